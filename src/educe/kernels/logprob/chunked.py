"""Portable XLA: a scan over chunks of tokens, logits recomputed in the backward pass.

Peak temporaries are a few [C, V] tiles, C ≪ N. Per token and vocabulary entry that is
2D flops forward and 6D backward (one recompute): 4/3 of the full-logits cost, for a
memory that no longer grows with N·V.

With g, e, m the cotangents of logp, entropy and mean_logp, the gradient of the logits is

  dz_v = g·(1[v = y] − p_v) − e·p_v·(z_v − lse + H) + m·(1/V − p_v)

Derived by hand because autodiff through the scan would save every tile it visits.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from educe.types import Scores

TILE_BYTES = 64 << 20  # of one float32 [C, V] tile; larger gains nothing on CPU or GPU
MIN_CHUNKS = 4  # so that two live tiles stay under [N, V], however small that is


def logprob(hidden, head, targets, *, temperature=1.0, softcap=None):
  """See `educe.kernels.logprob.logprob`."""
  rows, vocab = hidden.shape[0], head.shape[1]
  chunk = chunk_rows(rows, vocab)
  padded = -(-rows // chunk) * chunk
  hidden = jnp.pad(hidden, ((0, padded - rows), (0, 0)))
  targets = jnp.pad(targets, (0, padded - rows))
  out = _chunked(temperature, softcap, chunk, hidden, head, targets)
  return Scores(out[0][:rows], out[1][:rows], mean_logp=out[2][:rows])


def chunk_rows(rows: int, vocab: int) -> int:
  """C: the most rows whose tile fits TILE_BYTES, in at least MIN_CHUNKS even chunks."""
  fit = max(TILE_BYTES // (4 * vocab), 1)
  chunks = max(-(-rows // fit), min(MIN_CHUNKS, rows), 1)
  return max(-(-rows // chunks), 1)


def _tile(temperature, softcap, hidden, head, targets):
  """One tile: z [C, V], its slope dz/ds, and the one-hot of the targets as a mask."""
  s = jnp.einsum('cd,dv->cv', hidden, head, preferred_element_type=jnp.float32)
  slope = 1.0 / temperature
  if softcap is not None:
    t = jnp.tanh(s / softcap)
    s, slope = softcap * t, (1 - t * t) / temperature
  hit = jax.lax.broadcasted_iota(targets.dtype, s.shape, 1) == targets[:, None]
  return s / temperature, slope, hit


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(temperature, softcap, chunk, hidden, head, targets):
  return _forward(temperature, softcap, chunk, hidden, head, targets)[0]


def _forward(temperature, softcap, chunk, hidden, head, targets):
  vocab = head.shape[1]

  def tile(_, xs):
    h, y = xs
    z, _, hit = _tile(temperature, softcap, h, head, y)
    top = z.max(-1, keepdims=True)
    e = jnp.exp(z - top)
    mass = e.sum(-1)
    lse = top[:, 0] + jnp.log(mass)
    # Moments about the maximum, so that large logits cancel before they round.
    entropy = jnp.log(mass) - (e * (z - top)).sum(-1) / mass
    # A target outside the vocabulary hits nothing: say NaN instead of −lse.
    valid = (y >= 0) & (y < vocab)
    z_y = jnp.where(valid, jnp.where(hit, z, 0).sum(-1), jnp.nan)
    mean = (z - top).mean(-1) - jnp.log(mass)
    return None, (z_y - lse, entropy, mean, lse)

  xs = (hidden.reshape(-1, chunk, hidden.shape[1]), targets.reshape(-1, chunk))
  _, out = jax.lax.scan(tile, None, xs)
  logp, entropy, mean, lse = (x.reshape(-1) for x in out)
  return (logp, entropy, mean), (hidden, head, targets, lse, entropy)


def _backward(temperature, softcap, chunk, residuals, cotangents):
  hidden, head, targets, lse, entropy = residuals
  vocab = head.shape[1]

  def tile(d_head, xs):
    h, y, lse, entropy, g, e, m = xs
    z, slope, hit = _tile(temperature, softcap, h, head, y)
    # A trained target outside the vocabulary poisons the gradient as it did the value.
    g = jnp.where((y >= 0) & (y < vocab) | (g == 0), g, jnp.nan)
    log_p = z - lse[:, None]
    p = jnp.exp(log_p)
    dz = jnp.where(hit, g[:, None], 0) + m[:, None] / vocab
    dz -= p * ((g + m)[:, None] + e[:, None] * (log_p + entropy[:, None]))
    ds = (dz * slope).astype(jnp.result_type(h, head))
    d_hidden = jnp.einsum('cv,dv->cd', ds, head, preferred_element_type=jnp.float32)
    d_head += jnp.einsum('cd,cv->dv', h, ds, preferred_element_type=jnp.float32)
    return d_head, d_hidden.astype(h.dtype)

  rows = (targets, lse, entropy, *cotangents)
  xs = (hidden, *rows)
  xs = tuple(x.reshape(-1, chunk, *x.shape[1:]) for x in xs)
  d_head, d_hidden = jax.lax.scan(tile, jnp.zeros(head.shape, jnp.float32), xs)
  no_gradient = np.zeros(targets.shape, jax.dtypes.float0)
  return d_hidden.reshape(hidden.shape), d_head.astype(head.dtype), no_gradient


_chunked.defvjp(_forward, _backward)
