"""Each null against a direct call, on samples where sides and lengths all differ."""

import numpy as np
import pytest

from educe.measurement import majority, nulls, pass_at_k, sharpening
from educe.measurement.table import Side

P, N = 8, 32


def side(seed, rate, length):
  rng = np.random.default_rng(seed)
  rewards = (rng.random((P, N)) < rate).astype(float)
  logp = rng.normal(-3, 0.05, (P, N)) - 0.3 * rewards
  parsed = [
    [['right'] if r else [f'wrong {rng.integers(3)}'] for r in row] for row in rewards
  ]
  texts = [['?'] * N] * P
  lengths = np.full((P, N), float(length))
  return Side(rewards, logp, logp - 1, lengths, np.ones((P, N)), texts, texts, parsed)


BASE, POLICY = side(0, 0.3, 2), side(1, 0.6, 5)


@pytest.fixture(scope='module')
def got():
  return nulls.of_samples(BASE, POLICY)


def test_sharpened_up_to_what_its_weights_are_worth(got):
  k = pass_at_k.ladder(N)
  whole = sharpening.sharpened(BASE.rewards, BASE.logp_base, k)
  assert got.power.alpha == whole.alpha != 1
  assert got.power.curve.k.tolist() == k[k <= whole.effective].tolist() != k.tolist()
  np.testing.assert_allclose(
    got.power.values, whole.values[:, : len(got.power.curve.k)]
  )


def test_the_policy_less_that_on_the_same_prompts(got):
  ours = POLICY.rewards[got.power.prompts].mean()
  np.testing.assert_allclose(
    got.over_power.difference[0], ours - got.power.values[:, 0].mean()
  )
  assert got.over_power.difference[0] > 0


def test_the_base_votes_by_what_was_read_even_if_it_is_a_list(got):
  said = [[x[0] for x in row] for row in BASE.parsed]
  direct = majority.estimates(said, BASE.rewards, [1, 2, 4, 8, 16])
  assert got.majority.k.tolist() == [1, 2, 4, 8, 16]
  np.testing.assert_allclose(got.majority.rate, direct.mean(0))


def test_where_nothing_is_read_texts_vote():
  texts = [[x[0] for x in row] for row in BASE.parsed]
  unread = BASE._replace(parsed=[[None] * N] * P, texts=texts)
  again = nulls.of_samples(unread, POLICY)
  np.testing.assert_allclose(
    again.majority.rate, nulls.of_samples(BASE, POLICY).majority.rate
  )


def test_best_of_as_many_as_cost_the_same(got):
  assert got.n == 2.5
  direct = sharpening.best_of(BASE.rewards, 2.5).mean()
  np.testing.assert_allclose(got.best_of.mean, direct)
  assert direct > BASE.rewards.mean()


def test_exact():
  base = np.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]])
  right = np.array([[False, True, False], [True, False, False]])
  k = np.array([1, 2, 4])
  policy = np.array([[0.9, 0.95, 1.0], [0.8, 0.9, 1.0]])
  got = nulls.exact(base, right, policy, k)
  (at,) = got.power.prompts
  np.testing.assert_allclose(
    got.over_power.difference, policy[at] - got.power.values[0]
  )
  np.testing.assert_allclose(got.best_of.mean, 0.35)
  assert got.majority is None
