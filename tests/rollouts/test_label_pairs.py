"""Samples and a judge become records of prompt, chosen and rejected."""

import pytest

from educe.data import pairs
from educe.data import tokenizer as tokenizers
from educe.rollouts import transcripts
from educe.rollouts.label_pairs import label

CHAT = [{'role': 'user', 'content': 'Hi'}]
ROWS = [
  {'prompt': 'a', 'completion': 'xx', 'reward': 0.5},
  {'prompt': CHAT, 'completion': 'hello', 'reward': 1.0},
  {'prompt': 'a', 'completion': 'x', 'reward': 2.0},
  {'prompt': 'a', 'completion': 'xxx', 'reward': -1.0},
  {'prompt': CHAT, 'completion': 'go away', 'reward': 0.0},
  {'prompt': 'tie', 'completion': 'p', 'reward': 1.0},
  {'prompt': 'tie', 'completion': 'q', 'reward': 1.0},
  {'prompt': 'few', 'completion': 'p', 'reward': 1.0},
  {'prompt': 'few', 'completion': 'q', 'reward': None},
]


def said(content):
  return [{'role': 'assistant', 'content': content}]


def test_best_and_worst_of_each_prompt_wherever_they_lie():
  records, counts = label(ROWS)
  assert records == [
    {'prompt': 'a', 'chosen': 'x', 'rejected': 'xxx', 'chosen_rating': 2.0,
     'rejected_rating': -1.0},
    {'prompt': CHAT, 'chosen': said('hello'), 'rejected': said('go away'),
     'chosen_rating': 1.0, 'rejected_rating': 0.0},
  ]  # fmt: skip
  assert counts == {'pairs': 2, 'ties': 1, 'unscored': 1}
  assert label(ROWS, margin=1.0)[1] == {'pairs': 1, 'ties': 2, 'unscored': 1}


def test_a_judge_is_asked_once_with_each_prompts_completions_together():
  asked = []

  def judge(records, completions):
    asked.append([(r['prompt'], x) for r, x in zip(records, completions, strict=True)])
    return [float(len(x)) for x in completions]

  records, counts = label(ROWS, judge)
  assert len(asked) == 1
  assert [p for p, _ in asked[0]] == ['a'] * 3 + [CHAT] * 2 + ['tie'] * 2 + ['few'] * 2
  assert [(r['chosen'], r['rejected']) for r in records] == [
    ('xxx', 'x'), (said('go away'), said('hello')),
  ]  # fmt: skip
  assert counts == {'pairs': 2, 'ties': 2, 'unscored': 0}


def test_the_file_is_preference_data(tmp_path):
  transcripts.save(label(ROWS)[0], tmp_path / 'pairs.jsonl')
  words = tokenizers.load(path='byte')
  for row in transcripts.load(tmp_path / 'pairs.jsonl'):
    said = pairs.encode(words, row, 'pairs')
    assert said.labels == (row['chosen_rating'], row['rejected_rating'])


def test_equal_words_are_no_pair():
  rows = [{'prompt': 'a', 'completion': 'x', 'reward': float(i)} for i in range(3)]
  assert label(rows) == ([], {'pairs': 0, 'ties': 1, 'unscored': 0})


def test_bad_input():
  with pytest.raises(ValueError, match='there are no completions'):
    label([])
  with pytest.raises(ValueError, match='margin=-1 must not be negative'):
    label(ROWS, margin=-1)
  with pytest.raises(ValueError, match="row 0 has no 'reward'"):
    label([{'prompt': 'a', 'completion': 'x'}])
  for score in (float('nan'), float('inf'), '3', True):
    with pytest.raises(ValueError, match='label: a score is'):
      label([*ROWS, {'prompt': 'a', 'completion': 'x', 'reward': score}])
  for scores in ([], [1.0] * 20):
    with pytest.raises(ValueError, match=rf'scored {len(scores)} rows, 9 were asked'):
      label(ROWS, lambda records, completions, scores=scores: scores)
