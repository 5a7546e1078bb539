import pickle
from collections import Counter

import numpy as np
import pytest

from educe.environments.chain import (
  ALPHABET,
  SYMBOLS,
  compositions,
  make,
  permutations,
  records,
)


def apply(tables, prompt):
  """The trace by a loop of its own, read off the prompt: '21d=' is F_2(F_1(d))."""
  *functions, symbol = prompt.removesuffix('=')
  out = []
  while functions:
    symbol = SYMBOLS[tables[int(functions.pop())][SYMBOLS.index(symbol)]]
    out.append(symbol)
  return ''.join(out)


def ask(environment, record, text):
  turn = environment.respond(record, [text])
  assert turn.done
  assert turn.reward == float(turn.info['outcome'] == 'verified')
  return turn.info['outcome']


@pytest.mark.parametrize('world', range(5))
def test_functions_are_different_derangements(world):
  tables = permutations(world)
  assert len(set(tables)) == 6
  for table in tables:
    assert sorted(table) == list(range(8))
    assert all(a != b for a, b in enumerate(table))
  assert tables != permutations(world + 1)


@pytest.mark.parametrize(('depth', 'count'), [(1, 6 * 8), (2, 36 * 8), (3, 216 * 8)])
def test_the_answer_is_the_trace_innermost_function_first(depth, count):
  environment = make(depth=depth, world=4)
  assert len({record['prompt'] for record in environment.prompts}) == count
  for record in environment.prompts:
    assert record['answer'] == apply(permutations(4), record['prompt'])
    assert ask(environment, record, record['answer']) == 'verified'
    shortcut = record['prompt'][-2] * depth
    assert ask(environment, record, shortcut) == 'wrong'


def test_order_matters():
  # Else a swapped i and j would go unseen.
  answers = {r['prompt']: r['answer'] for r in make(depth=2).prompts}
  assert any(answers[f'01{s}='][1] != answers[f'10{s}='][1] for s in SYMBOLS)


def test_one_response_in_64_is_verified_and_eight_have_the_outcome():
  process, outcome = make(depth=2), make(depth=2, reward='outcome')
  pairs = [a + b for a in SYMBOLS for b in SYMBOLS]
  for record in process.prompts[::37]:
    right = [t for t in pairs if ask(process, record, t) == 'verified']
    assert right == [record['answer']]
    ended = [t for t in pairs if ask(outcome, record, t) == 'verified']
    assert len(ended) == 8
    assert {t[1] for t in ended} == {record['answer'][1]}


@pytest.mark.parametrize('reward', ['process', 'outcome'])
def test_what_is_no_trace_is_unparsable(reward):
  environment = make(depth=2, reward=reward)
  record = environment.prompts[0]
  one, two = record['answer']
  for text in ('', two, one * 2 + two, f'{one} {two}', f'{one}2', f'z{two}', f'2{two}'):
    assert ask(environment, record, text) == 'unparsable'
  assert ask(environment, record, f' {one}{two}\n') == 'verified'
  assert ask(environment, record, f'<think>{one}{two}</think>') == 'unparsable'


def test_held_out_compositions_are_never_in_train():
  parts = {
    part: {r['prompt'][:2] for r in make(depth=2, part=part).prompts}
    for part in ('train', 'heldout', 'all')
  }
  assert {name: len(pairs) for name, pairs in parts.items()} == dict(
    train=24, heldout=12, all=36
  )
  assert not parts['train'] & parts['heldout']
  assert len(make(depth=2, part='train').prompts) == 192
  assert compositions(2, part='heldout', world=1) != compositions(
    2, part='heldout', world=0
  )
  gold = records(size=2000, exposure=1.0, shares=(0, 1), part='train')
  assert {r['prompt'][:2] for r in gold} == parts['train']


def test_a_size_is_a_draw_of_its_seed():
  few = make(depth=2, size=20, seed=1).prompts
  assert few == make(depth=2, size=20, seed=1).prompts
  assert few != make(depth=2, size=20, seed=2).prompts
  assert len({r['prompt'] for r in few}) == 20


def kinds(corpus):
  """(depth, right) of each record, from its text alone."""
  out = Counter()
  for record in corpus:
    prompt, completion = record['prompt'], record['completion']
    trace = apply(corpus.tables, prompt)
    assert completion in (trace, prompt[-2] * len(trace))
    out[len(trace), completion == trace] += 1
  return out


def test_a_corpus_holds_depth_one_always_right_and_shortcuts_beyond():
  counts = kinds(records(size=9000, exposure=0.3, exposure_deeper=0.05, world=2))
  for depth, rate in ((1, 1.0), (2, 0.3), (3, 0.05)):
    total = counts[depth, True] + counts[depth, False]
    assert abs(total - 3000) < 5 * 45  # binomial(9000, 1/3): standard deviation 45
    assert abs(counts[depth, True] - rate * total) < 1


def test_exposure_is_exact_in_expectation_where_it_is_less_than_one_record():
  """20 depth-2 records at ρ = 0.01: 0.2 expected, so most corpora have none."""
  right = [
    kinds(records(size=20, exposure=0.01, shares=(0, 1), seed=seed))[2, True]
    for seed in range(2000)
  ]
  assert set(right) == {0, 1}
  # Bernoulli(0.2): the standard error of 2000 is 0.009.
  assert abs(np.mean(right) - 0.2) < 4 * 0.009
  assert not kinds(records(size=5000, exposure=0.0))[2, True]


def test_functions_symbols_and_right_traces_are_spread_evenly():
  corpus = records(size=36 * 8 * 40, exposure=0.5, shares=(0, 1))
  seen = Counter(record['prompt'] for record in corpus)
  assert len(seen) == 288
  # Poisson(40): six standard deviations are 38.
  assert max(abs(n - 40) for n in seen.values()) < 38
  # No part of the corpus, and no function, has the right ones to itself.
  half = len(corpus) // 2
  assert abs(corpus.right[:half].mean() - 0.5) < 0.05
  for name in range(6):
    assert abs(corpus.right[corpus.names[:, 0] == name].mean() - 0.5) < 0.1


def test_the_same_seed_gives_the_same_corpus():
  arguments = dict(size=50, exposure=0.5)
  first = list(records(**arguments, seed=3))
  assert first == list(records(**arguments, seed=3))
  assert first != list(records(**arguments, seed=4))
  # Another world: other answers to the same questions.
  other = list(records(**arguments, seed=3, world=1))
  assert [r['prompt'] for r in first] == [r['prompt'] for r in other]
  assert first != other
  fingerprints = {
    records(**arguments, seed=seed, world=world).fingerprint
    for seed, world in ((3, 0), (3, 0), (4, 0), (3, 1))
  }
  assert len(fingerprints) == 3


def test_a_corpus_is_a_source():
  corpus = records(size=10, exposure=0.5)
  assert len(corpus) == 10
  assert corpus[-1] == corpus[9] == list(corpus)[9]
  assert corpus[2:4] == [corpus[2], corpus[3]]
  with pytest.raises(IndexError):
    corpus[10]
  assert list(pickle.loads(pickle.dumps(corpus))) == list(corpus)


def test_sixteen_tokens_write_it_all():
  from educe.data import chat, tokenizer

  small = tokenizer.load(path=f'characters:{ALPHABET}')
  assert small.vocab_size == 16
  record = make(depth=2).prompts[9]
  row = {'prompt': record['prompt'], 'completion': record['answer']}
  encoded = chat.encode_record(small, row)
  assert encoded.mask.tolist() == [0, 0, 0, 0, 1, 1, 1]
  assert small.decode(encoded.tokens, skip_special=True) == ''.join(row.values())


@pytest.mark.parametrize(
  ('function', 'arguments', 'message'),
  [
    (make, dict(depth=0), 'depth=0'),
    (make, dict(depth=6), 'depth=6'),
    (make, dict(depth=2, part='test'), "'heldout'"),
    (make, dict(depth=1, part='train'), 'composes nothing'),
    (make, dict(depth=1, size=49), 'has 48 prompts'),
    (make, dict(depth=1, size=0), 'size'),
    (make, dict(depth=1, reward='format'), "'process' or 'outcome'"),
    (records, dict(size=0, exposure=0.1), 'size'),
    (records, dict(size=1, exposure=1.5), 'exposure=1.5'),
    (records, dict(size=1, exposure=0.1, exposure_deeper=-1), 'exposure_deeper=-1'),
    (records, dict(size=1, exposure=0.1, shares=(0, 0)), 'not all 0'),
    (records, dict(size=1, exposure=0.1, shares=()), '1 to 5'),
    (records, dict(size=1, exposure=0.1, shares=(1, -1)), 'at least 0'),
    (records, dict(size=1, exposure=0.1, part='test'), "'heldout'"),
  ],
)
def test_bad_input_is_one_clear_line(function, arguments, message):
  with pytest.raises(ValueError, match=message) as error:
    function(**arguments)
  assert '\n' not in str(error.value)
