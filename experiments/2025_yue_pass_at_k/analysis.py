"""What exact chances say of a run: curves, crossings, sets, nulls.

`judge.py`, `tables.py` and `figure.py` read results/<name>.json through these functions.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np

from educe.measurement import pass_at_k, support
from educe.measurement import support_dynamics as moves

HERE = pathlib.Path(__file__).parent
KS = pass_at_k.ladder(2**20)
BUDGETS = (64, 1024, 16384)
SETS = ('trained', 'heldout', 'deeper', 'single')
Run = dict[str, Any]


def load(name: str) -> dict[str, Any]:
  return json.loads((HERE / 'results' / f'{name}.json').read_text())


def logp(run: Run, stage: str, part: str = 'trained') -> np.ndarray:
  """log p(C|x) of every prompt, `[P]`, nats."""
  return np.minimum(run['logp'][part][stage], 0)


def values(log_p: np.ndarray) -> np.ndarray:
  """pass@k of every prompt at KS, `[P, K]`."""
  return pass_at_k.exact(np.exp(log_p)[:, None], KS)


def compare(run: Run, part: str = 'trained', ours: str = 'rl') -> pass_at_k.Comparison:
  """pass@k of a stage less that of the base."""
  after, before = (values(logp(run, stage, part)) for stage in (ours, 'base'))
  return pass_at_k.compare(after, before, KS)


def crosses_once(difference: np.ndarray) -> bool:
  """Ahead at every k below some k*, behind at every k above; equal at most at the end."""
  signs = np.sign(np.where(np.abs(difference) < pass_at_k.ROUNDING, 0, difference))
  turn = int((signs > 0).sum())
  behind = int((signs < 0).sum())
  order = [1] * turn + [-1] * behind + [0] * (len(signs) - turn - behind)
  return turn > 0 and behind > 0 and signs.tolist() == order


def lost(run: Run, factor: float, part: str = 'trained', ours: str = 'rl') -> float:
  """Share of prompts that RL left with less than 1/factor of their chance."""
  change = logp(run, ours, part) - logp(run, 'base', part)
  return float((change < -math.log(factor)).mean())


def tilt(log_p0: np.ndarray, mean: float) -> np.ndarray:
  """log π(C|x) of the Gibbs policy with this mean π(C|x): all odds times one e^b."""
  log_odds = log_p0 - np.log(-np.expm1(np.minimum(log_p0, -1e-12)))
  low, high = -50.0, 50.0
  for _ in range(100):
    b = (low + high) / 2
    tilted = -np.logaddexp(0, -(log_odds + b))
    low, high = (b, high) if np.exp(tilted).mean() < mean else (low, b)
  return tilted


def sets(run: Run, k: float, part: str = 'trained', ours: str = 'rl') -> moves.Dynamics:
  """Accessible before and after, from exact chances."""
  eps = support.sampling(k)
  before, after = logp(run, 'base', part) >= eps, logp(run, ours, part) >= eps
  return moves.dynamics(moves.fates(before, after))


def seen_sets(run: Run, k: int) -> tuple[np.ndarray, np.ndarray]:
  """(P, E, S, O) expected of k samples of each: base and RL, and the base twice."""
  chances = (np.exp(logp(run, stage)) for stage in ('base', 'rl'))
  before, after = (pass_at_k.exact(x, k) for x in chances)
  return moves.fates(before, after), moves.fates(before, before)


def creation(run: Run, log_eps: float, part: str) -> moves.Creation:
  before, after = logp(run, 'base', part), logp(run, 'rl', part)
  return moves.creation(np.exp(before), np.exp(after), before >= log_eps)


def training_budget(run: Run) -> float:
  """log ε_train of a trained pair, nats."""
  return support.training(run['group'], run['visits'])


def by_exposure(results: dict[str, Any]) -> dict[float, list[Run]]:
  out: dict[float, list[Run]] = {}
  for run in results['chain']:
    out.setdefault(run['exposure'], []).append(run)
  return dict(sorted(out.items()))
