"""JSONL to ArrayRecord, the file format that Grain reads at random, through TFDS.

  build(splits=dict(train='data://gsm8k_train.jsonl.gz'), name='gsm8k_jsonl',
        data_dir='~/data')
  sources.tfds(dataset='gsm8k_jsonl', split='train', data_dir='~/data')

For sets that do not fit in memory, or that other programs should read by name. Works
without TensorFlow. Rows keep their order.
"""

from __future__ import annotations

import gzip
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from educe import paths
from educe.data import sources

VERSION = '1.0.0'


def build(*, splits: Mapping[str, str], name: str, data_dir: str) -> pathlib.Path:
  """Writes `data_dir/name/1.0.0`; returns that folder.

  splits: name of each split and the JSONL (or .gz) file that it is made from. Columns
    are text, numbers, truth values, lists of these, or messages (lists of objects with
    text in them); their types are read off all rows, and all rows have the same.
  Raises ValueError naming file and line for what is none of these, and FileExistsError
  if the folder is there already.
  """
  import tensorflow_datasets as library

  if not re.fullmatch('[a-z][a-z0-9_]*', name):
    raise ValueError(f'name={name!r}: expected small letters, digits and underscores')
  folder = pathlib.Path(data_dir).expanduser()
  target = folder / name / VERSION
  if target.exists():
    raise FileExistsError(f'{target}: already built; remove it or choose another name')
  types: dict[str, str] = {}
  for path in splits.values():
    _merge_types(types, path)
  features = {column: _feature(kind, library) for column, kind in types.items()}

  class Rows(  # type: ignore[call-arg]
    library.core.GeneratorBasedBuilder, skip_registration=True
  ):
    # Nothing is downloaded, so no list of checksums beside this file is looked for.
    url_infos = None

    def _info(self):
      return library.core.DatasetInfo(
        builder=self,
        description=f'Built from {", ".join(splits.values())}.',
        features=library.features.FeaturesDict(features),
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager):
      del dl_manager
      return {split: self._generate_examples(path) for split, path in splits.items()}

    def _generate_examples(self, path):
      for index, (_, row) in enumerate(_rows(path)):
        yield index, row

  Rows.name = name
  Rows.VERSION = library.core.Version(VERSION)
  library.disable_progress_bar()
  Rows(data_dir=str(folder), file_format='array_record').download_and_prepare()
  return target


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """(line number, row), one at a time: the file may be larger than memory."""
  file = paths.resolve(path)
  with file.open('rb') as plain:
    packed = plain.read(2) == b'\x1f\x8b'
  with gzip.open(file, 'rb') if packed else file.open('rb') as lines:
    yield from sources.parse(lines, path)


def _merge_types(types: dict[str, str], path: str) -> None:
  empty = True
  for number, row in _rows(path):
    empty = False
    if types and set(row) != set(types):
      raise ValueError(
        f'{path} line {number}: columns {sorted(row)}, but rows before it have '
        f'{sorted(types)}; every row needs the same'
      )
    for column, value in row.items():
      where = f'{path} line {number}: column {column!r}'
      types[column] = _merge(types.get(column, 'unknown'), _kind(value, where), where)
  if empty:
    raise ValueError(f'{path}: data set is empty')


def _kind(value: Any, where: str) -> str:
  """'text', 'int', …; 'list of …'; 'unknown' for an empty list."""
  for kind, python in (('text', str), ('bool', bool), ('int', int), ('float', float)):
    if isinstance(value, python):
      return kind
  if isinstance(value, list):
    inner = 'unknown'
    for entry in value:
      inner = _merge(inner, _kind(entry, where), where)
    if inner.startswith('list of'):
      raise ValueError(f'{where} is a list of lists; supported are flat lists')
    return f'list of {inner}'
  if isinstance(value, dict) and value and {type(v) for v in value.values()} == {str}:
    return 'object of ' + '|'.join(sorted(value))
  raise ValueError(
    f'{where} is {value!r:.60}; supported are text, numbers, truth values, lists of '
    'these and messages'
  )


def _merge(old: str, new: str, where: str) -> str:
  if old in ('unknown', new) or new == 'unknown':
    return new if old == 'unknown' else old
  if {old, new} == {'int', 'float'}:
    return 'float'
  if old.startswith('list of ') and new.startswith('list of '):
    return 'list of ' + _merge(old[8:], new[8:], where)
  raise ValueError(f'{where} is {new}, but {old} in rows before it')


def _feature(kind: str, library: Any) -> Any:
  features = library.features
  if kind.startswith('list of '):
    return features.Sequence(_feature(kind[8:], library))
  if kind.startswith('object of '):
    return {name: features.Text() for name in kind[10:].split('|')}
  if kind in ('text', 'unknown'):  # unknown: lists that are empty in every row
    return features.Text()
  return features.Scalar(
    dtype={'bool': np.bool_, 'int': np.int64, 'float': np.float64}[kind]
  )
