"""Against 60-digit decimals, binomial sums and worlds whose every probability is known."""

import decimal
import math

import numpy as np
import pytest

from educe.environments import tabular
from educe.measurement import support
from educe.measurement.accuracy import wilson

RNG = np.random.default_rng(0)
D = decimal.Decimal


@pytest.fixture(autouse=True)
def _digits():
  with decimal.localcontext(prec=60):
    yield


def kl_in_decimals(mass, log_p):
  m, p = D(mass), D(log_p).exp()
  away = (1 - m) * ((1 - m).ln() - (1 - p).ln()) if m < 1 else 0
  return float(m * (m.ln() - D(log_p)) + away)


def test_thresholds_as_printed():
  """Three digits of each, as the specification of accessible support has them."""
  k = 1024
  printed = [
    (support.sampling(k, 0.95), 2.92e-3, 5e-6),
    (support.sampling(k, 0.5), 6.77e-4, 5e-7),
    (support.sampling(k, 1 - (1 - 1 / k) ** k), 9.77e-4, 5e-7),  # log p ≥ −log k
    (support.sampling(8192), 3.66e-4, 5e-7),  # −log(0.05)/8192
  ]
  for log_eps, want, digits in printed:
    np.testing.assert_allclose(math.exp(log_eps), want, rtol=0, atol=digits)


@pytest.mark.parametrize('draws', [1, 7, 1024, 10**12, 10**30])
@pytest.mark.parametrize('chance', [1e-9, 0.5, 0.95, 1 - 1e-6])
def test_sampling_and_training_in_sixty_digits(draws, chance):
  """ε itself would have lost all digits at 1e12 draws, had it been taken from 1."""
  want = float((1 - (1 - D(chance)) ** (1 / D(draws))).ln())
  np.testing.assert_allclose(support.sampling(draws, chance), want, rtol=1e-14)
  want = float((1 - D(chance) ** (1 / D(4 * draws))).ln())
  np.testing.assert_allclose(support.training(4, draws, chance), want, rtol=1e-14)


def test_at_the_threshold_a_run_misses_with_the_chance_zeta():
  p = math.exp(support.training(16, 50, 0.05))
  np.testing.assert_allclose((1 - p) ** (16 * 50), 0.05, rtol=1e-12)
  p = math.exp(support.sampling(64, 0.9))
  np.testing.assert_allclose(1 - (1 - p) ** 64, 0.9, rtol=1e-12)


@pytest.mark.parametrize(
  ('mass', 'printed'),
  [(0.5, (1.61, 3.91, 8.52, 17.73)), (0.9, (3.82, 7.96, 16.25, 32.83))],
)
def test_the_cost_of_a_mass_as_printed(mass, printed):
  got = support.cost(mass, np.log([1e-2, 1e-4, 1e-8, 1e-16]))
  np.testing.assert_allclose(got, printed, atol=5e-3)


@pytest.mark.parametrize('mass', [1e-3, 0.5, 0.999, 1.0])
def test_costs_keep_their_digits_far_out(mass):
  """Of p = e^−2000 a float64 has no bit left, of its logarithm all of them."""
  for below in (1e-3, 1.0, 40.0, 2000.0):
    log_p = math.log(mass) - below
    got, want = support.cost(mass, log_p), kl_in_decimals(mass, log_p)
    # Near p = m, kl is a difference of terms of order m: their rounding is absolute.
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(support.divergence(want, mass), log_p, rtol=1e-9)


def test_what_is_there_already_costs_nothing():
  np.testing.assert_array_equal(support.cost(0.5, np.log([0.5, 0.7, 1.0])), 0)
  assert support.cost(1.0, 0.0) == 0
  assert support.cost(0.5, -np.inf) == np.inf
  np.testing.assert_allclose(support.divergence(0.0, 0.3), math.log(0.3), rtol=1e-7)


def test_no_policy_with_that_mass_is_nearer():
  """The binary tilt of that mass costs just this, and random policies cost more."""
  p0 = RNG.dirichlet(np.ones(6))
  correct = np.array([1.0, 1, 0, 0, 0, 0])
  for beta in (0.2, 0.5, 2.0):
    tilt = tabular.gibbs(p0, correct, beta)
    mass, log_p = float(tilt @ correct), math.log(p0 @ correct)
    least = support.cost(mass, log_p)
    np.testing.assert_allclose(least, tabular.kl(tilt, p0), rtol=1e-12)
    inside, outside = RNG.dirichlet(np.ones(2), 50), RNG.dirichlet(np.ones(4), 50)
    others = np.concatenate([mass * inside, (1 - mass) * outside], 1)
    assert (tabular.kl(others, p0) > least).all()
    assert support.divergence(float(least) * 1.001, mass) < log_p
    assert support.divergence(float(least) * 0.999, mass) > log_p


def test_regimes_begin_where_they_say():
  log_eps, step = support.sampling(1024), math.log(0.01)
  table = [
    (math.log(0.9), -math.inf, 'basin'),
    (support.BASIN, -math.inf, 'basin'),
    (np.nextafter(support.BASIN, -9), -math.inf, 'tail'),
    (log_eps, -math.inf, 'tail'),
    (np.nextafter(log_eps, -9), step, 'barrier'),
    (np.nextafter(log_eps, -9), np.nextafter(step, -9), 'singular'),
    (-900.0, 0.0, 'barrier'),
    (-math.inf, -math.inf, 'singular'),
  ]
  log_p, log_step, want = zip(*table, strict=True)
  got = support.regimes(log_p, log_step, k=1024, eps_step=0.01)
  np.testing.assert_array_equal(got, want)
  # More samples move what is behind a barrier into the tail; nothing else moves.
  deep = support.regimes(math.log(1e-5), step, k=1e6, eps_step=0.01)
  assert (deep, support.regimes(math.log(1e-5), step, k=1024, eps_step=0.01)) == (
    'tail',
    'barrier',
  )
  got = support.regimes(log_eps, -9.0, k=1024, eps_step=0.01, delta=0.99)
  assert got == 'singular'


def test_the_curve_of_known_probabilities():
  p = np.array([0.9, 0.05, 1e-3, 0.0])
  with np.errstate(divide='ignore'):
    got = support.reach(np.log(p), [1, 64, 10_000])
  np.testing.assert_array_equal(got.accessible, [0, 0.5, 0.75])
  np.testing.assert_array_equal(got.undecided, 0)
  np.testing.assert_array_equal(
    np.stack([got.low, got.high], 1), [wilson(n, 4) for n in (0, 2, 3)]
  )
  assert str(got) == (
    '75.0% of 4 prompts accessible in 10,000 samples (95 % interval 30.1% to 95.4%)'
  )
  half = support.reach(np.log(p[:3]), [1, 64, 10_000], delta=0.5)
  np.testing.assert_allclose(half.accessible, [1 / 3, 2 / 3, 1])


def binomial(n, p):
  return np.array([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)])


def test_clopper_and_pearson_by_sums():
  n = 30
  c = np.arange(n + 1)
  low, high = support.clopper_pearson(c, n)
  assert (low[0], high[n]) == (0, 1)
  for i in range(1, n + 1):
    np.testing.assert_allclose(binomial(n, low[i])[i:].sum(), 0.025, rtol=1e-9)
  for i in range(n):
    np.testing.assert_allclose(binomial(n, high[i])[: i + 1].sum(), 0.025, rtol=1e-9)


@pytest.mark.parametrize('eps', [0.003, 0.05, 0.4])
def test_a_decision_is_wrong_once_in_forty_at_most(eps):
  """By the sum over all counts, at the p that are hardest to tell from ε."""
  n = 400
  told = support.decide(np.arange(n + 1), n, math.log(eps))
  assert binomial(n, eps * (1 - 1e-9))[told == 1].sum() <= 0.025
  assert binomial(n, eps)[told == -1].sum() <= 0.025
  assert binomial(n, min(1.0, 8 * eps))[told == 1].sum() > 0.5  # and it does tell


def test_few_samples_do_not_deny():
  log_eps = support.sampling(1024)  # 0.0029
  got = support.decide([0, 0, 3, 64], [64, 4096, 64, 64], log_eps)
  np.testing.assert_array_equal(got, [0, -1, 1, 1])
  got = support.sampled_reach([0, 0, 3, 64], 64, [1, 1024])
  np.testing.assert_array_equal(got.accessible, [0, 0.5])
  np.testing.assert_array_equal(got.undecided, [0.25, 0.5])  # p = 0.95 or more, of 64
  assert (got.low[1], got.high[1]) == (wilson(2, 4)[0], wilson(4, 4)[1])
  assert str(got).endswith('50.0% undecided)')


def test_samples_say_of_a_world_what_is_true_of_it():
  """200 seeds: 60 prompts of log-uniform p in [1e-5, 1], 256 samples of each."""
  ks = [8, 32, 256, 2048]
  log_eps = np.array([support.sampling(k) for k in ks])
  share = log_eps / math.log(1e-5)  # of log-uniform p above ε: the truth
  rng = np.random.default_rng(1)
  covered, exact, wrong, undecided = np.zeros((4, len(ks)))
  for _ in range(200):
    log_p = rng.uniform(math.log(1e-5), 0, 60)
    correct = rng.binomial(256, np.exp(log_p))
    got, known = support.sampled_reach(correct, 256, ks), support.reach(log_p, ks)
    covered += (got.low <= share) & (share <= got.high)
    exact += (known.low <= share) & (share <= known.high)
    told = np.stack([support.decide(correct, 256, e) for e in log_eps])
    true = np.where(log_p >= log_eps[:, None], 1, -1)
    wrong += (told == -true).mean(1)
    undecided += got.undecided
    # Whoever is certain of more prompts than there are is wrong about some of them.
    extra = (told == 1).mean(1) - known.accessible
    assert (extra <= (told == -true).mean(1) + 1e-12).all()
  assert (covered / 200 > 0.93).all()
  assert (exact / 200 > 0.9).all()  # Wilson's, at 60 prompts, is 93 to 97 %
  assert (wrong / 200 < 0.025).all()
  assert undecided[3] / 200 > 0.5 > 0.1 > undecided[0] / 200  # k ≫ N cannot be told


def test_bad_input_is_one_clear_line():
  for message, call in [
    ('k=0 samples must be 1', lambda: support.sampling(0)),
    ('delta=1.0 must be between', lambda: support.sampling(4, 1.0)),
    ('group=0 and visits=3', lambda: support.training(0, 3)),
    ('zeta=0 must be between', lambda: support.training(4, 3, 0)),
    ('kappa=-1 nats', lambda: support.divergence(-1)),
    ('mass=0 must be above 0', lambda: support.divergence(1, 0)),
    ('mass=2 must be above 0', lambda: support.cost(2, -1.0)),
    ('0.3 is no log-probability', lambda: support.cost(0.5, [-1, 0.3])),
    ('nan is no log-probability', lambda: support.reach([np.nan], [4])),
    ('ks is empty', lambda: support.reach([-1.0], [])),
    ('there are no prompts', lambda: support.reach([], [4])),
    ('k=8 samples leave no tail: ε=0.312', lambda: support.regimes(
      -1.0, -1.0, k=8, eps_step=0.1)),
    ('eps_step=0 must', lambda: support.regimes(-1.0, -1.0, k=64, eps_step=0)),
    ('5 correct of 4 samples', lambda: support.decide([1, 5], 4, -1.0)),
    ('0 correct of 0 samples', lambda: support.sampled_reach([0], [0], [4])),
  ]:  # fmt: skip
    with pytest.raises(ValueError, match=message):
      call()
