"""What a run paid in KL, and what it got: ledger, frontier and the nearest Gibbs policy.

The measurements of free_energy.py and frontier.py at once, of two distributions over the
same outputs: `[P, Y]` probabilities, exact or of pooled samples (mixture.py). The reward is
1 where an output is right and else 0, of which every Gibbs policy has a ledger of one term:
collapse and drift are the distance to it (Pythagoras), and need no β to be known.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from educe.environments import tabular
from educe.measurement import best_of_n, frontier
from educe.measurement.free_energy import Estimate, estimate, ledger, nearest_gibbs

TILTS = np.geomspace(1e-3, 1e3, 200)  # b along the frontier, per unit of reward
CHOICES = 2 ** np.arange(1, 11)  # n of best-of-n


class Spending(NamedTuple):
  """KL in nats per sequence, rewards as shares of right outputs; means over prompts."""

  total: Estimate  # KL(π‖q)
  price: Estimate  # … of being right more often
  collapse: Estimate  # … of fewer of the right answers
  drift: Estimate  # … of what no reward asked for
  efficiency: frontier.Efficiency
  beta: float  # of the nearest Gibbs policy g
  distance: Estimate  # KL(π‖g)
  soft_value: float  # β·log E_q[e^{r/β}]: what g attains of E r − β·KL
  objective: float  # what π attains of it
  frontier: np.ndarray  # [B, 2] KL and reward of Gibbs policies
  best_of: np.ndarray  # [N, 2] the same of the best of 1, 2, 4 …

  def __str__(self) -> str:
    terms = ', '.join(
      f'{x.mean:.3f} {n}' for n, x in zip(self._fields, self[:4], strict=False)
    )
    return f'KL (nats): {terms}; {self.efficiency}'


def spending(policy: np.ndarray, base: np.ndarray, right: np.ndarray) -> Spending:
  """All of it. policy, base, right: `[P, Y]`.

  Raises ValueError as `free_energy.ledger` does.
  """
  p, q = np.asarray(policy, np.float64), np.asarray(base, np.float64)
  reward = np.asarray(right, np.float64)
  terms = ledger(p, q, right).estimates()
  beta, distance = nearest_gibbs(p, q, reward)
  # At β of 0 and ∞ the two agree, and differ from no tilt.
  soft = objective = float('nan')
  if 0 < beta < np.inf:
    soft = -float(tabular.free_energy(q, reward, beta).mean())
    objective = float(tabular.objective(p, q, reward, beta).mean())

  def place(other: np.ndarray) -> tuple[float, float]:
    return tabular.kl(other, q).mean(), (other * reward).sum(-1).mean()

  return Spending(
    **terms,
    efficiency=frontier.efficiency(p, q, reward),
    beta=beta,
    distance=estimate(distance),
    soft_value=soft,
    objective=objective,
    frontier=np.array([place(tabular.gibbs(q, b * reward, 1.0)) for b in TILTS]),
    best_of=np.array([place(best_of_n.policy(q, reward, int(n))) for n in CHOICES]),
  )
