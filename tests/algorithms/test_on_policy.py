"""What GRPO and PPO share; their own tests hold the rest of it."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe.algorithms import on_policy
from educe.rollouts.position import Position
from educe.types import Batch, Rollouts

ROUNDS = types.SimpleNamespace(
  prompts=4,
  group=2,
  temperature=0.7,
  ahead=False,
  behind=False,
  publisher=None,
  seed=0,
  get_state=dict,
  holding=contextlib.nullcontext,
  must_score=lambda: None,
)


def test_what_is_read_is_in_order_whole_and_at_the_sampling_temperature():
  model, table = toy.model()
  tokens = np.random.default_rng(0).integers(0, 8, (6, 5)).astype(np.int32)
  sizes = []

  def place(batch, shares=1):
    sizes.append(len(batch.tokens))
    return batch

  read = on_policy.reader(model, ROUNDS, place, 2)
  logp, values = read(table, tokens, np.ones((6, 5), np.float32))
  assert values is None
  assert sizes == [2, 2, 2]
  want = np.zeros((6, 5))
  for b, row in enumerate(tokens):
    for t in range(1, 5):
      want[b, t] = toy.log_softmax(toy.logits(table, row[:t]) / 0.7)[row[t]]
  np.testing.assert_allclose(logp, want, atol=2e-5)  # up to 10 nats in float32
  counted = model._replace(
    values=lambda params, states, tokens, *_: (jnp.cumsum(tokens, -1) * 1.0, {})
  )
  _, values = on_policy.reader(counted, ROUNDS, place, 3)(
    table, tokens, np.ones((6, 5), np.float32)
  )
  np.testing.assert_array_equal(values[:, 1:], np.cumsum(tokens, -1)[:, :-1])
  assert not values[:, 0].any()


@pytest.mark.parametrize(
  ('rounds', 'said'),
  [
    ({}, None),
    (dict(publisher=1), 'rollouts.server samples with other kernels'),
    (dict(publisher=1, behind=True), 'rollouts.server.export_every > 1 samples from'),
    (dict(publisher=1, behind=True, ahead=True), 'rollouts.ahead samples from'),
    (dict(behind=True, ahead=True), 'rollouts.ahead samples from'),
  ],
)
def test_what_is_off_policy_unweighed_is_said(rounds, said, capsys):
  rounds = types.SimpleNamespace(**(vars(ROUNDS) | rounds))
  on_policy.check(rounds, functools.partial(print), 1, 1, None)
  told = capsys.readouterr().err
  assert (said in told) if said else not told
  weighed = functools.partial(print, sampler_correction='token_truncate')
  on_policy.check(rounds, weighed, 1, 1, None)
  assert not capsys.readouterr().err


def test_the_sampler_drew_from_what_truncation_left():
  mask = np.array([[0, 1, 1.0]])
  plain = Rollouts(mask, mask, -2 * mask, np.ones(1), np.ones(1), 1, [])
  np.testing.assert_array_equal(on_policy.drawn_logp(plain), [[0, -2, -2]])
  kept = plain._replace(kept=np.array([[1, 0.5, 1]]))
  np.testing.assert_allclose(on_policy.drawn_logp(kept), [[0, -2 - np.log(0.5), -2]])


def test_a_walk_asks_for_a_round_when_the_last_is_spent():
  asked, rounds = [], types.SimpleNamespace(**vars(ROUNDS))

  def following(params, step, greedy):
    asked.append((params, step, greedy))
    return types.SimpleNamespace(number=len(asked) - 1)

  def prepare(state, current):
    rows = np.arange(8) + 100 * current.number
    return Batch(rows[:, None], rows[:, None]), {'round': current.number}

  rounds.next = following
  data = Position(rounds)
  take = on_policy.walk(data, prepare, 2, 2, greedy=True)
  state = types.SimpleNamespace(params='p', step=5)
  seen = [take(state) for _ in range(8)]
  assert asked == [('p', 5, True)] * 2
  assert [info for _, info in seen] == [
    {'round': 0},
    {},
    {},
    {},
    {'round': 1},
    {},
    {},
    {},
  ]
  for first in (0, 2, 4, 6):
    rows = np.concatenate([seen[first + i][0].tokens[:, 0] for i in range(2)]) % 100
    assert sorted(rows) == list(range(8))
    assert (rows.reshape(-1, 2) % 2 == [0, 1]).all()  # whole groups
  assert jax.tree.leaves(seen[4][0].tokens)[0].min() >= 100


def test_one_update_a_round_keeps_the_order_it_was_sampled_in():
  rounds = types.SimpleNamespace(**vars(ROUNDS))
  rounds.next = lambda *a, **k: types.SimpleNamespace(number=3)
  rows = np.arange(8)[:, None]
  take = on_policy.walk(Position(rounds), lambda *_: (Batch(rows, rows), {}), 1, 1)
  batch, _ = take(types.SimpleNamespace(params=None, step=0))
  np.testing.assert_array_equal(batch.tokens, rows)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ((0, 1, None), 'epochs=0'),
    ((1, 3, None), 'rollouts.prompts=4 a multiple of minibatches'),
    ((1, 1, -2), 'reference_every=-2 must be'),
  ],
)
def test_passes_that_cannot_be_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    on_policy.check(ROUNDS, None, *options)
