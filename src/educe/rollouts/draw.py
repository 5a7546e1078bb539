"""Draw one token from logits: temperature, truncation, inverse CDF or Gumbel noise.

Everything is float32 whatever the model's dtype, and nothing is ever sorted:
a truncation threshold is found by bisecting the bit patterns of the weights, and
a token by inverting the cumulative sum in two levels (a block, then a token in it).
On a CPU at V = 49,152 that is ~20 times cheaper than the Gumbel trick, which needs
B·V random numbers where this needs 2·B. On an accelerator those numbers are taken to be
cheap, while each cumulative sum and gather is a pass of its own: there the trick is used,
argmax_v log w_v + g_v with Gumbel's g_v = −log(−log u_v) (1954; see `noise`).

Truncations apply in the order top-k, top-p, min-p, as in most samplers:
  top-k   the k largest                                  Fan et al. 2018, 1805.04833
  top-p   the smallest set of what is left whose mass ≥ p of it
                                                    Holtzman et al. 2019, 1904.09751
  min-p   probability ≥ min_p · the largest probability
                                                      Nguyen et al. 2024, 2407.01082
Tokens tied with the last one kept are kept too, so no result hangs on the order of ids.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from educe.kernels.dispatch import device_kind

BLOCK = 128
_ONE = 0x3F800000  # the bit pattern of float32 1.0


class Settings(NamedTuple):
  """How to draw. None switches a part off, and is part of the compiled program;
  numbers are traced, so changing one compiles nothing."""

  temperature: Float[Array, ''] | float | None = 1.0  # None: greedy
  top_k: Int[Array, ''] | int | None = None
  top_p: Float[Array, ''] | float | None = None
  min_p: Float[Array, ''] | float | None = None


class Draw(NamedTuple):
  token: Int[Array, 'B']
  logp: Float[Array, 'B']  # log-softmax(logits / temperature)[token] (nats)
  kept: Float[Array, 'B']  # mass that truncation left standing, 1 when off


def noise(key: Key[Array, ''], vocabulary: int) -> Float[Array, 'n']:
  """What a row is drawn with on this backend: two uniform numbers, or one of Gumbel's a
  token.

  Of two words of random bits each: from one, tokens of a probability near 2^-23 would
  hardly ever win.
  """
  if device_kind() == 'cpu':
    return jax.random.uniform(key, (2,))
  return jax.random.gumbel(key, (vocabulary,), mode='high')


def draw(
  logits: Float[Array, 'B V'], noise: Float[Array, 'B n'], settings: Settings
) -> Draw:
  """One token a row, with its log-probability before any truncation.

  Greedy decoding (temperature None) takes the most likely token, the lowest id of a
  tie, and reports its log-probability at temperature 1.

  noise: unused when greedy. n = 2: uniform in [0, 1), for the inverse of the cumulative
    distribution; n = V: Gumbel's
  """
  logits = logits.astype(jnp.float32)
  temperature = settings.temperature
  scaled = logits if temperature is None else logits / temperature
  peak = scaled.max(-1)
  weights = jnp.exp(scaled - peak[:, None])  # in [0, 1]; the largest is exactly 1
  total = weights.sum(-1)
  if temperature is None:
    token, kept = jnp.argmax(logits, -1), jnp.ones_like(peak)
  else:
    keep = standing(weights, settings)
    kept = jnp.ones_like(peak)
    if keep is not None:
      weights = jnp.where(keep, weights, 0)
      kept = weights.sum(-1) / total
    if noise.shape[1] == 2:
      token = _invert(weights, noise)
    else:
      token = jnp.argmax(jnp.log(weights) + noise, -1)
  chosen = jnp.take_along_axis(scaled, token[:, None], -1)[:, 0]
  return Draw(token.astype(jnp.int32), chosen - peak - jnp.log(total), kept)


def standing(
  weights: Float[Array, 'B V'], settings: Settings
) -> Bool[Array, 'B V'] | None:
  """Which tokens survive truncation; None when there is none.

  weights: exp(logit − largest logit), hence in [0, 1] with a 1 in every row
  """
  keep = None
  if settings.top_k is not None:
    k = jnp.minimum(settings.top_k, weights.shape[-1])
    keep = weights >= _threshold(weights, jnp.ones_like(weights), k)
  if settings.top_p is not None:
    mass = weights if keep is None else jnp.where(keep, weights, 0)
    at_least = _threshold(mass, mass, settings.top_p * mass.sum(-1))
    keep = _both(keep, weights >= at_least)
  if settings.min_p is not None:
    keep = _both(keep, weights >= settings.min_p)
  return keep


def _both(a, b):
  return b if a is None else a & b


def _threshold(weights, mass, target):
  """The largest t with Σ mass·[weights ≥ t] ≥ target, row by row -> [B, 1].

  Non-negative floats sort like their bit patterns, so 30 halvings are exact.
  """
  bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

  def halve(_, bounds):
    low, high = bounds  # low holds, high does not
    middle = (low + high) // 2
    holds = jnp.where(bits >= middle[:, None], mass, 0).sum(-1) >= target
    return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

  low = jnp.zeros(weights.shape[0], jnp.int32)
  low, _ = jax.lax.fori_loop(0, 30, halve, (low, jnp.full_like(low, _ONE + 1)))
  return jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]


def _invert(weights, uniforms):
  """The token that each row's two uniforms select: first its block, then itself."""
  rows, size = weights.shape
  padded = jnp.pad(weights, ((0, 0), (0, -size % BLOCK)))
  blocks = padded.reshape(rows, -1, BLOCK)
  block = _pick(blocks.sum(-1), uniforms[:, 0])
  inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
  # The bound matters only where the logits are NaN; log-probs then say so.
  return jnp.minimum(block * BLOCK + _pick(inside, uniforms[:, 1]), size - 1)


def _pick(weights, uniform):
  """An index in proportion to its weight; never one of weight 0.

  A float32 cumulative sum may end below the total or dip: demanding weight > 0
  and falling back on the last such index closes both holes.
  """
  cumulative = jnp.cumsum(weights, -1)
  possible = weights > 0
  past = possible & (cumulative > uniform[:, None] * cumulative[:, -1:])
  last = weights.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], -1)
  return jnp.where(past.any(-1), jnp.argmax(past, -1), last)
