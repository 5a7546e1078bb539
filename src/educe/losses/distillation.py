"""Distillation: a student learns to speak as a teacher does.

  supervised   −log π(y_t)                on the teacher's text: SFT (losses/sft.py)
  jsd          D_β(p_T‖π) at y_<t         on the teacher's text, the student's, or both
  reverse_kl   KL(π‖p_T) at y_<t, from y_t ~ π alone: with d_t = log π(y_t) − log p_T(y_t),
                 value ρ_t·d_t     gradient ρ_t·d_t·∇log π(y_t)     ρ = π/π_old

each averaged over the trained tokens (nats per token).

jsd: Rishabh Agarwal et al., "On-policy distillation of language models: learning from
self-generated mistakes" (GKD), 2023, §2 and §3, arXiv:2306.13649; β = 0 is forward KL, 1
reverse KL (kernels/divergence.py has the convention). reverse_kl: Yuxian Gu et al.,
"MiniLLM", 2023, arXiv:2306.08543: the single-step part of its policy gradient, whose
reward is −d_t; and so GKD's reverse KL, estimated from the token that was drawn. It needs
no more of the teacher than one number a token.

Differs from the papers: text of the student is taken as given, no gradient flows through
its sampling (as in GKD), and reverse_kl does not see that a token also chooses the
prefixes after it (MiniLLM does). d is clamped to ±20 where it multiplies ∇log π. Of
MiniLLM's mixed sampling, length normalisation and pre-training loss there is nothing.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.lax import stop_gradient as sg

from educe.losses import aggregate as agg
from educe.losses import kl, sft
from educe.types import Batch, Max, Mean, Scores

OBJECTIVES = ('supervised', 'reverse_kl', 'jsd')


def loss(
  scores: Scores,
  batch: Batch,
  *,
  objective: str = 'jsd',
  beta: float = 0.5,
  aggregate: str = 'token_mean',
) -> tuple[Mean, dict[str, Mean | Max]]:
  """The loss at the top of this file, and its metrics.

  jsd reads scores.divergence; reverse_kl batch.ref_logp, the teacher's log-probs of the
  student's tokens, and old_logp (None: this update is on policy, ρ = 1). What stands where
  the mask is 0, NaN and ±inf included, touches neither value nor gradient.

  Args:
    beta: β of jsd: what scores.divergence was computed with (algorithms/distillation.py
      reads it here)
    aggregate: 'token_mean', 'sequence_mean' or 'sequence_sum'

  metrics, over trained tokens: nll, entropy (nats) · jsd: divergence (nats) ·
    reverse_kl: kl (k1), kl/k1, kl/k2, kl/k3 (nats to the teacher), importance_ratio

  Raises ValueError for a bad setting, or one that there are no arrays for.
  """
  _check(scores, batch, objective, beta, aggregate)
  mask = batch.mask
  clean = functools.partial(agg.clean, mask=mask)
  mean, metrics = sft.loss(scores, batch, aggregate=aggregate)
  if objective == 'jsd':
    term = clean(scores.divergence)
    metrics['divergence'] = agg.token_mean(term, mask)
    mean = agg.aggregate(term, mask, aggregate)
  elif objective == 'reverse_kl':
    logp, teacher = clean(scores.logp), sg(clean(batch.ref_logp))
    old_logp = sg(logp if batch.old_logp is None else clean(batch.old_logp))
    term = kl.penalty(
      logp, teacher, logp - old_logp, estimator='k1', gradient='unbiased'
    )
    for name, estimator in kl.ESTIMATORS.items():
      metrics[f'kl/{name}'] = agg.token_mean(estimator(logp, teacher), mask)
    metrics['kl'] = metrics['kl/k1']
    ratio = jnp.exp(kl.clamp(logp - old_logp))
    metrics['importance_ratio'] = agg.token_mean(ratio, mask)
    mean = agg.aggregate(term, mask, aggregate)
  return mean, dict(metrics)


def _check(scores: Scores, batch: Batch, objective, beta, aggregate) -> None:
  wrong = None
  if objective not in OBJECTIVES:
    wrong = f'objective={objective!r} is not one of {list(OBJECTIVES)}'
  elif not 0 <= beta <= 1:
    wrong = f'beta={beta} must be in [0, 1]: 0 is forward KL, 1 reverse KL'
  elif objective != 'jsd' and beta != 0.5:
    wrong = f"beta={beta} belongs to objective='jsd', not {objective!r}"
  elif objective == 'jsd' and scores.divergence is None:
    wrong = (
      "objective='jsd' needs the teacher's distributions (scores.divergence): set "
      "config.algorithm.name='distillation' and config.algorithm.teacher"
    )
  elif objective == 'reverse_kl' and batch.ref_logp is None:
    wrong = (
      "objective='reverse_kl' needs the teacher's log-probs of the student's own tokens "
      "(batch.ref_logp): set config.algorithm.name='distillation', its teacher, and "
      'on_policy=1'
    )
  if wrong:
    raise ValueError(f'distillation: {wrong}')
