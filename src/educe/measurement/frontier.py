"""The most reward that a KL can buy, and how much of it a run has bought.

Reward is bought best along the Gibbs policies g_b ∝ q·e^{b·r} of the base q. Along them

  d E_b[r]/db = Var_b r,    d KL(g_b‖q)/db = b·Var_b r,    so  d R*/d KL = 1/b

and R*(KL), the frontier, has b as its parameter: both rise in it, and b is found by
halving. A run's efficiency is η = (R − R0)/(R*(KL) − R0), R0 the base's reward.

Each prompt can be held against what its own KL could have bought; or all of them against
what their mean KL could have bought had it been spent where it pays most, which is at one
b for all of them, as the optimum of E[r] − β·KL has it. The second is `eta`. Its error
takes the frontier's own into account: a prompt of more KL would have put it higher, by 1/b
a nat.

All `[P, Y]`, probabilities over all outputs, or over pooled samples (measurement/
mixture.py), of which η ≤ 1 holds as well. The curve of reward against KL is that of Leo
Gao et al., 2022, arXiv:2210.10760. NumPy, float64; KL in nats per sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from educe.environments import tabular
from educe.measurement.free_energy import (
  Estimate,
  distributions,
  ratio_estimate,
  strength,
)


class Efficiency(NamedTuple):
  kl: float  # nats per sequence, mean over prompts, as all that follow
  start: float  # R0, of the base
  reward: float  # R
  best: float  # R*: the mean KL, spent at the prompts where it buys most
  # (R − R0)/(R* − R0); NaN where nothing can be bought. `within`, never less: each prompt
  # is held against what its own KL could buy.
  eta: Estimate
  within: Estimate

  def __str__(self) -> str:
    return (
      f'{self.eta.mean:.1%} of what {self.kl:.3f} nats can buy (95 % interval '
      f'{self.eta.low:.1%} to {self.eta.high:.1%}): reward {self.start:.3f} to '
      f'{self.reward:.3f}, at most {self.best:.3f}'
    )


def frontier(
  base: np.ndarray, reward: np.ndarray, kl: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(R*, b), `[P]` each: the most reward that `kl` nats can buy of each prompt, and where.

  base, reward: `[P, Y]` · kl: `[P]`; b is ∞ from the KL on at which only the best is left

  Raises ValueError for a base that is no distribution and a reward that is not finite.
  """
  q, unit, low, span = _scaled(distributions(base, base)[1], reward)
  kl = np.broadcast_to(np.asarray(kl, np.float64), q.shape[:1])
  gain, b = _gain(q, unit, kl)
  b = np.where(kl > 0, np.where(kl < _most(q, unit), b, np.inf), 0)
  return low + span * ((q * unit).sum(-1) + gain), b / span


def efficiency(policy: np.ndarray, base: np.ndarray, reward: np.ndarray) -> Efficiency:
  """How much of the reward that a run's KL could buy it has bought. All `[P, Y]`.

  η ≤ `within` ≤ 1 of a policy that gained, unless it is right where the base has no mass:
  no tilt goes there, at any KL.
  """
  p, q = distributions(policy, base)
  rewards = np.broadcast_to(np.asarray(reward, np.float64), p.shape)
  few, unit, low, span = _scaled(q, rewards)  # gains below are in this unit
  start, kl = float((q * rewards).sum(-1).mean()), tabular.kl(p, q)
  gain = ((p - q) * ((rewards - low) / span)).sum(-1)
  most = np.zeros_like(gain)
  bought = most
  if (total := kl.mean()) > 0:
    b = strength(lambda b: tabular.kl(_tilt(few, unit, b), few).mean(), total)
    tilted = _tilt(few, unit, b)
    most = bought = ((tilted - few) * unit).sum(-1)
    if total < _most(few, unit).mean():  # else KL is left over, and buys nothing
      # Its mean is that of `most`; of each prompt, what it does to the frontier.
      bought = most + (kl - tabular.kl(tilted, few)) / b
  return Efficiency(
    float(total),
    start,
    start + span * float(gain.mean()),
    start + span * float(most.mean()),
    ratio_estimate(gain, bought),
    ratio_estimate(gain, _gain(few, unit, kl)[0]),
  )


def _gain(
  base: np.ndarray, unit: np.ndarray, kl: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(R*(KL) − R0, b), `[P]` each, in the unit of _scaled."""
  b = strength(lambda b: tabular.kl(_tilt(base, unit, b), base), kl)
  gain = ((_tilt(base, unit, b) - base) * unit).sum(-1)
  return np.where(kl > 0, gain, 0), b


def _tilt(base: np.ndarray, unit: np.ndarray, b: np.ndarray) -> np.ndarray:
  return tabular.gibbs(base, np.asarray(b)[..., None] * unit, 1.0)


def _most(base: np.ndarray, unit: np.ndarray) -> np.ndarray:
  """−log q(best), `[P]`: the KL at which only the best is left."""
  there = np.where(base > 0, unit, -np.inf)
  return -np.log(np.where(there == there.max(-1, keepdims=True), base, 0).sum(-1))


def _scaled(
  base: np.ndarray, reward: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float, float]:
  """(q, (r − low)/span in [0, 1], low, span): the rewards that the base can earn.

  Where few values occur, one column for each of them: a tilt sees nothing else.
  """
  q = np.asarray(base, np.float64)
  r = np.broadcast_to(np.asarray(reward, np.float64), q.shape)
  if not np.isfinite(r).all():
    raise ValueError('frontier: a reward is not finite')
  low = float(r[q > 0].min())
  span = float(r[q > 0].max()) - low or 1.0
  unit = np.where(q > 0, (r - low) / span, 0)
  values, column = np.unique(unit, return_inverse=True)
  if len(values) < q.shape[-1]:
    at = column.reshape(q.shape) + len(values) * np.arange(len(q))[:, None]
    few = np.bincount(at.ravel(), q.ravel(), len(values) * len(q)).reshape(len(q), -1)
    q, unit = np.asarray(few, np.float64), np.broadcast_to(values, few.shape)
  return q, unit, low, span
