import math

import numpy as np
import pytest
from scipy import optimize, stats

from educe.measurement import scaling_law
from educe.measurement.accuracy import wilson
from educe.measurement.scaling_law import (
  compare,
  errors,
  fit,
  log_log_r_squared,
  reached,
)

D = np.array([10, 30, 100, 300, 1000, 3000, 10_000, 30_000])
THREE = np.repeat(D, 3)  # three seeds


def power(d, c, s):
  return c * d**s


def saturating(d, limit, a, s):
  return limit + a * d**s


CASES = [
  ('power', power, (0.05, 0.28)),
  ('power', power, (0.9, -0.2)),
  ('saturating', saturating, (0.2, 1.5, -0.4)),
  ('saturating', saturating, (0.6, -0.8, -0.3)),  # a performance that rises to .6
]


def numbers(law):
  """[limit,] factor, exponent."""
  both = [law.factor, law.exponent]
  return both if law.form == 'power' else [law.limit, *both]


@pytest.mark.parametrize(('form', 'curve', 'truth'), CASES)
def test_points_on_a_law_give_it_back(form, curve, truth):
  law = fit(D, curve(D, *truth), form)
  # The search ends where RSS is flat to a rounding: exponents to the root of 1e-16.
  np.testing.assert_allclose([x.value for x in numbers(law)], truth, rtol=1e-6)
  np.testing.assert_allclose(law(D), curve(D, *truth), rtol=1e-6)
  assert law.r_squared > 1 - 1e-12
  assert math.isfinite(law.aicc)
  assert (law.points, law.limit.value == 0) == (8, form == 'power')
  np.testing.assert_allclose(law.decades, math.log10(3000))


@pytest.mark.parametrize(('form', 'curve', 'truth'), CASES)
def test_the_fit_and_its_intervals_are_those_of_a_general_solver(form, curve, truth):
  rng = np.random.default_rng(0)
  y = curve(THREE, *truth) + 0.01 * rng.normal(size=24)
  law = fit(THREE, y, form)
  best, covariance = optimize.curve_fit(curve, THREE, y, p0=truth, xtol=1e-14)
  np.testing.assert_allclose([x.value for x in numbers(law)], best, rtol=1e-4)
  rss = ((y - curve(THREE, *best)) ** 2).sum()
  np.testing.assert_allclose(law.rss, rss, rtol=1e-8)
  np.testing.assert_allclose(law.r_squared, 1 - rss / ((y - y.mean()) ** 2).sum())
  error = np.sqrt(np.diag(covariance)) * stats.t.ppf(0.975, 24 - len(best))
  exponent, factor = law.exponent, law.factor
  # The solver's slopes are differences: some 1e-4; ours of the formula.
  np.testing.assert_allclose(exponent.high - exponent.value, error[-1], rtol=1e-3)
  np.testing.assert_allclose(exponent.value - exponent.low, error[-1], rtol=1e-3)
  of_log = error[-2] / abs(best[-2])
  np.testing.assert_allclose(np.log(factor.high / factor.value), np.sign(
    factor.value) * of_log, rtol=1e-3)  # fmt: skip
  assert factor.low < factor.value < factor.high
  if form == 'saturating':
    np.testing.assert_allclose(law.limit.high - law.limit.value, error[0], rtol=1e-3)
    low = max(law.limit.value - error[0], 0)
    np.testing.assert_allclose(law.limit.low, low, rtol=2e-3)


def test_the_criterion_is_akaikes_corrected():
  rng = np.random.default_rng(1)
  y = power(THREE, 0.05, 0.28) + 0.01 * rng.normal(size=24)
  for form, k in (('power', 3), ('saturating', 4)):
    law = fit(THREE, y, form)
    sigma = math.sqrt(law.rss / 24)  # of maximum likelihood
    likelihood = stats.norm.logpdf(y, law(THREE), sigma).sum()
    aicc = -2 * likelihood + 2 * k + 2 * k * (k + 1) / (24 - k - 1)
    # RSS stands for the likelihood but for a constant of all forms.
    np.testing.assert_allclose(law.aicc + 24 * (1 + math.log(2 * math.pi)), aicc)


def test_a_limit_below_nothing_is_none():
  """An error that falls faster than a power law: its free limit would be negative."""
  y = saturating(D, -0.1, 1.0, -0.2)
  law = fit(D, y, 'saturating')
  assert (law.limit.value, law.limit.low) == (0, 0)
  plain = fit(D, y, 'power')
  np.testing.assert_allclose(law.rss, plain.rss, rtol=1e-8)
  np.testing.assert_allclose(law.exponent.value, plain.exponent.value, rtol=1e-4)


def test_the_search_finds_the_lowest_of_several_minima():
  """Against a dense search of the exponent by another method."""
  rng = np.random.default_rng(2)
  for _ in range(20):
    y = rng.random(8)
    law = fit(D, y, 'power')
    for s in np.linspace(-5, 5, 2001):
      basis = (D / 500) ** s
      assert law.rss <= np.linalg.lstsq(basis[:, None], y, rcond=None)[1][0] + 1e-9


@pytest.mark.parametrize(('form', 'curve', 'truth'), CASES[1:])
def test_intervals_of_points_cover(form, curve, truth):
  """200 seeds of 8 points: binomial(200, .95) is in 180..198 with probability .999."""
  covered = np.zeros(len(truth))
  for seed in range(200):
    noise = 0.01 * np.random.default_rng(seed).normal(size=len(D))
    law = fit(D, curve(D, *truth) + noise, form)
    covered += [x.low <= t <= x.high for x, t in zip(numbers(law), truth, strict=True)]
  assert (covered >= 180).all(), covered
  assert (covered <= 200).all()
  assert covered[-1] <= 198


def test_intervals_over_problems_cover_and_are_paired():
  """Problems of two difficulties, the same ones at each D; points alone know nothing."""
  d, c, s, problems = D[2:7], 0.06, 0.2, 300
  covered = wider = 0
  for seed in range(200):
    rng = np.random.default_rng(seed)
    ease = rng.choice([0.3, 1.7], problems)
    scores = rng.random((5, problems)) < power(d, c, s)[:, None] * ease
    law = fit(d, scores, 'power', resamples=200, seed=seed)
    covered += law.exponent.low <= s <= law.exponent.high
    if seed >= 40:
      continue
    alone = np.stack([rng.permutation(row) for row in scores])  # another pairing
    other = fit(d, alone, 'power', resamples=200, seed=seed)
    assert other.exponent.value == law.exponent.value
    wider += other.exponent.high - other.exponent.low > (
      law.exponent.high - law.exponent.low
    )
  assert 178 <= covered <= 199  # percentiles of 200 resamples are a little narrow
  assert wider > 26  # half of them if the pairs were not kept together


def test_the_form_that_made_the_points_is_preferred():
  hits = {'power': 0, 'power_error': 0, 'saturating': 0}
  for seed in range(30):
    noise = 0.01 * np.random.default_rng(seed).normal(size=24)
    for name, performance in (
      ('power', power(THREE, 0.05, 0.28)),
      ('power_error', 1 - power(THREE, 0.9, -0.2)),
      ('saturating', 1 - saturating(THREE, 0.3, 1.5, -0.4)),
    ):
      got = compare(THREE, np.clip(performance + noise, 0, 1))
      assert math.isclose(sum(got.weights), 1)
      hits[name] += got.best == name
  # A law of the error has a saturating one beside it that fits at least as well: AICc
  # then errs about as often as χ²(1) is above 2.2, in 14 %.
  assert hits['power'] == hits['saturating'] == 30
  assert hits['power_error'] >= 20


def test_a_comparison_is_of_one_response():
  performance = power(D, 0.05, 0.28)
  got = compare(D, performance)
  assert got.best == 'power'
  np.testing.assert_allclose(got.power(D), performance, rtol=1e-6)
  direct = fit(D, 1 - performance, 'saturating')
  assert got.saturating == direct
  np.testing.assert_allclose(
    got.weights[2] / got.weights[1],
    math.exp((got.power_error.aicc - direct.aicc) / 2),
  )
  assert str(got).startswith('P = 0.05·D^0.28 (95 % interval')
  assert str(got).count('(weight') == 3


def test_log_log_is_straight_for_a_power_law_alone():
  assert log_log_r_squared(D, power(D, 0.05, 0.28)) == pytest.approx(1)
  y = saturating(D, 0.2, 1.5, -0.4)
  slope = stats.linregress(np.log(D), np.log(y))
  np.testing.assert_allclose(log_log_r_squared(D, y), slope.rvalue**2)
  assert log_log_r_squared(D, y) < 0.95


def test_nine_tenths_of_a_fall():
  # Linear in log D between points: half of the way from 10 to 1,000 is 100.
  assert reached([10, 1000], [0.8, 0.2], share=0.5) == pytest.approx(100)
  assert reached([10, 100, 1000], [0.8, 0.2, 0.2]) == pytest.approx(10 * 10**0.9)
  assert reached([1000, 10, 100], [0.2, 0.8, 0.2]) == pytest.approx(10 * 10**0.9)
  assert reached([10, 10, 100], [0.9, 0.7, 0.2], share=1.0) == pytest.approx(100)
  # It may overshoot: the first time counts.
  assert reached([1, 10, 100], [1.0, 0.0, 0.5], share=1.0) == pytest.approx(10**0.5)
  assert math.isnan(reached([10, 100], [0.2, 0.3]))
  assert math.isnan(reached([10, 100], [0.2, 0.2]))


def test_format_errors_are_counted_apart_from_reasoning_errors():
  counts = dict(verified=40, wrong=30, unparsable=10, timeout=3, error=2)
  rows = [{'outcome': name} for name, count in counts.items() for _ in range(count)]
  got = errors(rows)
  assert got.format == (10 / 80, *wilson(10, 80))
  assert got.reasoning == (30 / 80, *wilson(30, 80))
  assert got.reasoning_if_parsed == (30 / 70, *wilson(30, 70))
  assert (got.judged, got.unjudged) == (80, 5)
  assert str(got) == 'format errors 12.5%, reasoning errors 37.5% of 80'
  assert errors([{'outcome': 'unparsable'}]).reasoning_if_parsed is None


@pytest.mark.parametrize('freedom', [3, 4, 5, 10, 21, 1000])
def test_students_quantile(freedom):
  expected = stats.t.ppf(0.975, freedom)
  np.testing.assert_allclose(scaling_law._student(freedom), expected, atol=4e-3)
  if freedom > 4:
    np.testing.assert_allclose(scaling_law._student(freedom), expected, atol=5e-4)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: fit(D, D * 1.0, 'linear'), "form='linear'"),
    (lambda: fit(D, np.ones(7), 'power'), r'examples \[8\] must be \[n\]'),
    (lambda: fit(D[:4], np.arange(4.0), 'power'), '4 points'),
    (lambda: fit([9] * 8, np.arange(8.0), 'power'), '1 numbers of examples'),
    (lambda: fit(D[:5], np.arange(5.0), 'saturating'), 'needs 6 points at 3'),
    (lambda: fit(D - 10, D * 1.0, 'power'), 'must be positive'),
    (lambda: fit(D, D * np.nan, 'power'), 'value finite'),
    (lambda: fit(D, np.zeros(8), 'power'), 'every value is 0'),
    (lambda: compare(D, D * 1.0), 'not %'),
    (lambda: log_log_r_squared(D, D - 10.0), 'not positive'),
    (lambda: reached(D, D, share=0), 'share=0'),
    (lambda: reached([3, 3], [1, 2]), 'one number'),
    (lambda: errors([]), 'no transcript'),
    (lambda: errors([{'outcome': 'timeout'}]), 'no transcript'),
    (lambda: errors([{'outcome': 'judged'}]), 'neither right nor wrong'),
  ],
)
def test_bad_input_is_one_clear_line(call, message):
  with pytest.raises(ValueError, match=message) as error:
    call()
  assert '\n' not in str(error.value)
