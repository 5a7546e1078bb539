"""What a round of rollouts looks like in numbers, under the names that users know."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from educe.types import OUTCOMES, Rollouts


def summary(rollouts: Rollouts) -> dict[str, Any]:
  """Metrics of a round.

  reward, reward_std: mean of the scored rows; mean over groups of a group's standard
    deviation (n − 1) · frac_reward_zero_std: groups whose rewards are all equal
  rewards/<name>/mean: of each named part, where it was scored
  outcomes/<outcome>: shares of the rows
  groups/solved_{none, some, all}: shares of the groups, where answers are right or wrong
  completions/{mean, min, max}_length (tokens) · completions/clipped_ratio: share of the
    rows that ran out of room
  sampling/kept_mass: probability that truncation left standing (mean over tokens),
    where any was cut
  """
  rows, group = len(rollouts.rewards), rollouts.group
  lengths = np.asarray(rollouts.mask).sum(-1)
  rewards = np.asarray(rollouts.rewards, np.float64).reshape(-1, group)
  scored = rewards[np.isfinite(rewards)]
  outcomes = collections.Counter(row['outcome'] for row in rollouts.transcripts)
  spreads = [r[np.isfinite(r)].std(ddof=1) for r in rewards if np.isfinite(r).sum() > 1]
  solved = verified(rollouts) / group
  numbers = {
    'reward': scored.mean() if len(scored) else np.nan,
    'reward_std': np.mean(spreads) if spreads else 0.0,
    'frac_reward_zero_std': equal(rollouts).mean(),
    'completions/mean_length': lengths.mean(),
    'completions/min_length': lengths.min(),
    'completions/max_length': lengths.max(),
    'completions/clipped_ratio': 1 - np.asarray(rollouts.stopped).mean(),
  }
  if not outcomes['judged']:
    numbers |= {
      'groups/solved_none': (solved == 0).mean(),
      'groups/solved_some': ((solved > 0) & (solved < 1)).mean(),
      'groups/solved_all': (solved == 1).mean(),
    }
  numbers |= {f'outcomes/{name}': outcomes[name] / rows for name in OUTCOMES}
  parts: dict[str, list[float]] = {}
  for row in rollouts.transcripts:
    for name, value in row['rewards'].items():
      if value is not None:
        parts.setdefault(name, []).append(value)
  numbers |= {f'rewards/{name}/mean': np.mean(x) for name, x in parts.items()}
  if rollouts.kept is not None:
    mask = np.asarray(rollouts.mask)
    numbers['sampling/kept_mass'] = (rollouts.kept * mask).sum() / mask.sum()
  return {name: float(x) for name, x in numbers.items()}


def verified(rollouts: Rollouts) -> np.ndarray:
  """Completions verified of each group, `[P]`."""
  right = np.array([row['outcome'] == 'verified' for row in rollouts.transcripts])
  return right.reshape(-1, rollouts.group).sum(-1)


def equal(rollouts: Rollouts) -> np.ndarray:
  """Groups that say nothing: all scored rewards equal, or fewer than two scored, `[P]`."""
  rewards = np.asarray(rollouts.rewards, np.float64).reshape(-1, rollouts.group)
  scored = np.isfinite(rewards)
  high = np.where(scored, rewards, -np.inf).max(-1)
  low = np.where(scored, rewards, np.inf).min(-1)
  return high <= low
