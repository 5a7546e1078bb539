"""Published counts, loops and enumerations; sampled estimates beside exact worlds."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from educe.environments import tabular
from educe.measurement import pass_at_k, support
from educe.measurement import support_dynamics as dynamics
from educe.measurement.accuracy import wilson
from educe.measurement.support_dynamics import above_noise, creation, fates, twice

RNG = np.random.default_rng(0)
NAN = math.nan


def sets(preserved, gained, lost, out):
  """Accessible before and after, `[P]`, with so many of each fate."""
  before = [1] * preserved + [0] * gained + [1] * lost + [0] * out
  after = [1] * preserved + [1] * gained + [0] * lost + [0] * out
  return np.array(before, bool), np.array(after, bool)


# One run of RLOO at three depths and three budgets: (P, E, S, O), SRR, NDR, NSCR.
LEDGER = [
  ((0, 158, 0, 34), NAN, 1.00, 1.00),
  ((50, 109, 3, 30), 0.943, 0.686, 0.654),
  ((157, 6, 21, 8), 0.882, 0.037, -0.082),
  ((0, 64, 0, 32), NAN, 1.00, 1.00),
  ((33, 37, 4, 22), 0.892, 0.529, 0.446),
  ((70, 7, 13, 6), 0.843, 0.091, -0.067),
  ((0, 84, 0, 1644), NAN, 1.00, 1.00),
  ((0, 170, 0, 1558), NAN, 1.00, 1.00),
  ((11, 292, 3, 1422), 0.786, 0.964, 0.944),
]


@pytest.mark.parametrize('row', LEDGER, ids=lambda row: str(row[0]))
def test_the_ledger_of_a_run_as_printed(row):
  counts, srr, ndr, nscr = row
  got = dynamics.dynamics(fates(*sets(*counts)), resamples=100)
  assert got[:4] == counts
  values = [got.srr.value, got.ndr.value, got.nscr.value]
  np.testing.assert_allclose(values, [srr, ndr, nscr], atol=5e-4)
  p, e, s, _ = counts
  if p:
    harmonic = 2 / (1 / got.srr.value + 1 / got.ndr.value)
    np.testing.assert_allclose(got.sds.value, harmonic, rtol=1e-12)
  else:
    assert math.isnan(got.sds.value)
  assert (got.up, got.down) == (e, s)
  want = stats.binomtest(e, e + s).pvalue
  np.testing.assert_allclose(got.p_value, want, rtol=1e-9)


def test_published_rates_of_published_counts():
  """Wu et al., 2025, tables 1 and 3."""
  for counts, srr, nscr, digits in [
    ((2400, 36, 163, 805), 0.94, -0.05, 5e-3),
    ((154, 28, 18, 72), None, 0.050, 5e-4),
    ((138, 12, 34, 88), None, -0.120, 5e-4),
  ]:
    got = dynamics.dynamics(fates(*sets(*counts)), resamples=100)
    np.testing.assert_allclose(got.nscr.value, nscr, atol=digits)
    if srr:
      np.testing.assert_allclose(got.srr.value, srr, atol=digits)


def test_what_has_no_support_has_no_rates():
  got = dynamics.dynamics(fates(*sets(0, 0, 0, 5)))
  for estimate in got[4:8]:
    assert all(map(math.isnan, estimate))
  assert got.p_value == 1
  lost = dynamics.dynamics(fates(*sets(0, 0, 4, 1)), resamples=100)
  assert (lost.srr.value, lost.nscr.value) == (0, -1)
  assert math.isnan(lost.ndr.value)
  assert math.isnan(lost.sds.value)


def test_sets_of_outputs_by_loop():
  before, after, counted = RNG.random((3, 6, 9)) < 0.5
  got = fates(before, after, counted)
  for x in range(6):
    want = [0, 0, 0, 0]
    for a, b, c in zip(before[x], after[x], counted[x], strict=True):
      if c:
        want[{(1, 1): 0, (0, 1): 1, (1, 0): 2, (0, 0): 3}[a, b]] += 1
    np.testing.assert_array_equal(got[x], want)
  np.testing.assert_array_equal(fates(before, after).sum(1), 9)


def test_chances_give_the_expected_sets():
  """By the sum over all outcomes of four independent evaluations."""
  a, b = np.array([0.3, 0.9]), np.array([0.2, 0.6])
  want = np.zeros((2, 4))
  for seen in itertools.product([0, 1], repeat=4):
    before, after = np.array(seen[:2]), np.array(seen[2:])
    chance = np.prod(np.where(before, a, 1 - a)) * np.prod(np.where(after, b, 1 - b))
    want += chance * fates(before, after)
  np.testing.assert_allclose(fates(a, b), want, atol=1e-15)


@pytest.mark.parametrize('c', range(7))
@pytest.mark.parametrize('k', [1, 2, 3])
def test_twice_is_the_mean_over_disjoint_subsets(c, k):
  correct = set(range(c))
  total, pairs = np.zeros(4), 0
  for first in itertools.combinations(range(6), k):
    for second in itertools.combinations(sorted(set(range(6)) - {*first}), k):
      a, b = bool(correct & {*first}), bool(correct & {*second})
      total += [a and b, b and not a, a and not b, not a and not b]
      pairs += 1
  np.testing.assert_allclose(twice([c], [6], k), [total / pairs], atol=1e-15)


def test_twice_is_unbiased():
  """The mean over every count c of N = 9 is what two evaluations of k = 4 give."""
  for p in (1e-3, 0.2, 0.9):
    chance = stats.binom.pmf(np.arange(10), 9, p)
    a = 1 - (1 - p) ** 4
    want = [a * a, a * (1 - a), a * (1 - a), (1 - a) ** 2]
    np.testing.assert_allclose(chance @ twice(np.arange(10), 9, 4), want, atol=1e-14)
    np.testing.assert_allclose(fates([a], [a]), [want], atol=1e-15)


@pytest.mark.parametrize(('k', 'floor'), [(256, 0.89), (1024, 0.91), (8192, 0.93)])
def test_the_noise_floor_as_printed(k, floor):
  """Log-uniform p in [1e-6, 1]: nothing changed, and SRR is what papers report."""
  log_p = (np.arange(4000) + 0.5) / 4000 * math.log(1e-6)
  a = pass_at_k.exact(np.exp(log_p), k)
  got = dynamics.dynamics(fates(a, a), resamples=100)
  np.testing.assert_allclose(got.srr.value, floor, atol=5e-3)
  np.testing.assert_allclose(got.ndr.value, 1 - floor, atol=5e-3)
  assert (got.nscr.value, got.up, got.down) == (0, 0, 0)


def test_a_binary_tilt_loses_nothing_at_any_budget():
  """Every correct output gains the same factor: SRR = 1, NSCR ≥ 0 at every ε."""
  p0 = RNG.dirichlet(np.full(40, 0.2), 12)
  correct = RNG.random((12, 40)) < 0.3
  tilt = tabular.gibbs(p0, correct.astype(float), 0.4)
  collapsed = np.where(correct & (p0 < p0.max(1, keepdims=True)), p0 * 1e-3, p0)
  for k in (1, 8, 64, 512, 4096):
    log_eps = support.sampling(k)
    before, after, few = (np.log(x + 1e-300) >= log_eps for x in (p0, tilt, collapsed))
    table = fates(before, after, correct)
    assert table[:, 2].sum() == 0
    assert not dynamics.dynamics(table, resamples=100).nscr.value < 0
    if k > 8:
      assert fates(before, few, correct)[:, 2].sum() > 0  # a collapse does


def test_intervals_by_another_bootstrap():
  """Of a share of 200 the standard error is √(s(1−s)/n) with n itself at random."""
  got = dynamics.dynamics(fates(*sets(120, 40, 30, 10)))
  for estimate, n in ((got.srr, 150), (got.ndr, 160)):
    error = math.sqrt(estimate.value * (1 - estimate.value) / n)
    width = (estimate.high - estimate.low) / (2 * 1.96)
    np.testing.assert_allclose(width, error, rtol=0.12)
    assert estimate.low < estimate.value < estimate.high
  total = 190
  variance = (40 + 30 - 10**2 / total) / total**2
  width = (got.nscr.high - got.nscr.low) / (2 * 1.96)
  np.testing.assert_allclose(width, math.sqrt(variance), rtol=0.12)
  assert got.sds.low < got.sds.value < got.sds.high


def test_nothing_lost_is_no_proof_that_nothing_can_be():
  got = dynamics.dynamics(fates(*sets(20, 0, 0, 5)), resamples=100)
  assert (got.srr.low, got.srr.high) == (wilson(20, 20)[0], 1)
  assert (got.ndr.low, got.ndr.high) == (0, wilson(0, 20)[1])
  np.testing.assert_allclose(got.nscr[1:], [-wilson(0, 20)[1], wilson(0, 20)[1]])
  # Twenty outputs of one prompt stand or fall together: they are one observation.
  one = dynamics.dynamics(fates(*(x[None] for x in sets(20, 0, 0, 5))), resamples=100)
  assert one.srr.low == wilson(1, 1)[0]


def test_resampling_is_seeded_and_read():
  table = fates(*sets(20, 8, 5, 9))
  one, same = dynamics.dynamics(table), dynamics.dynamics(table, seed=0)
  assert one.sds == same.sds
  assert one.sds != dynamics.dynamics(table, seed=1).sds
  assert one.sds != dynamics.dynamics(table, resamples=100).sds


def population(rng, prompts):
  """p0 log-uniform in [1e-4, 1]; π is p0 times a random factor, where that is below 1."""
  log_p0 = rng.uniform(math.log(1e-4), 0, prompts)
  log_pi = np.minimum(log_p0 + rng.normal(0.5, 2.0, prompts), -1e-3)
  return log_p0, log_pi


def sampled(rng, log_p0, log_pi, n, k):
  """Unbiased chances of being seen, from n samples of each policy."""
  chances = []
  for log_p in (log_p0, log_pi):
    correct = rng.binomial(n, np.exp(log_p))
    chances.append(1 - stats.hypergeom.pmf(0, n, correct, k))
  return chances


@pytest.mark.parametrize('known', [True, False], ids=['exact', 'sampled'])
def test_the_intervals_cover_the_population(known):
  """200 seeds of 60 prompts: from known p at ε(k), and from N = 128 samples at k = 32."""
  k, rng = 32, np.random.default_rng(5)
  log_eps = support.sampling(k)
  of = lambda p: p >= log_eps if known else pass_at_k.exact(np.exp(p), k)  # noqa: E731
  p, e, s, _ = fates(*map(of, population(rng, 400_000))).sum(0)
  truth = np.array([p / (p + s), e / (p + e), 0, (e - s) / (p + e + s)])
  truth[2] = 2 / (1 / truth[0] + 1 / truth[1])
  covered, values = np.zeros(4), []
  for _ in range(200):
    drawn = population(rng, 60)
    pair = map(of, drawn) if known else sampled(rng, *drawn, 128, k)
    got = dynamics.dynamics(fates(*pair), resamples=150)
    value, low, high = np.array(got[4:8]).T
    covered += (low <= truth) & (truth <= high)
    values.append(value)
  assert (covered / 200 > 0.91).all(), covered  # 0.95 ± 2·0.015, and 60 is not many
  error = np.std(values, 0) / math.sqrt(200)
  bias = np.mean(values, 0) - truth
  # A ratio of sums is biased by its variance over its mean: by less than 0.02 here.
  assert (np.abs(bias) < 4 * error + 0.02).all(), bias


def test_the_same_policy_twice_is_no_change():
  """200 seeds: each interval has the truth in it, and the sign test errs 1 in 20."""
  k, n, rng = 32, 128, np.random.default_rng(6)
  silent, quiet, false = 0, 0, 0
  for _ in range(200):
    log_p0, _ = population(rng, 60)
    correct = rng.binomial(n, np.exp(log_p0))
    before = 1 - stats.hypergeom.pmf(0, n, correct, k)
    after = sampled(rng, log_p0, log_p0, n, k)[1]
    table = fates(before, after)
    got = dynamics.dynamics(table, resamples=150)
    assert 0.5 < got.srr.value < 0.97  # a 'shrinkage' that is nothing but sampling
    silent += got.nscr.low <= 0 <= got.nscr.high
    excess = above_noise(table, twice(correct, n, k), resamples=150)
    quiet += excess.srr.low <= 0 <= excess.srr.high
    false += got.p_value < 0.05
  assert silent / 200 > 0.92
  assert quiet / 200 > 0.91
  assert false / 200 < 0.09


def test_a_collapse_is_beyond_the_noise():
  """Half of the prompts lose all: told from sampling by the exact and the sampled way."""
  rng = np.random.default_rng(7)
  log_p0, _ = population(rng, 200)
  log_pi = np.where(np.arange(200) % 2, log_p0, -30.0)
  correct = rng.binomial(128, np.exp(log_p0))
  before = 1 - stats.hypergeom.pmf(0, 128, correct, 32)
  after = sampled(rng, log_p0, log_pi, 128, 32)[1]
  sampled_excess = above_noise(fates(before, after), twice(correct, 128, 32))
  a, b = pass_at_k.exact(np.exp(log_p0), 32), pass_at_k.exact(np.exp(log_pi), 32)
  exact_excess = above_noise(fates(a, b), fates(a, a))
  for excess in (sampled_excess, exact_excess):
    assert excess.srr.high < -0.2
  assert exact_excess.srr.value == pytest.approx(sampled_excess.srr.value, abs=0.1)
  assert str(exact_excess).startswith('over the same policy twice: SRR -0.')
  got = dynamics.dynamics(fates(before, after))
  assert got.nscr.high < 0
  assert got.p_value < 1e-6
  assert f'{got.down} down (p=' in str(got)


def test_the_null_is_paired():
  """Against itself nothing is left over, however few the prompts."""
  table = twice(RNG.integers(0, 40, 9), 80, 16)
  assert above_noise(table, table, resamples=100) == (((0.0,) * 3,) * 2)


def test_shares_of_the_gain_by_hand():
  p0 = np.array([0.2, 0.3, 0.0, 0.001, 0.5, 0.0] * 20)
  pi = np.array([0.6, 0.5, 0.4, 0.002, 0.4, 0.0] * 20)
  got = creation(p0, pi, p0 >= 0.01)
  np.testing.assert_allclose(got.gain.value, 0.901 / 6)
  np.testing.assert_allclose(got.created_gain.value, 0.401 / 6)
  np.testing.assert_allclose(got.created.value, 0.401 / 0.901)
  np.testing.assert_allclose(got.elicited.value, 0.5 / 0.901)
  assert got.undecided == 0
  assert got.created.low < got.created.value < got.created.high
  np.testing.assert_allclose(got.elicited.low, 1 - got.created.high)
  np.testing.assert_allclose(got.elicited.high, 1 - got.created.low)
  first = np.arange(2, 120, 6)  # those from 0 to 0.4, then those from 0.001 to 0.002
  np.testing.assert_array_equal(got.prompts, [*first, *(first + 1)])
  assert '55.5% elicited' in str(got)
  assert '44.5% created' in str(got)
  assert '; 40 prompts)' in str(got)


def test_undecided_prompts_widen_both_shares():
  p0, pi = np.zeros(60), np.tile([0.5, 0.3, 0.2], 20)
  got = creation(p0, pi, np.tile([-1, 0, 1], 20))
  np.testing.assert_allclose(
    [got.created.value, got.undecided, got.elicited.value], [0.5, 0.3, 0.2]
  )
  sure = creation(p0, pi, np.tile([-1, 1, 1], 20))
  np.testing.assert_allclose(got.created.low, sure.created.low)
  np.testing.assert_allclose(got.elicited.high, sure.elicited.high)
  sure = creation(p0, pi, np.tile([-1, -1, 1], 20))
  np.testing.assert_allclose(got.created.high, sure.created.high)
  np.testing.assert_allclose(got.elicited.low, sure.elicited.low)
  assert '30.0% undecided' in str(got)


def test_planted_causes_are_told_apart():
  """A tilt of what is accessible creates nothing; new information is all creation."""
  rng = np.random.default_rng(8)
  p0 = rng.dirichlet(np.ones(30), 80)
  correct = np.zeros((80, 30))
  correct[:, :2] = 1
  p0[::2, :2] *= 1e-9  # every other prompt is out of reach
  p0 /= p0.sum(1, keepdims=True)
  before = (p0 * correct).sum(1)
  accessible = np.log(before) >= support.sampling(1024)
  tilt = (tabular.gibbs(p0, correct, 0.3) * correct).sum(1)
  got = creation(before, tilt, accessible)
  np.testing.assert_allclose(got.created[:2], 0, atol=1e-6)
  # All 80 prompts say the same, which leaves room for one in twenty that would not.
  np.testing.assert_allclose(got.created.high, wilson(0, 80)[1], atol=1e-6)
  assert got.elicited.value == pytest.approx(1, abs=1e-6)
  assert got.gain.low > 0.1
  taught = creation(before, np.where(accessible, before, 0.7), accessible)
  np.testing.assert_allclose(taught.created.value, 1, atol=1e-12)
  np.testing.assert_allclose(taught.created.low, wilson(40, 40)[0])
  assert sorted(taught.prompts) == np.flatnonzero(~accessible).tolist()
  same = creation(before, before, accessible)
  assert same.gain.low < same.gain.value == 0 < same.gain.high
  assert math.isnan(same.created.value)
  assert str(same).startswith('no gain to share out: 0.000 (')
  lost = creation(before, before * 0.5, accessible)
  assert lost.gain.high < 0
  assert math.isnan(lost.elicited.value)
  # A threshold of training is another, deeper budget, and shares follow it.
  deep = np.log(before) >= support.training(16, 2**36)
  assert accessible.sum() < deep.sum()
  assert creation(before, np.full(80, 0.7), deep).created.value < 0.1


def test_shares_from_samples_beside_the_exact_ones():
  """200 seeds: one half of the samples decides, the other gives the rates.

  Truth: p0 log-uniform in [1e-5, 1], π = 0.2 + 0.8·p0, accessible from ε(16) on.
  """
  rng = np.random.default_rng(9)
  log_eps = support.sampling(16)
  grid = (np.arange(200_000) + 0.5) / 200_000 * math.log(1e-5)
  p = np.exp(grid)
  truth = (0.2 * (1 - p) * (grid < log_eps)).mean() / (0.2 * (1 - p)).mean()
  covered, exactly, gains = np.zeros(2), 0, []
  for _ in range(200):
    p0 = np.exp(rng.uniform(math.log(1e-5), 0, 50))
    pi = 0.2 + 0.8 * p0
    told = support.decide(rng.binomial(256, p0), 256, log_eps)
    rates = rng.binomial(64, p0) / 64, rng.binomial(64, pi) / 64
    got = creation(*rates, told, resamples=150)
    covered += [
      got.created.low <= truth <= got.created.high,
      got.elicited.low <= 1 - truth <= got.elicited.high,
    ]
    exact = creation(p0, pi, np.log(p0) >= log_eps, resamples=150)
    exactly += exact.created.low <= truth <= exact.created.high
    gains.append(got.gain.value - exact.gain.value)
    shares = got.created.value + got.undecided + got.elicited.value
    np.testing.assert_allclose(shares, 1, rtol=1e-12)
  assert (covered / 200 > 0.93).all()
  assert exactly / 200 > 0.91
  assert abs(np.mean(gains)) < 4 * np.std(gains) / math.sqrt(200)


def test_bad_input_is_one_clear_line():
  good = np.ones((3, 4))
  for message, call in [
    (r'all be \[P\] or all \[P, Y\]', lambda: fates([1, 0], [1])),
    (r'all be \[P\] or all \[P, Y\]', lambda: fates([[1]], [[1]], [1])),
    ('compare log-probabilities with', lambda: fates([-3.0], [-1.0])),
    ('compare log-probabilities with', lambda: fates([0.5], [np.nan])),
    ('needs 2·k=10 samples of each prompt and has 9', lambda: twice([1], [9], 5)),
    ('needs 2·k=0', lambda: twice([1], [9], 0)),
    ('correct must be between 0', lambda: twice([10], [9], 4)),
    (r'must be \[P, 4\], not \[0, 4\]', lambda: dynamics.dynamics(good[:0])),
    (r'must be \[P, 4\], not \[3, 3\]', lambda: dynamics.dynamics(good[:, :3])),
    ('3 prompts and 2 of the null', lambda: above_noise(good, good[:2])),
    (r'must all be \[P\], or', lambda: creation([0.1], [0.1, 0.2], [True])),
    (r'must all be \[P\], or', lambda: creation([], [], [])),
    ('are probabilities, 0 to 1', lambda: creation([0.1], [-0.1], [True])),
    ('are probabilities, 0 to 1', lambda: creation([np.nan], [0.1], [True])),
    (r'accessible is 1, 0 \(undecided\)', lambda: creation([0.1], [0.1], [2])),
  ]:
    with pytest.raises(ValueError, match=message):
      call()
