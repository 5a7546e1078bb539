"""Of a tilt everything is known; of anything else, by the functions of other files."""

import numpy as np
import pytest

from educe.environments import tabular
from educe.measurement import free_energy
from educe.measurement.spending import spending

RNG = np.random.default_rng(0)
BASE = RNG.dirichlet(np.ones(12), 7)
RIGHT = np.arange(12) < np.arange(1, 8)[:, None]
BETA = 0.4


def test_a_tilt_pays_the_price_alone_and_is_its_own_nearest_gibbs_policy():
  policy = tabular.gibbs(BASE, RIGHT.astype(float), BETA)
  got = spending(policy, BASE, RIGHT)
  kl = tabular.kl(policy, BASE).mean()
  np.testing.assert_allclose([got.total.mean, got.price.mean], kl, rtol=1e-12)
  np.testing.assert_allclose([got.collapse.mean, got.drift.mean], 0, atol=1e-12)
  np.testing.assert_allclose(got.beta, BETA, rtol=1e-9)
  np.testing.assert_allclose(got.distance.mean, 0, atol=1e-12)
  np.testing.assert_allclose(got.objective, got.soft_value, rtol=1e-12)
  np.testing.assert_allclose(got.efficiency.eta.mean, 1, rtol=1e-9)
  at = np.interp(kl, *got.frontier.T)
  np.testing.assert_allclose(at, (policy * RIGHT).sum(-1).mean(), atol=1e-3)


def test_any_other_policy_is_further_away_and_gets_less():
  policy = (RNG.dirichlet(np.ones(12), 7) + RIGHT) / (1 + RIGHT.sum(-1, keepdims=True))
  got = spending(policy, BASE, RIGHT)
  terms = got.price.mean + got.collapse.mean + got.drift.mean
  np.testing.assert_allclose(got.total.mean, terms, rtol=1e-12)
  gap = free_energy.gibbs_gap(policy, BASE, RIGHT.astype(float), got.beta).mean()
  np.testing.assert_allclose(got.soft_value - got.objective, gap, rtol=1e-9)
  np.testing.assert_allclose(got.distance.mean, gap / got.beta, rtol=1e-9)
  assert got.efficiency.eta.mean < 1


def test_best_of_n_stands_below_the_frontier():
  got = spending(BASE, BASE, RIGHT)
  kl, reward = got.best_of.T
  assert (np.diff(kl) > 0).all()
  assert (np.diff(reward) > 0).all()
  assert (reward <= np.interp(kl, *got.frontier.T) + 1e-3).all()
  # Two draws of the base: right unless both are wrong.
  rate = (BASE * RIGHT).sum(-1)
  np.testing.assert_allclose(reward[0], (1 - (1 - rate) ** 2).mean(), rtol=1e-9)


@pytest.mark.parametrize('policy', [BASE, np.where(RIGHT, 0, BASE)])
def test_where_nothing_was_gained_the_base_is_the_nearest(policy):
  policy = policy / policy.sum(-1, keepdims=True)
  keep = slice(0, 5)
  got = spending(policy[keep], BASE[keep], RIGHT[keep])
  assert got.beta == np.inf
  kl = tabular.kl(policy, BASE)[keep].mean()
  np.testing.assert_allclose(got.distance.mean, kl, atol=1e-12)
  assert np.isnan(got.soft_value)


def test_where_all_was_gained_the_nearest_is_the_base_among_right_answers():
  policy = np.where(RIGHT, BASE, 0)
  policy /= policy.sum(-1, keepdims=True)
  got = spending(policy, BASE, RIGHT)
  assert got.beta == 0
  np.testing.assert_allclose(got.distance.mean, 0, atol=1e-12)
