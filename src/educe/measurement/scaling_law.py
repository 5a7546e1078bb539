"""How performance grows with the number of examples D: power law, or a ceiling.

  P = c·D^{1/b}             power law of performance: log–log a straight line
  1 − P = A·D^{−α}          power law of the error
  1 − P = E∞ + A·D^{−α}     error that saturates at E∞ ≥ 0

The first is the form of Mohit Raghavendra, Vaskar Nath & Sean Hendryx, "Revisiting the
Superficial Alignment Hypothesis", 2024, arXiv:2410.03717. A range of D in which a form
cannot be told from another says nothing for either, hence the comparison: all three are
fitted by least squares to P itself (the errors of P and of 1 − P are the same numbers;
those of log P are not) and compared by Akaike's criterion, corrected for few points
(Clifford Hurvich & Chih-Ling Tsai, 1989, doi:10.1093/biomet/76.2.297),

  AICc = n·log(RSS/n) + 2k + 2k(k+1)/(n−k−1)      k: parameters, the variance too

For a given exponent the rest is linear (variable projection), so that one number is
searched for: scanned over its whole range, then refined where the scan is lowest.

The interval of a parameter is over problems (bootstrap, the same resample at every D)
where each problem's score is given, else of points about the law (delta method, Student's
t). Neither knows whether the law holds beyond the points. NumPy, float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from educe.measurement.accuracy import Z, wilson

FORMS = ('power', 'saturating')
STEEPEST = 5.0  # the largest exponent in size: 100 times less error at 2.5 times D
SHALLOWEST = 0.01  # α of a saturating law; below it is log D in all but name
STARTS = 200
GOLDEN = (math.sqrt(5) - 1) / 2


class Interval(NamedTuple):
  value: float
  low: float  # 95 %
  high: float

  def __str__(self) -> str:
    return f'{self.value:.3g} (95 % interval {self.low:.3g} to {self.high:.3g})'


class Law(NamedTuple):
  """value = limit + factor·D^exponent."""

  form: str
  limit: Interval  # E∞, unit of the values; 0 for a power law
  factor: Interval  # c or A, unit of the values
  exponent: Interval  # 1/b or −α
  rss: float  # Σ of squared residuals
  r_squared: float  # of the values themselves
  aicc: float
  points: int
  decades: float  # of D

  def __call__(self, examples: np.ndarray) -> np.ndarray:
    """The law's values, of the shape of examples."""
    d = np.asarray(examples, np.float64)
    return self.limit.value + self.factor.value * d**self.exponent.value

  def __str__(self) -> str:
    limit = f'{self.limit.value:.3g} + ' if self.form == 'saturating' else ''
    return (
      f'{limit}{self.factor.value:.3g}·D^{self.exponent}; R² {self.r_squared:.3f} of '
      f'{self.points} points over {self.decades:.1f} decades'
    )


class Comparison(NamedTuple):
  power: Law  # of P
  power_error: Law  # of 1 − P
  saturating: Law  # of 1 − P
  weights: tuple[float, float, float]  # Akaike's: e^{−ΔAICc/2}, to a sum of 1

  @property
  def best(self) -> str:
    """The field with the largest weight."""
    return self._fields[int(np.argmax(self.weights))]

  def __str__(self) -> str:
    each = zip(('P', '1 − P', '1 − P'), self[:3], self.weights, strict=True)
    return '; '.join(f'{y} = {law} (weight {w:.2f})' for y, law, w in each)


class Errors(NamedTuple):
  format: Interval  # unparsable, share of all judged; the interval is Wilson's
  reasoning: Interval  # wrong, share of all judged
  reasoning_if_parsed: Interval | None  # wrong, share of what was parsed; None: nothing
  judged: int
  unjudged: int  # the verifier timed out or failed

  def __str__(self) -> str:
    return (
      f'format errors {self.format.value:.1%}, reasoning errors '
      f'{self.reasoning.value:.1%} of {self.judged}'
    )


def fit(
  examples: np.ndarray,
  values: np.ndarray,
  form: str,
  *,
  resamples: int = 1000,
  seed: int = 0,
) -> Law:
  """The law of a form that is nearest to the values, by least squares.

  examples: `[n]`, D > 0; several runs with one D are so many points
  values: `[n]`, or `[n, M]`, the scores of the same M problems at each point. Their means
    are fitted; the intervals are then over problems, else of points about the law.
  form: 'power' (limit 0, exponent of either sign) or 'saturating' (limit ≥ 0, exponent
    negative, factor of either sign: an error that falls to its limit, or a performance
    that rises to it)

  An exponent at an end of its range, −5 … 5 or −5 … −0.01, is one that the points do not
  determine.

  Raises ValueError for an unknown form, shapes that differ, numbers that are not finite,
  a D ≤ 0, values that are all the same, fewer points than parameters + 3 (no AICc), or
  fewer different D than parameters.
  """
  if form not in FORMS:
    raise ValueError(f'form={form!r}: must be one of {", ".join(FORMS)}')
  parameters = 2 + (form == 'saturating')
  d, values = np.asarray(examples, np.float64), np.asarray(values, np.float64)
  if d.ndim != 1 or values.ndim not in (1, 2) or len(values) != len(d):
    raise ValueError(
      f'scaling law: examples {list(d.shape)} must be [n] and values '
      f'{list(values.shape)} [n] or [n, M]'
    )
  if not (np.isfinite(d).all() and (d > 0).all() and np.isfinite(values).all()):
    raise ValueError(
      'scaling law: every number of examples must be positive and every value finite; '
      'leave such points out'
    )
  n, different = len(d), len(np.unique(d))
  if n < parameters + 3 or different < parameters:
    raise ValueError(
      f'scaling law: {n} points at {different} numbers of examples; the {form} form '
      f'needs {parameters + 3} points at {parameters} numbers or more'
    )
  x = np.log(d)
  middle = x.mean()  # the basis is about 1 here, whatever the exponent
  y = values if values.ndim == 1 else values.mean(1)
  if not np.ptp(y):
    raise ValueError(f'scaling law: every value is {y[0]:.4g}; there is nothing to fit')
  start, scale, power, rss = (a[0] for a in _nearest(x - middle, y[None], form))
  law = start, scale * math.exp(-power * middle), power
  if values.ndim == 2:
    rng = np.random.default_rng(seed)
    chosen = rng.integers(values.shape[1], size=(resamples, values.shape[1]))
    drawn = np.stack([values[:, c].mean(1) for c in chosen])
    limits, factors, exponents, _ = _nearest(x - middle, drawn, form)
    draws = np.stack([limits, factors * np.exp(-exponents * middle), exponents])
    low, high = np.percentile(draws, [2.5, 97.5], axis=1)
  else:
    low, high = _delta(x, law, rss, form)
  # Rounding alone leaves this much of a perfect fit, and log 0 compares with nothing.
  floor = n * (np.finfo(float).eps * np.abs(y).max()) ** 2 + np.finfo(float).tiny
  k = parameters + 1
  aicc = n * math.log(max(rss, floor) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
  spread = ((y - y.mean()) ** 2).sum()
  limit, factor, exponent = (
    Interval(*map(float, each)) for each in zip(law, low, high, strict=True)
  )
  return Law(
    form,
    limit,
    factor,
    exponent,
    rss=float(rss),
    r_squared=float(1 - rss / spread),
    aicc=float(aicc),
    points=n,
    decades=float(np.ptp(x) / math.log(10)),
  )


def compare(
  examples: np.ndarray,
  performance: np.ndarray,
  *,
  resamples: int = 1000,
  seed: int = 0,
) -> Comparison:
  """The three laws above, and how much each is to be believed.

  examples `[n]`, performance `[n]` or `[n, M]` in 0..1, as in `fit`

  Raises ValueError for a performance outside 0..1, and as `fit` does.
  """
  p = np.asarray(performance, np.float64)
  if not ((p >= 0) & (p <= 1)).all():
    raise ValueError('scaling law: a performance is not in 0..1; give shares, not %')
  laws = [
    fit(examples, y, form, resamples=resamples, seed=seed)
    for y, form in ((p, 'power'), (1 - p, 'power'), (1 - p, 'saturating'))
  ]
  criteria = np.array([law.aicc for law in laws])
  weights = np.exp(-(criteria - criteria.min()) / 2)
  first, second, third = (weights / weights.sum()).tolist()
  return Comparison(laws[0], laws[1], laws[2], (first, second, third))


def log_log_r_squared(examples: np.ndarray, values: np.ndarray) -> float:
  """Squared correlation of log D and log value: 1 for points on a power law.

  Raises ValueError for anything that is not positive.
  """
  d, y = np.asarray(examples, np.float64), np.asarray(values, np.float64)
  if not ((d > 0).all() and (y > 0).all()):
    raise ValueError('log-log: a number is not positive; leave such points out')
  return float(np.corrcoef(np.log(d), np.log(y))[0, 1] ** 2)


def reached(examples: np.ndarray, errors: np.ndarray, *, share: float = 0.9) -> float:
  """The number of examples at which a share of the whole fall of an error is reached.

  examples, errors: `[n]`; equal D are averaged. The fall is from the smallest D to the
  largest; between points the error is linear in log D. NaN if it does not fall.

  Raises ValueError unless 0 < share ≤ 1 and two different D are there.
  """
  if not 0 < share <= 1:
    raise ValueError(f'share={share}: must be in 0..1, and not 0')
  d, place = np.unique(np.asarray(examples, np.float64), return_inverse=True)
  if len(d) < 2:
    raise ValueError('reached: one number of examples shows no fall')
  mean = np.bincount(place, np.asarray(errors, np.float64)) / np.bincount(place)
  goal = mean[0] - share * (mean[0] - mean[-1])
  if not mean[-1] < mean[0]:
    return math.nan
  after = int(np.argmax(mean <= goal + 1e-12))  # the last one is there by definition
  ahead, behind = mean[after - 1], mean[after]
  part = min((ahead - goal) / (ahead - behind), 1.0)
  return float(d[after - 1] * (d[after] / d[after - 1]) ** part)


def errors(transcripts: Sequence[Mapping[str, Any]]) -> Errors:
  """Format errors apart from reasoning errors.

  transcripts: rows with `outcome`: 'unparsable' is an error of format, 'wrong' one of
    reasoning. Shares of all add up to what is not solved; but whoever is unparsable can
    not be wrong, so where format errors are many see `reasoning_if_parsed`.

  Raises ValueError for none, or where a judge's scores stand for right and wrong.
  """
  outcomes = [row['outcome'] for row in transcripts]
  if 'judged' in outcomes:
    raise ValueError("errors: outcome 'judged' is neither right nor wrong")
  right, wrong, unparsable = map(outcomes.count, ('verified', 'wrong', 'unparsable'))
  judged = right + wrong + unparsable
  if not judged:
    raise ValueError('errors: no transcript has an answer that was verified')

  def share(count: int, total: int) -> Interval:
    return Interval(count / total, *wilson(count, total))

  return Errors(
    share(unparsable, judged),
    share(wrong, judged),
    share(wrong, right + wrong) if right + wrong else None,
    judged,
    len(outcomes) - judged,
  )


def _nearest(x, y, form: str) -> tuple[np.ndarray, ...]:
  """(limit, factor at x = 0, exponent, rss), each `[R]`, of y `[R, n]`."""
  if form == 'power':
    grid = np.linspace(-STEEPEST, STEEPEST, STARTS + 1)
  else:
    grid = -np.geomspace(STEEPEST, SHALLOWEST, STARTS + 1)
  start = np.argmin([_project(x, y, s, form)[2] for s in grid], axis=0)
  low, high = grid[np.maximum(start - 1, 0)], grid[np.minimum(start + 1, STARTS)]
  for _ in range(45):  # each leaves .618 of two grid steps: 4e-10
    step = GOLDEN * (high - low)
    left, right = high - step, low + step
    better = _project(x, y, left, form)[2] < _project(x, y, right, form)[2]
    low, high = np.where(better, low, left), np.where(better, right, high)
  exponent = (low + high) / 2
  limit, factor, rss = _project(x, y, exponent, form)
  return limit, factor, exponent, rss


def _project(x, y, exponent, form: str) -> tuple[np.ndarray, ...]:
  """(limit, factor, rss) `[R]`: the best of y `[R, n]` for an exponent, or `[R]` of them.

  A limit below 0 is none: with it at 0, the nearest that is allowed, a power law is left.
  """
  basis = np.exp(np.multiply.outer(exponent, x))  # [n] or [R, n]
  factor = (y * basis).sum(-1) / (basis * basis).sum(-1)
  limit = np.zeros_like(factor)
  if form == 'saturating':
    centred = basis - basis.mean(-1, keepdims=True)
    slope = (y * centred).sum(-1) / (centred * centred).sum(-1)
    free = y.mean(-1) - slope * basis.mean(-1)
    limit, factor = np.maximum(free, 0), np.where(free > 0, slope, factor)
  residual = y - limit[:, None] - factor[:, None] * basis
  return limit, factor, (residual * residual).sum(-1)


def _delta(x, law, rss, form: str) -> tuple[np.ndarray, np.ndarray]:
  """(low, high) `[3]` of (limit, factor, exponent), by the values' slopes in them."""
  limit, factor, exponent = law
  rises = factor * np.exp(exponent * x)
  slopes = [rises, rises * x]  # in log factor and exponent
  if form == 'saturating':
    slopes.append(np.ones_like(x))
  jacobian = np.stack(slopes, 1)
  freedom = len(x) - jacobian.shape[1]
  try:
    variance = np.diag(np.linalg.inv(jacobian.T @ jacobian)) * rss / freedom
  except np.linalg.LinAlgError:
    variance = np.full(len(slopes), np.inf)
  # Near a singular matrix rounding may turn a sign: the points do not determine it.
  error = _student(freedom) * np.sqrt(np.where(variance < 0, np.inf, variance))
  with np.errstate(over='ignore'):
    factors = np.sort(factor * np.exp(np.array([-error[0], error[0]])))
  of_limit = error[2] if form == 'saturating' else 0.0
  return (
    np.array([max(limit - of_limit, 0.0), factors[0], exponent - error[1]]),
    np.array([limit + of_limit, factors[1], exponent + error[1]]),
  )


def _student(freedom: int) -> float:
  """Two-sided 95 % of Student's t, to .004 from 3 degrees of freedom on.

  G. W. Hill, 1970, doi:10.1145/355598.355600; Abramowitz & Stegun 26.7.5.
  """
  z = Z
  return (
    z
    + (z**3 + z) / (4 * freedom)
    + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z)
    / (92160 * freedom**4)
  )
