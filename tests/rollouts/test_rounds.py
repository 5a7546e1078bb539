"""Rounds: the right groups in the right places, and nothing lost between two runs."""

import functools
import itertools
import json
import threading
import time

import jax
import numpy as np
import pytest
import toy

from educe.data import tokenizer as tokenizers
from educe.environments import chain, reward_functions
from educe.environments.verifiers import VerifierError
from educe.models import scratch
from educe.rollouts import rounds, statistics
from educe.rollouts import server as server_lib
from educe.rollouts.joining import ARRAYS
from educe.rollouts.pool import Pool
from educe.types import Environment, Rollouts, StateMismatch, Turn

SMALL = dict(prompts=4, group=3, max_new_tokens=3, workers=0, show_every=0)
WORDS = tokenizers.load(path=f'characters:{chain.ALPHABET}')


@functools.cache
def policy():
  return scratch.load(preset='chain')


def real(environment=None, **changes):
  """Rounds of a random tiny transformer on the chain world."""
  world = environment or chain.make(depth=2, part='train')
  return rounds.make(policy()[0], WORDS, world, 0, **(SMALL | changes))


class Oracle:
  """Stands in for sampler and judge: prompt i's completions say (i, row, call).

  reward(i, row, call) decides what they earn. Rows are wider with every call.
  """

  def __init__(self, reward, cut=()):
    self.reward, self.cut, self.calls = reward, cut, []

  def __call__(self, params, chosen, key, *, group=3, temperature=1.0):
    call = len(self.calls)
    self.calls.append((params, list(chosen), group, temperature))
    rows = [(i, row) for i in chosen for row in range(group)]
    width = 4 + call
    tokens = np.zeros((len(rows), width), np.int32)
    tokens[:, :3] = [(i, row, call) for i, row in rows]
    tokens[:, -1] = 999
    mask = np.zeros((len(rows), width), np.float32)
    mask[:, 1:3] = 1
    rewards = [self.reward(i, row, call) for i, row in rows]
    transcripts = [
      {'id': i, 'row': row, 'call': call, 'reward': reward, 'length': 2, 'rewards': {},
       'outcome': 'verified' if reward == 1 else 'wrong', 'stopped': True,
       'prompt': str(i), 'completion': str(row), 'answer': ''}
      for (i, row), reward in zip(rows, rewards, strict=True)
    ]  # fmt: skip
    return Rollouts(
      tokens,
      mask,
      -mask * tokens,
      np.ones(len(rows), np.int32),
      np.array(rewards, np.float32),
      group,
      transcripts,
      kept=np.full(mask.shape, 0.5, np.float32) if call in self.cut else None,
    )


def fake(oracle, size=20, adaptive=False, **changes):
  settings = dict(
    seed=0, prompts=4, group=3, max_new_tokens=3, temperature=1.0, refills=0,
    ahead=False, show_every=0,
  )  # fmt: skip
  pool = Pool(size, seed=0, adaptive=adaptive)
  return rounds.Rounds(oracle, pool, None, **(settings | changes))


def check_rows(current):
  """Tokens, mask, log-probs, rewards and transcripts of a row speak of one sample."""
  r = current.rollouts
  for at, transcript in enumerate(r.transcripts):
    i, row, call = (int(x) for x in r.tokens[at, :3])
    assert (i, row, call) == tuple(transcript[k] for k in ('id', 'row', 'call'))
    assert row == at % r.group
    assert i == r.tokens[at - row, 0]  # one prompt a group
    assert r.rewards[at] == np.float32(transcript['reward'])
    assert r.mask[at].sum() == 2
    np.testing.assert_array_equal(r.sampler_logp[at], -r.mask[at] * r.tokens[at])
    assert np.flatnonzero(r.tokens[at] == 999).tolist() == [3 + call]


def mixed(i, row, call):
  """Even prompts say nothing, odd ones do."""
  return float(row == i % 3) if i % 2 else 0.0


def test_refills_put_whole_groups_where_silent_ones_were():
  oracle = Oracle(mixed)
  current = fake(oracle, refills=10).next(None, 5)
  check_rows(current)
  assert not statistics.equal(current.rollouts).any()
  ids = current.rollouts.tokens[::3, 0].tolist()
  assert len(set(ids)) == 4
  assert all(i % 2 for i in ids)
  # Those that spoke at once stay where they were.
  first = oracle.calls[0][1]
  assert [i for i in first if i % 2] == [i for i in ids if i in first]
  assert all(ids[place] == i for place, i in enumerate(first) if i % 2)
  asked = [i for _, chosen, *_ in oracle.calls for i in chosen]
  assert asked == Pool(20, seed=0, adaptive=False).draw(len(asked))
  assert current.info['sampling/prompts'] == len(asked)
  assert (current.number, current.step) == (0, 5)
  # The policy is described by the prompts as they came.
  share = sum(i % 2 == 0 for i in first) / 4
  assert current.info['frac_reward_zero_std'] == share > 0


def test_every_call_of_the_sampler_has_randomness_of_its_own():
  """With a key used twice, a refill would repeat the noise that drew what it replaces."""
  keys = []

  def sample(params, chosen, key, **options):
    keys.append(tuple(jax.random.key_data(key).tolist()))
    return Oracle(lambda i, row, call: 0.0)(params, chosen, key, **options)

  for seed in (0, 1):
    r = fake(sample, seed=seed, refills=3)
    for step in range(3):
      r.next(None, step, greedy=True)
  assert len(keys) == 2 * 3 * (1 + 3 + 1)
  assert len(set(keys)) == len(keys)


@pytest.mark.parametrize('ahead', [False, True])
def test_who_samples_is_given_no_value_head(ahead):
  oracle = Oracle(mixed)
  r = fake(oracle, ahead=ahead)
  for step in range(2):
    r.next({'table': np.ones(2), 'value': np.zeros(2)}, step)
  r.close()
  assert len(oracle.calls) >= 2
  assert all(list(params) == ['table'] for params, *_ in oracle.calls)


@pytest.mark.parametrize('refills', [0, 1, 3])
def test_refills_are_bounded_and_what_stays_silent_stays(refills):
  oracle = Oracle(lambda i, row, call: 0.0)
  current = fake(oracle, refills=refills).next(None, 0)
  check_rows(current)
  assert len(oracle.calls) == 1 + refills
  assert len(current.rollouts.rewards) == 12
  assert current.rollouts.tokens[::3, 0].tolist() == oracle.calls[0][1]


def test_refills_ask_for_few_different_numbers_of_prompts():
  """Each width is a program to compile: powers of two, and never more than a round."""
  oracle = Oracle(lambda i, row, call: float(row == 0) if i % 5 == 0 else 0.0)
  r = fake(oracle, size=200, prompts=6, refills=6)
  for _ in range(12):
    check_rows(r.next(None, 0))
  assert {len(chosen) for _, chosen, *_ in oracle.calls} <= {1, 2, 4, 6}


def test_truncation_seen_in_one_part_of_a_round_is_kept_for_it_alone():
  for cut in ((0,), (1,), (0, 1)):
    current = fake(Oracle(mixed, cut), refills=1).next(None, 0)
    check_rows(current)
    r = current.rollouts
    want = np.where(np.isin(r.tokens[:, 2], cut), 0.5, 1.0)
    for column in (1, 2):  # what was sampled
      np.testing.assert_array_equal(r.kept[:, column], want)
    # Narrower rows are filled up with 1: a loss takes the log, and of 0 it is −∞.
    assert (r.kept[r.tokens[:, 2] == 0, 4:] == 1).all()


def test_the_greedy_baseline_is_of_the_prompts_that_were_kept():
  oracle = Oracle(lambda i, row, call: mixed(i, row, call) if call < 2 else i / 100)
  current = fake(oracle, refills=1).next(None, 0, greedy=True)
  _, chosen, group, temperature = oracle.calls[-1]
  assert (group, temperature) == (1, 0.0)
  assert chosen == current.rollouts.tokens[::3, 0].tolist() != oracle.calls[0][1]
  np.testing.assert_allclose(current.greedy, np.array(chosen) / 100, rtol=1e-6)
  assert fake(Oracle(mixed)).next(None, 0).greedy is None


def test_the_pool_hears_of_every_prompt_that_was_sampled():
  r = fake(Oracle(lambda i, row, call: float(row < i % 3)), adaptive=True, refills=2)
  r.next(None, 0)
  visited = [i for _, chosen, *_ in r._sample.calls for i in chosen]
  for i in range(20):
    assert (r._pool.tried[i] > 0) == (i in visited)
    if visited.count(i) == 1:
      assert (r._pool.tried[i], r._pool.solved[i]) == (3, i % 3)


def test_different_rounds_and_seeds_draw_different_samples_and_repeat_exactly():
  model, params = policy()

  def tokens(seed, count):
    r = rounds.make(model, WORDS, chain.make(depth=1, size=4), seed, **SMALL)
    return [r.next(params, 0).rollouts.tokens for _ in range(count)]

  one, two = tokens(0, 2)
  assert (one[:, 3:] != two[:, 3:]).any()
  np.testing.assert_array_equal(tokens(0, 1)[0], one)
  assert (tokens(1, 1)[0] != one).any()


class Slow(Oracle):
  def __call__(self, *arguments, **options):
    time.sleep(0.05)
    return super().__call__(*arguments, **options)


def test_ahead_is_one_round_behind_and_never_more():
  oracle = Slow(mixed)
  r = fake(oracle, ahead=True)
  got = [r.next({'w': np.full(1, step)}, step) for step in range(0, 40, 10)]
  assert [x.number for x in got] == [0, 1, 2, 3]
  assert [x.step for x in got] == [0, 0, 10, 20]
  r.get_state()  # waits for the one under way
  r.close()
  stale = [x.info['sampling/staleness_steps'] for x in got]
  assert stale == [0, 10, 10, 10]
  used = [int(params['w'][0]) for params, *_ in oracle.calls]
  assert used == [0, 0, 10, 20, 30]  # what a round says of its policy is true
  asked = [i for _, chosen, *_ in oracle.calls for i in chosen]
  assert asked == Pool(20, seed=0, adaptive=False).draw(20)


def test_several_processes_sample_no_round_ahead(as_processes):
  def run(_):
    return rounds.make(
      None, None, None, 0, prompts=1, group=1, max_new_tokens=1, ahead=True
    )

  for error in as_processes(2, run):
    assert isinstance(error, ValueError)
    assert 'rollouts.ahead=True: 2 processes would sample and train in thr' in str(
      error
    )


def test_ahead_brings_the_greedy_baseline_of_every_round():
  r = fake(Oracle(lambda i, row, call: i / 100), ahead=True)
  for step in range(3):
    current = r.next({'w': np.zeros(1)}, step, greedy=True)
    ids = current.rollouts.tokens[::3, 0]
    np.testing.assert_allclose(current.greedy, ids / 100, rtol=1e-6)
  r.close()


def test_ahead_samples_with_params_of_its_own():
  """The step donates the params; who samples meanwhile must not see them go."""
  begin, oracle = threading.Event(), Oracle(mixed)

  def sample(params, *arguments, **options):
    if len(oracle.calls):
      assert begin.wait(10)
    return oracle(np.asarray(params['w']), *arguments, **options)

  r = fake(sample, ahead=True)
  params = {'w': jax.numpy.arange(3.0)}
  r.next(params, 0)
  params['w'].delete()
  begin.set()
  np.testing.assert_array_equal(r._waiting.result() and oracle.calls[1][0], [0, 1, 2])
  r.close()


@pytest.mark.parametrize('ahead', [False, True])
@pytest.mark.parametrize('adaptive', [False, True])
def test_a_restored_run_asks_and_gets_the_same(ahead, adaptive):
  """… with the round that was under way, bit for bit, NaN and extras included."""

  def reward(i, row, call):
    return np.nan if (i + row) % 7 == 0 else mixed(i, row, call)

  options = dict(ahead=ahead, adaptive=adaptive, refills=2)
  oracle = Oracle(reward, cut=(0, 3))
  r = fake(oracle, **options)
  for step in range(3):
    r.next({'w': np.zeros(1)}, step, greedy=True)
  state = json.loads(json.dumps(r.get_state()))
  calls = len(oracle.calls)
  want = [r.next({'w': np.zeros(1)}, step, greedy=True) for step in (3, 4, 5)]
  r.close()

  again = Oracle(reward, cut=(0, 3))
  again.calls = [None] * calls
  other = fake(again, **options)
  other.set_state(state)
  got = [other.next({'w': np.zeros(1)}, step, greedy=True) for step in (3, 4, 5)]
  other.close()
  for a, b in zip(want, got, strict=True):
    assert (a.number, a.step) == (b.number, b.step)
    np.testing.assert_array_equal(a.greedy, b.greedy)
    for name in ARRAYS:
      x, y = getattr(a.rollouts, name), getattr(b.rollouts, name)
      assert (x is None) == (y is None)
      if x is not None:
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype
    assert json.dumps(list(a.rollouts.transcripts)) == json.dumps(
      list(b.rollouts.transcripts)
    )
    times = {'timing/rollout_seconds'}
    assert {k: v for k, v in a.info.items() if k not in times} == pytest.approx(
      {k: v for k, v in b.info.items() if k not in times}, rel=0, abs=0, nan_ok=True
    )


def test_a_round_that_waits_is_used_even_when_ahead_was_switched_off():
  r = fake(Oracle(mixed), ahead=True)
  r.next({'w': np.zeros(1)}, 0)
  state = json.loads(json.dumps(r.get_state()))
  r.close()
  other = fake(Oracle(mixed))
  other.set_state(state)
  assert [other.next(None, step).number for step in (1, 2)] == [1, 2]


@pytest.mark.parametrize(('name', 'value'), [('prompts', 2), ('group', 2), ('seed', 1)])
def test_a_state_of_other_rollouts_is_refused(name, value):
  state = fake(Oracle(mixed)).get_state()
  with pytest.raises(StateMismatch, match=rf'{name}=\d but this run has {value}'):
    fake(Oracle(mixed), **{name: value}).set_state(state)
  with pytest.raises(StateMismatch, match='size=20 but this run has 30'):
    fake(Oracle(mixed), size=30).set_state(state)


def test_rounds_that_teach_nothing_are_said_after_a_while_not_at_once(capsys):
  r = fake(Oracle(lambda i, row, call: 0.25))
  for number in range(1, 4 * rounds.PATIENCE + 1):
    r.next(None, 0)
    warned = 'all rewards are equal' in capsys.readouterr().err
    assert warned == (number in [rounds.PATIENCE * n for n in (1, 2, 4)])


@pytest.mark.parametrize('equal', [False, True])
def test_groups_of_one_are_silent_only_if_the_whole_round_is(equal, capsys):
  """REINFORCE++ and ReMax are right to have them; they compare with something else."""
  oracle = Oracle(lambda i, row, call: 0.5 if equal else i / 20)
  r = fake(functools.partial(oracle, group=1), group=1)
  for _ in range(rounds.PATIENCE):
    r.next(None, 0)
  assert ('all rewards are equal' in capsys.readouterr().err) == equal


def test_a_refilled_round_is_no_reason_to_warn(capsys):
  """Before the refill nothing had a signal; what is trained on has."""
  r = fake(Oracle(lambda i, row, call: float(row == 0 and call % 2)), refills=1)
  for _ in range(rounds.PATIENCE):
    assert r.next(None, 0).info['frac_reward_zero_std'] == 1
  assert 'warning' not in capsys.readouterr().err


def test_a_model_that_never_ends_is_said(capsys):
  model, params = toy.model(vocabulary=WORDS.vocab_size)
  params = params.at[:, np.array(WORDS.eos_ids)].set(-1e9)
  r = rounds.make(model, WORDS, chain.make(depth=2, part='train'), 0, **SMALL)
  for _ in range(rounds.PATIENCE):
    assert r.next(params, 0).info['completions/clipped_ratio'] == 1
  said = capsys.readouterr().err
  assert f'for {rounds.PATIENCE} rounds over 90 % of completions are cut off' in said


@pytest.mark.parametrize(
  'change', [{'temperature': 1e-3}, {'top_k': 1}, {'top_p': 1e-6}, {'min_p': 1.0}]
)
def test_what_sharpens_the_sampler_reaches_it(change):
  """Each leaves the likeliest token alone, so that the rows of a group are equal."""
  same = []
  for settings in ({}, change):
    rollouts = real(**settings).next(policy()[1], 0).rollouts
    groups = np.asarray(rollouts.tokens).reshape(4, 3, -1)
    same.append((groups == groups[:, :1]).all())
  assert same == [False, True]


def test_stop_strings_reach_the_sampler():
  r = real(stop=list(chain.ALPHABET)).next(policy()[1], 0).rollouts
  assert (np.asarray(r.mask).sum(-1) == 1).all()
  assert np.asarray(r.stopped).all()


def test_a_sample_is_shown_now_and_then(capsys):
  r = fake(Oracle(mixed), show_every=2)
  for number in range(4):
    r.next(None, 0)
    assert ('wrong; right is' in capsys.readouterr().err) == (number % 2 == 0)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(prompts=0), r'prompts=0'),
    (dict(group=0), r'group=0'),
    (dict(pool='best'), r"rollouts.pool='best' must be 'uniform' or 'adaptive'"),
    (dict(refills=-1), r'refills=-1'),
    (dict(refills=1, group=1), r'rollouts.refills=1 replace groups .* group=1 always'),
    (dict(workers=-1), r'workers=-1'),
    (dict(show_every=-1), r'show_every=-1'),
    (dict(overlong_prompts='cut'), r"overlong_prompts='cut'"),
    (dict(temperature=0.0), r'rollouts.temperature=0.0 must be above 0'),
    (dict(temperature=float('nan')), r'rollouts.temperature=nan'),
    (dict(max_new_tokens=0), r'rollouts.max_new_tokens=0'),
    (
      dict(max_new_tokens=13),
      r"192 of 192 prompts leave no room for rollouts.max_new_tokens=13 in the model's "
      r"context of 16; lower it, or set rollouts.overlong_prompts='drop'",
    ),
    (dict(max_new_tokens=13, overlong_prompts='drop'), r'no prompts that fit'),
    (dict(workers=1, time_limit=0.0), r'time_limit=0'),
    (dict(workers=1, error_limit=2.0), r'error_limit=2'),
    (dict(workers=0, error_limit=2.0), r'error_limit=2'),
  ],
)
def test_bad_input_is_one_line_before_anything_is_sampled(change, message):
  with pytest.raises(ValueError, match=message) as caught:
    real(**change)
  assert '\n' not in str(caught.value)


def test_prompts_that_do_not_fit_are_dropped_whole_and_counted(capsys):
  prompts = [{'prompt': 'a' * n, 'answer': ''} for n in (2, 14, 5, 15, 13)]
  world = Environment(prompts, chain.make(depth=1).respond)
  r = real(world, overlong_prompts='drop', prompts=3)
  assert '2 of 5 prompts leave no room' in capsys.readouterr().err
  rollouts = r.next(policy()[1], 0).rollouts
  asked = sorted(len(row['prompt']) for row in rollouts.transcripts[::3])
  assert asked == [2, 5, 13]  # 13 + 3 is the context, exactly


def test_a_record_without_a_name_is_called_by_its_place_in_the_environment():
  prompts = [{'prompt': letter, 'answer': ''} for letter in 'abcdef']
  prompts[3]['id'] = 'mine'
  world = Environment(prompts, chain.make(depth=1).respond)
  rows = real(world, prompts=6, group=1).next(policy()[1], 0).rollouts.transcripts
  names = {row['prompt']: row['id'] for row in rows}
  assert names == {'a': 0, 'b': 1, 'c': 2, 'd': 'mine', 'e': 4, 'f': 5}


BAD = [
  ('raises', lambda p, c, r: 1 / 0, 'ZeroDivisionError'),
  ('nan', lambda p, c, r: float('nan'), 'nan'),
  ('string', lambda p, c, r: '1', r"'1' \(str\)"),
  ('list', lambda p, c, r: [1.0], r'\[1.0\]'),
  ('bool', lambda p, c, r: True, 'True'),
]


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize(
  ('reward', 'message'), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_a_reward_that_is_none_stops_the_run_in_one_line(reward, message, workers):
  world = reward_functions.make(
    prompts=[{'prompt': 'a'}] * 4, functions={'mine': reward}
  )
  r = real(world, workers=workers)
  with pytest.raises(ValueError, match=message) as caught:
    r.next(policy()[1], 0)
  r.close()
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('answer', [float('nan'), '1', True])
def test_an_environment_of_ones_own_is_held_to_the_same_without_workers(answer):
  """One bad row of many is an 'error', not scored; it never becomes a number."""
  calls = itertools.count()

  def respond(prompt, transcript):
    bad = next(calls) == 2
    return Turn(None, answer if bad else 0.0, True, {})

  r = real(Environment([{'prompt': 'a', 'answer': ''}] * 4, respond))
  rollouts = r.next(policy()[1], 0).rollouts
  assert [row['outcome'] for row in rollouts.transcripts].count('error') == 1
  assert np.flatnonzero(np.isnan(rollouts.rewards)).tolist() == [2]


@pytest.mark.parametrize('workers', [0, 1])
def test_too_many_errors_stop_the_run_in_this_process_too(workers):
  """4 of 12 rewards raise: not all of them, yet far more than one in ten."""

  def half(prompt, completion, record):
    if record['answer'] == 'bad':
      raise TypeError('no such\ncolumn')
    return 0.5

  prompts = [{'prompt': 'a', 'answer': x} for x in ('', 'bad', '')]
  world = reward_functions.make(prompts=prompts, functions={'half': half})
  r = real(world, prompts=3, group=4, workers=workers)
  message = (
    r"4 of the last 12 .*error_limit=0.1 .*first: .* 'half' raised TypeError: no"
  )
  with pytest.raises(VerifierError, match=message) as caught:
    r.next(policy()[1], 0)
  r.close()
  assert '\n' not in str(caught.value)
  assert str(caught.value).count('TypeError') == 1  # the same one is said once


def test_the_environment_that_raises_is_named_not_what_wraps_it():
  world = reward_functions.make(
    prompts=[{'prompt': 'a'}], functions={'f': lambda p, c, r: 1 / 0}
  )
  r = real(world, prompts=1)
  with pytest.raises(ValueError, match=r'environment educe\.environments\.reward_'):
    r.next(policy()[1], 0)


def test_a_reward_that_hangs_is_a_timeout_and_not_scored():
  def slow(prompt, completion, record):
    import time

    if record['answer'] == 'hang':
      time.sleep(60)
    return 1.0

  prompts = [{'prompt': 'a', 'answer': x} for x in ('', 'hang', '', '')]
  world = reward_functions.make(prompts=prompts, functions={'slow': slow})
  r = real(world, group=1, workers=1, time_limit=0.3, error_limit=0.5)
  rollouts = r.next(policy()[1], 0).rollouts
  r.close()
  outcomes = {row['answer']: row['outcome'] for row in rollouts.transcripts}
  assert outcomes == {'': 'verified', 'hang': 'timeout'}
  assert np.isnan(rollouts.rewards).sum() == 1


def test_a_verifier_that_answers_the_wrong_number_of_rows_is_refused(monkeypatch):
  class Verifier:
    def __call__(self, rows):
      return [Turn(None, 1.0, True, {})] * (len(rows) - 1)

    def close(self):
      pass

  monkeypatch.setattr(rounds.verifiers, 'worker_pool', lambda *a, **k: Verifier())
  with pytest.raises(ValueError, match='answered 11 rows, 12 were asked'):
    real(workers=1).next(policy()[1], 0)


class Exports:
  """Stands in for rollouts/publishing.py: exports every second round."""

  every, step, fails = 2, None, 0

  def __init__(self):
    self.seen = []

  def __call__(self, params, step, number):
    self.seen.append((params, step, number))
    if self.fails:
      raise OSError('full')
    if self.step is None or number % self.every == 0:
      self.step = step
    return self.step


@pytest.mark.parametrize('ahead', [False, True])
def test_a_round_says_which_policy_the_engine_served(ahead):
  exports = Exports()
  r = fake(Oracle(mixed), publisher=exports, ahead=ahead)
  assert r.behind
  got = [r.next({'w': jax.numpy.ones(2)}, step) for step in (0, 10, 20, 30)]
  r.get_state()  # waits for the one under way
  r.close()
  want = [0, 0, 10, 10] if ahead else [0, 0, 20, 20]
  assert [x.step for x in got] == want
  stale = [x.info['sampling/staleness_steps'] for x in got]
  assert stale == [a - b for a, b in zip((0, 10, 20, 30), want, strict=True)]
  assert all(x.info['timing/export_seconds'] >= 0 for x in got)
  assert [number for *_, number in exports.seen] == list(range(4 + ahead))


def test_what_is_exported_while_training_goes_on_is_a_copy_on_the_host():
  exports, begin = Exports(), threading.Event()

  def publish(params, step, number):
    assert not number or begin.wait(10)
    return exports(params, step, number)

  publish.every, publish.step = 1, None
  r = fake(Oracle(mixed), publisher=publish, ahead=True)
  params = {'w': jax.numpy.arange(3.0)}
  r.next(params, 0)
  params['w'].delete()  # the update donates them
  begin.set()
  r.get_state()
  r.close()
  copy, *_ = exports.seen[1]
  assert isinstance(copy['w'], np.ndarray)
  np.testing.assert_array_equal(copy['w'], [0, 1, 2])


def test_weights_that_could_not_be_exported_cost_no_prompts():
  exports = Exports()
  exports.fails = 1
  r = fake(Oracle(mixed), publisher=exports)
  with pytest.raises(OSError, match='full'):
    r.next(None, 0)
  exports.fails = 0
  assert r.next(None, 0).chosen == fake(Oracle(mixed)).next(None, 0).chosen


def test_what_the_engine_served_survives_a_restart():
  r = fake(Oracle(mixed), publisher=Exports())
  r.next(None, 4)
  state = json.loads(json.dumps(r.get_state()))
  again = fake(Oracle(mixed), publisher=Exports())
  again.set_state(state)
  assert again.publisher.step == 4
  assert again.next(None, 6).step == 4
  plain = fake(Oracle(mixed))  # the engine was given up
  plain.set_state(state)
  assert not plain.behind
  assert plain.next(None, 6).step == 6


def test_an_engine_needs_a_folder_to_read_from():
  server = server_lib.connect(url='http://localhost:8000/v1', model='m')
  with pytest.raises(ValueError, match='needs run_dir'):
    real(server=server)
