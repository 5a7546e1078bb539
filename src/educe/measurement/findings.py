"""Every measurement of what a run did, from a samples table or from known probabilities.

`of_table` and `exact` fill in the same record, so that a world that can be enumerated says
how far samples are to be trusted, and verdict.py and report.py need not ask which it was.

**Where the gain came from.** A prompt is accessible to the base at a budget of k samples
if they show a right answer with a chance of δ = 0.95, p ≥ ε(k) (support.py). Its gain is

  elicited    where p ≥ ε(budget): right answers among the base's samples leave no doubt, or
              the right texts that either policy wrote have, by their log-probs under the
              base, ε(budget) together. That is a proof, however rarely the base writes them
  created     where p < ε(denied): none or few right among n samples of the base leave no
              doubt. Fewer samples deny less: n without a right one deny k ≤ 0.81·n
              (`deniable`), and `denied` is the budget if they can
  undecided   otherwise

Each half of the samples decides that for the rates of the other half, for a sample in both
would flatter what was created. `gains` has the same for every k, with denied = budget.

**What was lost.** Of the right answers that the base shows, each with its probability under
both (`outputs`): those that REACH samples of the base would show again, and would not of
the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from educe.measurement import (
  mixture,
  pass_at_k,
  right_answers,
  support,
  support_dynamics,
  support_evidence,
)
from educe.measurement import nulls as nulls_of
from educe.measurement.free_energy import (
  Divergence,
  RatioCertificate,
  distributions,
  divergence,
  divergence_from_samples,
  ratio_certificate,
)
from educe.measurement.intervals import TAIL
from educe.measurement.nulls import Nulls
from educe.measurement.pass_at_k import CORRECT, Comparison, Curve
from educe.measurement.spending import Spending, spending
from educe.measurement.support_dynamics import Creation, Dynamics, Excess
from educe.measurement.table import Side, Table

LADDER = tuple(2**i for i in range(21))  # budgets k, samples
REACH = 1024  # samples: the budget, unless one is given
LEAST = 23  # samples: ε(k) ≤ 1/8, so that no basin is ever denied


class Findings(NamedTuple):
  """Of P prompts; what a field says of itself is in the module that it is from."""

  samples: int | None  # of each prompt and side; None: enumerated
  left_out: int  # prompts with fewer than two scored samples of a side
  ids: Sequence[Any]  # [P]
  rates: np.ndarray  # [P, 2] share of right samples: of the base, of the policy
  base: Curve
  policy: Curve
  comparison: Comparison  # the policy less the base
  budget: int  # k within which a gain is elicited
  denied: int  # k beyond which it is created
  status: np.ndarray  # [P] 1: accessible to the base, −1: not, 0: undecided
  creation: Creation
  gains: list[Creation]  # the same for each k of LADDER, denied at that k too
  reach: support.Reach  # of the base, for each k of LADDER
  missing: support_evidence.MissingMass | None  # of the base's texts; None: enumerated
  divergence: Divergence
  apart: float  # mean |log π/q| over what either side writes, nats per sequence
  spending: Spending
  certificate: RatioCertificate | None  # at the nearest β; None: no tilt is nearest
  unseen: float  # share of prompts without a right sample of the base
  dynamics: list[Dynamics]  # of prompts solved in k samples, for each k of the curves
  twice: list[Dynamics]  # the same of the base sampled twice, up to k = excess_k
  excess: Excess  # the policy over that, at excess_k
  excess_k: int
  outputs: Dynamics  # of single right answers, accessible in REACH samples
  nulls: Nulls | None  # None: a single prompt cannot choose α and report too


def deniable(samples: int) -> int:
  """The largest k that `samples` without a right one deny, at least 1."""
  k = samples * math.log(1 - support.DELTA) / math.log(TAIL)
  return max(1, math.ceil(k) - 1)


def needed(budget: int) -> int:
  """Samples of each prompt of which half deny `budget`, if none is right."""
  return 2 * math.ceil(budget * math.log(TAIL) / math.log(1 - support.DELTA) + 1)


def exact(
  policy: np.ndarray,
  base: np.ndarray,
  correct: np.ndarray,
  *,
  length: int = 1,
  budget: int = REACH,
) -> Findings:
  """From probabilities of every output.

  policy, base, correct: `[P, Y]` · length: tokens of an output · budget: k of the verdict

  Raises ValueError as the measurements do: for what is no distribution, and where no
  output of any prompt is correct.
  """
  p, q = distributions(policy, base)
  right = np.asarray(correct, bool)
  # A sum of probabilities may pass 1 by a rounding.
  rates = np.minimum(np.stack([(x * right).sum(-1) for x in (q, p)], -1), 1)
  with np.errstate(divide='ignore'):
    log_p, log_q, log_rate = np.log(p), np.log(q), np.log(rates[:, 0])
  ratio = mixture.log_ratio(log_p, log_q)
  there = (p + q) > 0  # elsewhere no ratio is
  distance = np.where(there, np.abs(ratio), 0)

  def chances(k: np.ndarray) -> list[np.ndarray]:
    return [pass_at_k.exact(rate[:, None], k) for rate in rates.T]

  def twice(k: int) -> np.ndarray:
    seen = chances(np.array([k]))[0][:, 0]
    return support_dynamics.fates(seen, seen)

  k, nulls = np.array(LADDER), None
  if len(p) > 1:
    nulls = nulls_of.exact(q, right, chances(k)[1], k)
  return _findings(
    chances,
    k,
    lambda log_eps: np.where(log_rate >= log_eps, 1, -1)[None],
    (rates[None, :, 0], rates[None, :, 1]),
    twice,
    excess_k=REACH,
    samples=None,
    left_out=0,
    ids=list(range(len(p))),
    rates=rates,
    budget=budget,
    denied=budget,
    reach=support.reach(log_rate, LADDER),
    missing=None,
    divergence=divergence(p, q, np.full(p.shape, length)),
    apart=float((np.where(there, (p + q) / 2 * distance, 0)).sum(-1).mean()),
    spending=spending(p, q, right),
    log_ratio=np.where(p > 0, ratio, -np.inf),
    unseen=float((rates[:, 0] == 0).mean()),
    outputs=_outputs(log_q, log_p, right),
    nulls=nulls,
  )


def of_table(table: Table, *, budget: int = REACH) -> Findings:
  """From samples.

  budget: k of the verdict

  Raises ValueError where no prompt has two scored samples of each policy, where none of
  them is right, for log-probs that are missing, and budget < 1.
  """
  half = table.base.rewards.shape[1] // 2
  halves = slice(half), slice(half, 2 * half)
  keep = np.flatnonzero(
    np.all(
      [
        ~np.isnan(side.rewards[:, part]).all(1)
        for side in (table.base, table.policy)
        for part in halves
      ],
      axis=0,
    )
  )
  if not half or not len(keep):
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
  counts = [pass_at_k.counts(x) for x in rewards]
  scored, right = counts[0]
  samples = int(min(n.min() for n, _ in counts))
  proof = right_answers.log_mass(right_answers.shown(sides, slice(None)))

  def chances(k: np.ndarray) -> list[np.ndarray]:
    return [pass_at_k.estimates(x, k) for x in rewards]

  def status(log_eps: float) -> np.ndarray:
    return np.stack([decide(log_eps) for decide in folds])

  folds = [_decider(sides, part) for part in halves]
  return _findings(
    chances,
    pass_at_k.ladder(samples),
    status,
    # Each fold is rated by the half that the other decides by.
    tuple(np.stack([_rate(x[:, part]) for part in halves[::-1]]) for x in rewards),
    lambda k: support_dynamics.twice(right, scored, k),
    excess_k=samples // 2,
    samples=samples,
    left_out=len(table.ids) - len(keep),
    ids=[table.ids[i] for i in keep],
    rates=np.stack([_rate(x) for x in rewards], -1),
    budget=budget,
    denied=min(budget, max(LEAST, deniable(half))),
    reach=support.sampled_reach(right, scored, LADDER, log_least=proof),
    missing=support_evidence.missing_mass(sides[0].texts),
    divergence=divergence_from_samples(ratio, sides[1].lengths),
    apart=float((np.abs(ratio).mean() + np.abs(base_ratio).mean()) / 2),
    spending=spending(pool.policy, pool.base, pool.rewards >= CORRECT),
    log_ratio=np.concatenate([ratio, base_ratio], -1),
    unseen=float((right == 0).mean()),
    outputs=_outputs(
      *right_answers.padded(right_answers.shown(sides[:1], slice(None)))
    ),
    nulls=nulls_of.of_samples(*sides) if len(keep) > 1 else None,
  )


def _findings(
  chances: Callable[[np.ndarray], list[np.ndarray]],
  k: np.ndarray,
  status: Callable[[float], np.ndarray],
  rated: tuple[np.ndarray, ...],
  twice: Callable[[int], np.ndarray],
  *,
  excess_k: int,
  budget: int,
  denied: int,
  spending: Spending,
  log_ratio: np.ndarray,
  **others: Any,
) -> Findings:
  """What both have in common: pass@k is known of every prompt, and what is accessible.

  chances: k → pass@k of base and policy, `[P, K]` each · status: log ε → `[F, P]`, 1 where
  p ≥ ε, −1 where not, 0 undecided · rated: `[F, P]` each, rates that status has not seen ·
  twice: k → fates of the base sampled twice, `[P, 4]`, for k ≤ excess_k
  """

  def between(within: float, beyond: float) -> np.ndarray:
    """Elicited within so many samples, created beyond so many."""
    inside = status(support.sampling(within)) == 1
    outside = status(support.sampling(beyond)) == -1
    return np.where(inside, 1, np.where(outside, -1, 0))

  def creation(where: np.ndarray, resamples: int = 2000) -> Creation:
    return support_dynamics.creation(rated[0], rated[1], where, resamples=resamples)

  before, after = chances(k)
  fates = [support_dynamics.fates(*x) for x in zip(before.T, after.T, strict=True)]
  seen = support_dynamics.fates(*(x[:, 0] for x in chances(np.array([excess_k]))))
  where = between(budget, denied)
  beta = spending.beta
  return Findings(
    base=pass_at_k.curve(before, k),
    policy=pass_at_k.curve(after, k),
    comparison=pass_at_k.compare(after, before, k),
    budget=budget,
    denied=denied,
    # Of two folds that differ the undecided: both must say so.
    status=np.where((where == where[0]).all(0), where[0], 0),
    creation=creation(where),
    gains=[creation(between(x, x), 200) for x in LADDER],
    spending=spending,
    certificate=ratio_certificate(log_ratio, beta=beta) if 0 < beta < np.inf else None,
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


def _decider(sides: Sequence[Side], part: slice) -> Callable[[float], np.ndarray]:
  """log ε → `[P]` of 1, −1 and 0, by these of the samples alone."""
  n, c = pass_at_k.counts(sides[0].rewards[:, part])
  proof = right_answers.log_mass(right_answers.shown(sides, part))
  return lambda log_eps: support.decide(c, n, log_eps, log_least=proof)


def _rows(side: Side, keep: np.ndarray) -> Side:
  """Of the prompts that are kept."""
  kept: Any = ([x[i] for i in keep] if isinstance(x, list) else x[keep] for x in side)
  return Side(*kept)


def _rate(rewards: np.ndarray) -> np.ndarray:
  """`[P]`: share right, of the scored; of none, 0."""
  n, c = pass_at_k.counts(rewards)
  return c / np.maximum(n, 1)


def _outputs(before: np.ndarray, after: np.ndarray, counted: np.ndarray) -> Dynamics:
  """Of single right answers, from their log-probs."""
  log_eps = support.sampling(REACH)
  fates = support_dynamics.fates(before >= log_eps, after >= log_eps, counted)
  return support_dynamics.dynamics(fates)
