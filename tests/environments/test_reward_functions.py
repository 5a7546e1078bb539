import functools
import re

import pytest

from educe.environments.reward_functions import make
from educe.environments.verifiers import VerifierError, worker_pool

RECORDS = [
  {'prompt': 'Say five.', 'answer': '5', 'limit': 3},
  {'prompt': [{'role': 'user', 'content': 'Say six.'}], 'answer': '6', 'limit': None},
]


def right(prompt, completion, columns):
  return float(columns['answer'] in completion)


def short(prompt, completion, columns):
  limit = columns['limit']
  return None if limit is None else float(len(completion) <= limit)


def never(prompt, completion, columns):
  return None


def respond(environment, index, text):
  return environment.respond(environment.prompts[index], [text])


def test_one_function_is_an_environment():
  environment = make(prompts=RECORDS, functions=right)
  assert respond(environment, 0, 'It is 5') == (
    None, 1.0, True, {'outcome': 'verified', 'rewards': {'right': 1.0}}
  )  # fmt: skip
  turn = respond(environment, 0, 'It is 6')
  assert (turn.reward, turn.info['outcome']) == (0.0, 'wrong')


def test_a_function_sees_the_prompt_the_completion_and_every_column():
  seen = []

  def look(prompt, completion, columns):
    seen.append((prompt, completion, columns['limit'], columns['answer']))
    return 0.5

  environment = make(
    prompts=[*RECORDS, {'prompt': 'no answer', 'limit': 1}], functions=look
  )
  for index in range(3):
    assert respond(environment, index, 'text').reward == 0.5
  assert seen == [
    ('Say five.', 'text', 3, '5'),
    (RECORDS[1]['prompt'], 'text', None, '6'),
    ('no answer', 'text', 1, None),
  ]


def test_the_reward_is_the_weighted_sum_of_what_was_scored():
  environment = make(
    prompts=RECORDS,
    functions={'right': right, 'short': short, 'never': never},
    weights={'right': 2.0, 'short': -0.25},
  )
  turn = respond(environment, 0, '5')
  assert turn.reward == 2.0 - 0.25
  assert turn.info['rewards'] == {'right': 1.0, 'short': 1.0, 'never': None}
  # Not scored: neither 0 · weight, nor a smaller denominator for the rest.
  turn = respond(environment, 1, '6')
  assert turn.reward == 2.0
  assert turn.info['rewards']['short'] is None


def test_a_row_that_no_function_scores_has_no_reward():
  environment = make(prompts=RECORDS, functions=[short, never])
  assert respond(environment, 1, '6').reward is None
  assert respond(environment, 0, 'long text').reward == 0.0  # scored, and bad


def test_one_reward_may_decide_the_outcome():
  functions = {'right': right, 'short': short}
  environment = make(prompts=RECORDS, functions=functions, verified_by='right')
  turn = respond(environment, 0, 'abc')
  assert (turn.reward, turn.info['outcome']) == (1.0, 'wrong')
  turn = respond(environment, 0, 'It is 5')
  assert (turn.reward, turn.info['outcome']) == (1.0, 'verified')
  by_short = make(prompts=RECORDS, functions=functions, verified_by='short')
  assert respond(by_short, 1, '6').info['outcome'] == 'unparsable'
  assert respond(make(prompts=RECORDS, functions=functions), 0, 'abc').info == {
    'outcome': 'verified', 'rewards': {'right': 0.0, 'short': 1.0}
  }  # fmt: skip


def test_functions_without_names_get_one():
  class Style:
    def __call__(self, prompt, completion, columns):
      return 0.0

  nested = functools.partial(functools.partial(right))
  turn = respond(make(prompts=RECORDS, functions=[nested, Style()]), 0, '')
  assert list(turn.info['rewards']) == ['right', 'Style']


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    (float('nan'), "reward 'odd' is nan: return a finite"),
    ('1', r"reward 'odd' is '1' \(str\): return a float"),
    (True, r"reward 'odd' is True \(bool\)"),
    ([1.0, 0.0], r"reward 'odd' is \[1.0, 0.0\] \(list\)"),
  ],
)
def test_what_is_no_reward_is_one_clear_line(value, message):
  environment = make(
    prompts=RECORDS, functions={'fine': right, 'odd': lambda *_: value}
  )
  with pytest.raises(ValueError, match=message) as error:
    respond(environment, 0, '5')
  assert '\n' not in str(error.value)


def test_in_a_worker_a_broken_function_is_an_error_and_stops_the_run():
  def broken(prompt, completion, columns):
    return columns['no such column'] if completion == 'bad' else 1.0

  environment = make(prompts=RECORDS, functions=broken)
  with worker_pool(environment.respond, workers=1) as verifier:
    good, bad = verifier([(RECORDS[0], ['good']), (RECORDS[0], ['bad'])])
    assert good.reward == 1
    assert good.info['rewards'] == {'broken': 1.0}
    assert bad.reward is None
    said = bad.info['error']
    assert said.startswith(
      "ValueError: reward 'broken' raised KeyError: 'no such column'"
    )
    assert re.search(r'\(test_reward_functions\.py line \d+\)$', said)
    with pytest.raises(VerifierError, match='no such column'):
      verifier([(RECORDS[0], ['bad'])] * 5)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(prompts=[]), 'prompts is empty'),
    (
      dict(prompts=[{'question': 'x'}]),
      r"prompts\[0\] has no column 'prompt'.*question",
    ),
    (dict(functions=[]), 'functions is empty'),
    (dict(functions={'a': 'right'}), 'not a function'),
    (dict(functions=[right, right]), "two are called 'right'"),
    (dict(weights={'wrong': 1.0}), "weights names 'wrong', but .* are right"),
    (dict(weights={'right': None}), 'is None'),
    (dict(weights={'right': float('inf')}), 'weights.*is inf'),
    (dict(verified_by='short'), "verified_by names 'short'"),
  ],
)
def test_bad_input_is_one_clear_line(arguments, message):
  with pytest.raises(ValueError, match=message) as error:
    make(**{'prompts': RECORDS, 'functions': right, **arguments})
  assert '\n' not in str(error.value)
