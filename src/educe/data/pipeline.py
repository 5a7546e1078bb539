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
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import grain
from absl import flags

from educe.data import chat, packing
from educe.data import tokenizer as tokenizer_lib
from educe.types import StateMismatch

# Records looked at when a pipeline is made, so that errors come before device work.
_PEEK = 8
# Rows kept open by first-fit. On GSM8K chats in SmolLM2's vocabulary rows are 90 % full
# at 512 tokens, 95 % at 1024 and 98 % at 2048; twice as many bins add half a point.
_BINS = 64


def make(
  source: Sequence[Any],
  tokenizer: tokenizer_lib.Tokenizer,
  process_index: int = 0,
  process_count: int = 1,
  *,
  batch_size: int,
  max_length: int,
  packing: bool = False,
  shuffle: bool = True,
  seed: int = 0,
  epochs: int | None = None,
  workers: int = 0,
  overlong: str = 'drop',
  drop_remainder: bool = True,
) -> Batches:
  """An iterator of dicts of [B, T] arrays: tokens, mask, segments, positions, ids.

  source: random access to records (see `sources`); what `chat.encode_record` accepts
  batch_size: B, rows of this process
  max_length: T, tokens a row
  packing: several documents a row, instead of one and padding
  seed: of the order of records (each epoch has its own order) and of packed rows
  epochs: times through the data; None is for ever. With several processes it must be
    None: they would run out at different steps, for they drop different records
  workers: processes that tokenise; 0 does it in a thread of this one
  overlong: 'drop' or 'truncate' what exceeds max_length; `.counts()` tells how many
  drop_remainder: leave out the last, incomplete batch; False fills it with padding rows
  process_index, process_count: which share of the records is read here

  Raises ValueError for arguments that cannot work, an empty source, and the first
  records if they cannot be encoded.
  """
  _check(locals())
  for index in range(min(_PEEK, len(source))):
    _encode(index, source, tokenizer, max_length, overlong)
  records = _Records(
    functools.partial(
      _encoded_records,
      source=source,
      tokenizer=tokenizer,
      max_length=max_length,
      overlong=overlong,
      order=(shuffle, seed, epochs, process_index, process_count),
    ),
    workers=workers,
    limit=-(-len(source) // process_count),
    hint=f'max_length={max_length}, overlong={overlong!r}',
  )
  rows = _rows(records, packing, max_length, tokenizer.pad_id, seed)
  batches = rows.batch(batch_size, drop_remainder=drop_remainder)
  if not drop_remainder:
    batches = batches.map(
      functools.partial(_fill_rows, batch_size=batch_size, pad_id=tokenizer.pad_id)
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
    packing=packing,
    shuffle=shuffle,
    seed=seed,
    overlong=overlong,
    process_index=process_index,
    process_count=process_count,
  )
  return Batches(iter(batches), records, fingerprint)


# `packing` is a keyword of make(): the module is used through these.
def _rows(records, packed, max_length, pad_id, seed):
  if packed:
    return packing.pack(
      records, max_length=max_length, pad_id=pad_id, bins=_BINS, seed=seed
    )
  return records.map(
    functools.partial(packing.pad, max_length=max_length, pad_id=pad_id)
  )


def _fill_rows(batch, batch_size, pad_id):
  return packing.fill_rows(batch, batch_size=batch_size, pad_id=pad_id)


class Batches(grain.DatasetIterator):
  """The iterator that `make` returns; `close()` it to stop its workers.

  get_state() → a JSON-able dict, set_state(state) continues exactly after the batch
  that was last returned when it was taken. Works with `grain.checkpoint`.
  """

  def __init__(self, parent, records: _Records, fingerprint: dict[str, Any]):
    super().__init__(parent)
    self.batch_size: int = fingerprint['batch_size']
    self.packing: bool = fingerprint['packing']
    self._records = records
    self._fingerprint = fingerprint
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
          f'batch_size={self._fingerprint["batch_size"]} rows; lower batch_size, '
          'or set drop_remainder=False'
        ) from None
      raise
    self._returned += 1
    return batch

  def counts(self) -> dict[str, int]:
    """Records read so far by this process, and what became of those too long.

    records · truncated · dropped_overlong · dropped_masked (nothing left to train on)
    """
    return dict(self._records.live.counts)

  def get_state(self) -> dict[str, Any]:
    return dict(
      fingerprint=dict(self._fingerprint),
      returned=self._returned,
      parent=self._parent.get_state(),
    )

  def set_state(self, state: dict[str, Any]) -> None:
    """Raises StateMismatch if the state is of another data set or other arguments."""
    theirs = state['fingerprint']
    for name, ours in self._fingerprint.items():
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


class _Records(grain.IterDataset):
  """Documents that are kept, in order, counted; `live` is the iterator in use."""

  live: _RecordsIterator

  def __init__(self, documents, *, workers: int, limit: int, hint: str):
    super().__init__()
    self.documents = documents
    self.workers = workers
    self.limit = limit  # records an epoch, of this process
    self.hint = hint

  def __iter__(self):
    self.live = _RecordsIterator(self)
    return self.live

  def __str__(self) -> str:
    return 'Records'


class _RecordsIterator(grain.DatasetIterator):
  """Reads through workers from any position; the position is a count of records."""

  def __init__(self, dataset: _Records):
    super().__init__()
    self._dataset = dataset
    self._open: Any = None
    self.counts = dict(records=0, truncated=0, dropped_overlong=0, dropped_masked=0)

  def __next__(self):
    self._assert_not_closed()
    self.start_prefetch()
    for _ in range(self._dataset.limit):
      document = next(self._open)
      fate = document.pop('fate')
      self.counts['records'] += 1
      if fate == packing.TRUNCATED:
        self.counts['truncated'] += 1
      elif fate == packing.OVERLONG:
        self.counts['dropped_overlong'] += 1
      elif fate == packing.MASKED:
        self.counts['dropped_masked'] += 1
      if fate in (packing.KEPT, packing.TRUNCATED):
        return document
    raise ValueError(
      f'a whole epoch was dropped ({self.counts}; {self._dataset.hint}): raise '
      'max_length'
    )

  def start_prefetch(self) -> None:
    # Not before the position is known: a worker started at 0 would read for nothing.
    if self._open is None:
      documents = self._dataset.documents(self.counts['records'])
      self._open = _read(documents, self._dataset.workers)

  def get_state(self) -> dict[str, Any]:
    return dict(self.counts)

  def set_state(self, state: dict[str, Any]) -> None:
    if self._open is not None:
      self._open.close()
    self._open = None
    self.counts = dict(state)

  def close(self) -> None:
    if self._open is not None:
      self._open.close()
    super().close()

  def __str__(self) -> str:
    return 'Records'


def _encoded_records(
  start, *, source, tokenizer, max_length, overlong, order
) -> grain.MapDataset:
  """This process's documents from its `start`-th on; nothing is read yet."""
  shuffle, seed, epochs, process_index, process_count = order
  # Indices, not records, so that a token still knows its record after the shuffle.
  indices = grain.MapDataset.range(len(source)).seed(seed)
  if shuffle:
    indices = indices.shuffle()
  share = indices.repeat(epochs)[process_index::process_count]
  return share[start:].map(
    functools.partial(
      _encode,
      source=source,
      tokenizer=tokenizer,
      max_length=max_length,
      overlong=overlong,
    )
  )


def _encode(index, source, tokenizer, max_length, overlong):
  try:
    document = chat.encode_record(tokenizer, source[index])
  except ValueError as error:
    where = getattr(source, 'where', 'record {}'.format)
    raise ValueError(f'{where(index)}: {error}') from None
  return packing.fit(document, index, max_length=max_length, overlong=overlong)


def _read(documents: grain.MapDataset, workers: int):
  if workers and not flags.FLAGS.is_parsed():
    # Grain reads its own flags; a program without absl's command line never parses any.
    flags.FLAGS.mark_as_parsed()
  # A worker is asynchronous by itself; in this process a thread reads ahead.
  ahead = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  if not workers:
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)
  stream = documents.to_iter_dataset(ahead)
  # Documents are a few kB: a pipe beats a shared-memory segment each, and nothing is
  # left behind in /dev/shm when a run is killed.
  options = grain.experimental.DatasetOptions(min_shm_size=2**62)
  stream = grain.experimental.WithOptionsIterDataset(stream, options)
  return iter(
    stream.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=32),
      worker_init_fn=_start_worker,
    )
  )


def _start_worker(index: int, count: int) -> None:
  """Keeps a worker off the accelerators, and alive exactly as long as its parent."""
  del index, count
  os.environ['JAX_PLATFORMS'] = 'cpu'
  if 'jax' in sys.modules:  # it read the environment when it was imported
    sys.modules['jax'].config.update('jax_platforms', 'cpu')
  # Ctrl-C and schedulers signal the whole group; the parent still needs its data for
  # the step that it finishes before it saves.
  for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def follow() -> None:
    # A killed parent cannot close its workers; they would wait on it for ever.
    if parent is not None:
      parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


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
  if len(a['source']) < a['process_count']:
    raise ValueError(
      f'{len(a["source"])} records are too few for {a["process_count"]} processes'
    )
