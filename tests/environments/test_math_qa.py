import json
import os
import pathlib
import threading

import pytest

from educe.environments import math_qa
from educe.environments.math_qa import make, verify
from educe.environments.verifiers import worker_pool

pytest.importorskip('math_verify')
ROWS = [
  {'question': 'Two and two?', 'answer': 'It is 2+2 = <<2+2=4>>4.\n#### 4'},
  {'question': 'A thousand and two?', 'answer': 'x\n#### 1,002'},
  {'question': 'Four less five?', 'answer': '#### -1'},
  {'question': 'Half a dozen, halved twice?', 'answer': 1.5},
]
MATH = [
  {'problem': 'Half?', 'solution': r'So $\boxed{\frac{1}{2}}$ is it.'},
  {'problem': 'Expand.', 'solution': r'\boxed{x^2 + 2x + 1}'},
  {'problem': 'When?', 'solution': r'\boxed{\text{Friday}}'},
]


@pytest.fixture
def file(tmp_path):
  def write(rows):
    path = tmp_path / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)

  return write


def judge_text(gold, text):
  turn = math_qa._respond({'answer': gold}, [text])
  assert turn.done
  assert turn.reward == float(turn.info['outcome'] == 'verified')
  return turn.info['outcome']


@pytest.mark.parametrize(
  ('gold', 'text', 'outcome'),
  [
    ('3', r'first \boxed{2} then \boxed{3}', 'verified'),
    ('2', r'first \boxed{2} then \boxed{3}', 'wrong'),
    ('0.5', r'\boxed{50\%}', 'wrong'),
    ('50', r'\boxed{50\%}', 'verified'),
    (r'50\%', r'\boxed{50}', 'verified'),
    ('5', '<think></think>', 'unparsable'),
    ('5', r'<think>\boxed{5}</think>', 'unparsable'),
    ('5', r'<think>\boxed{5}</think>Done.', 'unparsable'),
    ('5', r'<think>no</think>\boxed{5}', 'verified'),
    ('5', r'<think>\boxed{5}', 'unparsable'),
    ('5', r'\boxed{}', 'unparsable'),
    ('5', r'\boxed{5', 'unparsable'),
    ('18', 'She makes 9 * 2 = $18.', 'verified'),
    ('18', '#### 18', 'verified'),
    ('18', r'\boxed{\$18.00}', 'verified'),
    ('18', r'\boxed{18 \text{ dollars}}', 'verified'),
    ('18', r'\boxed{18\text{ million}}', 'wrong'),
    ('18', 'She makes 9 * 2 = 18, or 3 less than 21.', 'wrong'),
    ('1,002', r'\boxed{1002}', 'verified'),
    ('1002', 'It is 1,002.', 'verified'),
    ('-1', 'It is -1', 'verified'),
    ('-1', 'It is 1', 'wrong'),
    ('5', 'none', 'unparsable'),
    ('5', '', 'unparsable'),
    (r'\frac{1}{2}', r'\boxed{0.5}', 'verified'),
    (r'\frac{1}{2}', r'\boxed{\dfrac{2}{4}}', 'verified'),
    (r'\frac{1}{2}', r'The answer is $\frac{1}{2}$.', 'verified'),
    (r'\frac{1}{3}', r'\boxed{0.33}', 'wrong'),
    ('x^2+2x+1', r'\boxed{(x+1)^2}', 'verified'),
    ('x^2+2x+1', r'\boxed{(y+1)^2}', 'wrong'),
    (r'2\sqrt{2}', r'\boxed{\sqrt{8}}', 'verified'),
    (r'\{1,2\}', r'\boxed{\{2, 1\}}', 'verified'),
    ('(1,2)', r'\boxed{(2,1)}', 'wrong'),
    ('[0,1)', r'\boxed{[0,1]}', 'wrong'),
    (r'\pi', r'\boxed{3.14}', 'wrong'),
    ('5', r'\boxed{x = 5}', 'verified'),
    ('5', r'\boxed{4, 5}', 'wrong'),
    ('5', r'\boxed{4 \text{ or } 5}', 'wrong'),
    (r'\text{Friday}', r'\boxed{Friday}', 'verified'),
    (r'\text{Friday}', r'\boxed{\text{Monday}}', 'wrong'),
    ('5', r'\boxed{' + '5' * 500 + '}', 'unparsable'),
  ],
)
def test_answers(gold, text, outcome):
  assert judge_text(gold, text) == outcome


@pytest.mark.parametrize(
  'attack',
  [
    "__import__('educe').__dict__.update(hit=1)",
    '().__class__.__base__.__subclasses__()',
    r"\text{__import__('educe').__dict__.update(hit=1)}",
    "exec('import educe; educe.hit = 1')",
  ],
)
def test_text_is_never_evaluated(attack, monkeypatch):
  import math_verify.parser

  import educe

  def refuse(*args, **kwargs):
    raise AssertionError('parse_expr is eval')

  monkeypatch.setattr(math_verify.parser, 'parse_expr', refuse)
  for gold in ('x+1', '5', r'\text{Friday}'):
    assert judge_text(gold, rf'\boxed{{{attack}}}') in ('wrong', 'unparsable')
    assert judge_text(gold, f'<answer>{attack}</answer>') in ('wrong', 'unparsable')
  assert not hasattr(educe, 'hit')


def test_verification_needs_no_main_thread():
  """math-verify's alarm raises there, and its caller made that a reward of 0."""
  found = []
  thread = threading.Thread(target=lambda: found.append(verify('(x+1)^2', 'x^2+2x+1')))
  thread.start()
  thread.join()
  assert found == [True]


def test_a_huge_value_costs_one_sample(file):
  environment = make(path=file(ROWS))
  record = {'answer': 'x+1'}
  texts = [r'\boxed{9^{9^{9^{9}}}}', r'\boxed{x+1}', r'\boxed{((10^6)!)!}', '1+x']
  with worker_pool(
    environment.respond, workers=1, time_limit=2, error_limit=1
  ) as verifier:
    turns = verifier([(record, [text]) for text in texts])
  assert [t.reward for t in turns[1::2]] == [1.0, 1.0]
  assert all(not turn.reward for turn in turns[::2])


def test_a_verifier_that_fails_on_its_own_reference_says_so(monkeypatch):
  class Broken:
    parse = staticmethod(lambda *args, **kwargs: ['something'])
    LatexExtractionConfig = staticmethod(lambda: None)

    @staticmethod
    def verify(gold, answer, **kwargs):
      raise ValueError('signal only works in main thread of the main interpreter')

  monkeypatch.setattr(math_qa, '_library', lambda: Broken)
  with pytest.raises(ValueError, match="reference answer 'x' is not comparable"):
    verify('y', 'x')


def test_prompts_and_answers_of_gsm8k(file):
  environment = make(path=file([*ROWS, ROWS[0]]), instruction='Box it.', system='Go.')
  assert [r['answer'] for r in environment.prompts] == ['4', '1,002', '-1', '1.5']
  first = environment.prompts[0]
  assert first['prompt'] == [
    {'role': 'system', 'content': 'Go.'},
    {'role': 'user', 'content': 'Two and two?\n\nBox it.'},
  ]
  assert environment.respond(first, [r'\boxed{4}']).reward == 1


def test_prompts_and_answers_of_math(file):
  path = file(MATH)
  environment = make(path=path, question='problem', answer='solution')
  golds = [r['answer'] for r in environment.prompts]
  assert golds == [r'\frac{1}{2}', 'x^2 + 2x + 1', r'\text{Friday}']
  for record in environment.prompts:
    assert environment.respond(record, [record['solution']]).reward == 1


def test_worked_solutions_are_there_without_the_calculator(file):
  environment = make(path=file(ROWS))
  assert environment.prompts[0]['solution'] == 'It is 2+2 = 4.'
  for record in environment.prompts:
    said = f'{record["solution"]}\n\\boxed{{{record["answer"]}}}'
    assert environment.respond(record, [said]).reward == 1


def test_parts_and_sizes(file):
  path = file([{'question': f'What is {i}?', 'answer': i} for i in range(200)])
  parts = {
    p: {r['id'] for r in make(path=path, part=p).prompts} for p in ('train', 'heldout')
  }
  assert not parts['train'] & parts['heldout']
  assert len(parts['train'] | parts['heldout']) == 200
  few = make(path=path, size=9, seed=1, part='heldout').prompts
  assert len(few) == 9
  assert {r['id'] for r in few} <= parts['heldout']
  assert few == make(path=path, size=9, seed=1, part='heldout').prompts
  assert few != make(path=path, size=9, seed=2, part='heldout').prompts


def test_without_the_package_it_says_what_to_install(file, monkeypatch):
  math_qa._library.cache_clear()
  monkeypatch.setattr(math_qa, 'math_verify', None)
  with pytest.raises(ValueError, match='pip install math-verify'):
    make(path=file(ROWS))


def test_gsm8k_as_published():
  root = pathlib.Path(os.environ.get('EDUCE_DATA') or '../shared/data')
  if not (root / 'gsm8k_test.jsonl.gz').exists():
    pytest.skip('needs data://gsm8k_test.jsonl.gz')
  environment = make()
  assert len(environment.prompts) == 1319
  for record in environment.prompts:
    said = f'{record["solution"]}\n\\boxed{{{record["answer"]}}}'
    assert '<<' not in said
    assert environment.respond(record, [said]).reward == 1
    plain = f'#### {record["answer"]}'
    assert environment.respond(record, [plain]).reward == 1
    assert environment.respond(record, [f'{said} No: 7{record["answer"]}.']).reward == 1
    wrong = f'It is 7{record["answer"].lstrip("-")}.'
    assert environment.respond(record, [wrong]).reward == 0


@pytest.mark.parametrize(
  ('rows', 'arguments', 'message'),
  [
    (ROWS, dict(question='problem'), "line 1: no column 'problem'"),
    (ROWS, dict(size=0), 'size'),
    (ROWS, dict(size=9), 'has 4 problems, not size=9'),
    (ROWS, dict(part='test'), "'heldout'"),
    ([{'question': 'a', 'answer': '#### '}], {}, 'holds no answer'),
    ([{'question': 'a', 'answer': [1]}], {}, 'must be text or a number'),
    ([{'question': 5, 'answer': '1'}], {}, 'must be text'),
  ],
)
def test_bad_input_is_one_clear_line(file, rows, arguments, message):
  with pytest.raises(ValueError, match=message) as error:
    make(path=file(rows), **arguments)
  assert '\n' not in str(error.value)
