"""What the sampler drew is not quite what the trainer scores: weights that correct it.

The sampler's kernels, its precision or its stale weights give tokens other log-probs than
the trainer's. With ρ_t = π_old(y_t) / π_sampler(y_t), a token's policy gradient is
multiplied by

  token_truncate      clip(ρ_t, min, max)
  token_mask          ρ_t if min ≤ ρ_t ≤ max, else 0
  sequence_truncate   clip(Π_s ρ_s, min, max)
  sequence_mask       Π_s ρ_s if min ≤ Π_s ρ_s ≤ max, else 0

Only the product over the sequence is unbiased, where it is not cut; a token's own ratio
has the smaller variance. Truncated importance sampling: Edward Ionides, 2008; Feng Yao et
al., "Your efficient RL framework secretly brings you off-policy RL training", 2025
(fengyao.notion.site/off-policy-rl). Masking: "Every step evolves", 2025, IcePop,
arXiv:2510.18855.

Differs from the sources: a token whose log-prob the sampler did not report (NaN) has
ratio 1. A weight of 0 leaves the token in the denominator of the average: it is a weight
of the estimate, not a change of the mask. Log-ratios are clamped to ±20.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float

from educe.losses import aggregate as agg
from educe.losses.kl import clamp
from educe.types import Max, Mean

CORRECTIONS = (
  'none',
  'token_truncate',
  'token_mask',
  'sequence_truncate',
  'sequence_mask',
)


def weights(
  old_logp: Float[Array, 'B T'],
  sampler_logp: Float[Array, 'B T'],
  mask: Float[Array, 'B T'],
  *,
  how: str,
  low: float,
  high: float,
) -> tuple[Float[Array, 'B T'], dict[str, Mean | Max]]:
  """(weights, metrics). The weights are constants: no gradient flows through them.

  Log-probs are finite where the mask is 0 (and not read there); `how` is one of
  CORRECTIONS, with weights of 1 under 'none'; low and high bound the ratio.

  metrics, none of them after truncation:
    sampling/logp_difference/mean, …/max  |log π_old − log π_sampler| (nats, over tokens)
    sampling/importance_ratio      ρ_t (token mean); the product for 'sequence_…'
                                   (sequence mean)
    sampling/corrected             share of tokens whose ratio is outside [low, high];
                                   absent under 'none'
  """
  reported = mask * ~jnp.isnan(sampler_logp)
  log_ratio = sg(jnp.where(reported > 0, old_logp - sampler_logp, 0.0))
  metrics: dict[str, Mean | Max] = {
    'sampling/logp_difference/mean': agg.token_mean(jnp.abs(log_ratio), reported),
    'sampling/logp_difference/max': Max(jnp.abs(log_ratio).max()),
  }
  log_ratio, over = clamp(log_ratio), agg.token_mean
  if how.startswith('sequence'):
    total = clamp(log_ratio.sum(-1, keepdims=True))
    log_ratio, over = jnp.broadcast_to(total, mask.shape), agg.sequence_mean
  ratio = jnp.exp(log_ratio)
  metrics['sampling/importance_ratio'] = over(ratio, mask)
  if how == 'none':
    return jnp.ones_like(ratio), metrics
  outside = (ratio < low) | (ratio > high)
  metrics['sampling/corrected'] = agg.token_mean(outside * 1.0, mask)
  if how.endswith('mask'):
    return jnp.where(outside, 0.0, ratio), metrics
  return jnp.clip(ratio, low, high), metrics
