"""Portable XLA: a loop over chunks of tokens; the tokens that nobody needs are left out.

Peak temporaries are a few [C, V] tiles, C ≪ N. With F = 2·N·D·V flops and N the tokens
that are needed, there are two ways to a gradient:

  logprob     one F forward, three backward, where the tiles are made again: the
              cotangents may depend on every score
  one_pass    three F in all: the cotangents of a chunk follow from its own scores, and
              are asked for while its logits are there

The number of chunks is known on the device alone: masked tokens cost nothing, and
nothing is compiled anew when there are more of them. The gradients are derived by hand
(tile.py): autodiff through a loop would save every tile that it visits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from educe.kernels.dispatch import device_kind
from educe.kernels.logprob import op, tile
from educe.types import Scores, Split

TILE_BYTES = 64 << 20  # of one float32 [C, V] tile; larger gains nothing on a CPU
ROWS = 256  # on a CPU, no more where that makes several chunks: masks save whole ones
# A product of C rows does C operations a byte of a 16-bit W; chips need 150 to 600 of them
# (operations over bytes a second) not to wait for memory.
ROWS_OF_CHIPS = 2048


class Walk(NamedTuple):
  """The tokens in the order of the chunks."""

  row: Any  # [chunks·C]: which token, N beyond the last that is needed
  chunks: Any  # to be visited; an array, or a number where all are needed
  size: int  # C

  def at(self, index):
    """The tokens of a chunk."""
    return jax.lax.dynamic_slice_in_dim(self.row, index * self.size, self.size)


def one_pass(
  hidden,
  head,
  targets,
  cotangents: Callable[[Scores, Any], Scores],
  given: Any = (),
  *,
  temperature=1.0,
  softcap=None,
  needed=None,
  split: Split | None = None,
):
  """(Scores, dH, dW) of a loss whose cotangents at a token read its own scores alone.

  cotangents: [N] scores, given → what the loss's total is worth of each, [N]; called of
    scores of which no more than a few are there yet, the others 0
  given: arrays of rows, split among devices as the tokens are
  dH `[N, D]` and dW `[D, V]` in the dtypes of hidden and head. Not differentiable itself.
  """
  how, vocab = op.How(temperature, softcap), head.shape[1]
  if not len(hidden):
    return op.of_no_tokens(), hidden, jnp.zeros_like(head)

  def here(hidden, head, targets, needed, given):
    head = op.whole(split, head)
    walk = _walk(len(hidden), head.shape[1], needed)
    places = op.own(split, targets, head)

    def visit(index, carry):
      scores, d_hidden, d_head = carry
      at = walk.at(index)
      h, y = _take(hidden, at), _take(targets, at)
      z, slope, hit = _tile(how, h, head, _take(places, at))
      found = op.merged(split, _moments(z, hit), head.shape[1])
      new, lse = tile.finish(found, y, vocab)
      scores = jax.tree.map(lambda x, n: x.at[at].set(n, mode='drop'), scores, new)
      of_all = cotangents(scores, given)
      worth = [_take(x, at) for x in (of_all.logp, of_all.entropy, of_all.mean_logp)]
      known = tile.constants(lse, new.entropy, worth, y, vocab)
      ds = tile.gradient(z, slope, hit, [x[:, None] for x in known])
      part, d_head = products(ds, h, head, d_head)
      d_hidden = d_hidden.at[at].set(part.astype(d_hidden.dtype), mode='drop')
      return scores, d_hidden, d_head

    zero = jnp.zeros(len(hidden), jnp.float32)
    start = (
      Scores(zero, zero, mean_logp=zero),
      jnp.zeros(hidden.shape, op.parts_of(split, hidden, head)[0]),
      jnp.zeros(head.shape, jnp.float32),
    )
    scores, d_hidden, d_head = _visited(walk.chunks, visit, start)
    return scores, *op.summed(split, d_hidden, d_head, hidden, head)

  run = op.over(split, here, 'rhrrr', 'rrh')
  return run(hidden, head, jnp.asarray(targets, jnp.int32), needed, given)


def chunk_rows(rows: int, vocab: int) -> int:
  """C, of even chunks: about ROWS and at most TILE_BYTES a tile; see ROWS_OF_CHIPS."""
  chunks = -(-rows // ROWS_OF_CHIPS)
  if device_kind() == 'cpu':
    fit = max(TILE_BYTES // (4 * vocab), 1)
    chunks = max(-(-rows // fit), rows // ROWS, 1)
  return max(-(-rows // chunks), 1)


def _walk(rows: int, vocab: int, needed) -> Walk:
  size = chunk_rows(rows, vocab)
  chunks = -(-rows // size)
  if needed is None:
    return Walk(jnp.arange(chunks * size), chunks, size)
  (row,) = jnp.nonzero(needed, size=chunks * size, fill_value=rows)
  return Walk(row, -(-needed.sum() // size), size)


def _visited(chunks, visit, carry):
  """visit(index, carry) of each chunk; a single one needs no loop."""
  if isinstance(chunks, int) and chunks == 1:
    return visit(0, carry)
  return jax.lax.fori_loop(0, chunks, visit, carry)


def _take(x, at):
  return x.at[at].get(mode='fill', fill_value=0)


def _tile(how, hidden, head, targets):
  """One tile: z [C, V], its slope dz/ds, and the one-hot of the targets as a mask."""
  s = jnp.einsum('cd,dv->cv', hidden, head, preferred_element_type=jnp.float32)
  hit = jax.lax.broadcasted_iota(targets.dtype, s.shape, 1) == targets[:, None]
  return *tile.squash(s, how.temperature, how.softcap), hit


def _moments(z, hit):
  return tile.Moments(*(x[:, 0] for x in tile.moments(z, hit)))


def products(ds, h, head, d_head):
  """(dH of the chunk, dW with it added). On accelerators in the operands' own dtype."""
  ds = ds.astype(jnp.result_type(h, head))
  d_hidden = jnp.einsum('cv,dv->cd', ds, head, preferred_element_type=jnp.float32)
  # XLA's CPU backend is half as fast at a product that begins with a transposed matrix:
  # the barrier keeps it from folding the transpose into the product.
  across = jax.lax.optimization_barrier(h.T)
  d_head += jnp.einsum('dc,cv->dv', across, ds, preferred_element_type=jnp.float32)
  return d_hidden, d_head


def moments(how, hidden, head, targets, needed) -> tile.Moments:
  walk = _walk(len(hidden), head.shape[1], needed)

  def visit(index, found):
    at = walk.at(index)
    z, _, hit = _tile(how, _take(hidden, at), head, _take(targets, at))
    return jax.tree.map(
      lambda x, new: x.at[at].set(new, mode='drop'), found, _moments(z, hit)
    )

  zero = jnp.zeros(len(hidden), jnp.float32)
  # A mass of 1 where nobody looks: its logarithm is finite.
  return _visited(walk.chunks, visit, tile.Moments(zero, zero + 1, zero, zero, zero))


def gradients(how, hidden, head, targets, needed, known, dtypes):
  walk = _walk(len(hidden), head.shape[1], needed)

  def visit(index, carry):
    d_hidden, d_head = carry
    at = walk.at(index)
    h = _take(hidden, at)
    z, slope, hit = _tile(how, h, head, _take(targets, at))
    ds = tile.gradient(z, slope, hit, [_take(x, at)[:, None] for x in known])
    part, d_head = products(ds, h, head, d_head)
    return d_hidden.at[at].set(part.astype(d_hidden.dtype), mode='drop'), d_head

  start = jnp.zeros(hidden.shape, dtypes[0]), jnp.zeros(head.shape, jnp.float32)
  d_hidden, d_head = _visited(walk.chunks, visit, start)
  return d_hidden, d_head.astype(dtypes[1])


logprob = op.logprob(op.Passes(moments, gradients))
