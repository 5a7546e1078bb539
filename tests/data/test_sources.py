"""Records as they come, renamed, wrapped, refused."""

import gzip
import json
import pickle

import numpy as np
import pytest

from educe import config, paths
from educe.data import sources, tfds_builder
from educe.types import Environment

ROWS = [dict(question=f'q{i} é', answer=f'a{i}', n=i) for i in range(10)]


def write(path, rows):
  text = '\n'.join(json.dumps(row) for row in rows)
  data = text.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return str(path)


@pytest.mark.parametrize('name', ['rows.jsonl', 'rows.jsonl.gz'])
def test_jsonl_is_random_access(name, tmp_path):
  source = sources.jsonl(path=write(tmp_path / name, ROWS))
  assert len(source) == 10
  assert source[7] == ROWS[7]
  assert source[-1] == ROWS[-1]
  assert source[2:4] == ROWS[2:4]
  assert list(source) == ROWS
  with pytest.raises(IndexError):
    source[10]


def test_jsonl_workers_read_the_file_themselves(tmp_path):
  path = tmp_path / 'rows.jsonl'
  source = sources.jsonl(path=write(path, ROWS * 200), split='[1:]')
  assert source[0] == ROWS[1]
  data = pickle.dumps(source)
  assert len(data) < path.stat().st_size / 2
  assert pickle.loads(data)[5] == ROWS[6]
  path.write_text('{"question": "other"}\n' * 3000)
  with pytest.raises(ValueError, match='changed while it was being read'):
    pickle.loads(data)[5]


def test_fingerprint_follows_the_data(tmp_path):
  one = sources.jsonl(path=write(tmp_path / 'a.jsonl', ROWS))
  same = sources.jsonl(path=write(tmp_path / 'b.jsonl.gz', ROWS))
  other = sources.jsonl(path=write(tmp_path / 'c.jsonl', ROWS[::-1]))
  assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize(
  ('split', 'expected'),
  [
    ('[:3]', [0, 1, 2]),
    ('[8:]', [8, 9]),
    ('[50%:70%]', [5, 6]),
    ('[-2:]', [8, 9]),
    ('odd', [1, 3, 5, 7, 9]),
    ('odd[1:3]', [3, 5]),
    ('even[:40%]', [0, 2]),
  ],
)
def test_split(split, expected, tmp_path):
  rows = [{**row, 'split': ('even', 'odd')[row['n'] % 2]} for row in ROWS]
  source = sources.jsonl(path=write(tmp_path / 'a.jsonl', rows), split=split)
  assert [row['n'] for row in source] == expected


def test_columns_rename_and_format():
  source = sources.memory(
    records=ROWS,
    columns=dict(prompt='question', completion='{n}: {answer} {{ok}}'),
  )
  assert source[3] == dict(prompt='q3 é', completion='3: a3 {ok}')
  # Columns that are not mentioned stay.
  source = sources.memory(records=ROWS, columns=dict(prompt='question'))
  assert source[3] == dict(prompt='q3 é', answer='a3', n=3)


def test_formatting_reaches_no_attributes():
  with pytest.raises(ValueError, match=r"no column 'n\.__class__'"):
    sources.memory(records=ROWS, columns=dict(text='{n.__class__}'))


def test_chat_wraps_strings():
  columns = dict(prompt='question', completion='answer')
  source = sources.memory(records=ROWS, columns=columns, chat=True, system='Be kind.')
  assert source[0]['prompt'] == [
    dict(role='system', content='Be kind.'),
    dict(role='user', content='q0 é'),
  ]
  assert source[0]['completion'] == [dict(role='assistant', content='a0')]
  pair = [dict(prompt='p', chosen='c', rejected='r')]
  source = sources.memory(records=pair, chat=True)
  assert source[0]['chosen'] == [dict(role='assistant', content='c')]
  assert source[0]['prompt'] == [dict(role='user', content='p')]


def test_records_are_not_shared():
  source = sources.memory(records=ROWS, chat=True, columns=dict(prompt='question'))
  source[0]['prompt'].append('x')
  assert len(source[0]['prompt']) == 1
  assert 'prompt' not in ROWS[0]


@pytest.mark.parametrize(
  ('text', 'match'),
  [
    ('', r'rows\.jsonl: data set is empty'),
    ('\n\n', r'rows\.jsonl: data set is empty'),
    ('{"a": 1}\n\n{"a": 1', r'rows\.jsonl line 3: not JSON'),
    ('{"a": 1}\n[1]', r'rows\.jsonl line 2: expected an object'),
    (
      '{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}',
      r"rows\.jsonl line 3: columns \['prompt'\], but .* line 1 has",
    ),
  ],
)
def test_bad_lines(text, match, tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text(text)
  with pytest.raises(ValueError, match=match):
    sources.jsonl(path=str(path))


def test_bad_arguments(tmp_path):
  path = write(tmp_path / 'rows.jsonl', ROWS)
  with pytest.raises(ValueError, match=r"line 1: no column 'q' \(it has \['answer'"):
    sources.jsonl(path=path, columns=dict(prompt='q'))
  with pytest.raises(ValueError, match=r"split='\[3\]'"):
    sources.jsonl(path=path, split='[3]')
  with pytest.raises(ValueError, match='leaves none of 10 rows'):
    sources.jsonl(path=path, split='[10:]')
  with pytest.raises(
    ValueError, match="split='valid', and no row has a column 'split'"
  ):
    sources.jsonl(path=path, split='valid')
  with pytest.raises(ValueError, match='needs chat=True'):
    sources.jsonl(path=path, system='x')
  with pytest.raises(ValueError, match='data set is empty'):
    sources.memory(records=[])
  with pytest.raises(ValueError, match='memory row 1: expected a mapping'):
    sources.memory(records=[{}, 3])
  with pytest.raises(FileNotFoundError):
    sources.jsonl(path=str(tmp_path / 'none.jsonl'))
  broken = tmp_path / 'broken.jsonl.gz'
  broken.write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-20])
  with pytest.raises(ValueError, match='broken gzip'):
    sources.jsonl(path=str(broken))


def test_real_gsm8k():
  try:
    path = paths.resolve('data://gsm8k_train.jsonl.gz')
  except FileNotFoundError as error:
    pytest.skip(str(error))
  columns = dict(prompt='question', completion='answer')
  source = sources.jsonl(path=str(path), columns=columns, chat=True)
  assert len(source) == 7473
  assert source[0]['completion'][0]['content'].endswith('#### 72')


def test_tfds_columns_and_errors(tmp_path):
  path = write(tmp_path / 'rows.jsonl', ROWS)
  folder = str(tmp_path / 'tfds')
  tfds_builder.build(splits=dict(train=path), name='my_rows', data_dir=folder)
  source = sources.tfds(
    dataset='my_rows', data_dir=folder, columns=dict(prompt='question'), chat=True
  )
  assert source[2]['prompt'] == [dict(role='user', content='q2 é')]
  with pytest.raises(ValueError, match="no column 'nope'"):
    sources.tfds(dataset='my_rows', data_dir=folder, columns=dict(prompt='nope'))
  with pytest.raises(ValueError, match="split='valid' of 'my_rows'"):
    sources.tfds(dataset='my_rows', split='valid', data_dir=folder)
  with pytest.raises(ValueError, match='near names: my_rows'):
    sources.tfds(dataset='my_row', data_dir=folder)
  with pytest.raises(ValueError, match='near names: gsm8k'):
    sources.tfds(dataset='gsm8kk', data_dir=folder)


def test_tfds_catalogue_without_tensorflow():
  library = pytest.importorskip('tensorflow_datasets')
  catalogue = sources._tfds_catalogue(library)
  # The three ways in which TFDS lays its catalogue out.
  assert catalogue['gsm8k'].endswith('.text.gsm8k')
  assert catalogue['imdb_reviews'].endswith('imdb_reviews_dataset_builder')
  assert {'glue', 'squad', 'cnn_dailymail', 'wikipedia'} <= set(catalogue)
  assert not {'load', 'dataset_builder', '__init__'} & set(catalogue)


def test_plain_values():
  assert sources.plain(b'\xc3\xa9') == 'é'
  assert sources.plain(np.array([b'a', b'b'], object)) == ['a', 'b']
  assert sources.plain(np.int64(3)) == 3
  columns = dict(role=np.array([b'user'], object), content=np.array([b'hi'], object))
  assert sources.plain(columns) == [dict(role='user', content='hi')]
  assert sources.plain(dict(a=np.float64(1.5))) == dict(a=1.5)


def world(*records):
  return Environment(records, lambda record, transcript: None)


def test_answers_are_an_environments_prompts_with_completions():
  chat = [{'role': 'user', 'content': '1 + 1?'}]
  rows = sources.answers(
    environment=world({'id': 'a', 'prompt': chat, 'answer': 2, 'solution': '{1} + 1'}),
    completion='{solution}\n\\boxed{{answer}}',
  )
  (row,) = rows
  assert (row['id'], row['prompt']) == ('a', chat)
  said = {'role': 'assistant', 'content': '{1} + 1\n\\boxed{2}'}
  assert row['completion'] == [said]
  record = {'prompt': chat, 'answer': 0}
  (row,) = sources.answers(environment=world(record))
  assert row['completion'][0]['content'] == '0'
  assert 'completion' not in record


@pytest.mark.parametrize(
  ('completion', 'message'),
  [
    ('5', "completion='5' must name a column"),
    ('{reply}', "prompt 'a' has no 'reply', only .'id', 'prompt'."),
    ('{answer}', "prompt 'a' has no 'answer'"),
  ],
)
def test_answers_that_are_not_there_are_named(completion, message):
  record = {'id': 'a', 'prompt': 'x', 'answer': None}
  with pytest.raises(ValueError, match=message) as error:
    sources.answers(environment=world(record), completion=completion)
  assert '\n' not in str(error.value)


def test_answers_come_from_a_config_whose_mistakes_are_named():
  section = dict(name='countdown', size=3, numbers=3, part='train')
  values = config.expand_section(
    'source', dict(name='answers', environment=section), 'config.source'
  )
  assert values['environment']['use'] == 'all'  # a default, written out
  rows = config.call('source', values)
  assert [row['completion'][0]['content'] for row in rows] == [
    row['answer'] for row in rows
  ]
  section['numbrs'] = 2
  with pytest.raises(config.ConfigError, match=r'source\.environment\.numbrs=2'):
    config.expand_section('source', dict(name='answers', environment=section), 'source')
