"""By hand: two prompts, three samples of each side."""

import numpy as np

from educe.measurement import right_answers
from educe.measurement.table import Side


def side(texts, rewards, base, policy):
  rewards = np.array(rewards, float)
  return Side(
    rewards, np.array(base, float), np.array(policy, float), np.ones(rewards.shape),
    np.ones(rewards.shape), texts, [['wrong'] * 3] * 2, texts,
  )  # fmt: skip


BASE = side(
  [['a', 'b', 'a'], ['x', 'y', 'z']],
  [[1, 0, 1], [0, np.nan, 0]],
  [[-1, -2, -1], [-3, -3, -3]],
  [[-4, -5, -4], [-6, -6, -6]],
)
POLICY = side(
  [['c', 'a', 'b'], ['x', 'y', 'z']],
  [[1, 1, 0], [0, 0, 0]],
  [[-7, -1, -2], [-3, -3, -3]],
  [[-0.5, -4, -5], [-6, -6, -6]],
)


def test_each_right_text_counts_once_with_both_log_probs():
  got = right_answers.shown([BASE, POLICY], slice(None))
  assert got == [{'a': (-1, -4), 'c': (-7, -0.5)}, {}]
  assert right_answers.shown([BASE], slice(None)) == [{'a': (-1, -4)}, {}]
  assert right_answers.shown([BASE, POLICY], slice(1, 2)) == [{'a': (-1, -4)}, {}]


def test_their_mass_adds_up():
  got = right_answers.log_mass(right_answers.shown([BASE, POLICY], slice(None)))
  np.testing.assert_allclose(got[0], np.log(np.exp(-1) + np.exp(-7)))
  assert got[1] == -np.inf


def test_padded_to_the_most_that_a_prompt_has():
  base, policy, there = right_answers.padded(
    right_answers.shown([BASE, POLICY], slice(None))
  )
  assert there.tolist() == [[True, True], [False, False]]
  np.testing.assert_array_equal(base[0], [-1, -7])
  np.testing.assert_array_equal(policy[0], [-4, -0.5])
  assert (base[1] == -np.inf).all()
  none = right_answers.padded([{}, {}])
  assert none[2].shape == (2, 1)
  assert not none[2].any()
