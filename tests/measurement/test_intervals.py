"""Against enumeration of every resample, and against what 200 experiments cover."""

import itertools
import math

import numpy as np
import pytest

from educe.measurement import intervals
from educe.measurement.accuracy import wilson


def test_the_interval_is_that_of_all_resamples():
  """Of 5 prompts there are 5**5 resamples; 20,000 drawn ones have nearly their ranks."""
  values = np.array([0.0, 0.1, 0.35, 0.6, 1.0])
  every = np.sort([np.mean(x) for x in itertools.product(values, repeat=5)])
  low, high = intervals.bootstrap(np.mean, values, resamples=20_000)
  # A rank of 20,000 draws is off by 3·√(.025·.975/20,000) = 0.33 % of the resamples.
  share = lambda x: (every <= x).mean()  # noqa: E731
  assert 0.0217 < share(low) < 0.045  # means lie on steps of up to 1.5 % of them
  assert 0.9717 < share(high) < 0.985


def test_ranks_by_hand():
  low, high = intervals.quantiles(np.arange(1000.0)[::-1])
  assert (low, high) == (25, 974)  # 25 of the thousand lie beyond on either side
  low, high = intervals.quantiles(np.array([np.nan, 3.0, 1.0, np.inf]))
  assert (low, high) == (1, np.inf)
  low, high = intervals.quantiles(np.full((4, 2), np.nan))
  assert np.isnan([low, high]).all()


def test_arrays_are_drawn_together():
  one = np.random.default_rng(0).random((40, 3))
  low, high = intervals.bootstrap(lambda a, b: (a - b).mean(0), one, one + 0.25)
  np.testing.assert_allclose([low, high], np.full((2, 3), -0.25), atol=1e-12)
  assert not np.allclose(*intervals.bootstrap(lambda a, b: a.mean(0), one, one))


def test_the_seed_decides():
  values = np.random.default_rng(0).random(30)
  one, same, other = (
    intervals.replicates(np.mean, values, resamples=100, seed=seed)
    for seed in (3, 3, 4)
  )
  np.testing.assert_array_equal(one, same)
  assert (one != other).any()
  assert one.shape == (100,)


def test_what_is_not_defined_is_left_out():
  """A ratio that has no denominator in some resamples."""
  top, bottom = np.array([1.0, 0.0, 1.0]), np.array([2.0, 0.0, 0.0])

  def ratio(a, b):
    return a.sum() / b.sum() if b.sum() else np.nan

  low, high = intervals.bootstrap(ratio, top, bottom)
  assert low == 0.5  # (2,), where the third is not drawn: always half or more
  assert 1 < high <= 1.5  # (2, 0, 0) with ones: (1 + 1 + 1)/2


def test_where_all_agree_room_is_left():
  low, high = intervals.mean_interval(np.zeros((100, 2)))
  np.testing.assert_allclose(low, 0)
  np.testing.assert_allclose(high, wilson(0, 100)[1])
  assert 0.035 < high[0] < 0.038  # the rule of three, 3/P, and Wilson's 3.7/P
  low, high = intervals.mean_interval(np.ones(100))
  np.testing.assert_allclose([low, high], [wilson(100, 100)[0], 1])
  low, high = intervals.mean_interval(np.zeros(100), least=-1.0)
  np.testing.assert_allclose([-low, high], wilson(0, 100)[1])
  low, high = intervals.mean_interval([0.5])  # one prompt says little
  np.testing.assert_allclose([low, high], [0.5 - 0.3967, 0.5 + 0.3967], atol=1e-4)


@pytest.mark.parametrize('prompts', [30, 200])
def test_the_mean_is_covered(prompts):
  rng = np.random.default_rng(0)
  hits = 0
  for seed in range(200):
    values = rng.beta(0.5, 1.0, prompts)  # skewed; mean 1/3
    low, high = intervals.mean_interval(values, resamples=400, seed=seed)
    hits += low <= 1 / 3 <= high
  # 95 % less the percentile's 1 % at 30 prompts; 200 trials have a deviation of 1.6 %.
  assert 0.89 <= hits / 200 <= 0.985


def test_the_sign_test_is_exact():
  for gained, lost in itertools.product(range(12), repeat=2):
    size = gained + lost
    far = [i for i in range(size + 1) if abs(2 * i - size) >= abs(gained - lost)]
    want = sum(math.comb(size, i) for i in far) / 2**size
    np.testing.assert_allclose(intervals.sign_test(gained, lost), want, rtol=1e-14)
  assert intervals.sign_test(0, 0) == 1
  # Of many the normal law holds: 2·(1 − Φ(z)), with ½ taken off for whole numbers.
  z = (100 - 0.5) / math.sqrt(10_000 / 4)
  want = math.erfc(z / math.sqrt(2))
  np.testing.assert_allclose(intervals.sign_test(5_100, 4_900), want, rtol=1e-3)


def test_bad_input_is_one_clear_line():
  with pytest.raises(ValueError, match=r'arrays of \[3, 2\] prompts'):
    intervals.bootstrap(np.mean, np.zeros(3), np.zeros(2))
  for arrays in ((), (np.zeros(0),), (1.0,)):
    with pytest.raises(ValueError, match='at least one'):
      intervals.bootstrap(np.mean, *arrays)
  with pytest.raises(ValueError, match='resamples=99 leave no tails'):
    intervals.bootstrap(np.mean, np.zeros(3), resamples=99)
  for values, least in (([0.5, np.nan], 0), ([-0.1, 0.2], 0), ([0.1, 1.1], -1)):
    with pytest.raises(ValueError, match='not between'):
      intervals.mean_interval(values, least=least)
  for pair in ((-1, 2), (2, -1), (1.5, 2), (1, 2.5)):
    with pytest.raises(ValueError, match='must be whole numbers'):
      intervals.sign_test(*pair)
