"""Against loops over the equations; the sampled ones against exact worlds, 200 seeds."""

import math

import numpy as np
import pytest

from educe.environments import tabular
from educe.measurement import free_energy, mixture

SEEDS, P, N = 200, 50, 64
Y = 12
RNG = np.random.default_rng(0)


def worlds(rng, count):
  """(policy, base, reward), `[count, Y]`: three right answers, and a run that tilted
  towards them, each prompt as far as it went, with noise."""
  base = rng.dirichlet(np.full(Y, 0.7), count) + 1e-9
  base /= base.sum(-1, keepdims=True)
  reward = rng.permuted(np.tile(np.arange(Y) < 3, (count, 1)), axis=-1) * 1.0
  strength = rng.uniform(0, 4, (count, 1))
  noise = rng.normal(0, 0.7, (count, Y))
  return tabular.gibbs(base, strength * reward + noise, 1.0), base, reward


def drawn(rng, policy, base, reward, n=N):
  """Log-ratios and rewards of n samples of each side, by inverting the CDF."""
  sides = []
  ratio = np.log(policy) - np.log(base)
  for chance in (policy, base):
    edges = chance.cumsum(-1)[:, None, :-1]
    at = (rng.random((len(chance), n, 1)) > edges).sum(-1)
    sides += [np.take_along_axis(x, at, -1) for x in (ratio, reward)]
  return sides


POLICY, BASE, REWARD = worlds(RNG, 4000)  # the prompts that there are
LENGTHS = RNG.integers(1, 9, (4000, Y)) * 1.0
PICKED = RNG.integers(0, 4000, SEEDS * P)  # those of each seed, one after the other
DRAWN = drawn(RNG, POLICY[PICKED], BASE[PICKED], REWARD[PICKED])
POOLED = mixture.pool(*DRAWN)


def each_seed(values):
  """The estimate of each seed, from one number a prompt."""
  return [free_energy.estimate(x) for x in np.reshape(values, (SEEDS, P))]


def assert_covered(estimates, truth, bias=0.0):
  """95 % of 200: 0.95 ± 3 standard errors of 0.0154, for `bias` no wider."""
  inside = np.mean([x.low <= truth <= x.high for x in estimates])
  assert 0.90 <= inside <= 0.99
  error = np.mean([x.mean for x in estimates]) - truth
  noise = 3 * np.mean([x.error for x in estimates]) / math.sqrt(SEEDS)
  assert abs(error) < bias + noise


def kl_by_loop(p, q):
  return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_the_ledger_is_the_chain_rule():
  """I6, by loops: each term from the conditional distributions themselves."""
  got = free_energy.ledger(POLICY[:SEEDS], BASE[:SEEDS], REWARD[:SEEDS] == 1)
  for i in range(SEEDS):
    right = REWARD[i] == 1
    p, q = POLICY[i], BASE[i]
    rho, rho0 = p[right].sum(), q[right].sum()
    want = (
      kl_by_loop(p, q),
      kl_by_loop([rho, 1 - rho], [rho0, 1 - rho0]),
      rho * kl_by_loop(p[right] / rho, q[right] / rho0),
      (1 - rho) * kl_by_loop(p[~right] / (1 - rho), q[~right] / (1 - rho0)),
    )
    np.testing.assert_allclose([x[i] for x in got], want, atol=1e-12)
  np.testing.assert_allclose(
    got.price + got.collapse + got.drift, got.total, atol=1e-12
  )
  assert min(got.collapse.min(), got.drift.min(), got.price.min()) > 1e-6


def test_the_ledger_says_what_was_done():
  """Of four right answers of 0.1 each, and two wrong ones."""
  base = np.array([[0.1, 0.1, 0.1, 0.1, 0.3, 0.3]])
  right = np.arange(6) < 4
  tilt = tabular.gibbs(base, right * 1.0, 0.25)
  one = np.array([[0.4, 0, 0, 0, 0.3, 0.3]])
  wrong = np.array([[0.1, 0.1, 0.1, 0.1, 0.6, 0.0]])
  only_right = np.array([[0.25] * 4 + [0, 0]])
  for policy, want in (
    (base, (0, 0, 0)),
    (one, (0, 0.4 * math.log(4), 0)),
    (wrong, (0, 0, 0.6 * math.log(2))),
    (only_right, (-math.log(0.4), 0, 0)),
    (tilt, (tabular.kl(tilt, base)[0], 0, 0)),
  ):
    got = free_energy.ledger(policy, base, right)
    np.testing.assert_allclose(np.ravel(got[1:]), want, atol=1e-15)
  said = str(free_energy.ledger(one, base, right))
  assert said == 'KL total 0.555 nats = price 0.000 + collapse 0.555 + drift 0.000'


def test_the_ledger_where_the_base_is_never_right():
  base = np.array([[0.5, 0.5, 0.0]])
  right = np.array([False, False, True])
  got = free_energy.ledger(np.array([[0.25, 0.25, 0.5]]), base, right)
  assert (got.total[0], got.price[0]) == (np.inf, np.inf)
  assert (got.collapse[0], got.drift[0]) == (0, 0)
  got = free_energy.ledger(base, base, right)  # and the policy is not either
  assert [float(x[0]) for x in got] == [0, 0, 0, 0]
  # One of two right answers is new: it is what is right that has changed.
  two = free_energy.ledger(
    np.array([[0.25, 0.25, 0.5]]), base, np.array([0, 1, 1], bool)
  )
  assert two.collapse[0] == np.inf
  np.testing.assert_allclose(two.price, kl_by_loop([0.75, 0.25], [0.5, 0.5]))


def test_the_ledger_of_samples_is_covered():
  """Ratios of samples are biased by O(1/N): here by less than 1/(4N) nats."""
  got = free_energy.ledger(POOLED.policy, POOLED.base, POOLED.rewards == 1)
  want = free_energy.ledger(POLICY, BASE, REWARD == 1)
  np.testing.assert_allclose(
    got.price + got.collapse + got.drift, got.total, atol=1e-12
  )
  for name in got._fields:
    truth = getattr(want, name).mean()
    assert_covered(each_seed(getattr(got, name)), truth, bias=0.25 / N)


def test_samples_of_a_tilt_show_no_collapse_and_of_the_same_policy_nothing():
  tilt = tabular.gibbs(BASE[:P], REWARD[:P], 0.3)
  for policy, price in ((tilt, 0.5), (BASE[:P], 0.0)):
    pooled = mixture.pool(*drawn(RNG, policy, BASE[:P], REWARD[:P]))
    got = free_energy.ledger(pooled.policy, pooled.base, pooled.rewards == 1)
    np.testing.assert_allclose(got.collapse, 0, atol=1e-13)
    np.testing.assert_allclose(got.drift, 0, atol=1e-13)
    assert got.price.mean() > price or (got.price == price).all()


def test_the_exact_divergence_and_that_of_samples():
  want = free_energy.divergence(POLICY, BASE, LENGTHS)
  kl = [kl_by_loop(p, q) for p, q in zip(POLICY[:3], BASE[:3], strict=True)]
  tokens = [p @ length for p, length in zip(POLICY[:3], LENGTHS[:3], strict=True)]
  first = free_energy.divergence(POLICY[:3], BASE[:3], LENGTHS[:3])
  np.testing.assert_allclose(first.per_sequence.mean, np.mean(kl))
  np.testing.assert_allclose(first.per_sequence.error, np.std(kl, ddof=1) / 3**0.5)
  np.testing.assert_allclose(first.per_token.mean, np.sum(kl) / np.sum(tokens))
  at = (RNG.random((SEEDS * P, N, 1)) > POLICY[PICKED].cumsum(-1)[:, None, :-1]).sum(-1)
  ratio = np.take_along_axis(np.log(POLICY / BASE)[PICKED], at, -1)
  lengths = np.take_along_axis(LENGTHS[PICKED], at, -1)
  got = [
    free_energy.divergence_from_samples(*x)
    for x in zip(ratio.reshape(SEEDS, P, N), lengths.reshape(SEEDS, P, N), strict=True)
  ]
  assert_covered([x.per_sequence for x in got], want.per_sequence.mean)
  # A ratio of means over 50 prompts: its bias is far below its error.
  assert_covered([x.per_token for x in got], want.per_token.mean, bias=1e-3)
  assert str(got[0]).startswith(f'KL {got[0].per_sequence} nats per sequence, 0.')


def test_the_gap_is_what_the_objective_lacks():
  beta = 0.3
  policy, base, reward = POLICY[:SEEDS], BASE[:SEEDS], RNG.random((SEEDS, Y))
  got = free_energy.gibbs_gap(policy, base, reward, beta)
  best = -tabular.free_energy(base, reward, beta)
  lacks = best - tabular.objective(policy, base, reward, beta)
  np.testing.assert_allclose(got, lacks, atol=1e-12)
  assert got.min() > 1e-3
  gibbs = tabular.gibbs(base, reward, beta)
  assert np.abs(free_energy.gibbs_gap(gibbs, base, reward, beta)).max() < 1e-15
  # Of samples too: log π/q is r/β but for a constant, and so is log π̂/q̂.
  pooled = mixture.pool(*drawn(RNG, gibbs, base, reward))
  got = free_energy.gibbs_gap(pooled.policy, pooled.base, pooled.rewards, beta)
  assert np.abs(got).max() < 1e-14


@pytest.mark.parametrize('beta', [0.3, 1.0])
def test_the_gap_of_samples_is_covered(beta):
  got = free_energy.gibbs_gap(POOLED.policy, POOLED.base, POOLED.rewards, beta)
  want = free_energy.gibbs_gap(POLICY, BASE, REWARD, beta).mean()
  assert want > 0.05
  assert_covered(each_seed(got), want, bias=beta / (2 * N))


@pytest.mark.parametrize('beta', [0.5, 1.0])
def test_the_soft_value_of_samples_is_covered_and_its_bias_is_as_said(beta):
  n = 16  # few, that the bias may be seen
  rewards = DRAWN[3][:, :n].reshape(SEEDS, P, n)
  got = [free_energy.soft_value_from_samples(x, beta) for x in rewards]
  want = -tabular.free_energy(BASE, REWARD, beta).mean()
  assert_covered([x.value for x in got], want, bias=beta / n)
  # The prompts are the same in both, so that what is left is the samples' alone.
  exact = -tabular.free_energy(BASE[PICKED], REWARD[PICKED], beta).mean()
  bias = np.mean([x.value.mean for x in got]) - exact
  said = np.mean([x.bias for x in got])
  assert said < -0.002
  np.testing.assert_allclose(
    said, bias, rtol=0.35
  )  # to first order, with 10,000 prompts


def test_the_soft_value_by_hand():
  beta = 0.5
  w = np.exp([2.0, 0.0, 0.0])
  got = free_energy.soft_value_from_samples(
    np.array([[1.0, 0.0, 0.0, np.nan], [0.0, np.nan, np.nan, np.nan]]), beta
  )
  assert got.value.prompts == 1  # of one sample no spread is known
  np.testing.assert_allclose(got.value.mean, beta * math.log(w.mean()))
  bias = -beta * w.var(ddof=1) / (2 * 3 * w.mean() ** 2)
  np.testing.assert_allclose(got.bias, bias, rtol=1e-12)


def test_no_tilt_exceeds_its_certificate_and_others_do():
  beta = 0.25
  reward = RNG.uniform(-1, 2, (SEEDS, Y))
  tilt = tabular.gibbs(BASE[:SEEDS], reward, beta)
  ratio = np.log(tilt / BASE[:SEEDS])
  setting = {'lowest': -1.0, 'highest': 2.0}
  got = free_energy.ratio_certificate(ratio, beta=beta, **setting)
  assert (got.beyond, got.bound) == (0, 12.0)
  np.testing.assert_array_equal(got.log_ratio, ratio.max(-1))
  assert got.beta >= beta
  # Where the best is rare the bound is nearly met: a little more of b is too much.
  base = np.array([[1 - 1e-9, 1e-9]])
  tilt = tabular.gibbs(base, np.array([[0.0, 1.0]]), 1 / 8)
  ratio = np.log(tilt / base)
  assert free_energy.ratio_certificate(ratio, beta=1 / 8).beyond == 0
  got = free_energy.ratio_certificate(ratio, beta=1 / 7.99)
  assert got.beyond == 1
  np.testing.assert_allclose(got.beta, 1 / 8, rtol=1e-5)
  assert str(got) == (
    '1 of 1 prompts beyond e^7.99, the largest ratio e^8.00: a tilt only if β ≤ 0.125'
  )
  new = free_energy.ratio_certificate(np.array([[np.inf, 0.0]]), beta=0.1)
  assert (new.beyond, new.beta) == (1, 0.0)  # no tilt of any β
  same = free_energy.ratio_certificate(np.zeros((2, 3)), beta=0.1)
  assert (same.beyond, same.beta) == (0, np.inf)


def test_an_estimate_is_a_mean_with_its_error():
  got = free_energy.estimate(np.array([1.0, 2.0, 6.0]))
  assert (got.mean, got.prompts) == (3.0, 3)
  np.testing.assert_allclose(got.error, math.sqrt(7 / 3))
  np.testing.assert_allclose([got.low, got.high], [0.00611, 5.99389], atol=1e-5)
  assert str(got) == '3.000 (95 % interval 0.006 to 5.994; 3 prompts)'
  one = free_energy.estimate(np.array([2.0]))
  assert (one.mean, math.isnan(one.error)) == (2.0, True)
  endless = free_energy.estimate(np.array([1.0, np.inf]))
  assert (endless.mean, math.isnan(endless.error)) == (np.inf, True)


def test_bad_input_is_one_clear_line():
  p = np.array([[0.5, 0.5]])
  right = np.array([[True, False]])
  with pytest.raises(ValueError, match='no output of any prompt is correct'):
    free_energy.ledger(p, p, ~right & right)
  with pytest.raises(ValueError, match=r'policy \[2\] and base \[1, 2\] must both'):
    free_energy.ledger(p[0], p, right)
  for q in ([[0.5, 0.4]], [[1.5, -0.5]], [[0.5, np.nan]]):
    with pytest.raises(ValueError, match='base: the probabilities of prompt 0 sum'):
      free_energy.ledger(p, np.array(q), right)
  with pytest.raises(ValueError, match='needs one number of each'):
    free_energy.estimate(np.array([0.0, np.nan]))
  with pytest.raises(ValueError, match='needs one number of each'):
    free_energy.estimate(np.array([]))
  with pytest.raises(ValueError, match='no completion has a token'):
    free_energy.divergence(p, p, 0 * p)
  with pytest.raises(ValueError, match=r'log-ratios of the policy \[1, 1\] must be'):
    free_energy.divergence_from_samples(np.array([[np.nan]]), np.ones((1, 1)))
  for rewards in (np.ones((2, 1)), np.ones(2), np.array([[np.inf, 0.0]])):
    with pytest.raises(ValueError, match='two or more that are scored'):
      free_energy.soft_value_from_samples(rewards, 1.0)
  with pytest.raises(ValueError, match=r'beta=0\.0 must be positive'):
    free_energy.gibbs_gap(p, p, p, 0.0)
  with pytest.raises(ValueError, match=r'beta=0 must be positive'):
    free_energy.ratio_certificate(p, beta=0)
  with pytest.raises(ValueError, match=r'highest=0\.0 at least lowest=1\.0'):
    free_energy.ratio_certificate(p, beta=1.0, lowest=1.0, highest=0.0)
