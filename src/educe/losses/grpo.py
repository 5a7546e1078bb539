"""GRPO and its kin: policy gradients on sampled completions, for every preset.

With ρ_t = π(y_t)/π_old(y_t), A_t the advantage and sg the stop-gradient, the loss is

  L = ⟨ w_t·P_t + kl_coef·k_t − entropy_coef·H_t ⟩            (nats per token)

  P_t  clip       −min(ρ_t·A_t, clip(ρ_t, 1−ε_low, 1+ε_high)·A_t), and with dual_clip c
                  no more than −c·A_t where A_t < 0
       cispo      −sg(clip(ρ_t, 1−ε_low, 1+ε_high))·A_t·log π(y_t)
       sapo       −(4/τ)·σ(τ·(ρ_t − 1))·A_t, τ = τ_pos where A_t > 0, else τ_neg
       reinforce  −A_t·log π(y_t)
  ρ_t  with importance='sequence' is s = exp((1/|y|)·Σ_t log ρ_t) for all tokens of a row,
       and gradients flow through that mean
  w_t  losses/sampler_correction.py, on the policy gradient alone
  k_t  losses/kl.py
  ⟨·⟩  losses/aggregate.py

clip: John Schulman et al., "Proximal policy optimization algorithms", 2017, eq. 7,
arXiv:1707.06347, in Zhihong Shao et al., "DeepSeekMath", 2024, eq. 3, arXiv:2402.03300.
ε_high ≠ ε_low and the token mean: Qiying Yu et al., "DAPO", 2025, eq. 8, arXiv:2503.14476.
dual_clip: Deheng Ye et al., 2019, arXiv:1912.09729. sequence: Chujie Zheng et al., "Group
sequence policy optimization", 2025, arXiv:2507.18071. cispo: MiniMax, "MiniMax-M1", 2025,
arXiv:2506.13585. sapo: Chang Gao et al., "Soft adaptive policy optimization", 2025,
arXiv:2511.20347. constant average: Zichen Liu et al. (Dr. GRPO), 2025, arXiv:2503.20783.

Differs from the papers: they differ among themselves in the average, the baseline and
the KL, which here are arguments; the recipe of each is in configs/. log ρ is clamped to
±20. The gradient of the KL is unbiased by default; GRPO as printed has k3, naive. CISPO
without a lower bound, as it was run, is clip_low=1; bounds are 1 − ε and 1 + ε.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient as sg

from educe.losses import aggregate as agg
from educe.losses import kl
from educe.losses import sampler_correction as correction
from educe.types import Batch, Max, Mean, Scores

IMPORTANCE = ('token', 'sequence')
OBJECTIVES = ('clip', 'cispo', 'sapo', 'reinforce')


def loss(
  scores: Scores,
  batch: Batch,
  *,
  importance: str = 'token',
  objective: str = 'clip',
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = None,
  tau_pos: float = 1.0,
  tau_neg: float = 1.05,
  kl_coef: float = 0.0,
  kl_estimator: str = 'k3',
  kl_gradient: str = 'unbiased',
  sampler_correction: str = 'none',
  correction_min: float = 0.0,
  correction_max: float = 2.0,
  entropy_coef: float = 0.0,
  aggregate: str = 'token_mean',
  max_completion_length: int | None = None,
) -> tuple[Mean, dict[str, Mean | Max]]:
  """The loss at the top of this file, and its metrics. One sequence a row.

  Reads batch.advantages; old_logp (None: this update is on policy, ρ = 1); ref_logp, if
  kl_coef > 0; sampler_logp, for a correction. What stands where the mask is 0, NaN and
  ±inf included, touches neither value nor gradient.

  Args:
    importance: 'token' or 'sequence' (GSPO)
    objective: 'clip', 'cispo', 'sapo' or 'reinforce' (which reads no ratio)
    clip_low, clip_high: ε of clip and cispo
    dual_clip: c > 1, of clip alone; None for none
    tau_pos, tau_neg: of sapo
    kl_estimator, kl_gradient: 'k1', 'k2', 'k3'; 'naive', 'unbiased'
    sampler_correction: 'none', 'token_truncate', 'token_mask', 'sequence_truncate',
      'sequence_mask', with the ratio kept in [correction_min, correction_max]
    aggregate: 'token_mean', 'sequence_mean', 'sequence_sum' or 'constant', which divides
      by rows × max_completion_length (tokens, of the config; not the padded width)

  metrics, over trained tokens:
    entropy (nats) · importance_ratio: ρ_t, before any clipping
    clip_ratio/low, clip_ratio/high, clip_ratio/dual: share of tokens where that bound
      is what the objective takes (by the sign of A, for clip); of clip and cispo
    kl: the chosen estimator · kl/k1, kl/k2, kl/k3: all of them (with ref_logp)
    sampling/…: see sampler_correction.weights (with sampler_logp)

  Raises ValueError for a bad setting, or one that the batch has no arrays for.
  """
  _check(**{name: value for name, value in locals().items() if name != 'scores'})
  mask = batch.mask
  clean = functools.partial(agg.clean, mask=mask)
  logp, entropy = clean(scores.logp), clean(scores.entropy)
  advantages = sg(clean(batch.advantages))
  old_logp = sg(logp if batch.old_logp is None else clean(batch.old_logp))
  log_ratio = logp - old_logp
  token_ratio = jnp.exp(kl.clamp(log_ratio))
  ratio = token_ratio
  if importance == 'sequence':
    ratio = jnp.exp(kl.clamp(_row_mean(log_ratio, mask)))

  term, shares = _policy_term(
    objective, ratio, logp, advantages, clip_low, clip_high, dual_clip, tau_pos, tau_neg
  )
  metrics: dict[str, Mean | Max] = {
    'entropy': agg.token_mean(entropy, mask),
    'importance_ratio': agg.token_mean(token_ratio, mask),
    **{name: agg.token_mean(share * 1.0, mask) for name, share in shares.items()},
  }
  if batch.sampler_logp is not None:
    weights, sampling = correction.weights(
      old_logp,
      clean(batch.sampler_logp),
      mask,
      how=sampler_correction,
      low=correction_min,
      high=correction_max,
    )
    term = term * weights
    metrics |= sampling
  if batch.ref_logp is not None:
    ref_logp = sg(clean(batch.ref_logp))
    for name, estimator in kl.ESTIMATORS.items():
      metrics[f'kl/{name}'] = agg.token_mean(estimator(logp, ref_logp), mask)
    metrics['kl'] = metrics[f'kl/{kl_estimator}']
    if kl_coef:
      term = term + kl_coef * kl.penalty(
        logp, ref_logp, log_ratio, estimator=kl_estimator, gradient=kl_gradient
      )
  if entropy_coef:
    term = term - entropy_coef * entropy
  return agg.aggregate(term, mask, aggregate, max_completion_length), metrics


def _policy_term(
  objective, ratio, logp, advantages, clip_low, clip_high, dual_clip, tau_pos, tau_neg
):
  """(P_t, the tokens where each bound is in force), `[B, T]`."""
  up, down = advantages > 0, advantages < 0
  low, high = 1 - clip_low, 1 + clip_high
  if objective == 'reinforce':
    return -advantages * logp, {}
  if objective == 'sapo':
    tau = jnp.where(up, tau_pos, tau_neg)
    return -4 / tau * jax.nn.sigmoid(tau * (ratio - 1)) * advantages, {}
  if objective == 'cispo':
    shares = {'clip_ratio/low': ratio < low, 'clip_ratio/high': ratio > high}
    return -sg(jnp.clip(ratio, low, high)) * advantages * logp, shares
  # min(ρA, clip(ρ)A) is A·min(ρ, 1+ε) where A > 0 and A·max(ρ, 1−ε) where A < 0. Said
  # with `where`, a ratio on the bound keeps its whole gradient.
  at_low, at_high = down & (ratio < low), up & (ratio > high)
  taken = jnp.where(at_low, low, jnp.where(at_high, high, ratio))
  shares = {'clip_ratio/low': at_low, 'clip_ratio/high': at_high}
  if dual_clip is not None:
    at_dual = down & (ratio > dual_clip)
    taken = jnp.where(at_dual, dual_clip, taken)
    shares['clip_ratio/dual'] = at_dual
  return -taken * advantages, shares


def _row_mean(x, mask):
  """(1/|y|)·Σ_t x of each row, on all its tokens; 0 for a row without any."""
  tokens = mask.sum(-1, keepdims=True)
  mean = (x * mask).sum(-1, keepdims=True) / jnp.where(tokens > 0, tokens, 1)
  return jnp.where(mask > 0, mean, 0.0)


def _check(
  batch: Batch,
  importance,
  objective,
  clip_low,
  clip_high,
  dual_clip,
  tau_pos,
  tau_neg,
  kl_coef,
  kl_estimator,
  kl_gradient,
  sampler_correction,
  correction_min,
  correction_max,
  entropy_coef,
  **_,
) -> None:
  """One clear line for what cannot be. (aggregate.py speaks for the average.)"""
  for name, value, known in (
    ('importance', importance, IMPORTANCE),
    ('objective', objective, OBJECTIVES),
    ('sampler_correction', sampler_correction, correction.CORRECTIONS),
  ):
    if value not in known:
      raise ValueError(f'grpo: {name}={value!r} is not one of {list(known)}')
  kl.check(kl_estimator, kl_gradient)
  wrong = None
  if not 0 <= clip_low <= 1:
    wrong = (
      f'clip_low={clip_low} must be in [0, 1]: the ratio is kept above 1 − clip_low'
    )
  elif not clip_high >= 0:
    wrong = f'clip_high={clip_high} must not be negative'
  elif dual_clip is not None and objective != 'clip':
    wrong = f"dual_clip={dual_clip} belongs to objective='clip', not {objective!r}"
  elif dual_clip is not None and not dual_clip > 1:
    wrong = f'dual_clip={dual_clip} must be greater than 1 (3 is usual), or None'
  elif importance != 'token' and objective == 'reinforce':
    wrong = f"importance={importance!r}: objective='reinforce' has no ratio to average"
  elif not (tau_pos > 0 and tau_neg > 0):
    wrong = f'tau_pos={tau_pos} and tau_neg={tau_neg} must be positive'
  elif not (0 <= correction_min <= correction_max and correction_max > 0):
    wrong = (
      f'correction_min={correction_min} and correction_max={correction_max} must be '
      'bounds of a ratio: 0 ≤ min ≤ max'
    )
  elif not 0 <= kl_coef < math.inf:
    wrong = f'kl_coef={kl_coef} must not be negative'
  elif kl_coef and batch.ref_logp is None:
    wrong = (
      f'kl_coef={kl_coef} needs log-probs of a reference (batch.ref_logp): set '
      'config.algorithm.reference_every=0 (the initial policy), or kl_coef=0'
    )
  elif sampler_correction != 'none' and batch.sampler_logp is None:
    wrong = (
      f"sampler_correction={sampler_correction!r} needs the sampler's log-probs "
      '(batch.sampler_logp)'
    )
  elif not math.isfinite(entropy_coef):
    wrong = f'entropy_coef={entropy_coef} must be finite'
  elif batch.advantages is None:
    wrong = 'batch.advantages is None; see losses/advantages.py'
  elif batch.segments is not None:
    wrong = 'batch.segments is set: one sequence a row, with packing=False'
  if wrong:
    raise ValueError(f'grpo: {wrong}')
