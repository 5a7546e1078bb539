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
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from educe.kernels.logprob import tile
from educe.types import Scores

TILE_BYTES = 64 << 20  # of one float32 [C, V] tile; larger gains nothing on CPU or GPU
LEAST_ROWS = 256  # a product of fewer walks through W for little


class Walk(NamedTuple):
  """The tokens in the order of the chunks."""

  row: Any  # [chunks·C]: which token, N beyond the last that is needed
  chunks: Any  # to be visited; an array, or a number where all are needed
  size: int  # C


def logprob(hidden, head, targets, *, temperature=1.0, softcap=None, needed=None):
  """See `educe.kernels.logprob.logprob`."""
  walk = _walk(len(hidden), head.shape[1], needed)
  settings = (temperature, softcap, walk.size)
  out = _chunked(settings, hidden, head, targets, walk.row, walk.chunks)
  return Scores(out[0], out[1], mean_logp=out[2])


def one_pass(
  hidden,
  head,
  targets,
  cotangents: Callable[[Scores], Scores],
  *,
  temperature=1.0,
  softcap=None,
  needed=None,
):
  """(Scores, dH, dW) of a loss whose cotangents at a token read its own scores alone.

  cotangents: [N] scores → what the loss's total is worth of each, [N]; called of scores
    of which no more than a few are there yet, the others 0
  dH `[N, D]` and dW `[D, V]` in the dtypes of hidden and head. Not differentiable itself.
  """
  vocab, rows = head.shape[1], len(hidden)
  walk = _walk(rows, vocab, needed)

  def visit(index, carry):
    scores, d_hidden, d_head = carry
    at = jax.lax.dynamic_slice_in_dim(walk.row, index * walk.size, walk.size)
    h, y = _take(hidden, at), _take(targets, at)
    z, slope, hit = _tile(temperature, softcap, h, head, y)
    new, lse = _finished(z, hit, y, vocab)
    scores = jax.tree.map(lambda x, new: x.at[at].set(new, mode='drop'), scores, new)
    worth = [_take(x, at) for x in _three(cotangents(scores))]
    known = tile.constants(lse, new.entropy, worth, y, vocab)
    ds = tile.gradient(z, slope, hit, [x[:, None] for x in known])
    part, d_head = products(ds, h, head, d_head)
    return scores, d_hidden.at[at].set(part, mode='drop'), d_head

  zero = jnp.zeros(rows, jnp.float32)
  start = (
    Scores(zero, zero, mean_logp=zero),
    jnp.zeros_like(hidden),
    jnp.zeros(head.shape, jnp.float32),
  )
  scores, d_hidden, d_head = _visited(walk.chunks, visit, start)
  return scores, d_hidden, d_head.astype(head.dtype)


def chunk_rows(rows: int, vocab: int) -> int:
  """C: at most TILE_BYTES a tile, in even chunks, of LEAST_ROWS where there are more."""
  fit = max(TILE_BYTES // (4 * vocab), 1)
  chunks = max(-(-rows // fit), rows // LEAST_ROWS, 1)
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


def _tile(temperature, softcap, hidden, head, targets):
  """One tile: z [C, V], its slope dz/ds, and the one-hot of the targets as a mask."""
  s = jnp.einsum('cd,dv->cv', hidden, head, preferred_element_type=jnp.float32)
  hit = jax.lax.broadcasted_iota(targets.dtype, s.shape, 1) == targets[:, None]
  return *tile.squash(s, temperature, softcap), hit


def _finished(z, hit, targets, vocab):
  found = tile.Moments(*(x[:, 0] for x in tile.moments(z, hit)))
  return tile.finish(found, targets, vocab)


def products(ds, h, head, d_head):
  """(dH of the chunk, dW with it added). On accelerators in the operands' own dtype."""
  ds = ds.astype(jnp.result_type(h, head))
  d_hidden = jnp.einsum('cv,dv->cd', ds, head, preferred_element_type=jnp.float32)
  # XLA's CPU backend is half as fast at a product that begins with a transposed matrix:
  # the barrier keeps it from folding the transpose into the product.
  across = jax.lax.optimization_barrier(h.T)
  d_head += jnp.einsum('dc,cv->dv', across, ds, preferred_element_type=jnp.float32)
  return d_hidden.astype(h.dtype), d_head


def _three(scores: Scores):
  return scores.logp, scores.entropy, scores.mean_logp


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(settings, hidden, head, targets, row, chunks):
  return _forward(settings, hidden, head, targets, row, chunks)[0]


def _forward(settings, hidden, head, targets, row, chunks):
  temperature, softcap, size = settings
  vocab, rows = head.shape[1], len(hidden)

  def visit(index, out):
    at = jax.lax.dynamic_slice_in_dim(row, index * size, size)
    y = _take(targets, at)
    z, _, hit = _tile(temperature, softcap, _take(hidden, at), head, y)
    scores, lse = _finished(z, hit, y, vocab)
    new = (*_three(scores), lse)
    return tuple(x.at[at].set(n, mode='drop') for x, n in zip(out, new, strict=True))

  blank = (jnp.zeros(rows, jnp.float32),) * 4
  logp, entropy, mean, lse = _visited(chunks, visit, blank)
  residuals = (hidden, head, targets, row, chunks, lse, entropy)
  return (logp, entropy, mean), residuals


def _backward(settings, residuals, cotangents):
  temperature, softcap, size = settings
  hidden, head, targets, row, chunks, lse, entropy = residuals
  known = tile.constants(lse, entropy, cotangents, targets, head.shape[1])

  def visit(index, carry):
    d_hidden, d_head = carry
    at = jax.lax.dynamic_slice_in_dim(row, index * size, size)
    h, y = _take(hidden, at), _take(targets, at)
    z, slope, hit = _tile(temperature, softcap, h, head, y)
    ds = tile.gradient(z, slope, hit, [_take(x, at)[:, None] for x in known])
    part, d_head = products(ds, h, head, d_head)
    return d_hidden.at[at].set(part, mode='drop'), d_head

  start = jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32)
  d_hidden, d_head = _visited(chunks, visit, start)
  none = [np.zeros(np.shape(x), jax.dtypes.float0) for x in (targets, row, chunks)]
  return d_hidden, d_head.astype(head.dtype), *none


_chunked.defvjp(_forward, _backward)
