"""The arithmetic of one tile of logits, the same for XLA and for Pallas.

With s = h·W over a block of the vocabulary and z = softcap(s)/τ, a token has `Moments`

  m = max z    l = Σ e^{z−m}    u = Σ e^{z−m}·(z−m)    a = Σ (z−m)    z_y

Those of two blocks add up once they speak of one maximum, and of the whole vocabulary

  log p(y) = (z_y − m) − log l    H = log l − u/l    Σ_v log p_v / V = a/V − log l

(nats). Sums are about the maximum, so that large logits cancel before they round. With
g, e, c the cotangents of the three, the gradient of the logits is, by hand,

  ∂/∂z_v = g·(1[v = y] − p_v) − e·p_v·(log p_v + H) + c·(1/V − p_v)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from educe.types import Scores

# Below every logit, and finite: the difference of two is 0, not NaN.
LOWEST = -1e30


class Moments(NamedTuple):
  """Of each token, float32."""

  top: Any  # m
  mass: Any  # l
  moment: Any  # u
  above: Any  # a
  target: Any  # z_y; 0 where the block does not hold y


def squash(s, temperature: float, softcap: float | None):
  """z, and its slope dz/ds."""
  if softcap is None:
    return s / temperature, 1.0 / temperature
  t = jnp.tanh(s / softcap)
  return softcap * t / temperature, (1 - t * t) / temperature


def moments(z, hit, inside=None) -> Moments:
  """Of a tile `[C, V']`, in columns `[C, 1]`.

  hit: where an entry is its token's target
  inside: where it is an entry of the vocabulary at all; None: everywhere
  """
  if inside is not None:
    z = jnp.where(inside, z, LOWEST)
  top = z.max(-1, keepdims=True)
  above = z - top
  e = jnp.exp(above)
  if inside is not None:
    above = jnp.where(inside, above, 0.0)
  parts = (e, e * above, above, jnp.where(hit, z, 0.0))
  return Moments(top, *(x.sum(-1, keepdims=True) for x in parts))


def nothing(like) -> Moments:
  """Of no entry, in the shape of `like`."""
  zero = jnp.zeros_like(like)
  return Moments(jnp.full_like(like, LOWEST), zero, zero, zero, zero)


def about(x: Moments, top, count) -> Moments:
  """The same `count` entries' moments, about another maximum, not below theirs."""
  shift = x.top - top
  scale = jnp.exp(shift)
  moment = scale * (x.moment + shift * x.mass)
  return Moments(top, scale * x.mass, moment, x.above + count * shift, x.target)


def join(x: Moments, x_count, y: Moments, y_count) -> Moments:
  """Of two blocks with so many entries each."""
  top = jnp.maximum(x.top, y.top)
  x, y = about(x, top, x_count), about(y, top, y_count)
  return Moments(top, *(a + b for a, b in zip(x[1:], y[1:], strict=True)))


def finish(x: Moments, targets, vocab: int) -> tuple[Scores, Any]:
  """Scores, and log Σ e^z, of moments over the whole vocabulary."""
  log_mass = jnp.log(x.mass)
  # A target outside the vocabulary was nowhere: say NaN, not −log-sum-exp.
  valid = (targets >= 0) & (targets < vocab)
  logp = jnp.where(valid, x.target - x.top - log_mass, jnp.nan)
  entropy, mean = log_mass - x.moment / x.mass, x.above / vocab - log_mass
  return Scores(logp, entropy, mean_logp=mean), x.top + log_mass


def constants(lse, entropy, cotangents, targets, vocab: int):
  """What `gradient` reads of each token: lse, g, e, g + c + e·H and c/V.

  Where a target outside the vocabulary is trained on it is NaN, as its log-prob was.
  """
  g, e, c = cotangents
  g = jnp.where((targets >= 0) & (targets < vocab) | (g == 0), g, jnp.nan)
  return lse, g, e, g + c + e * entropy, c / vocab


def gradient(z, slope, hit, constants):
  """∂/∂s of a tile `[C, V']`; `constants` in columns."""
  lse, g, e, a, m = constants
  log_p = z - lse
  return (jnp.where(hit, g, 0.0) + m - jnp.exp(log_p) * (a + e * log_p)) * slope
