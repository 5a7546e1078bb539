import gzip
import json
import os
import pathlib
import random
import re
import time
from fractions import Fraction

import pytest

from educe.environments.countdown import evaluate, game24, make, solve


def ask(environment, record, text):
  turn = environment.respond(record, [text])
  assert turn.done
  assert turn.reward == float(turn.info['outcome'] == 'verified')
  return turn.info['outcome']


@pytest.mark.parametrize('numbers', [2, 3, 4, 6])
def test_every_problem_has_the_solution_that_it_names(numbers):
  environment = make(size=50, numbers=numbers, max_number=9, max_target=60)
  assert len({record['id'] for record in environment.prompts}) == 50
  for record in environment.prompts:
    assert 1 <= record['target'] <= 60
    assert len(record['numbers']) == numbers
    assert all(1 <= n <= 9 for n in record['numbers'])
    # Python's own arithmetic, on text that this file's code made.
    assert eval(record['answer'].replace('/', '//')) == record['target']
    assert ask(environment, record, record['answer']) == 'verified'
    question = record['prompt'][0]['content']
    assert f'make {record["target"]}.' in question
    for n in record['numbers']:
      assert str(n) in question


def test_the_parser_computes_as_python_does():
  """Random expressions against Python with fractions in place of numbers."""
  rng = random.Random(0)

  def write(depth):
    if depth == 0 or rng.random() < 0.2:
      return str(rng.randint(0, 30))
    text = f'{write(depth - 1)}{rng.choice("+-*/")}{write(depth - 1)}'
    return f'( {text})' if rng.random() < 0.5 else text

  valued = 0
  for _ in range(500):
    text = write(3)
    exact = ''.join(
      f'Fraction({piece})' if piece.isdigit() else piece
      for piece in re.split(r'(\d+)', text)
    )
    try:
      expected = eval(exact, {'Fraction': Fraction})
    except ZeroDivisionError:
      with pytest.raises(ValueError, match='division by zero'):
        evaluate(text)
      continue
    value, used = evaluate(text)
    assert value == expected
    assert used == [int(n) for n in re.findall(r'\d+', text)]
    valued += 1
  assert valued > 300


@pytest.mark.parametrize(
  ('answer', 'outcome'),
  [
    ('3 * 5 + 7', 'verified'),
    ('7+(5*3)', 'verified'),
    ('(((3*5)))+7', 'verified'),
    ('3 × 5 + 7', 'verified'),
    ('-(-7 - 3 * 5)', 'verified'),
    (r'\boxed{3 \times 5 + 7}', 'verified'),
    (r'\boxed{\left(3 \cdot 5\right) + 7}', 'verified'),
    ('$3 * 5 + 7$', 'verified'),
    ('3 * 5 + 7 = 22', 'verified'),
    ('The answer is 3 * 5 + 7.', 'verified'),
    ('<think>7+7+8?</think>\n<answer>3*5+7</answer>', 'verified'),
    ('3 * 5 + 7 = 23', 'wrong'),
    ('3 * 5 + 7 = 22 = 22', 'unparsable'),
    ('22', 'wrong'),  # not from the numbers
    ('22 + 3 - 3', 'wrong'),
    ('15 + 7', 'wrong'),
    ('3 + 5 + 7', 'wrong'),
    ('3 * 5 + 7 + 7 - 7', 'wrong'),  # one number thrice
    ('3 * 5 + 7 * 5 / 5', 'wrong'),
    ('35 - 7', 'wrong'),  # digits stuck together
    ('<think>3*5+7</think>', 'unparsable'),
    ('-3 * -5 + 7', 'unparsable'),
    ('3 ** 5', 'unparsable'),
    ('3 // 5', 'unparsable'),
    ('3 5 7', 'unparsable'),
    ('3 * (5 + 7', 'unparsable'),
    ('3 * 5) + 7', 'unparsable'),
    ('3 / (5 - 5) + 7', 'unparsable'),
    ('3(5)+7', 'unparsable'),
    ('()', 'unparsable'),
    ('', 'unparsable'),
    ('22.0', 'unparsable'),
    ('0x16', 'unparsable'),
    ('٣*5+7', 'unparsable'),
    ("__import__('os').getpid()", 'unparsable'),
    ('(' * 300, 'unparsable'),
    ('9**9**9**9', 'unparsable'),
  ],
)
def test_answers(answer, outcome):
  environment = make(size=1)
  record = {'answer': '3 * 5 + 7', 'numbers': [3, 5, 7], 'target': 22}
  assert ask(environment, record, answer) == outcome


def test_numbers_that_are_given_twice_may_be_used_twice():
  record = {'answer': '5 * 5 - 1', 'numbers': [1, 5, 5], 'target': 24}
  all_of_them, some = make(size=1), make(size=1, use='at_most_once')
  assert ask(all_of_them, record, '5 * 5 - 1') == 'verified'
  record = {'answer': '5 * 5', 'numbers': [1, 5, 5], 'target': 25}
  assert ask(all_of_them, record, '5 * 5') == 'wrong'
  assert ask(some, record, '5 * 5') == 'verified'
  record['numbers'] = [1, 5]
  assert ask(some, record, '5 * 5') == 'wrong'


def test_no_answer_takes_long_or_grows():
  nested = '(' * 99 + '1' + ')' * 99
  product = '*'.join(['999999999'] * 20)
  start = time.monotonic()
  assert evaluate(nested) == (1, [1])
  assert evaluate(product)[0] == 999999999**20
  with pytest.raises(ValueError, match='200 characters'):
    evaluate('1+' * 100 + '1')
  assert time.monotonic() - start < 1


def test_parts_share_no_problem_whatever_the_seed():
  def names(part, seed):
    found = make(size=40, numbers=2, max_number=12, part=part, seed=seed)
    return {(*sorted(r['numbers']), r['target']) for r in found.prompts}

  assert not names('train', 0) & names('heldout', 1)
  assert names('train', 0) & names('train', 1)
  assert names('train', 0) != names('train', 1)
  assert names('all', 3) == names('all', 3)


def test_solve_agrees_with_what_is_known():
  assert evaluate(solve([3, 3, 8, 8], 24)) == (24, [8, 3, 8, 3])  # 8 / (3 - 8 / 3)
  assert solve([1, 1, 1, 1], 24) is None
  assert evaluate(solve([5], 5))[0] == 5
  assert solve([5], 6) is None


def test_games_of_24_from_a_file(tmp_path):
  rows = [{'Puzzles': text} for text in ('1 1 4 6', '3 3 8 8', '1 1 11 11')]
  path = tmp_path / 'x.jsonl.gz'
  path.write_bytes(gzip.compress('\n'.join(map(json.dumps, rows)).encode()))
  environment = game24(path=str(path))
  assert [r['numbers'] for r in environment.prompts][1] == [3, 3, 8, 8]
  for record in environment.prompts:
    assert record['target'] == 24
    assert ask(environment, record, record['answer']) == 'verified'
  assert len(game24(path=str(path), size=2).prompts) == 2
  with pytest.raises(ValueError, match='has 3 puzzles'):
    game24(path=str(path), size=4)
  path.write_bytes(gzip.compress(b'{"Puzzles": "1 1"}'))
  with pytest.raises(ValueError, match='line 1: 24 cannot be made'):
    game24(path=str(path))


def test_all_published_games_of_24():
  root = pathlib.Path(os.environ.get('EDUCE_DATA') or '../shared/data')
  if not (root / 'game24.jsonl.gz').exists():
    pytest.skip('needs data://game24.jsonl.gz')
  environment = game24(part='heldout')
  assert abs(len(environment.prompts) - 1362 / 5) < 5 * 15  # binomial
  train = {record['id'] for record in game24(size=500, part='train').prompts}
  assert not train & {record['id'] for record in environment.prompts}
  for record in environment.prompts:
    assert ask(environment, record, record['answer']) == 'verified'


def test_every_problem_has_a_solution():
  environment = make(size=5, seed=2)
  for record in environment.prompts:
    assert (
      ask(environment, record, f'<answer>{record["answer"]}</answer>') == 'verified'
    )


@pytest.mark.parametrize(
  ('function', 'arguments', 'message'),
  [
    (make, dict(size=0), 'size'),
    (make, dict(size=1, numbers=1), 'numbers=1'),
    (make, dict(size=1, max_number=0), 'max_number=0'),
    (make, dict(size=1, max_target=0), 'max_target=0'),
    (make, dict(size=1, use='some'), "'at_most_once'"),
    (make, dict(size=1, part='test'), "'heldout'"),
    (make, dict(size=50, numbers=2, max_number=2), 'only about .* size=50'),
  ],
)
def test_bad_input_is_one_clear_line(function, arguments, message):
  with pytest.raises(ValueError, match=message) as error:
    function(**arguments)
  assert '\n' not in str(error.value)
