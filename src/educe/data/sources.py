"""Where records come from: random-access sequences of dicts, picklable for workers.

  jsonl(path='data://gsm8k_train.jsonl.gz', columns=dict(prompt='question', …))
  tfds(dataset='gsm8k', split='train')
  answers(environment=dict(name='reasoning_gym', task='chain_sum', …))
  memory(records=[…])

`columns` gives a record the names that the rest of educe knows (`messages`, `prompt`,
`completion`, `text`, `answer` …). A value is the name of one of the data's columns, or
text with columns in braces: `completion='{rationale}\\n#### {answer}'`. Columns that
are not mentioned stay as they are.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import gzip
import hashlib
import importlib
import json
import pathlib
import re
import string
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from educe import paths
from educe.types import Environment

_COLUMN = re.compile(r'\{(\w+(?:\.\w+)*)\}')
# A record of one data set must not have these where its first record does not.
KNOWN = ('messages', 'prompt', 'completion', 'text', 'chosen', 'rejected', 'answer')


@dataclasses.dataclass(frozen=True)
class Source(Sequence[dict[str, Any]]):
  """Rows with their columns renamed, and strings wrapped into messages if asked."""

  rows: Any  # random access, picklable
  name: str  # for error messages
  columns: Mapping[str, str] | None = None
  chat: bool = False
  system: str | None = None
  fingerprint: str | None = None  # changes when the data do, where that is known

  def __post_init__(self) -> None:
    if not len(self.rows):
      raise ValueError(f'{self.name}: data set is empty')
    if self.system is not None and not self.chat:
      raise ValueError('system is a message of a chat: it needs chat=True')

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    index = range(len(self))[index]
    record = dict(self.rows[index])
    if self.columns:
      record = _rename(record, self.columns, self.where(index))
    return _to_chat(record, self.system) if self.chat else record

  def where(self, index: int) -> str:
    """A record's place, for people: file and line if there is one."""
    if isinstance(self.rows, _Lines):
      return f'{self.name} line {self.rows.numbers[index]}'
    return f'{self.name} row {index}'


def memory(
  *,
  records: Sequence[Mapping[str, Any]],
  columns: Mapping[str, str] | None = None,
  chat: bool = False,
  system: str | None = None,
) -> Source:
  """Records that are already here."""
  source = Source(list(records), 'memory', columns, chat, system)
  _check(source, [f'memory row {i}' for i in range(len(source))])
  return source


def answers(*, environment: Environment, completion: str = '{answer}') -> Source:
  """An environment's prompts, each with the `completion` that its answer makes, for SFT.

  completion: what the assistant says; {column} stands for a column of the prompt's
    record: its `answer`, math_qa's worked `solution`, and {metadata.expression} for the
    `expression` in its `metadata`

  Raises ValueError for a completion without a column, and for records without an answer.
  """
  pieces = _COLUMN.split(completion)  # the columns are at the odd places
  if len(pieces) == 1:
    raise ValueError(f'completion={completion!r} must name a column, as {{answer}}')
  rows = []
  for index, record in enumerate(environment.prompts):
    said = list(pieces)
    for place in range(1, len(said), 2):
      said[place] = _column(record, said[place])
      if said[place] is None:
        raise ValueError(
          f'completion={completion!r}: prompt {record.get("id", index)!r} has no '
          f'{pieces[place]!r}, only {sorted(k for k, v in record.items() if v is not None)}'
        )
    text = ''.join(map(str, said))
    rows.append({**record, 'completion': [{'role': 'assistant', 'content': text}]})
  return memory(records=rows)


def _column(record: Mapping[str, Any], path: str) -> Any:
  value: Any = record
  for key in path.split('.'):
    value = value.get(key) if isinstance(value, Mapping) else None
  return value


def jsonl(
  *,
  path: str,
  split: str | None = None,
  columns: Mapping[str, str] | None = None,
  chat: bool = False,
  system: str | None = None,
) -> Source:
  """One JSON object a line; .gz is decompressed. Held in memory (a larger set: tfds).

  split: '[:90%]', '[100:200]': these rows. 'valid': the rows whose own column `split`
    is 'valid'. 'valid[:50]': both.
  columns, chat, system: see the top of this file; chat=True wraps prompt and completion
    strings into messages (after `system`, if given).
  Raises ValueError naming file and line for what is not a JSON object or lacks a
  column, and for a file or split without rows.
  """
  file = paths.resolve(path)
  lines = _read_lines(file)
  rows = list(parse(lines, path))
  if not rows:
    raise ValueError(f'{path}: data set is empty')
  kept = _split_rows(rows, split, path)
  digest = hashlib.blake2b(b'\n'.join(lines), digest_size=8).hexdigest()
  where = _Lines(str(file), np.array([number for number, _ in kept]), digest)
  source = Source(where, path, columns, chat, system, digest)
  shaped = Source([row for _, row in kept], path, columns, chat, system)
  _check(shaped, [f'{path} line {number}' for number, _ in kept])
  return source


def parse(lines: Iterable[bytes], path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """(line number from 1, object) of each line of JSON that is not blank."""
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{path} line {number}: not JSON ({error})') from None
    if not isinstance(row, dict):
      raise ValueError(f'{path} line {number}: expected an object, got {row!r:.60}')
    yield number, row


def tfds(
  *,
  dataset: str,
  split: str = 'train',
  data_dir: str | None = None,
  columns: Mapping[str, str] | None = None,
  chat: bool = False,
  system: str | None = None,
) -> Source:
  """Any TensorFlow Datasets name, read through `tfds.data_source`, without TensorFlow.

  dataset: its name, as in the TFDS catalogue ('gsm8k', 'c4/en:3.1.0'), or one built by
    `educe.data.tfds_builder`
  split: TFDS's own grammar ('train', 'train[:10%]')
  data_dir: where it is, or will be downloaded to (TFDS's default if None)
  """
  import tensorflow_datasets as library

  folder = None if data_dir is None else str(pathlib.Path(data_dir).expanduser())
  plain_name = re.split('[/:]', dataset)[0]
  catalogue = _tfds_catalogue(library)
  if plain_name in catalogue:
    importlib.import_module(catalogue[plain_name])  # registers it
  try:
    rows = library.data_source(dataset, split=split, data_dir=folder)
  except library.core.DatasetNotFoundError:
    known = list(catalogue)
    if folder and pathlib.Path(folder).is_dir():
      known += [p.name for p in pathlib.Path(folder).iterdir() if p.is_dir()]
    near = ', '.join(difflib.get_close_matches(plain_name, known)) or 'none'
    where = folder or 'the default data_dir'
    raise ValueError(
      f'tfds dataset={dataset!r}: no such data set in {where} or the TFDS catalogue; '
      f'near names: {near}'
    ) from None
  except ValueError as error:
    if 'split' in str(error).lower():
      raise ValueError(f'tfds split={split!r} of {dataset!r}: {error}') from None
    raise
  source = Source(_Tfds(rows), f'{dataset}[{split}]', columns, chat, system)
  _check(Source([source.rows[0]], source.name, columns, chat, system), [source.name])
  return source


def _tfds_catalogue(library) -> dict[str, str]:
  """Name of each data set of the installed TFDS: the module that registers it.

  By file names, since TFDS lists its own catalogue only where TensorFlow is installed.
  """
  root = pathlib.Path(library.__file__).parent
  found = {}
  for file in root.glob('*/*.py'):
    found[file.stem] = f'{library.__name__}.{file.parent.name}.{file.stem}'
  for file in root.glob('*/*/__init__.py'):
    package = f'{library.__name__}.{file.parent.parent.name}.{file.parent.name}'
    found[file.parent.name] = package
  for file in root.glob('datasets/*/*_dataset_builder.py'):
    package = f'{library.__name__}.datasets.{file.parent.name}'
    found[file.parent.name] = f'{package}.{file.stem}'
  internal = ('core', 'scripts', 'testing', 'proto')
  return {
    name: module
    for name, module in found.items()
    if module.split('.')[1] not in internal and not name.endswith(('_test', '__init__'))
  }


@dataclasses.dataclass(frozen=True)
class _Lines:
  """Some lines of a file, read again in each process rather than sent to it."""

  file: str
  numbers: np.ndarray  # from 1
  digest: str

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return json.loads(self._lines[self.numbers[index] - 1])

  @functools.cached_property
  def _lines(self) -> list[bytes]:
    lines = _read_lines(pathlib.Path(self.file))
    if hashlib.blake2b(b'\n'.join(lines), digest_size=8).hexdigest() != self.digest:
      raise ValueError(f'{self.file}: changed while it was being read')
    return lines

  def __getstate__(self) -> dict[str, Any]:
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class _Tfds:
  """TFDS rows as plain Python: text, numbers, lists, messages."""

  rows: Any

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {name: plain(value) for name, value in self.rows[index].items()}


def plain(value: Any) -> Any:
  """Bytes to text, arrays to lists; a dict of equal columns with `role` to messages."""
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, np.ndarray | np.generic):
    return plain(value.tolist())
  if isinstance(value, Mapping):
    value = {name: plain(inner) for name, inner in value.items()}
    if 'role' in value and all(isinstance(inner, list) for inner in value.values()):
      return [
        dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)
      ]
    return value
  if isinstance(value, Sequence) and not isinstance(value, str):
    return [plain(inner) for inner in value]
  return value


def _read_lines(file: pathlib.Path) -> list[bytes]:
  data = file.read_bytes()
  if data[:2] == b'\x1f\x8b':
    try:
      data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
      raise ValueError(f'{file}: broken gzip file ({error})') from None
  return data.split(b'\n')


def _split_rows(rows, split, path):
  """Rows that `split` names; rows are (line number, record)."""
  if split is None:
    return rows
  match = re.fullmatch(r'([^\[\]]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?', split)
  if match is None:
    raise ValueError(f"split={split!r}: expected '[:90%]', 'valid' or 'valid[:50]'")
  name, start, stop = match.groups()
  if name:
    names = sorted({str(row.get('split')) for _, row in rows})
    rows = [(number, row) for number, row in rows if row.get('split') == name]
    if not rows and names == ['None']:
      raise ValueError(
        f"{path}: split={name!r}, and no row has a column 'split'; name rows by their "
        "number, as '[:90%]', or leave it out"
      )
    if not rows:
      raise ValueError(f'{path}: no row has split={name!r} (there are {names})')

  def bound(text):
    if text is None or not text.endswith('%'):
      return None if text is None else int(text)
    return len(rows) * int(text[:-1]) // 100

  kept = rows[bound(start) : bound(stop)]
  if not kept:
    raise ValueError(f'{path}: split={split!r} leaves none of {len(rows)} rows')
  return kept


def _check(source: Source, names: Sequence[str]) -> None:
  """Every record has what the first has, before any device is touched."""
  first: set[str] = set()
  for index, where in enumerate(names):
    record = source.rows[index]
    if not isinstance(record, Mapping):
      raise ValueError(f'{where}: expected a mapping, got {record!r:.60}')
    if source.columns:
      record = _rename(dict(record), source.columns, where)
    here = {name for name in KNOWN if record.get(name) is not None}
    first = first if index else here
    if here != first:
      raise ValueError(
        f'{where}: columns {sorted(here)}, but {names[0]} has {sorted(first)}; '
        'every record of a data set needs the same'
      )


def _rename(record, columns, where):
  fields = {
    new: [f for _, f, _, _ in string.Formatter().parse(old) if f is not None] or [old]
    for new, old in columns.items()
  }
  used = {name for names in fields.values() for name in names}
  missing = sorted(name for name in used if name not in record)
  if missing:
    raise ValueError(f'{where}: no column {missing[0]!r} (it has {sorted(record)})')
  result = {name: value for name, value in record.items() if name not in used}
  for new, old in columns.items():
    # Never str.format: a field such as {x.__class__} must stay a (missing) column.
    parts = string.Formatter().parse(old) if '{' in old else ()
    result[new] = (
      ''.join(text + ('' if f is None else str(record[f])) for text, f, _, _ in parts)
      if '{' in old
      else record[old]
    )
  return result


def _to_chat(record, system):
  if isinstance(record.get('prompt'), str):
    opening = [] if system is None else [dict(role='system', content=system)]
    record['prompt'] = [*opening, dict(role='user', content=record['prompt'])]
  for name in ('completion', 'chosen', 'rejected'):
    if isinstance(record.get(name), str):
      record[name] = [dict(role='assistant', content=record[name])]
  return record
