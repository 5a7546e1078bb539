"""Records to batches: Grain pipelines whose position is one small dict.

The stream of batches is a function of (source, tokenizer, arguments) alone: not of the
number of workers, and not of where the run was interrupted. Three things hold that up:

- records are shuffled by index, with a seed of their own each epoch, and dealt out to
  the processes: p of P reads the p-th, (p+P)-th … record of the global order;
- workers only tokenise; dropping, packing and batching happen after them, in order;
- the state is the number of records read (and, when packing, which row of the open set
  comes next), so it also survives another number of workers.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import weakref
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from educe.data import chat, packing, pairs, preference_rows, reading
from educe.data import tokenizer as tokenizer_lib
from educe.spelling import near
from educe.types import StateMismatch

# Records looked at when a pipeline is made, so that errors come before device work. Of
# preferences more (2 ms each): a run that stopped at a bad pair cannot go on with it
# corrected, for then it is of other data.
_PEEK, _PEEK_PREFERENCES = 8, 5000
# Rows kept open by first-fit. On GSM8K chats in SmolLM2's vocabulary rows are 90 % full
# at 512 tokens, 95 % at 1024 and 98 % at 2048; twice as many bins add half a point.
_BINS = 64
# Column, and why its values must differ. Of pairs the first record tells.
_LABELLED = {
  'unpaired': (
    'label',
    'unpaired preferences need both desirable and undesirable completions',
  ),
  'rated': ('rating', 'from equal ones nothing can be learned'),
  'steps': ('labels', 'from equal ones nothing can be learned'),
}


def make(
  source: Sequence[Any],
  tokenizer: tokenizer_lib.Tokenizer,
  process_index: int = 0,
  process_count: int = 1,
  learns: bool = True,
  looks: bool = True,
  *,
  batch_size: int,
  max_length: int,
  records: str = 'documents',
  packing: bool = False,
  shuffle: bool = True,
  seed: int = 0,
  epochs: int | None = None,
  workers: int = 0,
  overlong: str = 'drop',
  max_prompt_length: int | None = None,
  drop_remainder: bool = True,
) -> Batches:
  """An iterator of dicts of [B, T] arrays: tokens, mask, segments, positions, ids.

  source: random access to records (see `sources`)
  batch_size: rows; of pairs and unpaired records, groups of two rows (64 pairs are 128
    rows). In a config those of the whole batch, however many processes read it
  max_length: T, tokens a row
  records: 'documents', what `chat.encode_record` accepts; or 'pairs', 'unpaired', 'rated',
    'steps', what `pairs.encode` does, in rows as `preference_rows` lays them out
  packing: several documents a row, instead of one and padding
  seed: of the order of records (each epoch has its own order) and of packed rows
  epochs: times through the data; None is for ever. With several processes it must be
    None: they would run out at different steps, for they drop different records
  workers: processes that tokenise; 0 does it here, while the step before runs
  overlong: 'drop' or 'truncate' what exceeds max_length; `.counts()` tells how many. Of a
    document the end is cut off; of preferences see `preference_rows.fit`
  max_prompt_length: tokens of a prompt's end that truncated preferences keep; None is half
    of max_length
  drop_remainder: leave out the last, incomplete batch; False fills it with padding rows
  process_index, process_count: which share of the records is read here (`shards`)
  learns: whether judgements are to be learned from, and so must differ
  looks: whether the first records are tried now

  Raises ValueError for arguments that cannot work, an empty source, and, if it looks, the
  first 8 records (of preferences 5,000) if they cannot be encoded.
  """
  _check(locals())
  cut: dict[str, Any] = dict(max_length=max_length, overlong=overlong)
  if records != 'documents':
    cut |= dict(max_prompt_length=max_prompt_length, bos_id=tokenizer.bos_id)
  encode = functools.partial(
    _encode, source=source, tokenizer=tokenizer, records=records, cut=cut
  )
  if records == 'pairs':
    encode = functools.partial(encode, rated='labels' in encode(0))
  peek = _PEEK if records == 'documents' else _PEEK_PREFERENCES
  for index in range(min(peek, len(source)) if looks else 0):
    encode(index)
  if looks and learns and records in _LABELLED:
    _check_labels(source, *_LABELLED[records])
  read = reading.Records(
    functools.partial(
      reading.in_order,
      count=len(source),
      encode=encode,
      order=(shuffle, seed, epochs, process_index, process_count),
    ),
    workers=workers,
    limit=-(-len(source) // process_count),
    hint=f'max_length={max_length}, overlong={overlong!r}',
  )
  shape = dict(max_length=max_length, pad_id=tokenizer.pad_id)
  rows, together = _rows(read, records, packing, shape, seed)
  batches = rows.batch(batch_size, drop_remainder=drop_remainder, batch_fn=together)
  fill = functools.partial(_fill_rows, batch_size=batch_size, pad_id=tokenizer.pad_id)
  if not drop_remainder:
    batches = batches.map(functools.partial(fill, records=records))
  if records != 'documents':
    batches = batches.map(
      functools.partial(preference_rows.rows, records=records, pad_id=tokenizer.pad_id)
    )
  rules = hashlib.blake2b(digest_size=8)
  rules.update(tokenizer.definition.encode())
  rules.update(repr((tokenizer.chat_template, tokenizer.eos_ids)).encode())
  fingerprint = dict(
    records=len(source),
    data=getattr(source, 'fingerprint', None),
    tokenizer=rules.hexdigest(),
    batch_size=batch_size,
    max_length=max_length,
    records_as=records,
    packing=packing,
    shuffle=shuffle,
    seed=seed,
    overlong=overlong,
    max_prompt_length=max_prompt_length,
    process_index=process_index,
    process_count=process_count,
  )
  return Batches(iter(batches), read, fingerprint, encode, tokenizer.pad_id)


# `packing` is a keyword of make(): the module is used through these.
def _rows(read, records, packed, shape, seed):
  """(what a batch has B of, what makes them one; None: their arrays are stacked)."""
  if packed:
    return packing.pack(read, bins=_BINS, seed=seed, **shape), None
  if records == 'documents':
    return read, functools.partial(packing.pad, **shape)
  return read.map(functools.partial(preference_rows.pad, **shape)), None


def _fill_rows(batch, records, batch_size, pad_id):
  fill = packing.fill_rows if records == 'documents' else preference_rows.fill_rows
  return fill(batch, batch_size=batch_size, pad_id=pad_id)


def read(data: Batches) -> tuple[dict[str, Any], dict[str, Any]]:
  """The next rows, and what is logged of them: `data/ids_crc32`, a fingerprint of which
  records they hold, in order, so that two runs can be seen to have read the same; and the
  pipeline's own counts."""
  rows = next(data)
  ids = np.ascontiguousarray(rows['ids'])
  counts = {f'data/{name}': count for name, count in data.counts().items()}
  return rows, {'data/ids_crc32': zlib.crc32(ids.tobytes()), **counts}


class Batches(grain.DatasetIterator):
  """The iterator that `make` returns; `close()` it to stop its workers.

  get_state() → a JSON-able dict, set_state(state) continues exactly after the batch
  that was last returned when it was taken. Works with `grain.checkpoint`.
  """

  def __init__(self, parent, read: reading.Records, fingerprint, encode, pad_id: int):
    super().__init__(parent)
    self.records: str = fingerprint['records_as']
    self.group: int = preference_rows.ROWS[self.records]  # rows that a record takes
    self.batch_size: int = fingerprint['batch_size'] * self.group  # rows
    self.max_length: int = fingerprint['max_length']
    self.packing: bool = fingerprint['packing']
    self.pad_id = pad_id
    single = self.records in ('unpaired', 'rated')
    self.has_labels: bool = encode.keywords.get('rated', single)
    self.fingerprint: dict[str, Any] = fingerprint
    self._encode = encode
    self._records = read
    self._returned = 0
    # At the interpreter's end garbage collection comes too late to close workers.
    atexit.register(_close, weakref.ref(self))

  def __next__(self):
    try:
      batch = next(self._parent)
    except StopIteration:
      if not self._returned:
        raise ValueError(
          f'no batch: {self.counts()["records"]} records gave fewer than '
          f'batch_size={self.fingerprint["batch_size"]} rows; lower batch_size, '
          'or set drop_remainder=False'
        ) from None
      raise
    self._returned += 1
    return batch

  @contextlib.contextmanager
  def holding(self) -> Iterator[None]:
    """If the block fails, the batch that it read is the next one again."""
    before = self.get_state()
    try:
      yield
    except (ValueError, OSError):
      self.set_state(before)
      raise

  def rows_of(self, record: int) -> dict[str, np.ndarray] | None:
    """The `[G, T]` rows of a record of preferences; None if it is dropped."""
    document = self._encode(record)
    if document['fate'] not in (packing.KEPT, packing.TRUNCATED):
      return None
    return preference_rows.pad(document, max_length=self.max_length, pad_id=self.pad_id)

  def counts(self) -> dict[str, int]:
    """Records read so far by this process, and what became of those too long.

    records · truncated · dropped_overlong · dropped_masked (nothing left to train on)
    """
    return dict(self._records.live.counts)

  def get_state(self) -> dict[str, Any]:
    return dict(
      fingerprint=dict(self.fingerprint),
      returned=self._returned,
      parent=self._parent.get_state(),
    )

  def set_state(self, state: dict[str, Any]) -> None:
    """Raises StateMismatch if the state is of another data set or other arguments."""
    theirs = state['fingerprint']
    for name, ours in self.fingerprint.items():
      if theirs.get(name) != ours:
        raise StateMismatch(
          f'data state was saved with {name}={theirs.get(name)!r} but this pipeline '
          f'has {name}={ours!r}: the run cannot continue exactly; restore the old '
          'value or start a new run'
        )
    self._returned = state['returned']
    self._parent.set_state(state['parent'])

  def __str__(self) -> str:
    return 'Batches'


def _close(reference: weakref.ref[Batches]) -> None:
  batches = reference()
  if batches is not None:
    batches.close()


def _encode(index, source, tokenizer, records, cut, rated=None):
  where = getattr(source, 'where', 'record {}'.format)
  try:
    if records == 'documents':
      document = chat.encode_record(tokenizer, source[index])
      return packing.fit(document, index, **cut)
    said = pairs.encode(tokenizer, source[index], records)
  except ValueError as error:
    raise ValueError(f'{where(index)}: {error}') from None
  if rated not in (None, said.labels is not None):
    raise ValueError(
      f'{where(index)}: {"not rated" if rated else "rated"}, unlike {where(0)}; rate '
      'every pair of a data set, or none'
    )
  return preference_rows.fit(said, index, **cut)


def _check(a: dict[str, Any]) -> None:
  """Arguments of `make`."""
  for name, low in (('batch_size', 1), ('max_length', 2), ('workers', 0), ('seed', 0)):
    if a[name] < low:
      raise ValueError(f'{name}={a[name]}: must be at least {low}')
  if a['epochs'] is not None and a['epochs'] < 1:
    raise ValueError(f'epochs={a["epochs"]}: must be at least 1, or None (for ever)')
  if a['overlong'] not in ('drop', 'truncate'):
    raise ValueError(f"overlong={a['overlong']!r}: must be 'drop' or 'truncate'")
  if not 0 <= a['process_index'] < a['process_count']:
    raise ValueError(
      f'process_index={a["process_index"]}: must be in 0..process_count−1 '
      f'(process_count={a["process_count"]})'
    )
  if a['epochs'] is not None and a['process_count'] > 1:
    raise ValueError(
      f'epochs={a["epochs"]} with process_count={a["process_count"]}: processes would '
      'run out of data at different steps; leave epochs=None and let the number of '
      'steps end the run'
    )
  if not len(a['source']):
    raise ValueError('data set is empty')
  _check_records(a)
  if len(a['source']) < a['process_count']:
    raise ValueError(
      f'{len(a["source"])} records are too few for {a["process_count"]} processes'
    )


def _check_records(a: dict[str, Any]) -> None:
  records, longest = a['records'], a['max_prompt_length']
  if records not in preference_rows.ROWS:
    hint = near(records, preference_rows.ROWS)
    raise ValueError(f'records={records!r} is not known{hint}')
  if longest is not None and not 1 <= longest < a['max_length']:
    raise ValueError(
      f'max_prompt_length={longest} must be in 1..max_length−1={a["max_length"] - 1}'
    )
  if longest is not None and (records == 'documents' or a['overlong'] == 'drop'):
    raise ValueError(
      f"max_prompt_length={longest} is of truncated preferences: set overlong='truncate' "
      'and records, or leave it out'
    )
  if a['packing'] and records != 'documents':
    raise ValueError(f'packing=True is of documents, not of records={records!r}')
  alone = a['batch_size'] < 2 or not a['drop_remainder']
  if records == 'unpaired' and alone:
    raise ValueError(
      f'batch_size={a["batch_size"]}, drop_remainder={a["drop_remainder"]}: each unpaired '
      'record needs another one in its batch: at least 2, and drop_remainder=True'
    )


def _check_labels(source, column: str, why: str) -> None:
  # Ends at the second kind of label: only a bad data set is read to its end.
  def labels():
    for i in range(len(source)):
      value = source[i].get(column)
      yield from value if isinstance(value, list | tuple) else [value]

  first = next(labels())
  if all(label == first for label in labels()):
    raise ValueError(f'{column}: {first} throughout the data set: {why}')
