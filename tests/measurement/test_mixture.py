"""The two weightings of the same samples, against loops and against exact worlds."""

import math

import numpy as np
import pytest

from educe.environments import tabular
from educe.measurement import mixture

RNG = np.random.default_rng(0)
NAN = float('nan')


def by_loop(ratios, base_ratios):
  """π̂ and q̂ of one prompt, from the densities of the mixture."""
  n1, n0 = len(ratios), len(base_ratios)
  every = [math.exp(x) for x in [*ratios, *base_ratios]]
  q = np.array([1 / (n0 + n1 * ratio) for ratio in every])
  p = np.array([ratio / (n0 + n1 * ratio) for ratio in every])
  return p / p.sum(), q / q.sum()


def samples(rng, policy, base, reward, n, m):
  """(log-ratios, rewards) of n samples of the policy and m of the base, each prompt."""
  sides = []
  with np.errstate(divide='ignore'):
    ratio = mixture.log_ratio(np.log(policy), np.log(base))
  for chance, size in ((policy, n), (base, m)):
    edges = chance.cumsum(-1)[:, None, :-1]
    at = (rng.random((len(chance), size, 1)) > edges).sum(-1)
    sides += [np.take_along_axis(x, at, -1) for x in (ratio, reward)]
  return sides


def test_the_weights_are_those_of_the_mixture():
  ratios, base_ratios = RNG.normal(0, 3, (4, 5)), RNG.normal(0, 3, (4, 3))
  rewards, base_rewards = RNG.random((4, 5)), RNG.random((4, 3))
  pooled = mixture.pool(ratios, rewards, base_ratios, base_rewards)
  for row in range(4):
    p, q = by_loop(ratios[row], base_ratios[row])
    np.testing.assert_allclose(pooled.policy[row], p, rtol=1e-13)
    np.testing.assert_allclose(pooled.base[row], q, rtol=1e-13)
  np.testing.assert_array_equal(pooled.rewards, np.hstack([rewards, base_rewards]))
  assert pooled.left_out == 0


def test_equal_policies_have_equal_weights():
  pooled = mixture.pool(*(np.zeros((3, 4)) for _ in range(4)))
  np.testing.assert_array_equal(pooled.policy, np.full((3, 8), 1 / 8))
  np.testing.assert_array_equal(pooled.base, pooled.policy)


def test_the_weights_find_the_probabilities_of_both_sides():
  """200 seeds; of a right answer that the base writes once in 10,000, too."""
  base = np.array([[0.5, 0.4999, 1e-4]])
  policy = np.array([[0.3, 0.1, 0.6]])
  reward = np.eye(3)[None, 2]
  tile = lambda x: np.repeat(x, 200, 0)  # noqa: E731
  drawn = samples(RNG, tile(policy), tile(base), tile(reward), 64, 64)
  assert (drawn[3].sum(-1) == 0).mean() > 0.9  # counts alone know nothing of ρ0
  pooled = mixture.pool(*drawn)
  rho, rho0 = ((x * pooled.rewards).sum(-1) for x in (pooled.policy, pooled.base))
  # Without bias but for O(1/64) of itself, and the noise of 200 means.
  np.testing.assert_allclose(rho.mean(), 0.6, rtol=0.02)
  np.testing.assert_allclose(rho0.mean(), 1e-4, rtol=0.02)
  assert rho0.std() < 0.2 * 1e-4


def test_log_ratios_of_any_size_have_weights():
  """A side knows what the other would never write, and what it hardly would."""
  ratio, base_ratio = np.array([[np.inf, 800.0]]), np.array([[-np.inf, -800.0]])
  zeros = np.zeros((1, 2))
  pooled = mixture.pool(ratio, zeros, base_ratio, zeros)
  np.testing.assert_allclose(pooled.policy, [[0.5, 0.5, 0, 0]], atol=1e-15)
  np.testing.assert_allclose(pooled.base, [[0, 0, 0.5, 0.5]], atol=1e-15)
  assert pooled.base[0, 0] == 0
  assert pooled.base[0, 1] > 0  # hardly is not never: the KL stays finite
  assert tabular.kl(pooled.policy[:, 1:], pooled.base[:, 1:]) < np.inf


def test_what_was_not_scored_is_left_out():
  ratios, rewards = RNG.normal(size=(3, 4)), RNG.random((3, 4))
  base_ratios, base_rewards = RNG.normal(size=(3, 2)), RNG.random((3, 2))
  rewards[0, 1] = base_rewards[0, 0] = NAN
  base_rewards[1] = NAN
  pooled = mixture.pool(ratios, rewards, base_ratios, base_rewards)
  assert pooled.left_out == 1
  p, q = by_loop(ratios[0, [0, 2, 3]], base_ratios[0, 1:])
  np.testing.assert_allclose(pooled.policy[0, [0, 2, 3, 5]], p, rtol=1e-13)
  np.testing.assert_allclose(pooled.base[0, [0, 2, 3, 5]], q, rtol=1e-13)
  assert not pooled.policy[0, [1, 4]].any()
  assert not pooled.rewards[0, [1, 4]].any()
  p, q = by_loop(ratios[2], base_ratios[2])
  np.testing.assert_allclose(pooled.base[1], q, rtol=1e-13)


def test_the_log_ratio_knows_where_one_side_is_zero():
  ours = np.array([[-1.0, -np.inf, -2.0, -np.inf]])
  theirs = np.array([[-3.0, -2.0, -np.inf, -np.inf]])
  got = mixture.log_ratio(ours, theirs)
  np.testing.assert_array_equal(got, [[2.0, -np.inf, np.inf, -np.inf]])


def test_bad_input_is_one_clear_line():
  zeros = np.zeros((2, 3))
  broken = np.array([[0.0, NAN, NAN]])
  with pytest.raises(ValueError, match='2 log-probs of the base are missing'):
    mixture.log_ratio(np.zeros((1, 3)), broken)
  with pytest.raises(ValueError, match='2 log-probs of the policy are missing'):
    mixture.log_ratio(broken, np.zeros((1, 3)))
  with pytest.raises(ValueError, match=r'\[2, 3\] of the policy and \[3, 2\] of the'):
    mixture.log_ratio(zeros, zeros.T)
  with pytest.raises(ValueError, match=r'log-ratios of the base \[1, 3\] must be'):
    mixture.pool(zeros, zeros, broken, zeros)
  with pytest.raises(ValueError, match=r'rewards \[\(2, 2\), \(2, 3\)\] must be'):
    mixture.pool(zeros, zeros[:, :2], zeros, zeros)
  with pytest.raises(ValueError, match='must be'):
    mixture.pool(zeros, zeros, zeros[:1], zeros[:1])
  with pytest.raises(ValueError, match='a reward is infinite'):
    mixture.pool(zeros, zeros, zeros, zeros + np.inf)
  with pytest.raises(ValueError, match='no prompt has a scored sample of both'):
    mixture.pool(zeros, zeros, zeros, zeros + NAN)
  with pytest.raises(ValueError, match='sample of the policy has no probability'):
    mixture.pool(zeros - np.inf, zeros, zeros, zeros)
  with pytest.raises(ValueError, match='sample of the base has no probability'):
    mixture.pool(zeros, zeros, zeros + np.inf, zeros)
