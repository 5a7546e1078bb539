import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe import hosts
from educe.data import tokenizer as tokenizer_lib
from educe.losses.logprobs import score
from educe.models import policy, presets
from educe.rollouts.collect import collect, fitting
from educe.rollouts.sampler import bucket
from educe.types import Batch, Environment, Turn

KEY = jax.random.key(0)
RECORDS = [
  {'id': 'a', 'prompt': 'one', 'answer': '1'},
  {'prompt': 'a longer prompt, two', 'answer': '2'},
  {'id': 7, 'prompt': 'x', 'answer': '3'},
]


def respond(record, transcript):
  (text,) = transcript
  info = {'outcome': 'verified' if 'a' in text else 'wrong', 'rewards': {'a': 1.0}}
  return Turn(None, float(text.count('a')), True, info)


ENVIRONMENT = Environment(RECORDS, respond)


@pytest.fixture(scope='module')
def plain():
  """A toy policy that writes plain letters and now and then the end."""
  tokenizer = tokenizer_lib.load(path='byte')
  model, params = toy.model(vocabulary=tokenizer.vocab_size, max_length=64)
  params = params.at[:, jnp.array([ord(c) for c in 'abcdefgh '])].add(14)
  return model, params.at[:, jnp.array(tokenizer.eos_ids)].add(14), tokenizer


@pytest.fixture(scope='module')
def decoder():
  tokenizer = tokenizer_lib.load(path='byte')
  model = policy.build(presets.debug)
  params = jax.jit(model.init)(jax.random.key(5))
  # A fresh model is nearly uniform, where a wrong temperature would hardly show.
  params = {**params, 'head': params['head'] * 40}
  return model, params, tokenizer


def run(tools, records=RECORDS, environment=ENVIRONMENT, **options):
  options = {'group': 4, 'key': KEY, 'max_new_tokens': 12, **options}
  return collect(*tools, environment, records, **options)


def test_rows_are_prompt_then_completion_group_major(plain):
  rollouts = run(plain)
  tokenizer = plain[2]
  assert rollouts.group == 4
  assert len(rollouts.transcripts) == 12
  assert len({row['length'] for row in rollouts.transcripts}) > 2
  assert len({row['completion'] for row in rollouts.transcripts[:4]}) > 1
  for row, transcript in enumerate(rollouts.transcripts):
    record = RECORDS[row // 4]
    assert transcript['id'] == record.get('id', 1)
    assert transcript['prompt'] == record['prompt']
    assert transcript['answer'] == record['answer']
    ids = [tokenizer.bos_id, *tokenizer.encode(record['prompt'])]
    length = transcript['length']
    tokens = rollouts.tokens[row]
    assert tokens[: len(ids)].tolist() == ids
    sampled = tokens[len(ids) : len(ids) + length]
    assert not tokens[len(ids) + length :].any()
    expected = np.zeros(len(tokens))
    expected[len(ids) : len(ids) + length] = 1
    assert rollouts.mask[row].tolist() == expected.tolist()
    # The stop token is trained on, and is not part of the text.
    stopped = bool(rollouts.stopped[row])
    assert stopped == transcript['stopped'] == (sampled[-1] in tokenizer.eos_ids)
    assert (
      bytes(sampled[: length - stopped].tolist()).decode() == (transcript['completion'])
    )
    assert rollouts.rewards[row] == transcript['completion'].count('a')
    assert transcript['outcome'] in ('verified', 'wrong')
    assert transcript['rewards'] == {'a': 1.0}
  assert rollouts.stopped.any()
  assert not rollouts.stopped.all()


def test_log_probs_stand_at_the_token_they_score(plain):
  _, table, _ = plain
  rollouts = run(plain, temperature=1.3)
  exact = np.asarray(table, np.float64)
  for row in range(12):
    for column in range(rollouts.tokens.shape[1]):
      logp = rollouts.sampler_logp[row, column]
      if not rollouts.mask[row, column]:
        assert logp == 0
        continue
      history = rollouts.tokens[row, :column]
      x = toy.log_softmax(toy.logits(exact, history.tolist()) / 1.3)
      np.testing.assert_allclose(logp, x[rollouts.tokens[row, column]], atol=1e-5)


@pytest.mark.parametrize('temperature', [0.6, 1.0, 1.3])
@pytest.mark.parametrize('batch_size', [64, 3])
def test_on_policy_log_probs_equal_score(decoder, temperature, batch_size):
  model, params, _ = decoder
  rollouts = run(
    decoder, temperature=temperature, batch_size=batch_size, max_new_tokens=20
  )
  for pad in (0, 19):  # a wider padding must not change what a policy says
    tokens = np.pad(rollouts.tokens, ((0, 0), (0, pad)))
    mask = np.pad(rollouts.mask, ((0, 0), (0, pad)))
    batch = Batch(jnp.asarray(tokens), jnp.asarray(mask))
    logp = score(model, params, batch, temperature=temperature).logp
    ours = np.pad(rollouts.sampler_logp, ((0, 0), (0, pad)))
    # float32 sums of different order; the ratio is 1 to 1e-4.
    np.testing.assert_allclose(ours, logp * mask, atol=1e-4)
    wrong = score(model, params, batch, temperature=temperature * 1.1).logp
    assert np.abs(ours - wrong * mask).max() > 1e-2


def test_new_params_give_new_log_probs(decoder):
  """No weights and no keys of a former call are used again."""
  model, params, tokenizer = decoder
  before = run(decoder)
  moved = jax.tree.map(lambda x: x * 1.05, params)
  after = run((model, moved, tokenizer))
  again = run(decoder)
  np.testing.assert_array_equal(before.tokens, again.tokens)
  np.testing.assert_array_equal(before.sampler_logp, again.sampler_logp)
  batch = Batch(jnp.asarray(after.tokens), jnp.asarray(after.mask))
  stale = np.abs(after.sampler_logp - score(model, params, batch).logp * after.mask)
  fresh = np.abs(after.sampler_logp - score(model, moved, batch).logp * after.mask)
  assert stale.max() > 1e-2
  assert fresh.max() < 1e-4


def test_batches_and_orders_do_not_change_a_row(plain):
  whole = run(plain)
  small = run(plain, batch_size=3)
  np.testing.assert_array_equal(whole.tokens, small.tokens)
  np.testing.assert_allclose(whole.sampler_logp, small.sampler_logp, atol=1e-6)
  last = run(plain, RECORDS[2:], seeds=[8, 9, 10, 11])
  assert [row['completion'] for row in last.transcripts] == [
    row['completion'] for row in whole.transcripts[8:]
  ]
  other = run(plain, key=jax.random.key(1))
  assert other.transcripts[0]['completion'] != whole.transcripts[0]['completion']


def test_the_width_is_a_bucket_of_the_longest_row(plain):
  for length in (2, 41):
    rollouts = run(plain, max_new_tokens=length)
    longest = (rollouts.tokens * 0 + np.arange(rollouts.tokens.shape[1])).max(
      where=rollouts.mask > 0, initial=0
    ) + 1
    assert rollouts.tokens.shape[1] == bucket(longest)


def test_the_kept_mass_is_given_when_something_was_cut(decoder):
  model, params, _ = decoder
  assert run(decoder).kept is None
  assert run(decoder, top_k=10_000).kept is None
  rollouts = run(decoder, top_k=20, temperature=0.8)
  assert (rollouts.kept[rollouts.mask == 0] == 1).all()
  states, _ = model.hidden(params, jnp.asarray(rollouts.tokens))
  logits = np.asarray(states @ params['head'], np.float64) / 0.8
  p = np.exp(toy.log_softmax(logits))
  mass = np.sort(p, -1)[..., -20:].sum(-1)  # of the next token
  where = rollouts.mask[:, 1:] == 1
  np.testing.assert_allclose(
    rollouts.kept[:, 1:][where], mass[:, :-1][where], atol=1e-4
  )
  assert rollouts.kept.min() < 0.98


def test_a_verifier_sees_every_row_at_once_and_in_order(plain):
  calls = []

  def verifier(rows):
    calls.append(rows)
    return [Turn(None, float(index), True, {}) for index in range(len(rows))]

  rollouts = run(plain, verifier=verifier)
  assert len(calls) == 1
  assert [record['prompt'] for record, _ in calls[0]] == [
    record['prompt'] for record in RECORDS for _ in range(4)
  ]
  assert [text for _, (text,) in calls[0]] == [
    row['completion'] for row in rollouts.transcripts
  ]
  assert rollouts.rewards.tolist() == list(range(12))
  # Without an outcome, a reward of 1 or more is verified (as in measurement.accuracy).
  assert [row['outcome'] for row in rollouts.transcripts[:2]] == ['wrong', 'verified']


def test_not_scored_is_nan(plain):
  turn = Turn(None, None, True, {})
  rollouts = run(plain, verifier=lambda rows: [turn] * len(rows))
  assert np.isnan(rollouts.rewards).all()
  assert {row['reward'] for row in rollouts.transcripts} == {None}
  assert {row['outcome'] for row in rollouts.transcripts} == {'unparsable'}


def test_a_reward_is_what_was_paid_whatever_the_outcome(plain):
  """Partial credit for a wrong answer, a fine for an unparsable one."""
  paid = [('wrong', 0.5), ('unparsable', -1.0), ('verified', 0.25), ('wrong', 2.0)] * 3
  turns = [Turn(None, reward, True, {'outcome': said}) for said, reward in paid]
  rollouts = run(plain, verifier=lambda rows: turns)
  said = [(row['outcome'], row['reward']) for row in rollouts.transcripts]
  assert said == paid
  np.testing.assert_array_equal(rollouts.rewards, np.float32([r for _, r in paid]))


def test_a_reward_that_raises_is_an_error_and_not_scored(plain):
  def sometimes(record, transcript):
    if record['prompt'] == 'one':
      raise KeyError('no such column')
    return Turn(None, 1.0, True, {})

  rollouts = run(plain, environment=Environment(RECORDS, sometimes))
  assert np.isnan(rollouts.rewards[:4]).all()
  assert (rollouts.rewards[4:] == 1).all()
  assert rollouts.transcripts[0]['outcome'] == 'error'
  assert 'no such column' in rollouts.transcripts[0]['error']


@pytest.mark.parametrize('reward', [math.nan, math.inf, 'good', True])
def test_a_reward_that_is_no_number_is_an_error_and_not_scored(plain, reward):
  """As it is where worker processes judge: NaN is no way to say "not scored"."""

  def sometimes(record, transcript):
    return Turn(None, reward if record['prompt'] == 'one' else 1.0, True, {})

  rollouts = run(plain, environment=Environment(RECORDS, sometimes))
  assert np.isnan(rollouts.rewards[:4]).all()
  assert (rollouts.rewards[4:] == 1).all()
  assert rollouts.transcripts[0]['outcome'] == 'error'
  assert 'reward is' in rollouts.transcripts[0]['error']


def always(turn):
  return Environment(RECORDS, lambda record, transcript: turn)


def broken(record, transcript):
  return 1 / 0


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(group=0), 'group must be a whole number ≥ 1, got 0'),
    (dict(group=1.5), 'group must be'),
    (dict(records=[]), 'no records'),
    (dict(records=[{'id': 'q', 'text': 'x'}]), "'q' has no prompt, only"),
    (dict(max_new_tokens=50), 'record 1: its prompt has 21 tokens, with max_new_tokens'),
    (dict(max_new_tokens=0), 'max_new_tokens must be at least 1'),
    (dict(seeds=[1, 2]), '2 seeds for 12'),
    (dict(verifier=lambda rows: []), 'verifier answered 0 rows, 12 were asked'),
    (dict(verifier=lambda rows: [None] * 12), "record 'a': respond returned None"),
    (dict(environment=always(Turn('go on', 0.0, False, {}))), 'another turn'),
    (dict(environment=always(Turn(None, 'good', True, {}))), "'a': .* reward is 'good'"),
    (dict(environment=always(Turn(None, math.inf, True, {}))), 'reward is inf'),
    (dict(environment=always(Turn(None, 1e39, True, {}))), r'is 1e\+39: return a'),
    (dict(environment=always(Turn(None, 1.0, True, {'outcome': 'fine'}))), "'fine'"),
    (
      dict(environment=Environment(RECORDS, functools.partial(broken))),
      r"every row raised: environment .*test_collect.*record 'a': ZeroDivisionError: "
      r'division by zero \(test_collect.py line \d+\)',
    ),
    (
      dict(environment=Environment(RECORDS, lambda *_: Turn(None, 1.0, True))),
      r"record 'a': TypeError: .*missing 1 required positional argument: 'info'",
    ),
    (dict(environment=always(1.0)), r"'a': .* returned 1.0, expected a Turn"),
    (dict(environment=always((None, 1.0, True, {}))), 'expected a Turn'),
    (dict(environment=always(Turn(None, 1.0, True, None))), 'info=None: must be a dict'),
  ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(plain, options, message):
  with pytest.raises(ValueError, match=message) as error:
    run(plain, **options)
  assert '\n' not in str(error.value)


def test_fitting_drops_what_leaves_no_room(plain):
  model, _, tokenizer = plain
  kept = fitting(model, tokenizer, RECORDS, max_new_tokens=44)
  assert kept == [RECORDS[0], RECORDS[2]]
  assert fitting(model, tokenizer, RECORDS, max_new_tokens=43) == RECORDS
  assert run(plain, max_new_tokens=43).tokens.shape[1] <= 64


def test_processes_judge_a_share_each_and_hear_of_all(plain, as_processes):
  asked = {}

  def noted(record, transcript):
    asked.setdefault(hosts.index(), []).append(record['prompt'])
    return respond(record, transcript)

  whole = run(plain, environment=ENVIRONMENT._replace(respond=noted), together=True)
  everything = asked.pop(0)
  for verifier in (None, lambda rows: [noted(*row) for row in rows]):
    asked.clear()
    found = as_processes(
      2,
      lambda _, v=verifier: run(
        plain,
        environment=ENVIRONMENT._replace(respond=noted),
        together=True,
        verifier=v,
      ),
    )
    for each in found:
      assert each.transcripts == whole.transcripts
      np.testing.assert_array_equal(each.rewards, whole.rewards)
    assert sorted(asked[0] + asked[1]) == sorted(everything)
    assert abs(len(asked[0]) - len(asked[1])) <= 1
  # Alone, as where each process samples rows of its own, nothing is exchanged.
  asked.clear()
  alone = ENVIRONMENT._replace(respond=noted)
  as_processes(2, lambda i: i or run(plain, environment=alone))
  assert {i: sorted(x) for i, x in asked.items()} == {0: sorted(everything)}


def test_a_reward_that_always_raises_is_said_in_all_processes(plain, as_processes):
  some = ENVIRONMENT._replace(respond=broken)
  found = as_processes(2, lambda _: run(plain, environment=some, together=True))
  for error in found:
    assert isinstance(error, ValueError)
    assert 'the reward of every row raised' in str(error)

  def dies(rows):
    if hosts.index():
      raise ValueError('verifier workers die while starting')
    return [respond(*row) for row in rows]

  found = as_processes(2, lambda _: run(plain, together=True, verifier=dies))
  assert [str(x) for x in found] == [
    'process 1: verifier workers die while starting',
    'verifier workers die while starting',
  ]
