import gzip
import json

import pytest

from educe.environments import problems


def test_problems_that_differ_in_white_space_are_one_problem():
  """Otherwise a copy of a held-out problem could stand in the training part."""
  name = problems.digest('What is 1 + 2?')
  assert name == problems.digest(' What  is 1\n+ 2? ')
  assert name != problems.digest('What is 1 + 3?')


def test_one_problem_in_five_is_held_out_and_no_problem_is_in_both():
  names = [problems.digest(f'problem {i}') for i in range(5000)]
  held_out = [problems.in_part(name, 'heldout') for name in names]
  train = [problems.in_part(name, 'train') for name in names]
  assert all(a != b for a, b in zip(held_out, train, strict=True))
  assert all(problems.in_part(name, 'all') for name in names)
  # Binomial(5000, 0.2): standard deviation 28.
  assert abs(sum(held_out) - 1000) < 5 * 28
  with pytest.raises(ValueError, match="'heldout'"):
    problems.in_part(names[0], 'test')


def test_chats():
  assert problems.chat('Q', '', None) == [{'role': 'user', 'content': 'Q'}]
  assert problems.chat('Q', 'Be brief.', 'S') == [
    {'role': 'system', 'content': 'S'},
    {'role': 'user', 'content': 'Q\n\nBe brief.'},
  ]


def test_rows_of_plain_and_compressed_files(tmp_path):
  rows = [{'a': 1}, {'a': 'é'}]
  text = json.dumps(rows[0]) + '\n\n' + json.dumps(rows[1])
  (tmp_path / 'x.jsonl').write_text(text)
  (tmp_path / 'x.jsonl.gz').write_bytes(gzip.compress(text.encode()))
  for name in ('x.jsonl', 'x.jsonl.gz'):
    found = problems.read(str(tmp_path / name))
    assert [row for _, row in found] == rows
    assert found[1][0].endswith(f'{name} line 3')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{"a": 1}\nx', 'line 2: not JSON'),
    ('[1]', 'expected an object'),
    ('', 'is empty'),
  ],
)
def test_bad_files_are_one_clear_line(tmp_path, text, message):
  (tmp_path / 'x.jsonl').write_text(text)
  with pytest.raises(ValueError, match=message):
    problems.read(str(tmp_path / 'x.jsonl'))
  with pytest.raises(FileNotFoundError):
    problems.read(str(tmp_path / 'y.jsonl'))
  with pytest.raises(ValueError, match=r"f line 1: no column 'q' \(it has a, b\)"):
    problems.column({'a': 1, 'b': 2}, 'q', 'f line 1')
