"""Records in a fixed order through any number of workers, from any position.

The position is the number of records read, so it survives another number of workers;
documents that were dropped stay in the stream until they are counted here.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
from absl import flags

from educe.data import packing


class Documents(NamedTuple):
  places: range  # in the global order, across epochs
  document: Callable[[int], dict[str, Any]]  # the one at a place


class Records(grain.IterDataset):
  """Documents that are kept, in order, counted; `live` is the iterator in use."""

  live: RecordsIterator

  def __init__(self, documents, *, workers: int, limit: int, hint: str):
    super().__init__()
    self.documents = documents
    self.workers = workers
    self.limit = limit  # records an epoch, of this process
    self.hint = hint

  def __iter__(self):
    self.live = RecordsIterator(self)
    return self.live

  def __str__(self) -> str:
    return 'Records'


class RecordsIterator(grain.DatasetIterator):
  """Reads through workers from any position; the position is a count of records."""

  def __init__(self, dataset: Records):
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


def in_order(start, *, count, encode, order) -> Documents:
  """This process's documents from its `start`-th on; nothing is read yet."""
  shuffle, seed, epochs, process_index, process_count = order
  # Indices, not records, so that a token still knows its record after the shuffle.
  indices = grain.MapDataset.range(count).seed(seed)
  if shuffle:
    indices = indices.shuffle()  # anew each epoch: its index goes on beyond `count`
  first = process_index + start * process_count
  end = sys.maxsize if epochs is None else epochs * count
  document = functools.partial(_document, indices, encode)
  return Documents(range(first, end, process_count), document)


def _document(indices: grain.MapDataset, encode, position: int):
  return encode(indices[position])


def _read(documents: Documents, workers: int):
  places, document = documents
  if not workers:
    # While the step before runs on the device. A thread that read ahead would take twice
    # the time, and Grain's pipelines half of it again.
    return (document(place) for place in places)
  if not flags.FLAGS.is_parsed():
    # Grain reads its own flags; a program without absl's command line never parses any.
    flags.FLAGS.mark_as_parsed()
  stream = grain.MapDataset.range(places.start, places.stop, places.step).map(document)
  stream = stream.to_iter_dataset(  # workers are asynchronous by themselves
    grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  )
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
