"""JSONL → ArrayRecord → the same records, by name, without TensorFlow."""

import json
import subprocess
import sys

import pytest

from educe import paths
from educe.data import pipeline, sources, tfds_builder, tokenizer


def write(path, rows):
  path.write_text('\n'.join(json.dumps(row) for row in rows))
  return str(path)


def test_all_kinds_of_columns_come_back(tmp_path):
  rows = [
    dict(
      prompt=f'p{i} é\n',
      n=i,
      score=i / 2 if i else 0,
      ok=bool(i % 2),
      tags=['a', 'b'][: i % 3],
      never=[],
      messages=[dict(role='user', content='hi'), dict(role='assistant', content='')],
    )
    for i in range(30)
  ]
  path = write(tmp_path / 'rows.jsonl', rows)
  target = tfds_builder.build(
    splits=dict(train=path, test=path), name='kinds', data_dir=str(tmp_path / 'd')
  )
  assert target == tmp_path / 'd' / 'kinds' / '1.0.0'
  assert list(target.glob('*.array_record*'))
  for split in ('train', 'test'):
    source = sources.tfds(dataset='kinds', split=split, data_dir=str(tmp_path / 'd'))
    assert list(source) == rows  # in order


def test_real_gsm8k_by_name(tmp_path):
  try:
    path = str(paths.resolve('data://gsm8k_test.jsonl.gz'))
  except FileNotFoundError as error:
    pytest.skip(str(error))
  tfds_builder.build(splits=dict(test=path), name='gsm8k_jsonl', data_dir=str(tmp_path))
  source = sources.tfds(dataset='gsm8k_jsonl', split='test', data_dir=str(tmp_path))
  assert list(source) == list(sources.jsonl(path=path))
  part = sources.tfds(
    dataset='gsm8k_jsonl', split='test[10:20]', data_dir=str(tmp_path)
  )
  assert list(part) == source[10:20]


def test_read_by_grain_workers(tmp_path):
  rows = [dict(prompt=f'p{i}', completion=f'c{i}') for i in range(12)]
  path = write(tmp_path / 'rows.jsonl', rows)
  tfds_builder.build(splits=dict(train=path), name='rows', data_dir=str(tmp_path))
  streams = []
  for source, workers in (
    (sources.tfds(dataset='rows', data_dir=str(tmp_path)), 2),
    (sources.memory(records=rows), 0),
  ):
    batches = pipeline.make(
      source,
      tokenizer.load(path='byte'),
      batch_size=4,
      max_length=16,
      epochs=1,
      workers=workers,
    )
    streams.append([batch['tokens'].tolist() for batch in batches])
    batches.close()
  assert streams[0] == streams[1]


def test_tensorflow_is_never_imported(tmp_path):
  path = write(tmp_path / 'rows.jsonl', [dict(text='a')])
  code = f"""
from educe.data import sources, tfds_builder
folder = {str(tmp_path)!r}
tfds_builder.build(splits=dict(train={path!r}), name='a', data_dir=folder)
assert sources.tfds(dataset='a', data_dir=folder)[0] == dict(text='a')
"""
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  ('rows', 'match'),
  [
    ([], 'data set is empty'),
    ([dict(a=1), dict(b=1)], r"line 2: columns \['b'\], but rows before it have"),
    ([dict(a=1), dict(a='x')], "line 2: column 'a' is text, but int"),
    ([dict(a=[1]), dict(a=['x'])], "line 2: column 'a' is text, but int"),
    ([dict(a=None)], "line 1: column 'a' is None; supported are"),
    ([dict(a=[[1]])], 'list of lists'),
    ([dict(a=[dict(b=1)])], 'supported are'),
  ],
)
def test_rows_that_cannot_be_stored(rows, match, tmp_path):
  path = write(tmp_path / 'rows.jsonl', rows)
  with pytest.raises(ValueError, match=match):
    tfds_builder.build(splits=dict(train=path), name='bad', data_dir=str(tmp_path))
  assert not (tmp_path / 'bad').exists()


def test_names(tmp_path):
  path = write(tmp_path / 'rows.jsonl', [dict(text='a')])
  with pytest.raises(ValueError, match='small letters'):
    tfds_builder.build(splits=dict(train=path), name='No/', data_dir=str(tmp_path))
  tfds_builder.build(splits=dict(train=path), name='ok', data_dir=str(tmp_path))
  with pytest.raises(FileExistsError, match='already built'):
    tfds_builder.build(splits=dict(train=path), name='ok', data_dir=str(tmp_path))
