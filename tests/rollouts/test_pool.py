"""Every prompt its turn; the promising ones more often; a restart changes nothing."""

import json

import numpy as np
import pytest

from educe.rollouts.pool import FLOOR, Pool


def test_uniform_asks_each_prompt_once_an_epoch_in_a_new_order():
  pool = Pool(10, seed=3, adaptive=False)
  epochs = [pool.draw(10) for _ in range(4)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4
  assert epochs[0] != Pool(10, seed=4, adaptive=False).draw(10)


def test_uniform_order_does_not_depend_on_how_many_are_drawn_at_once():
  """A refill takes what the next round would have taken: nothing twice, nothing lost."""
  whole = Pool(7, seed=0, adaptive=False).draw(21)
  pool = Pool(7, seed=0, adaptive=False)
  assert [index for n in (3, 5, 1, 12) for index in pool.draw(n)] == whole


def test_adaptive_draws_in_proportion_to_what_there_is_to_learn():
  pool = Pool(4, seed=0, adaptive=True)
  pool.report([0, 1, 2, 3], 98, np.array([0, 49, 98, 24]))
  p = np.array([1, 50, 99, 25]) / 100
  want = FLOOR + (1 - FLOOR) * 4 * p * (1 - p)
  counts = np.bincount([pool.draw(1)[0] for _ in range(4000)], minlength=4)
  # Four standard errors of a share of 4000 draws.
  np.testing.assert_allclose(counts / 4000, want / want.sum(), atol=4 * 0.5 / 4000**0.5)
  assert counts[0] > 100  # nothing is given up


def test_adaptive_repeats_none_in_a_draw_and_says_when_it_must():
  pool = Pool(6, seed=0, adaptive=True)
  draws = [pool.draw(6) for _ in range(3)]
  assert all(sorted(draw) == list(range(6)) for draw in draws)
  assert len({tuple(draw) for draw in draws}) > 1
  with pytest.raises(ValueError, match=r'rollouts.prompts=7 of 6 prompts'):
    pool.draw(7)


def test_old_visits_count_less():
  """What was solved once, and no longer is, comes back."""
  pool = Pool(1, seed=0, adaptive=True)
  pool.report([0], 10, np.array([10]))
  pool.report([0], 10, np.array([0]))
  assert (pool.tried[0], pool.solved[0]) == (18, 8)
  with pytest.raises(ValueError, match='zip'):
    pool.report([0], 10, np.array([1, 2]))


@pytest.mark.parametrize('adaptive', [False, True])
def test_a_restored_pool_goes_on_with_the_same_questions(adaptive):
  pool = Pool(9, seed=1, adaptive=adaptive)
  pool.report(pool.draw(4), 3, np.array([0, 1, 2, 3]))
  state = json.loads(json.dumps(pool.get_state()))
  want = [pool.draw(4) for _ in range(5)]
  again = Pool(9, seed=1, adaptive=adaptive)
  again.set_state(state)
  assert [again.draw(4) for _ in range(5)] == want


def test_a_pool_may_become_adaptive_on_the_way_and_back():
  """It then knows of no prompt yet; the order of the uniform one goes on."""
  pool = Pool(5, seed=1, adaptive=False)
  pool.draw(3)
  later = Pool(5, seed=1, adaptive=True)
  later.set_state(json.loads(json.dumps(pool.get_state())))
  assert sorted(later.draw(5)) == list(range(5))
  back = Pool(5, seed=1, adaptive=False)
  back.set_state(json.loads(json.dumps(later.get_state())))
  assert back.draw(4) == Pool(5, seed=1, adaptive=False).draw(12)[8:]
