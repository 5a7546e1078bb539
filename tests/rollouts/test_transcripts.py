import json

import pytest

from educe.rollouts import transcripts


def row(completion='é', **changes):
  return {
    'id': 'a',
    'prompt': [
      {'role': 'system', 'content': 'Be kind.'},
      {'role': 'user', 'content': 'Q'},
    ],
    'completion': completion,
    'answer': 7,
    'outcome': 'wrong',
    'length': 2,
    'stopped': True,
  } | changes


def read(path):
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_rows_come_back_one_a_line(tmp_path):
  rows = [row(), row('two\nlines\u2028and\x85a \x0b\r half'), row('')]
  path = tmp_path / 'new' / 'folders' / 't.jsonl'
  transcripts.save(rows, path)
  assert transcripts.load(path) == rows
  assert transcripts.load(path, 2) == rows[:2]
  assert 'é' in path.read_text(encoding='utf-8')  # readable, not escaped
  assert [p.name for p in path.parent.iterdir()] == ['t.jsonl']  # nothing half-written


def test_half_a_surrogate_pair_is_stored_as_its_escape(tmp_path):
  """UTF-8 cannot hold it; JSON's own escape can, so it even comes back."""
  rows = [row('a\ud83d'), row('\udc00b')]
  transcripts.save(rows, tmp_path / 't.jsonl')
  assert read(tmp_path / 't.jsonl') == rows


def test_what_json_does_not_know_becomes_its_text(tmp_path):
  transcripts.save([row(answer={1})], tmp_path / 't.jsonl')
  assert read(tmp_path / 't.jsonl')[0]['answer'] == '{1}'


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 't.jsonl'
  transcripts.save([row()], path)
  loop = row()
  loop['answer'] = loop
  with pytest.raises(ValueError, match='Circular'):
    transcripts.save([row('new'), loop], path)
  assert read(path) == [row()]


def test_a_few_are_shown_to_people():
  text = transcripts.show([row(' x '), row('y', stopped=False), row('z')], limit=2)
  first, second = text.split('\n\n')
  assert first == '? Q\n> x\n  wrong; right is 7; 2 tokens'
  judged = dict(row(), answer=None, outcome='judged', reward=0.25)
  assert transcripts.show([judged]).endswith('judged; reward 0.25; 2 tokens')
  assert second.startswith('? Q\n> y … (cut off)\n')


@pytest.mark.parametrize('prompt', ['Q', ['earlier', 'Q']])
def test_prompts_may_be_texts(prompt):
  assert transcripts.show([row(prompt=prompt)]).startswith('? Q\n')
