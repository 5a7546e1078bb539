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
from educe.measurement.free_energy import (
  Estimate,
  distributions,
  estimate,
  ledger,
  nearest_gibbs,
)

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


def spending(policy: np.ndarray, base: np.ndarray, right: np.ndarray) -> Spending:
  """All of it. policy, base, right: `[P, Y]`.

  Raises ValueError as `free_energy.ledger` does.
  """
  p, q = distributions(policy, base)
  book = ledger(p, q, right)
  # A tilt, and best-of-n, see no more of an output than whether it is right.
  ours, theirs = (_right_or_wrong(x, right) for x in (p, q))
  reward = np.broadcast_to([1.0, 0.0], ours.shape)
  beta, price = nearest_gibbs(ours, theirs, reward)
  soft = objective = float('nan')  # at β of 0 and ∞ they are not defined
  if 0 < beta < np.inf:
    soft = -float(tabular.free_energy(theirs, reward, beta).mean())
    objective = float((ours[:, 0] - beta * book.total).mean())

  def place(other: np.ndarray) -> tuple[float, float]:
    return tabular.kl(other, theirs).mean(), other[:, 0].mean()

  tilts = [tabular.gibbs(theirs, b * reward, 1.0) for b in TILTS]
  chosen = [best_of_n.policy(theirs, reward, int(n)) for n in CHOICES]
  return Spending(
    **book.estimates(),
    efficiency=frontier.efficiency(p, q, np.asarray(right, np.float64)),
    beta=beta,
    distance=estimate(price + book.collapse + book.drift),
    soft_value=soft,
    objective=objective,
    frontier=np.array([place(x) for x in tilts]),
    best_of=np.array([place(x) for x in chosen]),
  )


def _right_or_wrong(p: np.ndarray, right: np.ndarray) -> np.ndarray:
  """`[P, 2]`."""
  mass = np.minimum((p * np.asarray(right, np.float64)).sum(-1), 1)
  return np.stack([mass, 1 - mass], -1)
