"""The frontier against closed forms and brute force; efficiencies of planted runs."""

import math

import numpy as np
import pytest
from scipy import optimize

from educe.environments import tabular
from educe.measurement import best_of_n, frontier, mixture

SEEDS, P, Y, N = 200, 50, 8, 64
RNG = np.random.default_rng(0)
BASE = RNG.dirichlet(np.ones(Y), SEEDS) + 1e-12
BASE /= BASE.sum(-1, keepdims=True)
GRADED = RNG.uniform(-1, 3, (SEEDS, Y))
RIGHT = (np.arange(Y) < 3) * np.ones((SEEDS, 1))
RIGHT_MASS = (BASE * RIGHT).sum(-1)


def tilts(b, reward=GRADED, base=BASE):
  return tabular.gibbs(base, np.asarray(b)[:, None] * reward, 1.0)


@pytest.mark.parametrize('reward', [GRADED, RIGHT], ids=['graded', 'binary'])
def test_the_tilt_that_a_kl_buys_is_found(reward):
  b = np.exp(RNG.uniform(-4, 2, SEEDS))
  policy = tilts(b, reward)
  best, strength = frontier.frontier(BASE, reward, tabular.kl(policy, BASE))
  np.testing.assert_allclose(best, (policy * reward).sum(-1), rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(strength, b, rtol=1e-8)  # a KL of b² has half the digits


def test_nothing_else_buys_more():
  """Random policies, and those of other rewards: none is beyond its own KL's R*."""
  for policy in (
    RNG.dirichlet(np.ones(Y), SEEDS),
    best_of_n.policy(BASE, GRADED, 3),
    tilts(np.full(SEEDS, 1.0), GRADED + RNG.normal(0, 0.1, GRADED.shape)),
  ):
    best, _ = frontier.frontier(BASE, GRADED, tabular.kl(policy, BASE))
    assert (best - (policy * GRADED).sum(-1)).min() > 0


def test_with_binary_rewards_it_is_the_kl_of_two_numbers():
  """kl(R*‖ρ0) = KL, R* ≥ ρ0."""
  kl = RNG.uniform(0, 1, SEEDS) * -np.log(RIGHT_MASS)
  best, b = frontier.frontier(BASE, RIGHT, kl)
  pair = lambda x: np.stack([x, 1 - x], -1)  # noqa: E731
  np.testing.assert_allclose(tabular.kl(pair(best), pair(RIGHT_MASS)), kl, atol=1e-9)
  assert (best >= RIGHT_MASS).all()
  odds = best / (1 - best) / (RIGHT_MASS / (1 - RIGHT_MASS))
  np.testing.assert_allclose(np.log(odds), b, rtol=1e-6)


def test_its_slope_is_one_over_b():
  kl = np.full(SEEDS, 0.2)
  (low, _), (_, b), (high, _) = (
    frontier.frontier(BASE, GRADED, kl + step) for step in (-1e-5, 0, 1e-5)
  )
  np.testing.assert_allclose((high - low) / 2e-5, 1 / b, rtol=1e-5)


def test_its_ends():
  reward = np.array([[0.0, 1.0, 1.0, 9.0], [2.0, 2.0, 2.0, 2.0]])
  base = np.array([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]])
  best, b = frontier.frontier(base, reward, np.zeros(2))
  np.testing.assert_allclose(best, [0.5, 2.0], rtol=1e-15)
  assert b.tolist() == [0, 0]
  for kl in (math.log(2) + 1e-9, 5.0, np.inf):  # only the two that pay 1 are left
    best, b = frontier.frontier(base, reward, np.full(2, kl))
    np.testing.assert_allclose(best, [1.0, 2.0], rtol=1e-15)
    assert b.tolist() == [np.inf, np.inf]
  best, b = frontier.frontier(base, reward, np.full(2, math.log(2) - 1e-9))
  assert 0.99 < best[0] < 1
  assert 10 < b[0] < 100


def test_outputs_of_one_reward_are_one():
  """Split in two halves that pay the same, an output buys what it did."""
  kl = np.full(SEEDS, 0.3)
  split = np.repeat(BASE / 2, 2, -1), np.repeat(GRADED, 2, -1)
  for got, want in zip(
    frontier.frontier(*split, kl), frontier.frontier(BASE, GRADED, kl), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-10)
  few = np.round(GRADED[0])  # rewards that occur often are merged, of all prompts
  spread = few + np.linspace(0, 1e-9, SEEDS)[:, None] + 1e-10 * np.arange(Y)
  merged, apart = (frontier.frontier(BASE, x, kl)[0] for x in (few, spread))
  np.testing.assert_allclose(merged, apart, atol=1e-8)


def test_a_tilt_of_one_strength_has_bought_all():
  got = frontier.efficiency(tilts(np.full(SEEDS, 0.8)), BASE, GRADED)
  np.testing.assert_allclose([got.eta.mean, got.within.mean], 1, rtol=1e-10)
  np.testing.assert_allclose(got.best, got.reward, rtol=1e-10)
  np.testing.assert_allclose(got.start, (BASE * GRADED).sum(-1).mean())
  assert max(got.eta.error, got.within.error) < 1e-8
  assert got.kl > 0.1


def test_a_tilt_of_many_strengths_has_bought_all_within_its_prompts():
  got = frontier.efficiency(tilts(np.exp(RNG.normal(0, 1, SEEDS))), BASE, GRADED)
  np.testing.assert_allclose(got.within.mean, 1, rtol=1e-10)
  assert got.eta.mean < 0.98


def test_other_policies_have_bought_less():
  noisy = tilts(np.full(SEEDS, 1.0), GRADED + RNG.normal(0, 0.5, GRADED.shape))
  got = frontier.efficiency(noisy, BASE, GRADED)
  assert 0.3 < got.eta.mean < got.within.mean < 0.95
  kl = tabular.kl(noisy, BASE)
  gain = ((noisy - BASE) * GRADED).sum(-1)
  own = frontier.frontier(BASE, GRADED, kl)[0] - (BASE * GRADED).sum(-1)
  np.testing.assert_allclose(got.within.mean, gain.mean() / own.mean())
  np.testing.assert_allclose(got.eta.mean, gain.mean() / (got.best - got.start))
  assert str(got) == (
    f'{got.eta.mean:.1%} of what {got.kl:.3f} nats can buy (95 % interval '
    f'{got.eta.low:.1%} to {got.eta.high:.1%}): reward {got.start:.3f} to '
    f'{got.reward:.3f}, at most {got.best:.3f}'
  )


def test_the_best_is_what_the_best_division_of_the_kl_buys():
  """Two prompts, by a search over how much of their KL each is given."""
  base = np.array([[0.9, 0.1, 0.0], [0.4, 0.3, 0.3]])
  reward = np.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.7]])
  policy = np.array([[0.6, 0.4, 0.0], [0.3, 0.6, 0.1]])
  total = tabular.kl(policy, base).sum()

  def bought(first):
    return -frontier.frontier(base, reward, np.array([first, total - first]))[0].mean()

  search = optimize.minimize_scalar(
    bought, bounds=(0, total), method='bounded', options={'xatol': 1e-9}
  )
  got = frontier.efficiency(policy, base, reward)
  np.testing.assert_allclose(got.kl, total / 2, rtol=1e-12)
  np.testing.assert_allclose(got.best, -search.fun, rtol=1e-10)
  assert bought(total / 2) > search.fun + 1e-3  # an even division buys less


def test_the_best_of_n_of_right_and_wrong_is_a_tilt_and_of_grades_almost():
  for n in (2, 4, 64):
    got = frontier.efficiency(best_of_n.policy(BASE, RIGHT, n), BASE, RIGHT)
    np.testing.assert_allclose(got.within.mean, 1, rtol=1e-9)
    assert got.eta.mean < 1
    got = frontier.efficiency(best_of_n.policy(BASE, GRADED, n), BASE, GRADED)
    assert 0.9 < got.within.mean < 1
    kl = tabular.kl(best_of_n.policy(BASE, GRADED, n), BASE).mean()
    np.testing.assert_allclose(got.kl, kl)
    assert got.kl < best_of_n.kl_bound(n)


def test_what_the_base_cannot_do_is_worth_more_than_any_kl():
  base = np.array([[1.0, 0.0], [0.5, 0.5]])
  reward = np.array([[0.0, 1.0], [0.0, 1.0]])
  got = frontier.efficiency(np.array([[0.2, 0.8], [0.5, 0.5]]), base, reward)
  assert got.kl == np.inf
  assert (got.start, got.best) == (0.25, 0.5)
  np.testing.assert_allclose(got.eta.mean, 1.6)


def test_nothing_bought_for_nothing_is_no_efficiency():
  for policy, reward in ((BASE, GRADED), (tilts(np.ones(SEEDS)), 0 * GRADED + 0.3)):
    got = frontier.efficiency(policy, BASE, reward)
    assert math.isnan(got.eta.mean)
    assert math.isnan(got.within.mean)
    np.testing.assert_allclose([got.reward, got.best], got.start, atol=1e-15)


def test_the_efficiency_of_samples_is_covered():
  """Prompts of a population, 64 samples of each side: 95 % of 200 intervals ± 3 of
  their standard errors of 0.0154."""
  size = 4000
  base = RNG.dirichlet(np.full(Y, 0.7), size) + 1e-9
  base /= base.sum(-1, keepdims=True)
  right = RNG.permuted(np.tile(np.arange(Y) < 2, (size, 1)), axis=-1) * 1.0
  strength = np.exp(RNG.normal(0.7, 0.5, (size, 1)))
  policy = tabular.gibbs(base, strength * right + RNG.normal(0, 0.5, right.shape), 1.0)
  truth = frontier.efficiency(policy, base, right)
  assert truth.eta.mean < truth.within.mean < 0.95
  found, exact = [], []
  for _ in range(SEEDS):
    at = RNG.integers(0, size, P)
    exact.append(frontier.efficiency(policy[at], base[at], right[at]))
    sides = []
    ratio = np.log(policy[at] / base[at])
    for chance in (policy[at], base[at]):
      edges = chance.cumsum(-1)[:, None, :-1]
      which = (RNG.random((P, N, 1)) > edges).sum(-1)
      sides += [np.take_along_axis(x, which, -1) for x in (ratio, right[at])]
    pooled = mixture.pool(*sides)
    found.append(frontier.efficiency(pooled.policy, pooled.base, pooled.rewards))
  assert max(x.within.mean for x in found) <= 1
  for results in (exact, found):
    for name in ('eta', 'within'):
      want = getattr(truth, name).mean
      got = [getattr(x, name) for x in results]
      assert 0.90 <= np.mean([x.low <= want <= x.high for x in got]) <= 0.99
      # Ratios: biased by what 50 prompts, or 64 samples, leave of their spread.
      np.testing.assert_allclose(np.mean([x.mean for x in got]), want, atol=0.015)


def test_bad_input_is_one_clear_line():
  with pytest.raises(ValueError, match='a reward is not finite'):
    frontier.frontier(BASE, GRADED + np.nan, np.ones(SEEDS))
  with pytest.raises(ValueError, match=r'prompt 0 sum to 0\.5, the least is 0\.25'):
    frontier.frontier(np.array([[0.25, 0.25]]), np.zeros((1, 2)), np.ones(1))
  with pytest.raises(ValueError, match=r'policy: .* of prompt 1 sum to 2'):
    frontier.efficiency(np.array([[1.0, 0], [1, 1]]), np.eye(2), np.eye(2))
