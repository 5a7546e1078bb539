"""From per-token values to a Mean: which average, written once.

  token_mean      Σ_b Σ_t m x / Σ_b Σ_t m              every token counts the same
  sequence_mean   Σ_b (Σ_t m x / Σ_t m) / #{b: Σ_t m > 0}   every sequence counts the same

A row without a trained token is in neither numerator nor denominator.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from educe.types import Mean


def token_mean(x: Float[Array, 'B T'], mask: Float[Array, 'B T']) -> Mean:
  """Mean over trained tokens. `where`, not `*`: a NaN at a masked token stays out."""
  return Mean(jnp.where(mask > 0, x * mask, 0.0).sum(), mask.sum())


def sequence_mean(x: Float[Array, 'B T'], mask: Float[Array, 'B T']) -> Mean:
  """Mean over sequences of each sequence's own token mean."""
  tokens = mask.sum(-1)
  total = jnp.where(mask > 0, x * mask, 0.0).sum(-1)
  return Mean((total / jnp.maximum(tokens, 1)).sum(), (tokens > 0).sum() * 1.0)


AGGREGATES = {'token_mean': token_mean, 'sequence_mean': sequence_mean}


def aggregate(x, mask, how: str) -> Mean:
  """The Mean of `x` `[B, T]` over `mask`, by the name used in configs."""
  if how not in AGGREGATES:
    raise ValueError(f'aggregate={how!r} is not one of {sorted(AGGREGATES)}')
  return AGGREGATES[how](x, mask)
