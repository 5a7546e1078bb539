"""From per-token values to a Mean: which average, written once.

  token_mean      Σ_b Σ_t m x / Σ_b Σ_t m              every token counts the same
  sequence_mean   Σ_b (Σ_t m x / Σ_t m) / #{b: Σ_t m > 0}   every sequence counts the same
  sequence_sum    Σ_b Σ_t m x / #{b: Σ_t m > 0}        a sequence counts by its length
  constant        Σ_b Σ_t m x / (B · L)                the same divisor for every batch

L is the longest completion that the config allows, in tokens, never the padded width, so
that padding changes nothing (Zichen Liu et al., "Understanding R1-Zero-like training",
2025, arXiv:2503.20783, §3.2: Dr. GRPO).

A row without a trained token is in neither numerator nor denominator; under `constant`
it counts, for a divisor that depends on the data would be no constant.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from educe.types import Mean


def token_mean(x: Float[Array, 'B T'], mask: Float[Array, 'B T']) -> Mean:
  """Mean over trained tokens."""
  return Mean(_trained(x, mask).sum(), mask.sum())


def sequence_mean(x: Float[Array, 'B T'], mask: Float[Array, 'B T']) -> Mean:
  """Mean over sequences of each sequence's own token mean."""
  tokens = mask.sum(-1)
  total = _trained(x, mask).sum(-1)
  return Mean((total / jnp.maximum(tokens, 1)).sum(), _sequences(mask))


def sequence_sum(x: Float[Array, 'B T'], mask: Float[Array, 'B T']) -> Mean:
  """Mean over sequences of each sequence's sum over tokens."""
  return Mean(_trained(x, mask).sum(), _sequences(mask))


def constant(
  x: Float[Array, 'B T'], mask: Float[Array, 'B T'], max_completion_length: int
) -> Mean:
  """Sum over tokens, divided by rows × `max_completion_length` (tokens)."""
  total = _trained(x, mask).sum()
  return Mean(total, jnp.full_like(total, len(mask) * max_completion_length))


AGGREGATES = ('constant', 'sequence_mean', 'sequence_sum', 'token_mean')


def clean(x, mask):
  """x `[B, T]` where the mask is not 0, else 0.

  For what is exponentiated or multiplied later: a `where` after that would hide inf and
  NaN from the value, but not 0 · inf from the gradient.
  """
  return jnp.where(mask > 0, x, 0.0)


def over(x: Float[Array, 'N'], counted: Bool[Array, 'N']) -> Mean:
  """Mean over the rows, or pairs, that are counted."""
  return Mean(jnp.where(counted, x, 0.0).sum(), counted.sum() * 1.0)


def aggregate(x, mask, how: str, max_completion_length: int | None = None) -> Mean:
  """The Mean of `x` `[B, T]` over `mask`, by the name used in configs.

  max_completion_length: tokens; read by 'constant' alone

  Raises ValueError for an unknown name, and for 'constant' without a positive length.
  """
  if how not in AGGREGATES:
    raise ValueError(f'aggregate={how!r} is not one of {list(AGGREGATES)}')
  if how == 'constant':
    if max_completion_length is None or max_completion_length < 1:
      raise ValueError(
        f"aggregate='constant' with max_completion_length={max_completion_length}: "
        'give the longest completion that is sampled, in tokens'
      )
    return constant(x, mask, max_completion_length)
  means = {
    'token_mean': token_mean,
    'sequence_mean': sequence_mean,
    'sequence_sum': sequence_sum,
  }
  return means[how](x, mask)


def _trained(x, mask):
  """m x. `where`, not `*`: a NaN at a masked token stays out."""
  return jnp.where(mask > 0, x * mask, 0.0)


def _sequences(mask):
  return (mask.sum(-1) > 0).sum() * 1.0
