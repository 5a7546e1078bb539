import json
import types

import numpy as np
import pytest

from educe.measurement.accuracy import accuracy, save, show, wilson
from educe.types import Environment, Turn


def done(text):
  return types.SimpleNamespace(text=text, tokens=list(range(len(text))), stopped=True)


def environment(size=6, **changes):
  """Problem i asks for the text str(i)."""

  def respond(prompt, transcript):
    text = transcript[-1]
    if text == 'broken':
      outcome = 'error'
    elif not text.isdigit():
      outcome = 'unparsable'
    else:
      outcome = 'verified' if text == prompt['answer'] else 'wrong'
    info = {'outcome': outcome}
    fields = dict(
      observation=None, reward=float(outcome == 'verified'), done=True, info=info
    )
    return Turn(**{**fields, **changes})

  prompts = [
    {'prompt': [{'role': 'user', 'content': f'say {i}'}], 'answer': str(i)}
    for i in range(size)
  ]
  return Environment(prompts, respond)


def test_outcomes_are_counted_apart_and_in_order():
  texts = ['0', '1', '7', 'x', 'broken', '5']
  result = accuracy(lambda prompts: [done(t) for t in texts], environment())
  wrong = {'wrong': 1, 'unparsable': 1, 'timeout': 0, 'error': 1}
  assert result.counts == {'verified': 3, **wrong}
  assert result.rate == 0.5
  assert result.total == 6
  assert (result.low, result.high) == wilson(3, 6)
  assert [row['completion'] for row in result.transcripts] == texts
  assert [row['answer'] for row in result.transcripts] == list('012345')
  assert [row['reward'] for row in result.transcripts] == [1, 1, 0, 0, 0, 1]
  assert result.transcripts[4]['length'] == 6
  assert result.metrics('a') == {'a': 0.5, 'a/low': result.low, 'a/high': result.high}
  assert str(result).startswith('50.0% of 6 (95 % interval 18.8% to 81.2%; 3 verified')


def test_rewards_alone_are_enough():
  rewards = iter([1.0, 0.4, None])
  base = environment(3)

  def respond(prompt, transcript):
    return Turn(None, next(rewards), True, {})

  result = accuracy(lambda p: [done('')] * 3, base._replace(respond=respond))
  assert result.counts == {
    'verified': 1,
    'wrong': 1,
    'unparsable': 1,
    'timeout': 0,
    'error': 0,
  }


def test_wilson_solves_the_score_equation():
  # At each bound, the observed share is exactly z standard errors away.
  for successes, total in [(3, 8), (50, 64), (1, 1000), (63, 64)]:
    rate = successes / total
    for bound in wilson(successes, total):
      z = (rate - bound) / np.sqrt(bound * (1 - bound) / total)
      np.testing.assert_allclose(abs(z), 1.959964, rtol=1e-9)
  assert wilson(0, 10)[0] == 0.0
  assert wilson(10, 10)[1] == 1.0
  np.testing.assert_allclose(wilson(0, 10)[1], 0.2775, atol=1e-4)  # published value


def test_wilson_covers_the_truth_at_its_level():
  rng = np.random.default_rng(0)
  hits = 0
  for successes in rng.binomial(64, 0.1, size=4000):
    low, high = wilson(int(successes), 64)
    hits += low <= 0.1 <= high
  assert 0.93 < hits / 4000 < 0.98


def test_transcripts_are_stored_and_shown(tmp_path):
  result = accuracy(lambda p: [done('é')] * 2, environment(2))
  save(result.transcripts, tmp_path / 't.jsonl')
  rows = [json.loads(line) for line in (tmp_path / 't.jsonl').read_text().splitlines()]
  assert rows == result.transcripts
  text = show(result.transcripts, limit=1)
  assert 'say 0' in text
  assert 'é' in text
  assert 'say 1' not in text


def test_bad_input():
  with pytest.raises(ValueError, match='no prompts'):
    accuracy(lambda p: [], environment(0))
  with pytest.raises(ValueError, match='more than one turn'):
    accuracy(lambda p: [done('')] * 6, environment(done=False))
  with pytest.raises(ValueError, match='shorter'):  # a completion is missing
    accuracy(lambda p: [done('')] * 5, environment())
  with pytest.raises(ValueError, match='5 successes of 4'):
    wilson(5, 4)
