"""What the base earns without training, beside the policy: the nulls of findings.py.

The base sharpened (sharpening.py), its majority vote (majority.py), and the best of as many
samples as one of the policy costs in tokens, by a verifier. Chance alone, the same policy
sampled twice, is in support_dynamics.py.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from educe.measurement import majority, pass_at_k, sharpening
from educe.measurement.free_energy import Estimate, estimate
from educe.measurement.pass_at_k import Comparison, Curve
from educe.measurement.table import Side

VOTES = 16  # the most votes that are counted: their cost grows as k³


class Nulls(NamedTuple):
  power: sharpening.Sharpened  # of samples, up to as many as its weights are worth
  over_power: Comparison  # the policy less that, on the prompts that did not choose α
  majority: Curve | None  # of the base's answers; None where outputs are enumerated
  n: float  # samples of the base that cost as many tokens as one of the policy
  best_of: Estimate  # how often a right one is among these


def exact(
  base: np.ndarray, right: np.ndarray, policy: np.ndarray, k: np.ndarray
) -> Nulls:
  """base, right: `[P, Y]` · policy: `[P, K]`, pass@k of the policy · k: `[K]`."""
  power = sharpening.sharpened_exact(base, right, k)
  over = pass_at_k.compare(policy[power.prompts], power.values, k)
  return Nulls(power, over, None, 1.0, estimate((base * right).sum(-1)))


def of_samples(base: Side, policy: Side) -> Nulls:
  """Raises ValueError for a single prompt: it cannot choose α and report too."""
  most = int(np.isfinite(base.rewards).sum(1).min())
  k = pass_at_k.ladder(min(most, int(np.isfinite(policy.rewards).sum(1).min())))
  power = sharpening.sharpened(base.rewards, base.logp_base, k)
  # Beyond the effective samples every exponent says what the samples say.
  k = k[k <= max(1, power.effective or 1)]
  values = power.values[:, : len(k)]
  power = power._replace(values=values, curve=pass_at_k.curve(values, k))
  ours = pass_at_k.estimates(policy.rewards[power.prompts], k)
  # Where nothing reads an answer in a text, texts vote.
  read = any(x is not None for row in base.parsed for x in row)
  answers = [
    [_vote(x) for x in row] if read else [x.strip() for x in texts]
    for row, texts in zip(base.parsed, base.texts, strict=True)
  ]
  few = pass_at_k.ladder(min(most, VOTES))
  votes = majority.estimates(answers, base.rewards, few.tolist())
  n = min(sharpening.affordable(np.nanmean(policy.lengths), base.lengths), most)
  return Nulls(
    power,
    pass_at_k.compare(ours, power.values, k),
    pass_at_k.curve(votes, few),
    n,
    estimate(sharpening.best_of(base.rewards, n)),
  )


def _vote(answer: Any) -> str | None:
  """What can be counted: an answer may be a list or a dict."""
  return None if answer is None else json.dumps(answer, sort_keys=True)
