"""The right answers that samples showed, each with its probability under both policies.

One answer is one text, its end included: two different ones never are the same sample, so
that their probabilities add up, and what they have together under the base is a lower bound
of p0(C|x) that needs no luck in sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from educe.measurement.pass_at_k import CORRECT
from educe.measurement.table import Side

Shown = Mapping[
  str, tuple[float, float]
]  # text → log-prob under base, under policy; nats


def shown(sides: Sequence[Side], samples: slice) -> list[Shown]:
  """Of each prompt those that are right among these samples of these sides."""
  found: list[dict[str, tuple[float, float]]] = [{} for _ in sides[0].texts]
  for side in sides:
    for row, texts in enumerate(side.texts):
      for at in range(len(texts))[samples]:
        if side.rewards[row, at] >= CORRECT:
          pair = float(side.logp_base[row, at]), float(side.logp_policy[row, at])
          found[row].setdefault(texts[at], pair)
  return list(found)


def log_mass(answers: Sequence[Shown]) -> np.ndarray:
  """`[P]` nats: what they have together under the base; −∞ of none."""
  logs = [[pair[0] for pair in texts.values()] for texts in answers]
  return np.array([np.logaddexp.reduce(x) if x else -np.inf for x in logs])


def padded(answers: Sequence[Shown]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """`[P, Y]` each: log-probs under base and policy, and which there are."""
  width = max(1, *map(len, answers))
  logs = np.full((2, len(answers), width), -np.inf)
  there = np.zeros((len(answers), width), bool)
  for row, texts in enumerate(answers):
    for place, pair in enumerate(texts.values()):
      logs[:, row, place], there[row, place] = pair, True
  return logs[0], logs[1], there
