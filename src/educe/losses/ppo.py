"""PPO: a clipped policy, a clipped critic, and entropy, in one update.

With ρ_t = π(y_t)/π_old(y_t), A_t the advantage, R_t the return and V_t the critic's value
of the state that token t was drawn from, the loss is

  L = ⟨ P_t + value_coef·½·max((V_t−R_t)², (V̂_t−R_t)²) − entropy_coef·H_t ⟩
  P_t = −min(ρ_t·A_t, clip(ρ_t, 1−ε_low, 1+ε_high)·A_t)
  V̂_t = V_old + clip(V_t − V_old, −value_clip, value_clip)

John Schulman et al., "Proximal policy optimization algorithms", 2017, eqs. 7 and 9,
arXiv:1707.06347. Clipped values: the same authors' code; Logan Engstrom et al.,
"Implementation matters in deep policy gradients", 2020, §3, arXiv:2005.12729. For language
models: Daniel Ziegler et al., 2019, arXiv:1909.08593; Long Ouyang et al., 2022,
arXiv:2203.02155. A_t, R_t: losses/advantages.py:gae. ⟨·⟩: losses/aggregate.py.

Differs from the papers: P_t, H_t, dual_clip and the correction for the sampler are those of
losses/grpo.py, whose objective 'clip' this is; the KL is in the reward, and only measured
here.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax.lax import stop_gradient as sg

from educe.losses import aggregate as agg
from educe.losses import grpo, kl
from educe.types import Batch, Max, Mean, Scores


def loss(
  scores: Scores,
  batch: Batch,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = None,
  value_clip: float | None = 0.2,
  value_coef: float = 0.1,
  entropy_coef: float = 0.0,
  sampler_correction: str = 'none',
  correction_min: float = 0.0,
  correction_max: float = 2.0,
  aggregate: str = 'token_mean',
  max_completion_length: int | None = None,
) -> tuple[Mean, dict[str, Mean | Max]]:
  """The loss at the top of this file, and its metrics. One sequence a row.

  Reads scores.values; batch.advantages, returns, old_values (for value_clip), old_logp
  (None: on policy, ρ = 1), ref_logp and sampler_logp as grpo.loss does. What stands where
  the mask is 0, NaN and ±inf included, touches neither value nor gradient.

  Args:
    clip_low, clip_high, dual_clip, sampler_correction, correction_min, correction_max,
      aggregate, max_completion_length: of losses/grpo.py
    value_clip: how far a value may move from old_values, in units of reward; None: freely
    value_coef: weight of the critic; 0 trains the policy alone
    entropy_coef: weight of the entropy bonus

  metrics, beside those of grpo.loss (entropy, importance_ratio, clip_ratio/…, kl,
  sampling/…), over trained tokens:
    policy_loss, value_loss: P_t (times its correction) and ½·max(…), each as ⟨·⟩ has it
    value_clip_ratio: share of tokens where the clipped error is the larger
    approx_kl: ρ − 1 − log ρ, an estimate of KL(π_old‖π) (nats)
    values, returns: their means (units of reward)
    value_error: (V − R)², unclipped

  Raises ValueError for a bad setting, or one that the batch has no arrays for.
  """
  _check(scores, batch, value_clip, value_coef, entropy_coef)
  try:
    policy, metrics = grpo.loss(
      scores,
      batch,
      clip_low=clip_low,
      clip_high=clip_high,
      dual_clip=dual_clip,
      sampler_correction=sampler_correction,
      correction_min=correction_min,
      correction_max=correction_max,
      aggregate=aggregate,
      max_completion_length=max_completion_length,
    )
  except ValueError as error:  # it speaks for the half that is ours
    raise ValueError(f'ppo: {str(error).removeprefix("grpo: ")}') from error
  mask = batch.mask
  clean = functools.partial(agg.clean, mask=mask)

  def mean(x):
    return agg.aggregate(x, mask, aggregate, max_completion_length)

  values, returns = clean(scores.values), sg(clean(batch.returns))
  square = (values - returns) ** 2
  worst, clipped = square, jnp.zeros_like(square)
  if value_clip is not None:
    old = sg(clean(batch.old_values))
    near = old + jnp.clip(values - old, -value_clip, value_clip)
    beyond = (near - returns) ** 2
    # `where`, not maximum, which would halve the gradient where the two are one.
    worst = jnp.where(beyond > square, beyond, square)
    clipped = (beyond > square) * 1.0
  critic = mean(worst / 2)
  log_ratio = jnp.zeros_like(mask)
  if batch.old_logp is not None:
    log_ratio = kl.clamp(clean(scores.logp) - clean(batch.old_logp))
  metrics |= {
    'policy_loss': policy,
    'value_loss': critic,
    'value_clip_ratio': agg.token_mean(clipped, mask),
    'approx_kl': agg.token_mean(jnp.expm1(log_ratio) - log_ratio, mask),
    'values': agg.token_mean(values, mask),
    'returns': agg.token_mean(returns, mask),
    'value_error': agg.token_mean(square, mask),
  }
  total = policy.total + value_coef * critic.total
  if entropy_coef:
    total = total - entropy_coef * mean(clean(scores.entropy)).total
  return Mean(total, policy.count), metrics


def _check(scores, batch, value_clip, value_coef, entropy_coef) -> None:
  """One clear line for what cannot be, of the critic; grpo.loss speaks for the policy."""
  wrong = None
  if scores.values is None:
    wrong = "the model has no value head: add a section config.value, trunk='shared'"
  elif batch.returns is None:
    wrong = "batch.returns is None: set config.algorithm.name='ppo', which makes them"
  elif value_clip is not None and not value_clip > 0:
    wrong = f'value_clip={value_clip} must be above 0, or None'
  elif value_clip is not None and batch.old_values is None:
    wrong = f'value_clip={value_clip} needs batch.old_values'
  elif not 0 <= value_coef < math.inf:
    wrong = f'value_coef={value_coef} must be at least 0, and finite'
  elif not math.isfinite(entropy_coef):
    wrong = f'entropy_coef={entropy_coef} must be finite'
  if wrong:
    raise ValueError(f'ppo: {wrong}')
