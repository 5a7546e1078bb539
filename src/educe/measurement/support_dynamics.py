"""What training did to the accessible sets: kept, gained and lost; elicited and created.

Of behaviours (correct outputs, or each prompt's correct ones taken together) P are
accessible before and after, E only after, S only before, O neither, and

  SRR  = P/(P+S)                       support retained
  NDR  = E/(P+E)                       of the new support, what is new
  SDS  = 2·SRR·NDR/(SRR+NDR) = 2PE/(P²+2PE+ES)
  NSCR = (E−S)/(P+E+S)                 net change

(Fang Wu et al., "The Invisible Leash", 2025, arXiv:2507.14843). The sign of NSCR can
depend on the budget, so that a curve over k is the result, never one number; and at a small
k what is 'new' may have been in the tail all the time, so NDR is no evidence of creation.

**The noise floor.** Where accessible means 'seen in k samples', with a = 1 − (1−p)ᵏ, the
same policy sampled twice keeps Σ a², gains and loses Σ a·(1−a) each: SRR is about 0.9
without any change, and NSCR 0. Its unbiased estimate from N ≥ 2k samples with c correct
is the mean over all pairs of disjoint subsets of k,

  Σ a·(1−a) ≈ Σ_x q_k − q_2k,    q_m = C(N−c, m)/C(N, m)

**Creation index.** Of the mean gain π(C|x) − p0(C|x) over prompts, CI is the share that
prompts contribute which were not accessible before, and 1 − CI is the share elicited.
**Differs from the proposal it follows**, which has π(C|x) of these in the numerator: by
less than ε a prompt, and the two shares would not sum to 1.

Intervals are 95 %, of bootstraps over prompts; of SRR, NDR and NSCR they are no narrower
than Wilson's, and Newcombe's of a difference of two such (1998, Statistics in Medicine 17),
because a bootstrap says ±0 where nothing was lost. NumPy, float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from educe.measurement.accuracy import wilson
from educe.measurement.intervals import bootstrap, mean_interval, sign_test
from educe.measurement.pass_at_k import pass_at_k


class Estimate(NamedTuple):
  value: float  # NaN where it is not defined
  low: float  # 95 %
  high: float

  def __str__(self) -> str:
    return f'{self.value:.3f} ({self.low:.3f} to {self.high:.3f})'


class Dynamics(NamedTuple):
  preserved: float  # P, behaviours; a count, or expected where it is sampled
  gained: float  # E
  lost: float  # S
  out: float  # O
  srr: Estimate
  ndr: Estimate
  sds: Estimate  # its interval is the bootstrap's alone
  nscr: Estimate
  up: int  # prompts that gained more than they lost
  down: int
  p_value: float  # sign test of up against down, two-sided

  def __str__(self) -> str:
    return (
      f'{self.preserved:.4g} kept, {self.gained:.4g} gained, {self.lost:.4g} lost, '
      f'{self.out:.4g} out; SRR {self.srr}, NDR {self.ndr}, NSCR {self.nscr}; {self.up} '
      f'prompts up, {self.down} down (p={self.p_value:.2g})'
    )


class Excess(NamedTuple):
  srr: Estimate  # below 0: more is lost than sampling twice would lose
  ndr: Estimate  # above 0: more is new than sampling twice would show

  def __str__(self) -> str:
    return f'over the same policy twice: SRR {self.srr}, NDR {self.ndr}'


class Creation(NamedTuple):
  created: Estimate  # CI: share of the gain from prompts that were not accessible
  undecided: float  # share from prompts of which the samples cannot tell
  elicited: Estimate  # share from prompts that were accessible: 1 − CI − undecided
  gain: Estimate  # mean of π(C|x) − p0(C|x)
  created_gain: Estimate  # the part of it that CI is the share of
  # Indices of those that were not accessible and gained, most first.
  prompts: np.ndarray

  def __str__(self) -> str:
    if math.isnan(self.created.value):
      return f'no gain to share out: {self.gain}'
    left = f', {self.undecided:.1%} undecided' if self.undecided else ''
    return (
      f'of a gain of {self.gain}, {self.elicited.value:.1%} elicited '
      f'({self.elicited.low:.1%} to {self.elicited.high:.1%}), {self.created.value:.1%} '
      f'created ({self.created.low:.1%} to {self.created.high:.1%}{left}; '
      f'{len(self.prompts)} prompts)'
    )


def fates(
  before: np.ndarray, after: np.ndarray, counted: np.ndarray | None = None
) -> np.ndarray:
  """(P, E, S, O) of each prompt, `[P, 4]`.

  before, after: `[P]` or `[P, Y]`, accessible or not (log_p0 >= support.sampling(k)); or
    the chance of being seen, pass@k exact or unbiased of independent samples, which
    gives the expected sets
  counted: `[P, Y]`, which outputs are behaviours (the correct ones); None: all

  Raises ValueError for shapes that differ and for values outside [0, 1].
  """
  a, b = np.asarray(before, np.float64), np.asarray(after, np.float64)
  there = np.ones(a.shape) if counted is None else np.asarray(counted, np.float64)
  if a.ndim not in (1, 2) or not a.shape == b.shape == there.shape:
    raise ValueError(
      'support: before, after and counted must all be [P] or all [P, Y], not '
      f'{[list(x.shape) for x in (a, b, there)]}'
    )
  for values in (a, b):
    if not ((values >= 0) & (values <= 1)).all():
      raise ValueError(
        'support: sets are true and false, or chances from 0 to 1; compare '
        'log-probabilities with a threshold first'
      )
  table = np.stack([a * b, (1 - a) * b, a * (1 - b), (1 - a) * (1 - b)], -1)
  table = table * there[..., None]
  return table if a.ndim == 1 else table.sum(1)


def twice(correct: np.ndarray, samples: np.ndarray, k: int) -> np.ndarray:
  """(P, E, S, O) expected of the same policy sampled twice, k samples each, `[P, 4]`.

  correct, samples: `[P]`, c of N. Unbiased.

  Raises ValueError for fewer than 2k samples of a prompt, or c that is not 0 to N.
  """
  c, n = (np.asarray(x, np.int64) for x in np.broadcast_arrays(correct, samples))
  if k < 1 or (n < 2 * k).any():
    raise ValueError(
      f'support: the same policy twice needs 2·k={2 * k} samples of each prompt and has '
      f'{n.min()}; draw more, or take a smaller k'
    )
  neither, none = 1 - pass_at_k(n, c, 2 * k), 1 - pass_at_k(n, c, k)
  changed = none - neither
  return np.stack([1 - 2 * none + neither, changed, changed, neither], -1)


def dynamics(table: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> Dynamics:
  """SRR, NDR, SDS and NSCR of `fates`, `[P, 4]`, with their intervals.

  What is not defined, because nothing was or became accessible, is NaN. The curve over
  budgets is [dynamics(fates(log_p0 >= e, log_pi >= e)) for e in map(sampling, ks)].

  Raises ValueError without prompts.
  """
  table = _table(table)
  values, total = _ratios(table), table.sum(0)
  low, high = bootstrap(_ratios, table, resamples=resamples, seed=seed)
  srr, ndr, sds, nscr = map(Estimate, values.tolist(), low.tolist(), high.tolist())
  preserved, gained, lost, out = map(float, total)
  moved = table[:, 1] - table[:, 2]
  up, down = int((moved > 0).sum()), int((moved < 0).sum())
  return Dynamics(
    preserved,
    gained,
    lost,
    out,
    _widened(srr, *_share(table, [0], [0, 2])),
    _widened(ndr, *_share(table, [1], [0, 1])),
    sds,
    _widened(nscr, *_newcombe(table)),
    up,
    down,
    sign_test(up, down),
  )


def above_noise(
  table: np.ndarray, null: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> Excess:
  """SRR and NDR less those of the same policy twice, at the same k, on the same prompts.

  table, null: `[P, 4]`, of `fates` from chances of being seen, and of `twice`, or of
    fates(a, a). Paired: both are resampled together.

  Raises ValueError for tables of different prompts.
  """
  table, null = _table(table), _table(null)
  if len(table) != len(null):
    raise ValueError(
      f'support: {len(table)} prompts and {len(null)} of the null; both must be the same'
    )
  difference = lambda a, b: (_ratios(a) - _ratios(b))[:2]  # noqa: E731
  low, high = bootstrap(difference, table, null, resamples=resamples, seed=seed)
  return Excess(*map(Estimate, difference(table, null).tolist(), low, high))


def creation(
  before: np.ndarray,
  after: np.ndarray,
  accessible: np.ndarray,
  *,
  resamples: int = 2000,
  seed: int = 0,
) -> Creation:
  """Which share of the gain comes from prompts that were not accessible before.

  before, after: `[P]`, p0(C|x) and π(C|x), or rates among samples; or `[F, P]`, of F folds,
    which are averaged. Samples that also decided what is accessible flatter CI: a prompt
    whose few successes did not show has a rate too low. So let each half of the samples
    decide for the rates of the other.
  accessible: of that shape, true or false; or 1, 0 and −1 of support.decide, whose
    undecided prompts count towards the upper ends of both shares and no lower one. With
    support.training as the threshold, CI is what training on that prompt cannot explain.

  Shares are NaN unless the whole interval of the gain is above 0. A share above 1, or below
  0, says that the other prompts lost. A share's interval is no narrower than Wilson's for
  as many prompts as moved.

  Raises ValueError for shapes that differ and for values that are no probabilities.
  """
  p0, pi, status = (
    np.atleast_2d(x)
    for x in (np.float64(before), np.float64(after), np.asarray(accessible))
  )
  if status.dtype == bool:
    status = np.where(status, 1, -1)
  if not (p0.ndim == 2 and p0.shape == pi.shape == status.shape and p0.size):
    raise ValueError(
      'creation index: before, after and accessible must all be [P], or [F, P], not '
      f'{[list(np.shape(x)) for x in (before, after, accessible)]}'
    )
  for values in (p0, pi):
    if not ((values >= 0) & (values <= 1)).all():
      raise ValueError('creation index: before and after are probabilities, 0 to 1')
  if not np.isin(status, (-1, 0, 1)).all():
    raise ValueError('creation index: accessible is 1, 0 (undecided) or −1')
  parts = ((pi - p0)[..., None] * (status[..., None] == [-1, 0, 1])).mean(0)  # [P, 3]

  def shares(parts):
    out, maybe, inside = parts.mean(0)
    ends = np.array([out, out + maybe, inside, inside + maybe])
    return _over(ends, np.full(4, out + maybe + inside))

  means = np.stack([parts.sum(-1), parts[:, 0]], -1)
  bounds = mean_interval(means, least=-1.0, resamples=resamples, seed=seed)
  gain, created_gain = (
    Estimate(*map(float, each)) for each in zip(means.mean(0), *bounds, strict=True)
  )
  value = shares(parts)
  low, high = bootstrap(shares, parts, resamples=resamples, seed=seed)
  if not gain.low > 0:
    value, low, high = (np.full(4, np.nan) for _ in range(3))
  moved = int((parts != 0).any(-1).sum())
  created, elicited = (
    _widened(
      Estimate(
        float(value[i]), float(min(low[i : i + 2])), float(max(high[i : i + 2]))
      ),
      *(_wilson(value[i], moved)[0], _wilson(value[i + 1], moved)[1]),
    )
    for i in (0, 2)
  )
  order = np.argsort(-parts[:, 0], kind='stable')
  return Creation(
    created,
    float(value[1] - value[0]),
    elicited,
    gain,
    created_gain,
    order[parts[order, 0] > 0],
  )


def _wilson(share: float, prompts: int) -> tuple[float, float]:
  if math.isnan(share):
    return share, share
  return wilson(min(max(share, 0.0), 1.0) * prompts, prompts)


def _ratios(table: np.ndarray) -> np.ndarray:
  """(SRR, NDR, SDS, NSCR)."""
  p, e, s, _ = table.sum(0)
  return _over(
    np.array([p, e, 2 * p * e, e - s]),
    np.array([p + s, p + e, p * p + 2 * p * e + e * s, p + e + s]),
  )


def _over(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  return np.divide(
    numerator, denominator, out=np.full(4, np.nan), where=denominator != 0
  )


def _share(table: np.ndarray, of: list[int], among: list[int]) -> tuple[float, float]:
  """Wilson's interval; behaviours of one prompt count as no more than one each."""
  each = table[:, among].sum(-1)
  total, prompts = each.sum(), np.count_nonzero(each)
  if not total:
    return math.nan, math.nan
  # A share of sums may pass 1 by a rounding.
  share, size = min(table[:, of].sum() / total, 1.0), min(total, prompts)
  return wilson(share * size, size)


def _newcombe(table: np.ndarray) -> tuple[float, float]:
  """Of E/(P+E+S) − S/(P+E+S)."""
  total = table[:, :3].sum()
  if not total:
    return math.nan, math.nan
  gained, lost = table[:, 1].sum() / total, table[:, 2].sum() / total
  gained_low, gained_high = _share(table, [1], [0, 1, 2])
  lost_low, lost_high = _share(table, [2], [0, 1, 2])
  low = gained - lost - math.hypot(gained - gained_low, lost_high - lost)
  high = gained - lost + math.hypot(gained_high - gained, lost - lost_low)
  return max(low, -1.0), min(high, 1.0)


def _widened(estimate: Estimate, low: float, high: float) -> Estimate:
  return Estimate(
    estimate.value, float(min(estimate.low, low)), float(max(estimate.high, high))
  )


def _table(table: np.ndarray) -> np.ndarray:
  table = np.asarray(table, np.float64)
  if table.ndim != 2 or table.shape[1] != 4 or not len(table):
    raise ValueError(f'support: fates must be [P, 4], not {list(table.shape)}')
  return table
