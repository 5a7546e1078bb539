"""Portable XLA: a loop over chunks of the vocabulary, for the least memory.

Peak temporaries are a few [N, V'] tiles of a few MB, whatever V: the moments of a chunk
(tile.py) are joined to those of the chunks before. Backward the tiles are made again,
and the chunk's columns of dW are finished at once: 4F in all, F = 2·N·D·V, of all tokens,
needed or not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from educe.kernels.logprob import op, tile

TILE_BYTES = 4 << 20  # of one float32 [N, V'] tile
LEAST_COLUMNS = 128


def _columns(rows: int, vocab: int) -> int:
  """V': as many columns as TILE_BYTES hold."""
  return min(max(TILE_BYTES // (4 * rows), LEAST_COLUMNS), vocab)


def _tile(how, index, hidden, head, targets):
  """(start, part of the head, z, slope, hit, inside) of the index-th chunk; the last one
  overlaps the one before it, which has those columns."""
  vocab = head.shape[1]
  size = _columns(len(hidden), vocab)
  start = jnp.minimum(index * size, vocab - size)
  part = jax.lax.dynamic_slice_in_dim(head, start, size, 1)
  s = jnp.einsum('nd,dv->nv', hidden, part, preferred_element_type=jnp.float32)
  column = start + jax.lax.broadcasted_iota(targets.dtype, s.shape, 1)
  inside = column >= index * size
  hit = (column == targets[:, None]) & inside
  return start, part, *tile.squash(s, *how), hit, inside


def moments(how, hidden, head, targets, needed) -> tile.Moments:
  rows, vocab = len(hidden), head.shape[1]
  size = _columns(rows, vocab)

  def visit(index, found):
    *_, z, _, hit, inside = _tile(how, index, hidden, head, targets)
    new = tile.moments(z, hit, inside)
    before = index * size
    return tile.join(found, before * 1.0, new, jnp.minimum(size, vocab - before) * 1.0)

  start = tile.nothing(jnp.zeros((rows, 1), jnp.float32))
  found = jax.lax.fori_loop(0, -(-vocab // size), visit, start)
  return tile.Moments(*(x[:, 0] for x in found))


def gradients(how, hidden, head, targets, needed, known, dtypes):
  vocab = head.shape[1]
  size = _columns(len(hidden), vocab)
  known = [x[:, None] for x in known]

  def visit(index, carry):
    d_hidden, d_head = carry
    start, part, z, slope, hit, inside = _tile(how, index, hidden, head, targets)
    ds = tile.gradient(z, slope, hit, known)
    ds = jnp.where(inside, ds, 0).astype(jnp.result_type(hidden, head))
    d_hidden += jnp.einsum('nv,dv->nd', ds, part, preferred_element_type=jnp.float32)
    new = jnp.einsum('nd,nv->dv', hidden, ds, preferred_element_type=jnp.float32)
    new += jax.lax.dynamic_slice_in_dim(d_head, start, size, 1)
    return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, new, start, 1)

  start = (
    jnp.zeros(hidden.shape, jnp.float32),
    jnp.zeros(head.shape, jnp.float32),
  )
  d_hidden, d_head = jax.lax.fori_loop(0, -(-vocab // size), visit, start)
  return d_hidden.astype(dtypes[0]), d_head.astype(dtypes[1])


logprob = op.logprob(op.Passes(moments, gradients))
