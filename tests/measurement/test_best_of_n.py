"""Against enumeration: every subset of the samples, every draw of n outcomes."""

import itertools
import math

import numpy as np
import pytest

from educe.environments import tabular
from educe.measurement import best_of_n

RNG = np.random.default_rng(0)
P0 = RNG.dirichlet(np.ones(5))
DISTINCT = np.array([0.3, -1.0, 2.0, 0.7, -0.2])
TIED = np.array([1.0, 0.0, 1.0, 0.0, -1.0])


def by_subsets(scores, worth, n):
  """Mean over all subsets of n of the mean worth of those that score highest."""
  total = []
  for subset in itertools.combinations(range(len(scores)), n):
    best = max(scores[i] for i in subset)
    total.append(np.mean([worth[i] for i in subset if scores[i] == best]))
  return np.mean(total)


def by_draws(p0, scores, n):
  """The chance of each outcome to be kept, over all N**n draws."""
  kept = np.zeros(len(p0))
  for draw in itertools.product(range(len(p0)), repeat=n):
    chance = math.prod(p0[y] for y in draw)
    best = [y for y in draw if scores[y] == max(scores[y] for y in draw)]
    for y in best:
      kept[y] += chance / len(best)
  return kept


@pytest.mark.parametrize('n', [1, 2, 3, 6, 7])
@pytest.mark.parametrize('decimals', [8, 0], ids=['distinct', 'tied'])
def test_the_estimate_is_the_mean_over_all_subsets(n, decimals):
  scores = RNG.standard_normal((2, 3, 7)).round(decimals)
  worth = RNG.standard_normal((2, 3, 7))
  got = best_of_n.expected(scores, n, worth=worth)
  own = best_of_n.expected(scores, n)
  for index in np.ndindex(2, 3):
    want = by_subsets(scores[index], worth[index], n)
    np.testing.assert_allclose(got[index], want, atol=1e-14)
    want = by_subsets(scores[index], scores[index], n)
    np.testing.assert_allclose(own[index], want, atol=1e-14)


def test_the_ends_are_the_mean_and_the_best():
  scores = RNG.standard_normal(20)
  np.testing.assert_allclose(best_of_n.expected(scores, 1), scores.mean())
  assert best_of_n.expected(scores, 20) == scores.max()


@pytest.mark.parametrize('scores', [DISTINCT, TIED], ids=['distinct', 'tied'])
def test_the_estimate_is_unbiased(scores):
  """Its mean over every possible sample of N = 4 is the exact value for n = 3."""
  worth = np.arange(5.0)
  mean = 0.0
  for draw in itertools.product(range(5), repeat=4):
    chance = math.prod(P0[y] for y in draw)
    mean += chance * best_of_n.expected(scores[[*draw]], 3, worth=worth[[*draw]])
  np.testing.assert_allclose(mean, by_draws(P0, scores, 3) @ worth, atol=1e-14)


@pytest.mark.parametrize('scores', [DISTINCT, TIED], ids=['distinct', 'tied'])
@pytest.mark.parametrize('n', [1, 2, 4])
def test_the_policy_is_what_n_draws_give(scores, n):
  want = by_draws(P0, scores, n)
  np.testing.assert_allclose(best_of_n.policy(P0, scores, n), want, atol=1e-15)


def test_the_policy_takes_prompts_and_outcomes_without_mass():
  p0 = np.array([[0.5, 0.0, 0.5], [0.0, 0.25, 0.75]])
  scores = np.array([[0.0, 9.0, 1.0], [-1.0, 1.0, 0.0]])
  want = [[0.25, 0, 0.75], [0, 1 - 0.75**2, 0.75**2]]
  np.testing.assert_allclose(best_of_n.policy(p0, scores, 2), want, atol=1e-15)
  np.testing.assert_allclose(best_of_n.policy(p0[0], scores, 2)[1], [0.25, 0, 0.75])


def test_many_draws_keep_their_digits():
  """p0(best) = 1e-18: 1 − (1 − 1e-18)ⁿ is lost if F is rounded to 1 first."""
  p0 = np.array([1.0, 1e-18])
  got = best_of_n.policy(p0, np.array([0.0, 1.0]), 10**15)
  np.testing.assert_allclose(got[1], 1e-3, rtol=1e-3)  # 1 − e^−0.001


@pytest.mark.parametrize('n', [2, 16, 256])
def test_the_kl_formula_bounds_and_is_reached_without_ties(n):
  fine = np.full(200_000, 5e-6)
  kl = tabular.kl(best_of_n.policy(fine, np.arange(200_000.0), n), fine)
  # Riemann sum of a density n·uⁿ⁻¹ over 200,000 cells: off by about n / 200,000.
  np.testing.assert_allclose(kl, best_of_n.kl_bound(n), atol=n / 200_000)
  for scores in (DISTINCT, TIED):
    coarse = tabular.kl(best_of_n.policy(P0, scores, n), P0)
    assert coarse < best_of_n.kl_bound(n) - 0.01
  binary = tabular.kl(best_of_n.policy([0.9, 0.1], [0.0, 1.0], 64), [0.9, 0.1])
  won = 1 - 0.9**64
  want = won * math.log(won / 0.1) + (1 - won) * math.log((1 - won) / 0.9)
  np.testing.assert_allclose(binary, want, atol=1e-12)


def test_the_kl_formula_as_printed():
  assert best_of_n.kl_bound(1) == 0
  np.testing.assert_allclose(best_of_n.kl_bound(2), 0.1931, atol=5e-5)
  np.testing.assert_allclose(best_of_n.kl_bound(256), 4.5491, atol=5e-5)


def test_bad_input_is_one_clear_line():
  with pytest.raises(ValueError, match='n=4 must be between 1 and the 3 samples'):
    best_of_n.expected(np.zeros(3), 4)
  with pytest.raises(ValueError, match='n=0 must be between'):
    best_of_n.expected(np.zeros(3), 0)
  with pytest.raises(ValueError, match=r'worth \[2\] and scores \[3\]'):
    best_of_n.expected(np.zeros(3), 1, worth=np.zeros(2))
  for f in (
    lambda s: best_of_n.expected(s, 1),
    lambda s: best_of_n.expected(np.zeros(2), 1, worth=s),
    lambda s: best_of_n.policy(np.full(2, 0.5), s, 1),
  ):
    with pytest.raises(ValueError, match='a score is not finite'):
      f(np.array([0.0, np.nan]))
  with pytest.raises(ValueError, match=r'p0 sums to 0\.5'):
    best_of_n.policy(np.array([0.25, 0.25]), np.zeros(2), 1)
  for f in (best_of_n.kl_bound, lambda n: best_of_n.policy([1.0], [0.0], n)):
    with pytest.raises(ValueError, match='n=0 must be 1 or more'):
      f(0)
