"""What a judge reads, and what becomes of what it says."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe import hosts
from educe.data import tokenizer as tokenizers
from educe.environments import chain, reward_functions
from educe.models import policy, presets
from educe.rollouts import judges, rounds
from educe.rollouts.http_client import EndpointError
from educe.types import Environment, Rollouts, Turn

WORDS = tokenizers.load(path=f'characters:{chain.ALPHABET}')
TEXTS = [('0a=', 'bc'), ('12a=', 'b'), ('0a=', ''), ('01ab=', 'ababab')]


@functools.cache
def valued():
  """A transformer whose value of a prefix is a projection of its last state."""
  architecture = dataclasses.replace(presets.debug, vocab_size=WORDS.vocab_size)
  model = policy.build(architecture)
  weight = np.random.default_rng(0).normal(size=architecture.dim).astype(np.float32)

  def values(params, states, tokens, positions=None, segments=None):
    return states @ jnp.asarray(weight), {}

  return model._replace(values=values), model.init(jax.random.key(0)), WORDS


def value_of(prompt, completion):
  """One text at a time, unpadded: prompt, completion, end."""
  model, params, words = valued()
  ids = [*words.encode(prompt + completion), words.eos_ids[0]]
  ids = [words.bos_id, *ids] if words.add_bos else ids
  tokens = jnp.asarray([ids])
  states, _ = model.hidden(params, tokens)
  return float(model.values(params, states, tokens)[0][0, -1])


def records_of(texts):
  return [{'prompt': prompt} for prompt, _ in texts], [said for _, said in texts]


@pytest.mark.parametrize('batch_size', [1, 3, 16])
def test_a_reward_model_reads_the_value_at_the_end_of_every_text(batch_size):
  judge = judges.reward_model(lambda path: valued(), path='rm', batch_size=batch_size)
  many = TEXTS * 3 + [('0a=', 'abc' * 8)]  # of another width
  got = judge(*records_of(many))
  want = [value_of(*text) for text in many]
  assert len({round(x, 3) for x in want}) == 5
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # float32, another order


def test_a_chat_ends_where_its_last_turn_does():
  """What the template writes after the stop token is no part of what was rated."""
  words = tokenizers.load(path='byte')
  model = policy.build(presets.debug)._replace(
    values=lambda params, states, tokens, *_: (tokens.astype(jnp.float32), {})
  )
  opened = model, model.init(jax.random.key(0)), words
  judge = judges.reward_model(lambda path: opened, path='rm')
  record = {'prompt': [{'role': 'user', 'content': 'Hi'}]}
  assert judge([record], ['Hello'])[0] in words.eos_ids


@pytest.mark.parametrize(
  ('completion', 'ends'),
  [
    ('ab\nc', ['b', None]),
    ('ab\n\nc', ['\n', None]),  # blank lines belong to the step before them
    ('\n\nab\nc', ['b', None]),
    ('ab', [None]),
    ('', [None]),
  ],
)
@pytest.mark.parametrize('chat', [False, True])
def test_a_process_reward_model_is_read_at_the_end_of_each_step(completion, ends, chat):
  """A value that is the token itself shows which were read; None is the stop token."""
  words = tokenizers.load(path='byte')
  model = policy.build(presets.debug)._replace(
    hidden=lambda params, tokens: (None, {}),
    values=lambda params, states, tokens: ((tokens - 90.0) / 20, {}),
  )
  opened = model, np.zeros(1), words
  prompt = [{'role': 'user', 'content': 'x\ny'}] if chat else 'x\ny'
  judge = functools.partial(judges.reward_model, lambda path: opened, path='rm')
  (last,) = judge()([{'prompt': prompt}], [completion])
  stop = round(20 * last + 90)
  assert stop in words.eos_ids
  tokens = [stop if x is None else words.encode(x)[0] for x in ends]
  right = 1 / (1 + np.exp(-(np.array(tokens) - 90.0) / 20))
  for steps, want in (('min', right.min()), ('product', right.prod())):
    (got,) = judge(steps=steps)([{'prompt': prompt}], [completion])
    assert got == pytest.approx(want, rel=1e-6), steps
  with pytest.raises(ValueError, match=r"judge\.steps='mean' must be one of"):
    judge(steps='mean')


def test_steps_whose_ends_cannot_be_told_apart_are_not_scored(monkeypatch):
  def encode(words, record, records):
    raise ValueError('completions[1]: ends in the same token as another step')

  monkeypatch.setattr(judges.pairs, 'encode', encode)
  judge = judges.reward_model(lambda path: valued(), path='rm', steps='min')
  assert judge([{'prompt': '0a='}], ['bc']) == [None]


def test_a_text_too_long_for_the_reward_model_is_not_scored():
  judge = judges.reward_model(lambda path: valued(), path='rm', max_length=6)
  scores = judge(*records_of([('0a=', 'b'), ('0a=', 'bcabcabc')]))
  assert scores[0] == pytest.approx(value_of('0a=', 'b'), rel=1e-5)
  assert scores[1] is None
  model, params, words = valued()
  broken = (
    model._replace(values=lambda *_: (jnp.full(_[1].shape[:2], jnp.nan), {})),
    params,
    words,
  )
  judge = judges.reward_model(lambda path: broken, path='rm')
  assert judge(*records_of(TEXTS)) == [None] * 4


def test_a_text_longer_than_the_reward_models_context_is_not_scored():
  judge = judges.reward_model(lambda path: valued(), path='rm')
  longest = valued()[0].architecture.max_length
  scores = judge(*records_of([('0a=', 'b' * longest), ('0a=', 'b')]))
  assert scores[0] is None
  assert scores[1] == pytest.approx(value_of('0a=', 'b'), rel=1e-5)


def test_a_run_without_a_value_head_is_refused():
  model, params, words = valued()
  plain = model._replace(values=None), params, words
  with pytest.raises(ValueError, match="path='rm' is of a run without a value head"):
    judges.reward_model(lambda path: plain, path='rm')
  with pytest.raises(ValueError, match='batch_size=0'):
    judges.reward_model(lambda path: plain, path='rm', batch_size=0)


def judge_of(url, **options):
  return judges.endpoint(url=url, model='m', **({'backoff': 0.01} | options))


def test_grades_are_read_last_and_scaled(server):
  replies = {
    'one': 'Good.\nGrade: 10',
    'two': 'A grade: 9 would be too much.\n**Grade:** 4',
    'six': 'grade = 1.0',
    'ten': 'Grade: 11\n',  # out of range
    'no': 'I cannot grade this',
    'bold': '**Grade:** **10**',
    'outer': '**Grade**: **5.5**',
  }

  def answer(question, count):
    said = re.search(r'\[Answer\]\n(\w+)\n', question)[1]
    assert 'user: Say {it}' in question
    assert 'from 1 to 10' in question
    return replies[said]

  url, asked = server(answer)
  records = [{'prompt': [{'role': 'user', 'content': 'Say {it}'}]}] * 7
  judge = judge_of(url, error_limit=0.5, retries=1)
  third = pytest.approx(1 / 3)
  assert judge(records, list(replies)) == [1.0, third, 0.0, None, None, 1.0, 0.5]
  assert len(asked) == 9
  with pytest.raises(
    EndpointError, match=r"2 of 7 .*no verdict in '(Grade: 11|I cannot)"
  ):
    judge_of(url, error_limit=0.2)(records, list(replies))


def shown(question):
  return re.findall(r'\[Answer [AB]\]\n(.*)\n', question)


def test_pairs_are_asked_in_both_orders_and_a_preference_for_a_place_cancels(server):
  quality = {'poor': 0, 'fair': 1, 'good': 2}

  def honest(question, count):
    a, b = (quality[x] for x in shown(question))
    verdict = 'A' if a > b else 'B' if b > a else 'tie'
    return f'Verdict: {verdict}' if count else f'**Verdict**: **{verdict}**'

  url, asked = server(honest)
  records = [{'prompt': 'x'}] * 3 + [{'prompt': 'y'}] * 2
  said = ['fair', 'good', 'poor', 'poor', 'poor']
  judge = judge_of(url, style='pairwise')
  assert judge(records, said) == [0.5, 1.0, 0.0, 0.5, 0.5]
  assert len(asked) == 6  # what says the same is not asked
  assert sorted(map(tuple, map(shown, (x['question'] for x in asked)))) == sorted(
    (a, b) for a in quality for b in quality if a != b
  )
  url, _ = server(lambda question, count: 'The second?\nVerdict: A')  # always the first
  assert judge_of(url, style='pairwise')(records, said) == [0.5] * 5


def test_a_comparison_that_is_unanswered_in_one_order_counts_for_neither(server):
  def answer(question, count):
    a, b = shown(question)
    return 'Hmm' if (a, b) == ('fair', 'good') else f'Verdict: {"A" if a > b else "B"}'

  url, _ = server(answer)
  judge = judge_of(url, style='pairwise', error_limit=0.5, retries=0)
  # By their spelling: poor > good > fair.
  assert judge([{'prompt': 'x'}] * 3, ['fair', 'good', 'poor']) == [0.0, 0.0, 1.0]
  assert judge([{'prompt': 'x'}] * 2, ['fair', 'good']) == [None, None]
  with pytest.raises(ValueError, match=r'one came alone: set rollouts\.group'):
    judge([{'prompt': 'x'}, {'prompt': 'y'}], ['fair', 'good'])


def test_a_judge_that_compares_says_so_to_who_asks_rounds():
  kinds = {'scalar': False, 'pairwise': True}
  for style, compares in kinds.items():
    judge = judge_of('http://localhost', style=style)
    assert judges.compares(judge) == rounds_of(judge).compares == compares
  assert not rounds_of(judges.length(target=3)).compares
  assert not rounds_of(None).compares


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(url='localhost:80'), "url='localhost:80' must begin with http://"),
    (dict(style='rank'), "style='rank' must be one of"),
    (dict(lowest=5, highest=5), 'lowest=5 must be less than highest=5'),
    (dict(highest=float('inf')), 'highest=inf, both finite'),
    (dict(lowest=float('-inf')), 'lowest=-inf must be less'),
    (dict(timeout=0.0), 'timeout=0.0 must be more than 0'),
    (dict(retries=-1), 'retries=-1 must be at least 0'),
    (dict(error_limit=2.0), r'error_limit=2.0 must be in 0\.\.1'),
    (dict(temperature=-1.0), 'temperature=-1.0'),
    (dict(api_key_env='EDUCE_NO_SUCH_KEY'), 'no such environment variable'),
  ],
)
def test_bad_settings(options, message):
  with pytest.raises(ValueError, match=message):
    judges.endpoint(**{'url': 'http://x', 'model': 'm', **options})


@pytest.mark.parametrize('key', ['secret\n', 'two words', 'secret\u201d', ' '])
def test_a_key_that_cannot_be_sent_is_refused_and_not_told(key, monkeypatch):
  monkeypatch.setenv('EDUCE_TEST_KEY', key)
  with pytest.raises(ValueError, match='what it holds is no key') as error:
    judges.endpoint(url='http://x', model='m', api_key_env='EDUCE_TEST_KEY')
  assert key.strip() == '' or key.strip() not in str(error.value)


def test_a_conversation_is_read_however_its_turns_are_written():
  turns = [
    {'from': 'human', 'value': 'Hi'},
    {'role': 'assistant', 'content': None, 'tool_calls': [{'name': 'f'}]},
    {'role': 'user', 'content': [{'type': 'text', 'text': 'a'}, {'text': 'b'}]},
  ]
  assert judges.conversation(turns) == 'user: Hi\n\nassistant: \n\nuser: ab'


@functools.cache
def student():
  return toy.model(vocabulary=WORDS.vocab_size)


def rounds_of(judge, world=None, **changes):
  settings = dict(prompts=3, group=2, max_new_tokens=4, workers=0, show_every=0)
  silent = Environment(
    [{'prompt': f'{i}a='} for i in range(6)],
    lambda prompt, said: Turn(None, None, True, {}),
  )
  return rounds.make(
    student()[0], WORDS, world or silent, 0, judge, **(settings | changes)
  )


def test_a_judges_scores_are_the_rewards_of_the_very_rows():
  seen = []

  def judge(records, completions):
    seen.append((list(records), list(completions)))
    scores = [
      len(x) + int(r['prompt'][0]) / 10
      for r, x in zip(records, completions, strict=True)
    ]
    return [None if i == 1 else score for i, score in enumerate(scores)]

  current = rounds_of(judge).next(student()[1], 0)
  r = current.rollouts
  # Nothing is solved where nothing is right: 1 is a score like any other.
  assert not [name for name in current.info if name.startswith('groups/solved')]
  assert current.info['outcomes/judged'] == 1 - 1 / len(r.rewards)
  assert len(seen) == 1  # all of a round at once
  for row, (reward, t) in enumerate(zip(r.rewards, r.transcripts, strict=True)):
    want = len(t['completion']) + int(t['prompt'][0]) / 10
    if row == 1:
      assert np.isnan(reward)
      assert (t['outcome'], t['error']) == ('error', 'the judge gave no score')
      continue
    assert reward == np.float32(want)
    assert t['rewards'] == {'environment': None, 'judge': want}
    assert t['reward'] == want
    assert t['outcome'] == 'judged'


def test_what_the_environment_said_stays_beside_it():
  def length(prompt, completion, record):
    return float(len(completion) > 1)

  world = reward_functions.make(
    prompts=[{'prompt': '0a='}], functions={'length': length}
  )
  r = rounds_of(lambda records, said: [0.25] * len(said), world, prompts=1, group=6)
  for t in r.next(student()[1], 0).rollouts.transcripts:
    long = len(t['completion']) > 1
    assert t['rewards'] == {'environment': long, 'length': long, 'judge': 0.25}
    assert t['outcome'] == ('verified' if long else 'wrong')


@pytest.mark.parametrize('ahead', [False, True])
def test_prompts_that_a_judge_failed_on_come_again(ahead):
  """Nothing is lost: what is saved after the failure is sampled as if it had not been."""
  failing = [False]

  def judge(records, completions):
    if failing[0]:
      raise EndpointError('down')
    return [float(len(x)) for x in completions]

  params = student()[1]
  whole = rounds_of(judge, ahead=ahead)
  want = [whole.next(params, 0).rollouts.tokens for _ in range(4)]
  first, second = (rounds_of(judge, ahead=ahead) for _ in range(2))
  got = [first.next(params, 0).rollouts.tokens]
  failing[0] = True

  def go_on():
    for _ in range(2):  # one may have been sampled ahead, before the failure
      got.append(first.next(params, 0).rollouts.tokens)

  with pytest.raises(EndpointError):
    go_on()
  failing[0] = False
  second.set_state(first.get_state())
  got += [second.next(params, 0).rollouts.tokens for _ in range(4 - len(got))]
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
  for each in (whole, first, second):
    each.close()


def test_a_judge_of_the_wrong_kind_is_named():
  params = student()[1]
  with pytest.raises(ValueError, match='the judge scored 1 rows, 6 were asked'):
    rounds_of(lambda records, said: [1.0]).next(params, 0)
  with pytest.raises(ValueError, match='judge: a score is nan'):
    rounds_of(lambda records, said: [float('nan')] * len(said)).next(params, 0)


def test_length_is_nearest_to_its_target():
  scores = judges.length(target=4)([{}] * 3, ['ab', 'abcd', 'abcdefgh'])
  assert scores == [-0.5, 0.0, -1.0]
  with pytest.raises(ValueError, match='target=0 must be at least 1'):
    judges.length(target=0)


@pytest.mark.parametrize('compares', [False, True])
def test_processes_ask_about_a_share_each_and_hear_of_all(as_processes, compares):
  texts = ['a', 'bb', 'c', 'dddd', 'ee', 'f']
  transcripts = [
    dict(completion=x, reward=None, rewards={}, outcome='judged') for x in texts
  ]
  rollouts = Rollouts(None, None, None, None, None, 2, transcripts)  # type: ignore
  records = [{'prompt': x} for x in '012']
  asked = {}

  def judge(records, completions):
    asked.setdefault(hosts.index(), []).extend(completions)
    return [float(len(text)) for text in completions]

  judge.compares = compares
  found = as_processes(2, lambda _: judges.rewarded(rollouts, records, judge))
  for each in found:
    assert each.rewards.tolist() == [1, 2, 1, 4, 2, 1]
  groups = [['a', 'bb', 'ee', 'f'], ['c', 'dddd']]
  assert [asked[0], asked[1]] == (groups if compares else [texts[::2], texts[1::2]])

  def down(records, completions):
    if hosts.index():
      raise ValueError('the judge does not answer')
    return judge(records, completions)

  found = as_processes(2, lambda _: judges.rewarded(rollouts, records, down))
  assert [str(x) for x in found] == [
    'process 1: the judge does not answer', 'the judge does not answer'
  ]  # fmt: skip
  short = as_processes(2, lambda _: judges.rewarded(rollouts, records, lambda *_: []))
  assert 'the judge scored 0 rows, 3 were asked' in str(short[0])
