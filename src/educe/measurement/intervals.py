"""How sure a number is that was measured on P prompts.

The prompts are the sample: P of them are drawn again, with replacement, and the statistic
is computed anew; the middle 95 % of what comes out is the interval (Bradley Efron, "Boot-
strap methods: another look at the jackknife", 1979, doi:10.1214/aos/1176344552; the
percentile interval). What a prompt's own samples leave open is in it, for they travel with
their prompt. Where two policies answer the same prompts, both go into one call, and the
resampling is paired.

Prompts that are gained against prompts that are lost are a sign test: if neither were
likelier, gained ~ Binomial(gained + lost, ½). NumPy, float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from educe.measurement.accuracy import wilson

TAIL = 0.025  # of each side: all intervals are 95 %


def replicates(
  statistic: Callable, *arrays: np.ndarray, resamples: int = 2000, seed: int = 0
) -> np.ndarray:
  """The statistic of each resample of the prompts, `[resamples, …]`.

  statistic: of arrays shaped as those given, to a number or an array
  arrays: `[P, …]`, row x of each belongs to prompt x

  Raises ValueError for no arrays or prompts, or arrays of different prompts, or fewer
  than 100 resamples.
  """
  rows = [np.asarray(x) for x in arrays]
  prompts = [len(x) if x.ndim else 0 for x in rows]
  if not prompts or len(set(prompts)) > 1 or not prompts[0]:
    raise ValueError(
      f'bootstrap: arrays of {prompts} prompts; all need the same, at least one'
    )
  if resamples < 100:
    raise ValueError(
      f'bootstrap: resamples={resamples} leave no tails of 2.5 %; take 100 or more'
    )
  rng = np.random.default_rng(seed)
  out = []
  for _ in range(resamples):
    drawn = rng.integers(prompts[0], size=prompts[0])
    out.append(statistic(*(x[drawn] for x in rows)))
  return np.asarray(out, np.float64)


def bootstrap(
  statistic: Callable, *arrays: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """(low, high) of a statistic of the prompts, 95 %, each of the statistic's shape.

  As `replicates`. A resample on which the statistic is NaN (a share of nothing) is left
  out; where all are, the interval is NaN. Where every resample says the same, so does
  the interval, and is too narrow: of a mean use `mean_interval`.
  """
  return quantiles(replicates(statistic, *arrays, resamples=resamples, seed=seed))


def quantiles(replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(low, high) of replicates `[R, …]`, by rank: ±∞ has a place, NaN has none."""
  ranked = np.sort(np.asarray(replicates, np.float64), axis=0)  # NaN comes last
  count = (~np.isnan(ranked)).sum(0)
  first = np.floor(TAIL * count).astype(int)  # as many are left out above as below
  last = np.maximum(count - 1 - first, 0)
  low, high = (np.take_along_axis(ranked, x[None], 0)[0] for x in (first, last))
  return low, high


def mean_interval(
  values: np.ndarray,
  *,
  least: float = 0.0,
  most: float = 1.0,
  resamples: int = 2000,
  seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """(low, high) of the mean over prompts, 95 %, each `[…]`.

  values: `[P, …]`, between `least` and `most`

  No narrower than Student's ± t·s/√P, for a bootstrap of few prompts is too sure. Where
  all prompts have one value there is nothing to resample: P of P alike leave room
  for a share w of other prompts, Wilson's bound of 0 among P, and they may lie as far
  away as `least` and `most`: so 0 of 100 solved gives 0 to 3.7 %, not 0 to 0.

  Raises ValueError for a value that is not in the range, and as `replicates`.
  """
  values = np.asarray(values, np.float64)
  # What rounding adds to a chance is no error of the caller's.
  if not ((values >= least - 1e-9) & (values <= most + 1e-9)).all():
    raise ValueError(f'interval of a mean: a value is not between {least} and {most}')
  mean = lambda x: x.mean(0)  # noqa: E731
  low, high = bootstrap(mean, values, resamples=resamples, seed=seed)
  if len(values) > 1:
    freedom = len(values) - 1
    half = stats.t.ppf(1 - TAIL, freedom) * values.std(0, ddof=1) / np.sqrt(len(values))
    low = np.maximum(np.minimum(low, values.mean(0) - half), least)
    high = np.minimum(np.maximum(high, values.mean(0) + half), most)
  w = wilson(0, len(values))[1]
  alike = (values == values[0]).all(0)
  value = values[0]
  low = np.where(alike, value - w * (value - least), low)
  return low, np.where(alike, value + w * (most - value), high)


def sign_test(gained: int, lost: int) -> float:
  """Two-sided p-value of `gained` against `lost` prompts, exact; 1 where there are none.

  Raises ValueError unless both are whole numbers ≥ 0.
  """
  if gained < 0 or lost < 0 or gained != int(gained) or lost != int(lost):
    raise ValueError(
      f'sign test: gained={gained} and lost={lost} must be whole numbers ≥ 0'
    )
  size, fewer = int(gained) + int(lost), int(min(gained, lost))
  ways = total = 1
  for i in range(fewer):  # C(size, i + 1) from C(size, i), in whole numbers
    ways = ways * (size - i) // (i + 1)
    total += ways
  return min(1.0, 2 * total / 2**size)
