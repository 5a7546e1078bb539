import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe.data import tokenizer as tokenizer_lib
from educe.measurement.accuracy import accuracy, evaluate, wilson
from educe.types import OUTCOMES, Environment, Turn

RECORDS = [
  {'id': f'p{i}', 'prompt': f'say {i}', 'answer': 'abc'[i % 3]} for i in range(6)
]


def respond(record, transcript):
  """Verified if the answer's letter is in the text."""
  good = record['answer'] in transcript[-1]
  return Turn(None, float(good), True, {'outcome': 'verified' if good else 'wrong'})


def broken(record, transcript):
  raise KeyError(record['id'])


ENVIRONMENT = Environment(RECORDS, respond)


@pytest.fixture(scope='module')
def policy():
  """A toy policy that writes plain letters and now and then the end."""
  words = tokenizer_lib.load(path='byte')
  model, params = toy.model(vocabulary=words.vocab_size, max_length=64)
  params = params.at[:, jnp.array([ord(c) for c in 'abcdefgh '])].add(14)
  return model, params.at[:, jnp.array(words.eos_ids)].add(13), words


def rows(*outcomes):
  return [{'outcome': outcome, 'id': i} for i, outcome in enumerate(outcomes)]


def test_outcomes_are_counted_apart():
  given = rows('verified', 'verified', 'wrong', 'unparsable', 'error', 'verified')
  result = accuracy(given)
  wrong = {'wrong': 1, 'unparsable': 1, 'timeout': 0, 'error': 1, 'judged': 0}
  assert result.counts == {'verified': 3, **wrong}
  assert list(result.counts) == list(OUTCOMES)
  assert result.rate == 0.5
  assert result.total == 6
  assert (result.low, result.high) == wilson(3, 6)
  assert result.transcripts == given
  bounds = {'accuracy/low': result.low, 'accuracy/high': result.high}
  assert result.metrics() == {'accuracy': 0.5, **bounds}
  assert str(result).startswith('50.0% of 6 (95 % interval 18.8% to 81.2%; 3 verified')


def test_evaluation_asks_every_problem_once_and_greedily(policy):
  first = evaluate(*policy, environment=ENVIRONMENT, max_new_tokens=8)
  assert [row['id'] for row in first.transcripts] == [r['id'] for r in RECORDS]
  for row, record in zip(first.transcripts, RECORDS, strict=True):
    good = record['answer'] in row['completion']
    assert row['outcome'] == ('verified' if good else 'wrong')
    assert 0 < row['length'] <= 8
  # The cut of the batch changes nothing, nor does asking again: greedy has no dice.
  again = evaluate(*policy, environment=ENVIRONMENT, max_new_tokens=8, batch_size=2)
  assert again == first
  hot = evaluate(*policy, environment=ENVIRONMENT, max_new_tokens=8, temperature=1.0)
  texts = [[row['completion'] for row in x.transcripts] for x in (first, hot)]
  assert texts[0] != texts[1]


def test_repeats_are_different_samples_of_each_problem(policy):
  options = dict(environment=ENVIRONMENT, max_new_tokens=8, temperature=1.0)
  result = evaluate(*policy, repeats=4, **options)
  assert result.total == 24
  assert [row['id'] for row in result.transcripts[:5]] == ['p0'] * 4 + ['p1']
  assert len({row['completion'] for row in result.transcripts[:4]}) > 1
  assert evaluate(*policy, repeats=4, **options) == result  # the same seeds every time
  solved = sum(r['answer'] in t['completion'] for r, t in zip(
    [r for r in RECORDS for _ in range(4)], result.transcripts, strict=True
  ))  # fmt: skip
  assert result.rate == solved / 24


def test_workers_judge_as_this_process_does(policy):
  options = dict(environment=ENVIRONMENT, max_new_tokens=8)
  assert evaluate(*policy, workers=1, **options) == evaluate(*policy, **options)


def test_an_environment_that_raises_is_named_with_its_problem(policy):
  environment = Environment(RECORDS, broken)
  with pytest.raises(ValueError, match=r"environment .*test_accuracy.*'p0': KeyError"):
    evaluate(*policy, environment=environment, max_new_tokens=2)


def test_nan_weights_are_not_an_accuracy(policy):
  model, params, words = policy
  broken = jax.tree.map(lambda x: x * jnp.nan, params)
  with pytest.raises(ValueError, match='NaN logits'):
    evaluate(model, broken, words, environment=ENVIRONMENT, max_new_tokens=2)


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


def test_bad_input(policy):
  with pytest.raises(ValueError, match='no transcripts'):
    accuracy([])
  with pytest.raises(ValueError, match='5 successes of 4'):
    wilson(5, 4)
  with pytest.raises(ValueError, match='0 successes of 0'):
    wilson(0, 0)
  options = dict(environment=ENVIRONMENT, max_new_tokens=2)
  with pytest.raises(ValueError, match='repeats=2 greedy completions would be equal'):
    evaluate(*policy, repeats=2, **options)
  with pytest.raises(ValueError, match='max_new_tokens=0 must be at least 1'):
    evaluate(*policy, **options | dict(max_new_tokens=0))
  asks_again = Environment(RECORDS, lambda *_: Turn('go on', 0.0, False, {}))
  with pytest.raises(ValueError, match='asks for another turn'):
    evaluate(*policy, **options | dict(environment=asks_again))
