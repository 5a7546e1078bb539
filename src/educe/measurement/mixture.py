"""Samples of two policies, each scored by both, as two distributions over the same texts.

With n_1 samples of the policy π and n_0 of its base q, all of a prompt's count as draws
from the mixture of both. ℓ = π(y)/q(y) is known of each, and with the weight of the
balance heuristic (Eric Veach & Leonidas Guibas, "Optimally combining sampling
techniques", 1995)

  q̂(y) ∝ 1 / (n_0 + n_1·ℓ)          π̂(y) ∝ ℓ / (n_0 + n_1·ℓ)

each sums to 1 over the samples. Before that no weight is above 1/n_0 or 1/n_1, however far
apart the two are; and where they are far apart, π̂ is uniform over π's samples and q̂ over
q's, but for what q gives to what π wrote: a right answer that no sample of the base has
still counts with the probability that the base gives it.

So every measurement that is a function of two distributions is, of π̂ and q̂, its own
estimate. π̂/q̂ is ℓ but for one constant, and what is zero or ordered by an identity is so
of the estimates too: nothing has moved where π = q, and a tilt is a tilt. They are biased
by O(1/n), for they are ratios. What neither side ever drew is not in them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Pooled(NamedTuple):
  """Samples of both sides as two distributions, `[P, n_1 + n_0]`, the policy's first."""

  policy: np.ndarray
  base: np.ndarray
  rewards: np.ndarray  # 0 where the weight is
  left_out: int  # prompts without a scored sample of each side


def log_ratio(policy_logp: np.ndarray, base_logp: np.ndarray) -> np.ndarray:
  """log π(y)/q(y), `[P, N]`, nats: of the same texts under both models.

  −∞ where π is 0, ∞ where only q is. Raises ValueError for log-probs that are missing.
  """
  ours, theirs = np.asarray(policy_logp, np.float64), np.asarray(base_logp, np.float64)
  if ours.shape != theirs.shape or ours.ndim != 2:
    raise ValueError(
      f'log-probs {list(ours.shape)} of the policy and {list(theirs.shape)} of the base '
      'must both be [P, N], of the same texts'
    )
  for name, logp in (('policy', ours), ('base', theirs)):
    if np.isnan(logp).any():
      raise ValueError(
        f'{int(np.isnan(logp).sum())} log-probs of the {name} are missing; both models '
        'must score the samples of both'
      )
    if (logp > 1e-3).any():
      raise ValueError(
        f'a log-prob of the {name} is {logp.max():.3g} nats, and none is above 0'
      )
  return np.where(ours == -np.inf, -np.inf, ours - np.where(ours > -np.inf, theirs, 0))


def pool(
  log_ratio: np.ndarray,
  rewards: np.ndarray,
  base_log_ratio: np.ndarray,
  base_rewards: np.ndarray,
) -> Pooled:
  """π̂ and q̂, as above.

  log_ratio, rewards: `[P, N]`, of the policy's samples, log π/q in nats; NaN: not scored,
    and left out · base_log_ratio, base_rewards: `[P, M]`, of the base's

  Raises ValueError where no prompt has a scored sample of each side, and for samples
  that were impossible where they were drawn.
  """
  sides = [drawn(log_ratio, 'policy'), drawn(base_log_ratio, 'base')]
  given = [np.asarray(x, np.float64) for x in (rewards, base_rewards)]
  shapes = [x.shape for x in sides], [x.shape for x in given]
  if shapes[0] != shapes[1] or len(sides[0]) != len(sides[1]):
    raise ValueError(
      f'pool: log-ratios {shapes[0]} and rewards {shapes[1]} must be (P, N) and (P, M)'
    )
  if any(np.isinf(x).any() for x in given):
    raise ValueError('pool: a reward is infinite; NaN says not scored')
  scored = [np.isfinite(x) for x in given]
  counts = [x.sum(-1, keepdims=True) for x in scored]
  keep = ((counts[0] > 0) & (counts[1] > 0))[:, 0]
  if not keep.any():
    raise ValueError('pool: no prompt has a scored sample of both policy and base')
  log_n1, log_n0 = (np.log(x[keep]) for x in counts)
  ratio, there, reward = (np.concatenate(x, -1)[keep] for x in (sides, scored, given))
  # Finite log-ratios keep a weight: float64 has none for e^−746, and 0 means never.
  floor = np.where(ratio == np.inf, -np.inf, -700.0)
  logs = (
    -np.logaddexp(log_n0 - ratio, log_n1),
    np.maximum(-np.logaddexp(log_n0, log_n1 + ratio), floor),
  )
  weights = (np.where(there, np.exp(x), 0) for x in logs)
  policy, base = (x / x.sum(-1, keepdims=True) for x in weights)
  return Pooled(policy, base, np.where(there, reward, 0), int((~keep).sum()))


def drawn(log_ratio: np.ndarray, side: str) -> np.ndarray:
  """A side's own samples: what it drew, it gives some probability."""
  ratio = np.asarray(log_ratio, np.float64)
  if ratio.ndim != 2 or not ratio.size or np.isnan(ratio).any():
    raise ValueError(
      f'log-ratios of the {side} {list(ratio.shape)} must be [P, N] numbers'
    )
  if (ratio == (-np.inf if side == 'policy' else np.inf)).any():
    raise ValueError(
      f'a sample of the {side} has no probability under it: was it drawn with another '
      'decoding?'
    )
  return ratio
