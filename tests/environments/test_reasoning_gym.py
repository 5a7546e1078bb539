import pickle

import pytest

from educe.environments import reasoning_gym
from educe.environments.reasoning_gym import make, records

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


def test_records_hold_the_same_problems_with_completions():
  environment = make(**SUM, size=8, seed=3, part='train')
  rows = records(**SUM, size=8, seed=3, part='train', completion='<answer>{answer}')
  for problem, row in zip(environment.prompts, rows, strict=True):
    assert row['prompt'] == problem['prompt']
    assert row['id'] == problem['id']
    text = f'<answer>{problem["answer"]}'
    assert row['completion'] == [{'role': 'assistant', 'content': text}]


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


@pytest.mark.parametrize('task', sorted(reasoning_gym.EVALUATES))
def test_families_that_evaluate_text_are_refused(task):
  with pytest.raises(ValueError, match='evaluates'):
    make(task=task, size=1)


def test_every_scorer_that_evaluates_is_known():
  """The package's sources hold no other scorer that calls eval on an answer."""
  import inspect

  from reasoning_gym.factory import DATASETS

  known = reasoning_gym.EXACT | reasoning_gym.EVALUATES
  for task, (kind, _) in DATASETS.items():
    module = inspect.getsource(inspect.getmodule(kind.score_answer))
    scorer = inspect.getsource(kind.score_answer)
    calls = [w for w in ('eval(', 'exec(', 'parse_expr(', 'sympify(') if w in scorer]
    if calls and task not in known:
      # number_sorting evaluates its own reference; propositional_logic has a parser.
      assert task in ('number_sorting', 'propositional_logic'), (task, calls)
      assert 'eval(answer' not in module


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
  assert turn.reward == 0
  assert function(environment.prompts[0], ['5']).info['outcome'] != 'error'


def test_respond_can_be_sent_to_a_worker_process():
  environment = make(**SUM, size=1)
  respond = pickle.loads(pickle.dumps(environment.respond))
  record = environment.prompts[0]
  assert respond(record, [record['answer']]).reward == 1


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(task='no_such_task', size=1), 'no task'),
    (dict(task='chain_sum', size=1, digits=2), 'digits.*its settings are.*max_digits'),
    (dict(task='chain_sum', size=1, min_digits=5, max_digits=2), 'its settings are'),
    (dict(task='chain_sum', size=1, part='test'), "'heldout'"),
    (dict(task='chain_sum', size=0), 'size'),
    (dict(SUM, max_digits=1, size=1000), 'different problems'),
  ],
)
def test_bad_input_is_one_clear_line(arguments, message):
  with pytest.raises(ValueError, match=message) as error:
    make(**arguments)
  assert '\n' not in str(error.value)


def test_records_need_references_and_a_place_for_them():
  with pytest.raises(ValueError, match=r'must contain \{answer\}'):
    records(**SUM, size=1, completion='{reply}')
  with pytest.raises(ValueError, match='no reference answers'):
    records(task='graph_color', size=1)
