"""pass@k: how often at least one of k samples is correct, and where two curves cross.

Of n samples of a prompt c are correct (their reward is 1 or more). The share of its
k-subsets that hold a correct one,

  1 − C(n−c, k)/C(n, k)        (Mark Chen et al., 2021, eq. 1, arXiv:2107.03374)

is unbiased for 1 − (1−p)^k, which a prompt solved with probability p has exactly. Over
prompts with p ~ Beta(a, b),

  E[1 − (1−p)^k] = 1 − B(a, b+k)/B(a, b) = 1 − Π_{i<k} (b+i)/(a+b+i)

A curve is the mean over prompts of `[P, K]` values, from samples (`estimates`) or from
known probabilities (`exact`): what follows does not ask which. A policy that is ahead of
its base at small k and behind at large k (Yang Yue et al., 2025, arXiv:2504.13837) crosses
it at k*, which is read off the difference of the two curves, straight between two k in
log k. A tilt of the base by a 0/1 reward lowers no prompt's pass@k, so that a crossing is
the sign of something else: interference between prompts, a collapse, or chance.

Intervals are 95 % over prompts, paired where two policies answer the same ones: they are
of prompts like these, and hold the chance of sampling. NumPy, float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from educe.measurement import intervals

CORRECT = 1.0  # the reward from which a sample is correct
ROUNDING = 1e-12  # two means of chances that are closer than this are equal


class Curve(NamedTuple):
  k: np.ndarray  # [K] samples
  rate: np.ndarray  # [K] mean over prompts of pass@k
  low: np.ndarray  # [K] 95 %
  high: np.ndarray
  prompts: int

  def __str__(self) -> str:
    points = ', '.join(
      f'pass@{k} {rate:.1%} ({low:.1%} to {high:.1%})'
      for k, rate, low, high in zip(self.k, self.rate, self.low, self.high, strict=True)
    )
    return f'{points}; 95 % intervals over {self.prompts} prompts'


class Comparison(NamedTuple):
  k: np.ndarray  # [K] samples
  difference: np.ndarray  # [K] mean over prompts of pass@k, ours − theirs
  low: np.ndarray  # [K] 95 %
  high: np.ndarray
  crossing: float | None  # k*, samples, not whole; None: not up to the largest k
  crossing_low: float | None  # 95 %; None, as in the next: beyond the largest k
  crossing_high: float | None
  crossed: float  # share of the resamples in which they cross
  prompts: int

  def __str__(self) -> str:
    at = ' and '.join(
      f'{self.difference[i]:+.1%} ({self.low[i]:+.1%} to {self.high[i]:+.1%}) at '
      f'k={self.k[i]}'
      for i in sorted({0, len(self.k) - 1})
    )
    beyond = f'beyond {self.k[-1]}'
    low, high = (
      beyond if x is None else f'{x:.4g}'
      for x in self[5:7]  # of the crossing
    )
    where = 'none' if self.crossing is None else f'k* = {self.crossing:.4g}'
    return (
      f'pass@k differs by {at}; crossing: {where} (95 % interval {low} to {high}; in '
      f'{self.crossed:.0%} of resamples), {self.prompts} prompts'
    )


def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> np.ndarray:
  """The unbiased estimate, `[…]`, from c correct of n samples; all three broadcast.

  To the last digits for any n: 1 − Π_{i<k} (1 − c/(n−i)) is a sum of logarithms over
  the smaller of k and c, which may change places.

  Raises ValueError unless they are whole, 0 ≤ c ≤ n and 1 ≤ k ≤ n.
  """
  n, c, k = np.broadcast_arrays(_whole(n, 'n'), _whole(c, 'c'), _whole(k, 'k'))
  if (k < 1).any():
    raise ValueError(f'pass@k: k={k.min()} must be 1 or more')
  if (n < k).any():
    least = n.min()
    less = f', ask for k ≤ {least}' if least else ''
    raise ValueError(
      f'pass@k: k={k[n < k].max()} needs as many scored samples of every prompt, and '
      f'one has {least}; sample more{less}, or leave that prompt out'
    )
  if ((c < 0) | (c > n)).any():
    raise ValueError('pass@k: the number correct must be between 0 and n')
  cases = np.stack([n.ravel(), c.ravel(), k.ravel()])
  cases, back = np.unique(cases, axis=1, return_inverse=True)
  values = np.array([_estimate(*case) for case in cases.T.tolist()])
  return values[back.ravel()].reshape(n.shape)


def exact(p: ArrayLike, k: ArrayLike) -> np.ndarray:
  """1 − (1−p)^k, `[…]`, of the chance p of one sample; both broadcast.

  Keeps its digits for p down to the smallest float64 and any k.

  Raises ValueError unless 0 ≤ p ≤ 1 (rounding may pass 1 by 1e-9) and k ≥ 1.
  """
  p, k = np.asarray(p, np.float64), _budgets(k)
  if not ((p >= 0) & (p <= 1 + 1e-9)).all():
    raise ValueError('pass@k: a probability is not between 0 and 1')
  with np.errstate(divide='ignore', under='ignore'):  # log 0 where p is 1
    return 0.0 - np.expm1(k * np.log1p(-np.minimum(p, 1)))


def beta(a: float, b: float, k: ArrayLike) -> np.ndarray:
  """1 − B(a, b+k)/B(a, b), `[…]`: pass@k over prompts with p ~ Beta(a, b).

  Raises ValueError unless a > 0, b > 0 and k ≥ 1.
  """
  if not (a > 0 and b > 0):
    raise ValueError(f'pass@k: Beta({a}, {b}) needs two positive numbers')
  k = _budgets(k)
  # A sum of logarithms, for log-gamma of k = 1e6 has lost nine digits.
  log_miss = [np.log1p(-a / (a + b + np.arange(x))).sum() for x in k.ravel()]
  return 0.0 - np.expm1(np.reshape(log_miss, k.shape))


def counts(rewards: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """(n, c), each `[P]`: scored samples of each prompt, and those correct.

  rewards: `[P, N]`; NaN: not scored; correct from 1 on

  Raises ValueError for another shape.
  """
  rewards = np.asarray(rewards, np.float64)
  if rewards.ndim != 2 or not len(rewards):
    raise ValueError(f'pass@k: rewards must be [P, N], not {list(rewards.shape)}')
  return (~np.isnan(rewards)).sum(-1), (rewards >= CORRECT).sum(-1)


def ladder(most: int) -> np.ndarray:
  """1, 2, 4, … and `most` itself: the k of a curve up to `most` samples."""
  if most < 1:
    raise ValueError(f'pass@k: a curve up to k={most} has no point')
  return np.unique([*(2 ** np.arange(int(most).bit_length())), most])


def estimates(rewards: ArrayLike, k: ArrayLike) -> np.ndarray:
  """The unbiased pass@k of every prompt, `[P, K]`.

  rewards: `[P, N]` as in `counts` · k: `[K]` samples

  Raises ValueError where a prompt has fewer than k scored samples.
  """
  n, c = counts(rewards)
  return pass_at_k(n[:, None], c[:, None], _budgets(k).reshape(1, -1))


def curve(
  values: ArrayLike, k: ArrayLike, *, resamples: int = 2000, seed: int = 0
) -> Curve:
  """Mean pass@k over prompts, with intervals, from `[P, K]` values of every prompt.

  Raises ValueError for values of other k.
  """
  values, k = _values(values, k)
  low, high = intervals.mean_interval(values, resamples=resamples, seed=seed)
  return Curve(k, values.mean(0), low, high, len(values))


def compare(
  ours: ArrayLike,
  theirs: ArrayLike,
  k: ArrayLike,
  *,
  resamples: int = 2000,
  seed: int = 0,
) -> Comparison:
  """The difference of two curves over the same prompts, and where they cross.

  ours, theirs: `[P, K]`, values of the same prompts in the same order, at equal k; the
    numbers of samples behind them may differ
  k: `[K]`, rising

  k* is the first at which whoever leads at the smallest k (where they differ) is behind;
  equality is no crossing. In a resample that has the other lead from the start, it is
  the smallest k. None stands for 'not within the range', and bounds are ranked with it
  at the end: an interval '12 to beyond 1024' does not exclude that they never cross.

  Raises ValueError for values of different prompts or other k.
  """
  ours, budgets = _values(ours, k)
  theirs, _ = _values(theirs, k)
  if len(ours) != len(theirs):
    raise ValueError(
      f'pass@k: {len(ours)} prompts of ours and {len(theirs)} of theirs; both policies '
      'must answer the same ones'
    )
  if (np.diff(budgets) <= 0).any():
    raise ValueError(f'pass@k: k must rise from point to point, not {budgets.tolist()}')
  gap = ours - theirs
  difference = gap.mean(0)
  low, high = intervals.mean_interval(gap, least=-1.0, resamples=resamples, seed=seed)
  differs = np.abs(difference) >= ROUNDING
  leader = np.sign(difference[differs.argmax()]) if differs.any() else 0.0
  drawn = intervals.replicates(lambda x: x.mean(0), gap, resamples=resamples, seed=seed)
  at = first_crossing(leader * drawn, budgets)
  point = first_crossing(leader * difference[None], budgets)[0]
  bounds = intervals.quantiles(at)
  star, star_low, star_high = (
    None if math.isinf(x) else float(x) for x in (point, *bounds)
  )
  crossed = float(np.isfinite(at).mean())
  return Comparison(
    budgets, difference, low, high, star, star_low, star_high, crossed, len(gap)
  )


def first_crossing(lead: np.ndarray, k: np.ndarray) -> np.ndarray:
  """Where each lead `[R, K]` first falls below 0, `[R]`, in samples; ∞: nowhere.

  The lead is taken as straight in log k between two of the `[K]` k.
  """
  lead = np.where(np.abs(lead) < ROUNDING, 0, lead)
  behind = lead < 0
  after = behind.argmax(-1)
  before = np.maximum(after - 1, 0)
  rows = np.arange(len(lead))
  a, b = lead[rows, before], lead[rows, after]  # a ≥ 0 > b, but where the first is < 0
  drop = np.where(after > 0, a - b, 1)
  share = np.where(after > 0, a / np.where(drop > 0, drop, 1), 0)
  log_k = np.log(k)
  at = np.exp(log_k[before] + share * (log_k[after] - log_k[before]))
  return np.where(behind.any(-1), at, np.inf)


def _estimate(n: int, c: int, k: int) -> float:
  if n - c < k:
    return 1.0
  few, many = sorted((c, k))
  return 0.0 - float(np.expm1(np.log1p(-many / (n - np.arange(few))).sum()))


def _values(values: ArrayLike, k: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  values, k = np.asarray(values, np.float64), np.atleast_1d(_budgets(k))
  if k.ndim != 1 or values.ndim != 2 or values.shape[1] != len(k) or not len(values):
    raise ValueError(
      f'pass@k: values {list(values.shape)} must be [P, K], one for each of the '
      f'{k.size} k'
    )
  return values, k


def _budgets(k: ArrayLike) -> np.ndarray:
  k = _whole(k, 'k')
  if (k < 1).any():
    raise ValueError(f'pass@k: k={k.min()} must be 1 or more')
  return k


def _whole(x: ArrayLike, name: str) -> np.ndarray:
  given = np.asarray(x)
  if not (np.isfinite(given).all() and (given == np.floor(given)).all()):
    raise ValueError(f'pass@k: {name}={given.ravel()[:4].tolist()} must be whole')
  return given.astype(np.int64)
