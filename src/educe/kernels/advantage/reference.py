"""The definition: one scan from the last token to the first, all rows at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=('gamma', 'lam'))
def gae(
  rewards, values, mask, bootstrap=None, segments=None, *, gamma: float, lam: float
):
  """See `educe.kernels.advantage.gae`."""
  drawn = mask > 0

  def clean(x, dtype=jnp.float32):
    if x is None:
      return jnp.zeros(mask.shape, dtype)
    return jnp.where(drawn, x, 0).astype(dtype)

  r, v, ahead = clean(rewards), clean(values), clean(bootstrap)
  which = clean(segments, jnp.int32)

  def step(later, now):
    """later: value, advantage and segment of the token drawn next; now: `[B]` of t."""
    value, advantage, segment = later
    here, r, v, ahead, which = now
    ends = which != segment
    delta = r + gamma * jnp.where(ends, ahead, value) - v
    new = delta + gamma * lam * jnp.where(ends, 0.0, advantage)
    kept = (
      jnp.where(here, v, value),
      jnp.where(here, new, advantage),
      jnp.where(here, which, segment),
    )
    return kept, jnp.where(here, new, 0.0)

  zeros = jnp.zeros(len(mask))
  start = zeros, zeros, jnp.full(len(mask), -1)
  by_time = [x.T for x in (drawn, r, v, ahead, which)]
  _, advantages = jax.lax.scan(step, start, by_time, reverse=True)
  return advantages.T, advantages.T + v
