"""Every row once a pass, in an order that a restart finds again."""

import numpy as np
import pytest

from educe.rollouts.position import Position
from educe.types import Batch


class Rounds:
  """Its own position, and whether it was closed."""

  def __init__(self, seed=0):
    self.seed, self.state, self.closed = seed, {'number': 7}, False

  def get_state(self):
    return self.state

  def set_state(self, state):
    self.state = state

  def close(self):
    self.closed = True


def position(number=0, steps=6, seed=0):
  found = Position(Rounds(seed))
  tokens = np.arange(30, dtype=np.int32).reshape(10, 3)
  found.begin(Batch(tokens, np.ones((10, 3), np.float32)), number, steps)
  return found


def test_every_row_once_a_pass_and_the_last_step_of_a_pass_may_be_short():
  at = position()
  passes = [[at.take(10, 4) for _ in range(3)] for _ in range(2)]
  for parts in passes:
    assert [len(part) for part in parts] == [4, 4, 2]
    assert sorted(np.concatenate(parts)) == list(range(10))
  assert passes[0][0].tolist() != passes[1][0].tolist()


@pytest.mark.parametrize('other', [dict(number=1), dict(seed=1)])
def test_rounds_and_seeds_have_orders_of_their_own(other):
  ours, theirs = position().take(10, 10), position(**other).take(10, 10)
  assert sorted(ours) == sorted(theirs)
  assert ours.tolist() != theirs.tolist()
  assert ours.tolist() == position().take(10, 10).tolist()


def test_it_is_spent_before_the_first_round_and_after_the_last_step():
  assert Position(Rounds()).spent
  at = position(steps=2)
  for _ in range(2):
    assert not at.spent
    at.take(10, 5)
  assert at.spent


def test_a_restored_one_goes_on_with_the_same_rows():
  at, other = position(number=3), Position(Rounds())
  at.take(10, 4)
  other.set_state(at.get_state())
  assert other.rollouts.state == {'number': 7}
  assert not other.spent
  for _ in range(5):
    ours, theirs = at.take(10, 4), other.take(10, 4)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(at.rows(ours).tokens, other.rows(theirs).tokens)
  assert at.spent
  assert other.spent


def test_a_spent_round_is_not_saved():
  at, other = position(steps=1), position()
  assert 'whole' in at.get_state()
  at.take(10, 10)
  assert 'whole' not in at.get_state()
  other.set_state(at.get_state())
  assert other.spent


def test_closing_it_closes_the_rounds():
  at = position()
  at.close()
  assert at.rollouts.closed


def test_what_an_algorithm_keeps_beside_it_survives_between_rounds_too():
  for at in (position(), Position(Rounds())):
    at.extra = {'coefficient': 0.1 + 0.2, 'numbers': {'kl': 1e-17}}
    other = Position(Rounds())
    other.extra = {'coefficient': 1.0, 'new': 2}
    other.set_state(at.get_state())
    assert other.extra == {**at.extra, 'new': 2}
  before = Position(Rounds()).get_state()  # of a run that kept nothing
  other.set_state(before)
  assert other.extra['coefficient'] == 0.1 + 0.2
