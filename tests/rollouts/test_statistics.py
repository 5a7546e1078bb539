"""The numbers of a round, against hand-computed ones."""

import numpy as np
import pytest

from educe.rollouts import statistics
from educe.types import Rollouts

NAN = np.nan


def rollouts(rewards, outcomes, lengths, stopped, group, parts=None, kept=None):
  rows = len(rewards)
  mask = (np.arange(6)[None] < np.array(lengths)[:, None]).astype(np.float32)
  parts = parts or [{}] * rows
  return Rollouts(
    tokens=np.zeros((rows, 6), np.int32),
    mask=mask,
    sampler_logp=np.zeros((rows, 6), np.float32),
    stopped=np.array(stopped, np.int32),
    rewards=np.array(rewards, np.float32),
    group=group,
    transcripts=[
      {'outcome': o, 'rewards': p} for o, p in zip(outcomes, parts, strict=True)
    ],
    kept=kept,
  )


def example(**changes):
  v, w, t = 'verified', 'wrong', 'timeout'
  return rollouts(
    **{
      'rewards': [1, 1, 0, 1, 0, 0, NAN, 0.5, NAN],
      'outcomes': [v, v, w, v, w, w, t, w, t],
      'lengths': [1, 2, 3, 4, 5, 6, 1, 1, 1],
      'stopped': [1, 1, 1, 1, 1, 0, 0, 1, 1],
      'group': 3,
      **changes,
    }
  )


def test_a_round_in_numbers():
  parts = [{'a': 1.0, 'b': None}, {'a': 0.0, 'b': 3.0}, *[{}] * 7]
  got = statistics.summary(example(parts=parts))
  want = {
    'reward': 3.5 / 7,
    # Of [1, 1, 0] and [1, 0, 0], both √(1/3); the third group has one scored row.
    'reward_std': (1 / 3) ** 0.5,
    'frac_reward_zero_std': 1 / 3,
    'groups/solved_none': 1 / 3,
    'groups/solved_some': 2 / 3,
    'groups/solved_all': 0,
    'completions/mean_length': 24 / 9,
    'completions/min_length': 1,
    'completions/max_length': 6,
    'completions/clipped_ratio': 2 / 9,
    'outcomes/verified': 3 / 9,
    'outcomes/wrong': 4 / 9,
    'outcomes/unparsable': 0,
    'outcomes/timeout': 2 / 9,
    'outcomes/error': 0,
    'outcomes/judged': 0,
    'rewards/a/mean': 0.5,
    'rewards/b/mean': 3,
  }
  assert got == pytest.approx(want, rel=1e-7)  # a mask, and so a length, is float32
  assert all(type(x) is float for x in got.values())


def test_nothing_scored_is_nan_and_silent_not_zero_and_not_a_crash():
  got = statistics.summary(example(rewards=[NAN] * 9))
  assert np.isnan(got['reward'])
  assert (got['reward_std'], got['frac_reward_zero_std']) == (0, 1)


def test_kept_mass_counts_sampled_tokens_alone():
  kept = np.full((9, 6), 0.1, np.float32)
  kept[1, :2] = 0.5
  mask = np.zeros((9, 6), np.float32)
  mask[1, :2] = 1
  r = example(kept=kept)._replace(mask=mask)
  assert statistics.summary(r)['sampling/kept_mass'] == pytest.approx(0.5)
  assert 'sampling/kept_mass' not in statistics.summary(example())


@pytest.mark.parametrize(
  ('rewards', 'silent'),
  [
    ([1, 1, 1], True),
    ([0.35, 0.35, 0.35], True),  # no residue
    ([1, 1, 0], False),
    ([1, NAN, 0], False),
    ([1, NAN, NAN], True),
    ([NAN, NAN, NAN], True),
    ([-2, -2, -1], False),
  ],
)
def test_groups_that_say_nothing(rewards, silent):
  r = rollouts(rewards, ['wrong'] * 3, [1] * 3, [1] * 3, 3)
  assert statistics.equal(r).tolist() == [silent]


def test_verified_counts_outcomes_by_group_not_rewards():
  """A shaped reward of 1 is not a solution, a solution of reward 0.2 is one."""
  assert statistics.verified(example()).tolist() == [2, 1, 0]
  assert statistics.verified(example(rewards=[0.2] * 9)).tolist() == [2, 1, 0]
