"""Answers judged beside those of the start, against counts made by hand."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe.data import tokenizer as tokenizers
from educe.environments import prompts
from educe.measurement import judged
from educe.measurement.win_rate import length_controlled
from educe.types import OUTCOMES

WORDS = tokenizers.load(path='byte')
WORLD = prompts.make(source=[{'prompt': f'say {i}'} for i in range(6)])
LETTERS = [ord(c) for c in 'abcdefgh ']


def policy(likes):
  """(model, params): plain letters, `likes` more often, and now and then the end."""
  model, params = toy.model(vocabulary=WORDS.vocab_size, max_length=64)
  params = params.at[:, jnp.array(LETTERS)].add(14)
  params = params.at[:, jnp.array(WORDS.eos_ids)].add(13)
  return model, params.at[:, ord(likes)].add(2)


MODEL, OURS = policy('a')
_, START = policy('b')


def many_a(records, completions):
  """Counts the letter a; does not judge what holds an h."""
  return [None if 'h' in text else float(text.count('a')) for text in completions]


def evaluate(params, start, judge=many_a, **options):
  options = {'max_new_tokens': 6, 'repeats': 3, 'batch_size': 4, **options}
  return judged.evaluate(
    MODEL, params, WORDS, start, environment=WORLD, judge=judge, **options
  )


def log_ratio(row, temperature):
  """Σ_t log π − log π_start of a completion, one token at a time in float64."""
  history = [WORDS.bos_id, *WORDS.encode(row['prompt'])]
  said = WORDS.encode(row['completion']) + [WORDS.eos_ids[0]] * bool(row['stopped'])
  assert len(said) == row['length']
  total = 0.0
  for token in said:
    ours, start = (
      toy.log_softmax(toy.logits(table, history) / temperature)[token]
      for table in (OURS, START)
    )
    total, history = total + ours - start, [*history, token]
  return total


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_every_number_is_the_one_counted_by_hand(temperature):
  got = evaluate(OURS, START, temperature=temperature)
  start = evaluate(START, OURS, temperature=temperature)  # the same seeds
  ours, theirs = (
    np.array(many_a(None, [row['completion'] for row in x.transcripts]), float)
    .reshape(6, 3)
    for x in (got, start)
  )  # fmt: skip
  assert np.isnan(ours).any()  # the judge leaves some out
  shares = []
  for mine, other in zip(ours, theirs, strict=True):
    both = [(a, b) for a in mine for b in other if not math.isnan(a + b)]
    if both:
      shares.append(np.mean([float(a > b) + (a == b) / 2 for a, b in both]))
  assert got.wins.rate == pytest.approx(np.mean(shares))
  assert got.wins.rate > 0.6
  by_prompt = np.array([x[~np.isnan(x)].mean() for x in ours if not np.isnan(x).all()])
  assert got.score == pytest.approx(by_prompt.mean())
  assert got.score_error == pytest.approx(by_prompt.std(ddof=1) / len(by_prompt) ** 0.5)
  assert got.start_score == pytest.approx(start.score)
  kl = np.array([log_ratio(row, temperature) for row in got.transcripts])
  kl = kl.reshape(6, 3).mean(-1)
  assert got.kl == pytest.approx(kl.mean(), abs=1e-4)  # float32 log-probs, 7 a row
  assert got.kl_error == pytest.approx(kl.std(ddof=1) / 6**0.5, abs=1e-4)
  assert got.kl > 0.3
  assert got.length == np.mean([row['length'] for row in got.transcripts])
  assert got.even is None  # of one completion a prompt
  assert set(got.metrics()) == {
    'win_rate', 'win_rate/low', 'win_rate/high', 'judged/score', 'judged/score_error',
    'judged/start_score', 'judged/kl', 'judged/kl_error', 'judged/length',
  }  # fmt: skip
  assert {row['outcome'] for row in got.transcripts} <= set(OUTCOMES)


def test_with_one_completion_each_the_length_is_taken_out():
  got = evaluate(OURS, START, repeats=1, max_new_tokens=12)
  start = evaluate(START, OURS, repeats=1, max_new_tokens=12)
  scores, lengths = zip(
    *(
      (
        many_a(None, [row['completion'] for row in x.transcripts]),
        [row['length'] for row in x.transcripts],
      )
      for x in (got, start)
    ),
    strict=True,
  )
  want = length_controlled(*np.array(scores, float), *np.array(lengths))
  assert got.even == want
  assert got.metrics()['win_rate_at_equal_length/low'] == want.low
  assert f'{want.rate:.1%} at equal length' in str(got)


def test_a_policy_is_no_better_than_itself():
  got = evaluate(START, START, judge=lambda _, texts: [float(len(x)) for x in texts])
  assert got.wins.rate == pytest.approx(0.5)
  assert got.kl == pytest.approx(0, abs=1e-5)  # sampler and trainer, float32
  assert got.score == got.start_score
  assert re.search(r'KL 0\.00', str(got))


def more_a(records, completions):
  """Shares of what each wins against all of its prompt's completions in the call."""
  rows = [
    (r['prompt'], x.count('a')) for r, x in zip(records, completions, strict=True)
  ]
  others = [[b for other, b in rows if other == prompt] for prompt, _ in rows]
  return [
    float(np.mean([(a > b) + (a == b) / 2 for b in among]))
    for (_, a), among in zip(rows, others, strict=True)
  ]


@pytest.mark.parametrize('repeats', [1, 3])
def test_a_judge_that_compares_sees_both_policies_at_once(repeats):
  asked = []

  def judge(records, completions):
    asked.append(len(completions))
    return more_a(records, completions)

  got = evaluate(OURS, START, judge, repeats=repeats, max_new_tokens=12)
  assert asked == [2 * 6 * repeats]
  assert got.wins.rate > 0.6
  assert got.score > 0.5 > got.start_score
  # Of shares won among themselves, those of both halves are one half in the mean.
  assert got.score + got.start_score == pytest.approx(1)
  assert len(got.transcripts) == 6 * repeats
  assert np.mean([row['reward'] for row in got.transcripts]) == pytest.approx(got.score)
  again = evaluate(OURS, START, many_a, repeats=repeats, max_new_tokens=12)
  for row, same in zip(got.transcripts, again.transcripts, strict=True):
    assert row['completion'] == same['completion']  # ours, in their order


def test_nothing_judged_is_an_error():
  with pytest.raises(ValueError, match='no prompt has a score of both policies'):
    evaluate(OURS, START, judge=lambda _, texts: [None] * len(texts))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'max_new_tokens': 0}, 'max_new_tokens=0 must be at least 1'),
    ({'repeats': 0}, 'repeats=0 must be at least 1'),
    ({'batch_size': 0}, 'batch_size=0 must be at least 1'),
    ({'temperature': 0.0}, 'temperature=0.0 must be above 0'),
  ],
)
def test_what_cannot_be_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    evaluate(OURS, START, **options)
