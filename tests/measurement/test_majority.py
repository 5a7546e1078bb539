"""Against every subset of the samples and every draw of k answers."""

import itertools
import math

import numpy as np
import pytest

from educe.measurement import majority

RNG = np.random.default_rng(0)


def vote(drawn, right):
  """Share of the most frequent answers of `drawn` that is right; None does not vote."""
  voting = [a for a in drawn if a is not None]
  if not voting:
    return 0.0
  most = max(voting.count(a) for a in voting)
  winners = sorted({a for a in voting if voting.count(a) == most})
  return np.mean([right[a] for a in winners])


def by_subsets(answers, rewards, k):
  kept = [i for i in range(len(answers)) if not math.isnan(rewards[i])]
  judged = {}
  for i in kept:
    judged.setdefault(answers[i], []).append(rewards[i] >= 1)
  right = {a: np.mean(x) for a, x in judged.items()}
  subsets = itertools.combinations(kept, k)
  return np.mean([vote([answers[i] for i in s], right) for s in subsets])


def by_draws(p, correct, k):
  total = 0.0
  for drawn in itertools.product(range(len(p)), repeat=k):
    total += math.prod(p[y] for y in drawn) * vote(drawn, correct)
  return total


def test_the_estimate_is_the_mean_over_all_subsets():
  names = ['4', '5', 'four', None, '12', '7']
  for trial in range(12):
    row = [names[i] for i in RNG.integers(0, 2 + trial % 5, 9)]
    if trial == 0:
      row = [None] * 9
    right = {a: RNG.random() < 0.5 for a in names}
    reward = np.array([1.0 if right[a] and a else 0.0 for a in row])
    reward[RNG.random(9) < 0.15] = np.nan
    if trial > 6:
      reward[RNG.random(9) < 0.2] = 1.0  # judged differently
    reward[:4] = np.nan_to_num(reward[:4])
    k = range(1, int((~np.isnan(reward)).sum()) + 1)
    want = [by_subsets(row, reward, x) for x in k]
    got = majority.estimates([row], reward[None], k)
    np.testing.assert_allclose(got, [want], atol=1e-13)


def test_the_ends():
  """One sample is the mean; all of them, one vote."""
  answers = [['a', 'b', 'b', 'c'], ['a', 'a', 'b', 'b'], ['a', 'b', 'c', 'c']]
  rewards = np.array([[0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]], float)
  got = majority.estimates(np.array(answers), rewards, [1, 4])
  np.testing.assert_allclose(got, [[0.5, 1], [0.5, 0.5], [0.5, 0]], atol=1e-13)


@pytest.mark.parametrize('k', [1, 2, 3, 5])
def test_the_exact_value_is_what_k_draws_give(k):
  p = np.array([[0.3, 0.25, 0.2, 0.25], [0.7, 0.0, 0.3, 0.0], [0.01, 0.02, 0.9, 0.07]])
  correct = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 0.5, 0, 0]])
  want = [by_draws(*row, k) for row in zip(p, correct, strict=True)]
  np.testing.assert_allclose(majority.exact(p, correct, [k])[:, 0], want, atol=1e-14)


def test_the_estimate_is_unbiased():
  """Its mean over every possible sample of N = 5 is the exact value for k = 1 … 5."""
  p, correct = np.array([0.5, 0.2, 0.3]), np.array([0.0, 1.0, 1.0])
  mean = 0.0
  for drawn in itertools.product(range(3), repeat=5):
    chance = math.prod(p[y] for y in drawn)
    rewards = correct[list(drawn)][None]
    mean += chance * majority.estimates([drawn], rewards, range(1, 6))
  np.testing.assert_allclose(
    mean, majority.exact(p[None], correct[None], range(1, 6)), atol=1e-13
  )


def test_many_votes():
  """Two answers: more than half of an odd number, the tail of a binomial."""
  p, k = 0.45, 101
  tail = sum(math.comb(k, i) * p**i * (1 - p) ** (k - i) for i in range(51, k + 1))
  got = majority.exact([[p, 1 - p]], [[1, 0]], [k, k + 1])
  np.testing.assert_allclose(got[0, 0], tail, rtol=1e-12)
  # An even number adds nothing: a tie is decided as by the sample that is left out.
  np.testing.assert_allclose(got[0, 1], tail, rtol=1e-12)
  # 90 of 200 are right: the tail of a hypergeometric.
  answers = [['r'] * 90 + ['w'] * 110]
  rewards = np.array([[1.0] * 90 + [0.0] * 110])
  ways = [math.comb(90, i) * math.comb(110, 101 - i) for i in range(51, 91)]
  want = sum(ways) / math.comb(200, 101)
  got = majority.estimates(answers, rewards, [101])[0, 0]
  np.testing.assert_allclose(got, want, rtol=1e-11)


def test_over_200_seeds_estimates_centre_on_the_exact_value():
  p = np.array([0.3, 0.25, 0.15, 0.1, 0.1, 0.1])
  correct = np.array([0, 1, 0, 0, 1, 0.0])
  drawn = RNG.choice(6, (200, 24), p=p)
  got = majority.estimates(drawn.tolist(), correct[drawn], [5, 12])
  error = got.std(0) / np.sqrt(200)
  want = majority.exact(p[None], correct[None], [5, 12])[0]
  assert (np.abs(got.mean(0) - want) < 3.5 * error).all()
  assert (error < 0.02).all()


def test_bad_input_is_one_clear_line():
  with pytest.raises(ValueError, match='k=3 needs 1 to 2 samples'):
    majority.estimates([['a', 'b', 'c']], [[1, 0, np.nan]], [3])
  with pytest.raises(ValueError, match='k=0 needs 1 to 1'):
    majority.estimates([['a']], [[1]], [0])
  for answers in ([['a', 'b'], ['a']], [['a', 'b']]):
    with pytest.raises(ValueError, match=r'rows of answers and rewards \[2, 2\]'):
      majority.estimates(answers, np.zeros((2, 2)), [1])
  with pytest.raises(ValueError, match='k=0 must be 1 or more'):
    majority.exact([[1.0]], [[1]], [0])
  for p in ([[0.5, 0.4]], [0.5, 0.5], [[1.5, -0.5]]):
    with pytest.raises(ValueError, match=r'p must be \[P, Y\] and sum to 1'):
      majority.exact(p, [0, 1], [1])
