"""Every measurement of what a run did, from a samples table or from known probabilities.

`of_table` and `exact` fill in the same record, so that a world that can be enumerated says
how far samples are to be trusted, and verdict.py and report.py need not ask which it was.

**Where the gain came from.** A prompt is accessible to the base at a budget of k samples
if they show a right answer with a chance of δ = 0.95, p ≥ ε(k) (support.py). It

  is          where right answers among the base's samples leave no doubt; or where the
              right texts that either policy wrote have, by their log-probs under the base,
              ε(k) together: a proof, however rarely the base writes them
  is not      where none or few right among n samples of the base leave no doubt
  undecided   otherwise

One half of the samples decides that and the other is what the rates are from, for a sample
in both would flatter what was created. n samples without a right one deny k ≤ 0.81·n
(`deniable`): the budget of the verdict, unless one is given. `gains` has the others.

**What was lost.** Of single right answers, enumerated or known by their log-probs, which
the base shows in REACH samples and the policy no longer does (`outputs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from educe.measurement import (
  majority,
  mixture,
  pass_at_k,
  sharpening,
  support,
  support_dynamics,
  support_evidence,
)
from educe.measurement.free_energy import (
  Divergence,
  Estimate,
  divergence,
  divergence_from_samples,
  estimate,
)
from educe.measurement.pass_at_k import CORRECT, Comparison, Curve
from educe.measurement.spending import Spending, spending
from educe.measurement.support_dynamics import Creation, Dynamics, Excess
from educe.measurement.table import Side, Table

LADDER = tuple(2**i for i in range(21))  # budgets k, samples
REACH = 1024  # samples that show what is accessible, where log-probs can tell
DELTA = 0.95  # chance that k samples show it
VOTES = 16  # the most votes that are counted: their cost grows as k³


class Nulls(NamedTuple):
  """What the base earns without training."""

  power: sharpening.Sharpened
  over_power: Comparison  # the policy less that, on the prompts that did not choose α
  majority: Curve | None  # of the base's answers; None where outputs are enumerated
  n: float  # samples of the base that cost as many tokens as one of the policy
  best_of: Estimate  # how often a right one is among these, which a verifier would find


class Findings(NamedTuple):
  """Of P prompts; what a field says of itself is in the module that it is from."""

  samples: int | None  # of each prompt and side; None: enumerated
  left_out: int  # prompts without two scored samples of each side
  ids: Sequence[Any]  # [P]
  rates: np.ndarray  # [P, 2] share of right samples: of the base, of the policy
  base: Curve
  policy: Curve
  comparison: Comparison  # the policy less the base
  budget: int  # k of `creation`
  creation: Creation
  gains: list[Creation]  # the same for each k of LADDER
  reach: support.Reach  # of the base, for each k of LADDER
  missing: support_evidence.MissingMass | None  # of the base's texts; None: enumerated
  divergence: Divergence
  spending: Spending
  log_ratio: float  # the largest log π/q, nats
  dynamics: list[Dynamics]  # of prompts solved in k samples, for each k of the curves
  twice: list[Dynamics]  # the same of the base sampled twice, up to k = excess_k
  excess: Excess  # the policy over that, at excess_k
  excess_k: int
  outputs: Dynamics  # of single right answers, accessible in REACH samples
  nulls: Nulls | None  # None: a single prompt cannot choose α and report too


def deniable(samples: int) -> int:
  """The largest k that `samples` without a right one deny, at least 1."""
  k = samples * math.log(1 - DELTA) / math.log(support.TAIL)
  return max(1, math.ceil(k) - 1)


def exact(
  policy: np.ndarray,
  base: np.ndarray,
  correct: np.ndarray,
  *,
  length: int = 1,
  ids: Sequence[Any] | None = None,
  budget: int = REACH,
) -> Findings:
  """From probabilities of every output.

  policy, base, correct: `[P, Y]` · length: tokens of an output · budget: k of the verdict

  Raises ValueError as the measurements do: for what is no distribution, and where no
  output of any prompt is correct.
  """
  p, q = np.asarray(policy, np.float64), np.asarray(base, np.float64)
  right = np.asarray(correct, bool)
  rates = np.stack([(x * right).sum(-1) for x in (q, p)], -1)
  with np.errstate(divide='ignore'):
    log_p, log_q, log_rate = np.log(p), np.log(q), np.log(rates[:, 0])

  def chances(k: np.ndarray) -> list[np.ndarray]:
    return [pass_at_k.exact(rate[:, None], k) for rate in rates.T]

  k, nulls = np.array(LADDER), None
  if len(p) > 1:
    power = sharpening.sharpened_exact(q, right, k)
    over = pass_at_k.compare(chances(k)[1][power.prompts], power.values, k)
    nulls = Nulls(power, over, None, 1.0, estimate(rates[:, 0]))

  def twice(k: int) -> np.ndarray:
    seen = chances(np.array([k]))[0][:, 0]
    return support_dynamics.fates(seen, seen)

  return _findings(
    chances,
    k,
    lambda log_eps: np.where(log_rate >= log_eps, 1, -1),
    (rates[:, 0], rates[:, 1]),
    twice,
    excess_k=REACH,
    samples=None,
    left_out=0,
    ids=list(range(len(p))) if ids is None else ids,
    rates=rates,
    budget=budget,
    reach=support.reach(log_rate, LADDER),
    missing=None,
    divergence=divergence(p, q, np.full(p.shape, length)),
    spending=spending(p, q, right),
    log_ratio=float(mixture.log_ratio(log_p, log_q)[p > 0].max()),
    outputs=_outputs(log_q, log_p, right),
    nulls=nulls,
  )


def of_table(table: Table, *, budget: int | None = None) -> Findings:
  """From samples.

  budget: k of the verdict; None: the largest that half of the samples can deny

  Raises ValueError where no prompt has two scored samples of each policy, where none of
  them is right, for log-probs that are missing, and budget < 1.
  """
  half = table.base.rewards.shape[1] // 2
  known = np.stack(
    [
      np.isfinite(side.rewards[:, part]).any(1)
      for side in (table.base, table.policy)
      for part in (slice(half), slice(half, None))
    ]
  )
  keep = np.flatnonzero(known.all(0))
  if not len(keep):
    raise ValueError(
      'no prompt has two scored samples of each policy, one to decide by and one to rate '
      'by; draw more, with --samples'
    )
  sides = [_rows(side, keep) for side in (table.base, table.policy)]
  rewards = [side.rewards for side in sides]
  if not any((x >= CORRECT).any() for x in rewards):
    raise ValueError(
      f'no sample of either policy is right at any of the {len(keep)} prompts: there is '
      'nothing to compare; draw more, with --samples, or take easier prompts'
    )
  base_ratio, ratio = (mixture.log_ratio(x.logp_policy, x.logp_base) for x in sides)
  pool = mixture.pool(ratio, rewards[1], base_ratio, rewards[0])
  samples = int(min(np.isfinite(x).sum(1).min() for x in rewards))
  wrote = [_right_texts(sides, part) for part in (slice(None), slice(half))]
  proof, half_proof = (_log_mass(x) for x in wrote)
  n, c = pass_at_k.counts(rewards[0][:, :half])
  scored, right = pass_at_k.counts(rewards[0])

  def chances(k: np.ndarray) -> list[np.ndarray]:
    return [pass_at_k.estimates(x, k) for x in rewards]

  return _findings(
    chances,
    pass_at_k.ladder(samples),
    lambda log_eps: support.decide(c, n, log_eps, log_least=half_proof),
    (_rate(rewards[0][:, half:]), _rate(rewards[1][:, half:])),
    lambda k: support_dynamics.twice(right, scored, k),
    excess_k=samples // 2,
    samples=samples,
    left_out=len(table.ids) - len(keep),
    ids=[table.ids[i] for i in keep],
    rates=np.stack([_rate(x) for x in rewards], -1),
    budget=deniable(half) if budget is None else budget,
    reach=support.sampled_reach(right, scored, LADDER, log_least=proof),
    missing=support_evidence.missing_mass(sides[0].texts),
    divergence=divergence_from_samples(ratio, sides[1].lengths),
    spending=spending(pool.policy, pool.base, pool.rewards >= CORRECT),
    log_ratio=float(max(ratio.max(), base_ratio.max())),
    outputs=_outputs(*_padded(wrote[0])),
    nulls=_nulls(*sides) if len(keep) > 1 else None,
  )


def _findings(
  chances: Callable[[np.ndarray], list[np.ndarray]],
  k: np.ndarray,
  status: Callable[[float], np.ndarray],
  rated: tuple[np.ndarray, np.ndarray],
  twice: Callable[[int], np.ndarray],
  *,
  excess_k: int,
  budget: int,
  **others: Any,
) -> Findings:
  """What both have in common: pass@k is known of every prompt, and what is accessible.

  chances: k → pass@k of base and policy, `[P, K]` each · status: log ε → `[P]`, 1 where a
  prompt is accessible, −1 not, 0 undecided · rated: `[P]` each, rates that status has not
  seen · twice: k → fates of the base sampled twice, `[P, 4]`, for k ≤ excess_k
  """

  def creation(at: float, resamples: int) -> Creation:
    where = status(support.sampling(at, DELTA))
    return support_dynamics.creation(*rated, where, resamples=resamples)

  before, after = chances(k)
  fates = [support_dynamics.fates(*x) for x in zip(before.T, after.T, strict=True)]
  seen = support_dynamics.fates(*(x[:, 0] for x in chances(np.array([excess_k]))))
  return Findings(
    base=pass_at_k.curve(before, k),
    policy=pass_at_k.curve(after, k),
    comparison=pass_at_k.compare(after, before, k),
    budget=budget,
    creation=creation(budget, 2000),
    gains=[creation(at, 200) for at in LADDER],
    dynamics=[support_dynamics.dynamics(x, resamples=200) for x in fates],
    twice=[
      support_dynamics.dynamics(twice(x), resamples=200)
      for x in k.tolist()
      if x <= excess_k
    ],
    excess=support_dynamics.above_noise(seen, twice(excess_k)),
    excess_k=excess_k,
    **others,
  )


def _nulls(base: Side, policy: Side) -> Nulls:
  most = int(np.isfinite(base.rewards).sum(1).min())
  k = pass_at_k.ladder(min(most, int(np.isfinite(policy.rewards).sum(1).min())))
  power = sharpening.sharpened(base.rewards, base.logp_base, k)
  ours = pass_at_k.estimates(policy.rewards[power.prompts], k)
  few = k[k <= VOTES]
  # Where nothing reads an answer in a text, texts vote.
  read = any(x is not None for row in base.parsed for x in row)
  answers = base.parsed if read else [[x.strip() for x in row] for row in base.texts]
  votes = majority.estimates(answers, base.rewards, few.tolist())
  n = min(sharpening.affordable(np.nanmean(policy.lengths), base.lengths), most)
  return Nulls(
    power,
    pass_at_k.compare(ours, power.values, k),
    pass_at_k.curve(votes, few),
    n,
    estimate(sharpening.best_of(base.rewards, n)),
  )


def _rows(side: Side, keep: np.ndarray) -> Side:
  """Of the prompts that are kept."""
  kept: Any = ([x[i] for i in keep] if isinstance(x, list) else x[keep] for x in side)
  return Side(*kept)


def _rate(rewards: np.ndarray) -> np.ndarray:
  """`[P]`: share right, of the scored; of none, 0."""
  n, c = pass_at_k.counts(rewards)
  return c / np.maximum(n, 1)


def _right_texts(
  sides: Sequence[Side], samples: slice
) -> list[dict[str, tuple[float, float]]]:
  """Of each prompt {right text: its log-prob under base and under policy}."""
  found: list[dict[str, tuple[float, float]]] = [{} for _ in sides[0].texts]
  for side in sides:
    for row, texts in enumerate(side.texts):
      for at in range(len(texts))[samples]:
        if side.rewards[row, at] >= CORRECT:
          pair = float(side.logp_base[row, at]), float(side.logp_policy[row, at])
          found[row].setdefault(texts[at], pair)
  return found


def _log_mass(wrote: Sequence[Mapping[str, tuple[float, float]]]) -> np.ndarray:
  """`[P]` nats: what different right texts have together under the base, at the least."""
  logs = [[pair[0] for pair in texts.values()] for texts in wrote]
  return np.array([np.logaddexp.reduce(x) if x else -np.inf for x in logs])


def _padded(
  wrote: Sequence[Mapping[str, tuple[float, float]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """`[P, Y]` each: log-probs under base and policy, and which there are."""
  width = max(map(len, wrote))
  logs = np.full((2, len(wrote), width), -np.inf)
  there = np.zeros((len(wrote), width), bool)
  for row, texts in enumerate(wrote):
    for place, pair in enumerate(texts.values()):
      logs[:, row, place], there[row, place] = pair, True
  return logs[0], logs[1], there


def _outputs(before: np.ndarray, after: np.ndarray, counted: np.ndarray) -> Dynamics:
  """Of single right answers, from their log-probs."""
  log_eps = support.sampling(REACH, DELTA)
  fates = support_dynamics.fates(before >= log_eps, after >= log_eps, counted)
  return support_dynamics.dynamics(fates)
