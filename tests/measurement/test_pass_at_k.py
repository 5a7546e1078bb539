"""Against subsets, whole-number arithmetic, enumeration, and 200 sampled experiments."""

import decimal
import fractions
import itertools
import math

import numpy as np
import pytest

from educe.measurement import pass_at_k as measure

K = np.array([1, 2, 4, 8, 16, 32, 64])


def tilted(p, log_odds):
  """Odds times e^log_odds: what a Gibbs tilt by a 0/1 reward does to a prompt."""
  return p * np.exp(log_odds) / (1 - p + p * np.exp(log_odds))


def world(prompts, seed, *, interference=0.35, below=0.02, by=1e-3):
  """(base, ours) `[P]`: a tilt that pushes some of the hard prompts down."""
  rng = np.random.default_rng(seed)
  base = rng.beta(0.25, 1.5, prompts)
  down = (base < below) & (rng.random(prompts) < interference)
  return base, np.where(down, base * by, tilted(base, 3.0))


def test_the_estimate_is_the_share_of_subsets():
  for n in range(1, 8):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
      samples = [True] * c + [False] * (n - c)
      want = np.mean([any(s) for s in itertools.combinations(samples, k)])
      np.testing.assert_allclose(measure.pass_at_k(n, c, k), want, atol=1e-15)


@pytest.mark.parametrize(
  ('n', 'c', 'k'),
  [
    (10**6, 1, 1),
    (10**6, 3, 7),
    (10**6, 2, 10**6 - 5),
    (10**6, 999_990, 2),
    (10**6, 1, 500_000),
    (20_000, 1, 1),
    (20_000, 37, 200),
    (20_000, 5_000, 3),
    (20_000, 3, 9_000),
    (20_000, 10_000, 10_000),
    (20_000, 10_001, 10_000),
  ],
)
def test_no_digits_are_lost(n, c, k):
  few, many = sorted((c, k))
  every = math.comb(n, few)
  want = (every - math.comb(n - many, few)) / every  # whole numbers: rounded once
  # A sum of up to 20,000 logarithms, each right to 1e-16 of itself.
  np.testing.assert_allclose(measure.pass_at_k(n, c, k), want, rtol=1e-13)


def test_it_broadcasts():
  n, c = np.array([5, 8, 8]), np.array([0, 3, 8])
  got = measure.pass_at_k(n[:, None], c[:, None], [1, 2, 5])
  assert got.shape == (3, 3)
  for i, j in np.ndindex(3, 3):
    assert got[i, j] == measure.pass_at_k(n[i], c[i], [1, 2, 5][j])
  np.testing.assert_allclose(got[:, 0], [0, 3 / 8, 1], rtol=1e-15)
  assert not np.signbit(got).any()


@pytest.mark.parametrize('p', [0.0, 1e-12, 0.003, 0.5, 0.97, 1.0])
def test_the_estimate_is_unbiased(p):
  """Its mean over the binomial count of correct ones is the closed form."""
  n, c = 24, np.arange(25)
  chance = np.array([math.comb(n, x) * p**x * (1 - p) ** (n - x) for x in range(25)])
  for k in (1, 2, 7, 24):
    mean = chance @ measure.pass_at_k(n, c, k)
    np.testing.assert_allclose(mean, measure.exact(p, k), rtol=1e-12)


@pytest.mark.parametrize('p', [1e-300, 1e-18, 3e-9, 1e-4, 0.3, 0.999])
@pytest.mark.parametrize('k', [1, 3, 1000, 2**20])
def test_the_closed_form_keeps_its_digits(p, k):
  with decimal.localcontext(prec=700):
    want = float(1 - (1 - decimal.Decimal(p)) ** k)
  np.testing.assert_allclose(measure.exact(p, k), want, rtol=1e-15 * 4)


def test_the_ends_of_the_closed_form():
  np.testing.assert_array_equal(measure.exact([0.0, 1.0, 1 + 1e-12], 2**20), [0, 1, 1])
  got = measure.exact(np.array([[0.1], [0.2]]), [1, 2])
  np.testing.assert_allclose(got, [[0.1, 0.19], [0.2, 0.36]])


def test_the_beta_form():
  """I20: as a product of fractions, as an integral, and where k is large."""
  for k in (1, 2, 9, 40):
    a, b = fractions.Fraction(1, 4), fractions.Fraction(3, 2)
    miss = math.prod((b + i) / (a + b + i) for i in range(k))
    np.testing.assert_allclose(measure.beta(0.25, 1.5, k), float(1 - miss), rtol=1e-14)
  # p = u⁴ takes the pole of p^−3/4 away; b = 2 leaves polynomials, which are exact.
  node, weight = np.polynomial.legendre.leggauss(80)
  u, weight = (node + 1) / 2, weight / 2
  density = 4 * (1 - u**4) / (1 / 0.25 - 1 / 1.25)  # B(¼, 2) = ∫ p^−¾·(1 − p)
  for k in (1, 5, 30):
    integral = (weight * density * measure.exact(u**4, k)).sum()
    np.testing.assert_allclose(measure.beta(0.25, 2, k), integral, rtol=1e-13)
  # B(a, b+k)/B(a, b) → Γ(a+b)/Γ(b)·k^−a·(1 − a(a+2b−1)/(2k)): the next term is k^−2.
  k = 2**20
  tail = math.gamma(1.75) / math.gamma(1.5) * k**-0.25
  tail *= 1 - 0.25 * (0.25 + 3 - 1) / (2 * k)
  np.testing.assert_allclose(1 - measure.beta(0.25, 1.5, k), tail, rtol=1e-11)


def test_a_tilt_crosses_nothing_and_interference_does():
  """I20's table, from 200,000 prompts: their deviation is at most 0.0009."""
  k = np.array([1, 4, 16, 64, 256, 1024])
  base, ours = world(200_000, 0)
  got = [measure.exact(x[:, None], k).mean(0) for x in (base, tilted(base, 3), ours)]
  np.testing.assert_allclose(got[0], measure.beta(0.25, 1.5, k), atol=0.003)
  np.testing.assert_allclose(got[0], [0.143, 0.311, 0.490, 0.634, 0.740, 0.816], atol=0.004)  # fmt: skip  # noqa: E501
  np.testing.assert_allclose(got[1], [0.450, 0.641, 0.752, 0.825, 0.877, 0.913], atol=0.004)  # fmt: skip  # noqa: E501
  np.testing.assert_allclose(got[2], [0.440, 0.610, 0.689, 0.737, 0.770, 0.794], atol=0.004)  # fmt: skip  # noqa: E501
  values = [measure.exact(x[:500, None], k) for x in (base, tilted(base, 3), ours)]
  free = measure.compare(values[1], values[0], k, resamples=200)
  assert (free.crossing, free.crossing_low, free.crossing_high) == (None, None, None)
  assert free.crossed == 0
  assert (free.difference > 0).all()
  held = measure.compare(values[2], values[0], k, resamples=200)
  assert 256 < held.crossing < 1024
  assert held.crossing_low < held.crossing


def test_rewards_are_counted():
  rewards = [[1, 0, np.nan, 2.5], [0.999, -1, 0, 0], [np.nan, np.nan, 1, 1]]
  n, c = measure.counts(rewards)
  assert (n.tolist(), c.tolist()) == ([3, 4, 2], [2, 0, 2])
  want = [[2 / 3, 1], [0, 0], [1, 1]]
  np.testing.assert_allclose(measure.estimates(rewards, [1, 2]), want, rtol=1e-15)
  assert measure.ladder(1).tolist() == [1]
  assert measure.ladder(64).tolist() == [1, 2, 4, 8, 16, 32, 64]
  assert measure.ladder(100).tolist() == [1, 2, 4, 8, 16, 32, 64, 100]


def test_curves_are_unbiased_and_covered():
  """200 experiments of 80 prompts from Beta(.5, 1), 16 samples of each."""
  k, rng = np.array([1, 4, 16]), np.random.default_rng(0)
  truth = measure.beta(0.5, 1.0, k)
  rates, hits = [], 0
  for seed in range(200):
    p = rng.beta(0.5, 1.0, (80, 1))
    got = measure.curve(
      measure.estimates(rng.random((80, 16)) < p, k), k, resamples=400, seed=seed
    )
    rates.append(got.rate)
    hits += (got.low <= truth) & (truth <= got.high)
  error = np.std(rates, 0) / np.sqrt(200)
  assert (np.abs(np.mean(rates, 0) - truth) < 3.5 * error).all()
  assert (error < 0.004).all()
  # 95 % less about 1 for the percentile interval of 80; 200 trials deviate by 1.6 %.
  assert (hits / 200 >= 0.89).all()
  assert (hits / 200 <= 0.985).all()


def test_a_curve_in_one_line():
  got = measure.curve(np.tile([[0.0, 0.5], [0.5, 1.0]], (50, 1)), [1, 8])
  assert got.prompts == 100
  np.testing.assert_allclose(got.rate, [0.25, 0.75])
  # The deviation of a mean of 100 values of 0 and ½ is 0.025.
  np.testing.assert_allclose(got.low, got.rate - 1.96 * 0.025, atol=0.005)
  np.testing.assert_allclose(got.high, got.rate + 1.96 * 0.025, atol=0.005)
  assert str(got).startswith('pass@1 25.0% (2')
  assert str(got).endswith('; 95 % intervals over 100 prompts')


def test_the_crossing_is_read_off_the_difference():
  k = np.array([1, 4, 16])
  lead = np.array(
    [
      [0.2, 0.1, -0.1],  # half way between 4 and 16, in log k
      [0.2, -0.6, 0.3],  # the first of two, a quarter of the way from 1 to 4
      [0.2, 0.1, 0.0],  # equality is none
      [0.2, 0.0, -0.1],
      [-0.1, 0.2, 0.2],  # the other led from the start
      [0.0, 0.0, 0.0],
      [0.2, 1e-16, -1e-16],  # two means that rounding parts
    ]
  )
  want = [8, 4**0.25, np.inf, 4, 1, np.inf, np.inf]
  np.testing.assert_allclose(measure.first_crossing(lead, k), want, rtol=1e-12)


def test_who_leads_is_not_who_is_ours():
  base, ours = world(300, 1)
  k = 2 ** np.arange(12)
  values = [measure.exact(x[:, None], k) for x in (ours, base)]
  one = measure.compare(*values, k, resamples=200)
  other = measure.compare(*values[::-1], k, resamples=200)
  np.testing.assert_allclose(one.difference, -other.difference)
  np.testing.assert_allclose(one.low, -other.high, atol=1e-15)
  assert one.crossing is not None
  assert one[5:8] == other[5:8]
  text = str(one)
  assert (
    f'crossing: k* = {one.crossing:.4g} (95 % interval {one.crossing_low:.4g}' in text
  )
  assert ' at k=1 and ' in text
  assert text.endswith('300 prompts')


def test_crossing_and_difference_are_covered():
  """200 experiments of 150 prompts, 64 samples by each policy."""
  given = dict(interference=0.6, below=0.2)
  many = world(200_000, 10**6, **given)
  fine = np.unique(np.geomspace(1, 64, 60).round().astype(int))
  lead = np.subtract(*(measure.exact(x[:, None], fine).mean(0) for x in many[::-1]))
  star = measure.first_crossing(lead[None], fine)[0]
  assert 4 < star < 20
  truth = np.subtract(*(measure.exact(x[:, None], K).mean(0) for x in many[::-1]))
  table = measure.pass_at_k(64, np.arange(65)[:, None], K)
  gaps, hits, covered, inside = [], 0, 0, 0
  for seed in range(200):
    rng = np.random.default_rng([7, seed])
    base, ours = (table[rng.binomial(64, p)] for p in world(150, seed, **given))
    got = measure.compare(ours, base, K, resamples=300, seed=seed)
    gaps.append(got.difference)
    hits += (got.low <= truth) & (truth <= got.high)
    high = math.inf if got.crossing_high is None else got.crossing_high
    covered += (got.crossing_low or math.inf) <= star <= high
    inside += got.crossing_high is not None
  error = np.std(gaps, 0) / np.sqrt(200)
  assert (np.abs(np.mean(gaps, 0) - truth) < 3.5 * error).all()
  for share in (*(hits / 200), covered / 200):
    assert 0.89 <= share <= 0.99
  assert inside > 100  # the intervals are not all open


def test_the_same_policy_twice_does_not_differ():
  """Over 200 seeds 0 is covered at every k, and where they cross is not known."""
  table = measure.pass_at_k(64, np.arange(65)[:, None], K)
  hits, known = 0, 0
  for seed in range(200):
    rng = np.random.default_rng(seed)
    p = rng.beta(0.25, 1.5, 100)
    got = measure.compare(
      *(table[rng.binomial(64, p)] for _ in range(2)), K, resamples=300, seed=seed
    )
    hits += (got.low <= 0) & (got.high >= 0)
    known += got.crossing_low != 1 and got.crossing_high is not None
  assert (hits / 200 >= 0.89).all()
  assert known <= 20  # an interval that excludes both ends of the range: about 5 %
  equal = measure.compare(table[:9], table[:9], K)
  assert (equal.difference == 0).all()
  assert (equal.low < 0).all()  # nine prompts that do not differ: others may
  assert (equal.high > 0).all()
  assert equal.crossing is None
  assert 'crossing: none (95 % interval beyond 64 to beyond 64; in 0%' in str(equal)


def test_bad_input_is_one_clear_line():
  few = [[1, 0, np.nan, np.nan], [1, 0, 0, 0]]
  with pytest.raises(ValueError, match=r'k=4 needs as many.* one has 2; .* k ≤ 2,'):
    measure.estimates(few, [1, 4])
  with pytest.raises(ValueError, match='one has 0; sample more, or leave that prompt'):
    measure.estimates([[np.nan], [1]], [1])
  with pytest.raises(ValueError, match=r'must be \[P, N\], not \[3\]'):
    measure.counts(np.zeros(3))
  with pytest.raises(ValueError, match='must be between 0 and n'):
    measure.pass_at_k(3, 4, 1)
  with pytest.raises(ValueError, match='must be between 0 and n'):
    measure.pass_at_k(3, -1, 1)
  for f in (
    lambda: measure.pass_at_k(3, 1, 0),
    lambda: measure.exact(0.5, 0),
    lambda: measure.beta(1, 1, 0),
  ):
    with pytest.raises(ValueError, match='k=0 must be 1 or more'):
      f()
  with pytest.raises(ValueError, match=r'k=\[1.5\] must be whole'):
    measure.exact(0.5, 1.5)
  with pytest.raises(ValueError, match=r'c=\[nan\] must be whole'):
    measure.pass_at_k(3, np.nan, 1)
  for p in (-0.1, 1.1, np.nan):
    with pytest.raises(ValueError, match='not between 0 and 1'):
      measure.exact(p, 1)
  for a, b in ((0, 1), (1, 0)):
    with pytest.raises(ValueError, match='needs two positive numbers'):
      measure.beta(a, b, 1)
  with pytest.raises(ValueError, match='k=0 has no point'):
    measure.ladder(0)
  with pytest.raises(ValueError, match=r'values \[2, 3\] must be \[P, K\].* the 2 k'):
    measure.curve(np.zeros((2, 3)), [1, 2])
  with pytest.raises(ValueError, match='2 prompts of ours and 3 of theirs'):
    measure.compare(np.zeros((2, 1)), np.zeros((3, 1)), [1])
  with pytest.raises(ValueError, match=r'k must rise .* not \[2, 1\]'):
    measure.compare(np.zeros((2, 2)), np.zeros((2, 2)), [2, 1])
