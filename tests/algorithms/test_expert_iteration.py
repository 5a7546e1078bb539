"""What is kept, in what batches, and that it survives a restart."""

import contextlib
import json

import jax
import numpy as np
import pytest

from educe.algorithms import expert_iteration
from educe.losses import sft
from educe.rollouts.rounds import Round
from educe.types import Rollouts, TrainState

NAN = float('nan')


def rollouts_of(rewards, texts=None, group=4):
  """Row i's tokens are all i + 1; a reward of 1 is verified."""
  rows = len(rewards)
  texts = texts or [f'text {i}' for i in range(rows)]
  tokens = np.arange(1, rows + 1, dtype=np.int32)[:, None] * np.ones((1, 4), np.int32)
  mask = np.zeros((rows, 4), np.float32)
  mask[:, 2:] = 1
  outcome = {1.0: 'verified'}
  return Rollouts(
    tokens=tokens,
    mask=mask,
    sampler_logp=np.zeros((rows, 4), np.float32),
    stopped=np.ones(rows, np.int32),
    rewards=np.array(rewards, np.float32),
    group=group,
    transcripts=[
      {'id': i // group, 'completion': text, 'outcome': outcome.get(r, 'wrong')}
      for i, (text, r) in enumerate(zip(texts, rewards, strict=True))
    ],
  )


class Scripted:
  """Rounds whose rewards are given."""

  group, prompts, seed = 4, 2, 0

  def __init__(self, *rounds):
    self.rounds, self.number = rounds, 0

  def next(self, params, step):
    self.number += 1
    return Round(
      rollouts_of(self.rounds[self.number - 1]), None, self.number - 1, step, {}
    )

  def must_score(self):
    pass

  def holding(self, current):
    return contextlib.nullcontext()

  def get_state(self):
    return {'number': self.number}

  def set_state(self, state):
    self.number = state['number']


STATE = TrainState(np.int32(3), {}, None, jax.random.key(0))
FIVE = [1, 0, 1, 1, 0, 1, NAN, 1]


def test_verified_completions_are_kept_once_each():
  rollouts = rollouts_of(FIVE)
  assert expert_iteration.kept(rollouts, 'verified', 1).tolist() == [0, 5]
  assert expert_iteration.kept(rollouts, 'verified', 2).tolist() == [0, 2, 5, 7]
  assert expert_iteration.kept(rollouts, 'verified', 4).tolist() == [0, 2, 3, 5, 7]
  same = rollouts_of(FIVE, texts=['a', 'b', 'a', 'c', 'd', 'e', 'f', 'e'])
  assert expert_iteration.kept(same, 'verified', 4).tolist() == [0, 3, 5]


def test_the_best_by_reward_is_kept_whether_right_or_not():
  rollouts = rollouts_of([0.1, 0.5, NAN, 0.5, NAN, -2, -1, NAN])
  assert expert_iteration.kept(rollouts, 'best', 1).tolist() == [1, 6]
  assert expert_iteration.kept(rollouts, 'best', 4).tolist() == [1, 3, 0, 6, 5]
  nobody = rollouts_of([NAN] * 8)
  assert expert_iteration.kept(nobody, 'best', 1).tolist() == []


def make(tmp_path, *rounds, **options):
  options = {'batch_size': 2, 'per_prompt': 4, 'epochs': 2, **options}
  return expert_iteration.make(Scripted(*rounds), sft.loss, tmp_path, **options)


def rows(batch):
  return [int(x) - 1 for x in batch.tokens[:, 0]]


def test_every_epoch_holds_each_kept_row_once_and_the_last_batch_is_filled(tmp_path):
  method = make(tmp_path, FIVE, FIVE)
  batches = [method.next_batch(STATE)[0] for _ in range(6)]
  for epoch in (batches[:3], batches[3:]):
    assert sorted(r for b in epoch for r in rows(b)) == [-1, 0, 2, 3, 5, 7]
  assert [r for b in batches[:3] for r in rows(b)] != [
    r for b in batches[3:] for r in rows(b)
  ]
  for batch in batches:
    assert batch.tokens.shape == (2, 4)
    np.testing.assert_array_equal(
      batch.mask.sum(-1), [2 * (row >= 0) for row in rows(batch)]
    )
  assert method.rows == 2


def test_every_pass_of_every_round_has_an_order_of_its_own(tmp_path):
  method = make(tmp_path, FIVE, FIVE)
  passes = [[rows(method.next_batch(STATE)[0]) for _ in range(3)] for _ in range(4)]
  assert len({str(batches) for batches in passes}) == 4


def test_numbers_and_transcripts_say_what_was_kept(tmp_path):
  method = make(tmp_path, FIVE)
  _, info = method.next_batch(STATE)
  assert (info['kept/rows'], info['kept/prompts']) == (5, 2)
  assert method.next_batch(STATE)[1] == {}
  lines = (tmp_path / 'rollouts' / '000000.jsonl').read_text().splitlines()
  assert [json.loads(x)['kept'] for x in lines] == [1, 0, 1, 1, 0, 1, 0, 1]
  assert json.loads(lines[0])['step'] == 3


def test_rounds_without_anything_right_are_sampled_again_but_not_for_ever(tmp_path):
  nothing = [0.0] * 8
  batch, info = make(tmp_path, nothing, nothing, FIVE).next_batch(STATE)
  assert info['kept/rows'] == 5
  assert set(rows(batch)) <= {0, 2, 3, 5, 7}
  with pytest.raises(ValueError, match='no completion was kept in 10 rounds'):
    make(tmp_path, *[nothing] * 10).next_batch(STATE)


@pytest.mark.parametrize('taken', [1, 4, 6])
def test_a_restart_goes_on_with_the_same_batches(tmp_path, taken):
  script = (FIVE, [0.0, 1, 1, 0, 0, 0, 0, 0])
  whole = make(tmp_path, *script)
  want = [rows(whole.next_batch(STATE)[0]) for _ in range(8)]
  first = make(tmp_path, *script)
  got = [rows(first.next_batch(STATE)[0]) for _ in range(taken)]
  second = make(tmp_path, *script)
  second.data.set_state(first.data.get_state())
  got += [rows(second.next_batch(STATE)[0]) for _ in range(8 - taken)]
  assert got == want


@pytest.mark.parametrize('epochs', [1, 3, 7])
def test_other_epochs_on_the_way_count_from_the_next_round(tmp_path, epochs):
  """The round that was under way ends as it began, each row as often."""
  first = make(tmp_path, FIVE)
  got = [rows(first.next_batch(STATE)[0])]
  second = make(tmp_path, FIVE, FIVE, epochs=epochs)
  second.data.set_state(first.data.get_state())
  got += [rows(second.next_batch(STATE)[0]) for _ in range(5)]
  whole = make(tmp_path, FIVE)
  assert got == [rows(whole.next_batch(STATE)[0]) for _ in range(6)]
  assert 'kept/rows' in second.next_batch(STATE)[1]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'batch_size': 0}, 'batch_size=0'),
    ({'epochs': 0}, 'epochs=0'),
    ({'keep': 'good'}, "algorithm.keep='good' must be one of"),
    ({'per_prompt': 5}, 'per_prompt=5 must be in 1..rollouts.group=4'),
  ],
)
def test_bad_input(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    make(tmp_path, FIVE, **options)
