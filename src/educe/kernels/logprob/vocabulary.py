"""Portable XLA: a loop over chunks of the vocabulary, for the least memory.

Peak temporaries are a few [N, V'] tiles of a few MB, whatever V: the moments of a chunk
(tile.py) are joined to those of the chunks before. Backward the tiles are made again,
and the chunk's columns of dW are finished at once: 4F in all, F = 2·N·D·V.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from educe.kernels.logprob import tile
from educe.types import Scores

TILE_BYTES = 4 << 20  # of one float32 [N, V'] tile
LEAST_COLUMNS = 128


def logprob(hidden, head, targets, *, temperature=1.0, softcap=None, needed=None):
  """See `educe.kernels.logprob.logprob`."""
  out = _logprob((temperature, softcap), hidden, head, targets)
  if needed is not None:
    out = tuple(jnp.where(needed, x, 0) for x in out)
  return Scores(out[0], out[1], mean_logp=out[2])


def _columns(rows: int, vocab: int) -> int:
  """V': as many columns as TILE_BYTES hold."""
  return min(max(TILE_BYTES // (4 * rows), LEAST_COLUMNS), vocab)


def _tile(settings, index, hidden, head, targets):
  """(start, z, slope, hit, inside) of the index-th chunk; the last one overlaps the one
  before it, which has those columns."""
  vocab = head.shape[1]
  size = _columns(len(hidden), vocab)
  start = jnp.minimum(index * size, vocab - size)
  part = jax.lax.dynamic_slice_in_dim(head, start, size, 1)
  s = jnp.einsum('nd,dv->nv', hidden, part, preferred_element_type=jnp.float32)
  column = start + jax.lax.broadcasted_iota(targets.dtype, s.shape, 1)
  inside = column >= index * size
  hit = (column == targets[:, None]) & inside
  return start, part, *tile.squash(s, *settings), hit, inside


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprob(settings, hidden, head, targets):
  return _forward(settings, hidden, head, targets)[0]


def _forward(settings, hidden, head, targets):
  rows, vocab = len(hidden), head.shape[1]
  size = _columns(rows, vocab)

  def visit(index, found):
    *_, z, _, hit, inside = _tile(settings, index, hidden, head, targets)
    new = tile.moments(z, hit, inside)
    before = index * size
    return tile.join(found, before * 1.0, new, jnp.minimum(size, vocab - before) * 1.0)

  start = tile.nothing(jnp.zeros((rows, 1), jnp.float32))
  found = jax.lax.fori_loop(0, -(-vocab // size), visit, start)
  found = tile.Moments(*(x[:, 0] for x in found))
  scores, lse = tile.finish(found, targets, vocab)
  residuals = (hidden, head, targets, lse, scores.entropy)
  return (scores.logp, scores.entropy, scores.mean_logp), residuals


def _backward(settings, residuals, cotangents):
  hidden, head, targets, lse, entropy = residuals
  vocab = head.shape[1]
  size = _columns(len(hidden), vocab)
  known = tile.constants(lse, entropy, cotangents, targets, vocab)
  known = [x[:, None] for x in known]

  def visit(index, carry):
    d_hidden, d_head = carry
    start, part, z, slope, hit, inside = _tile(settings, index, hidden, head, targets)
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
  none = np.zeros(targets.shape, jax.dtypes.float0)
  return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), none


_logprob.defvjp(_forward, _backward)
