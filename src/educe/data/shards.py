"""A batch read by several processes, each its share, and the same batch by any others.

Records are dealt into S shards, the s-th of S from the global order (`pipeline`), and a
batch is B/S rows of each, one shard after another. S is how many processes had rows of
their own when the run began. A process reads the shards that its rows come from; a run
that goes on with other processes keeps its S, and so its batches, bit by bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from educe import hosts
from educe.data.pipeline import Batches
from educe.types import StateMismatch

# (shard, of how many, whether to try the first records) -> its batches
Open = Callable[[int, int, bool], Batches]


class Shards:
  """Batches of `rows`' rows; what a run needs of one pipeline, over the shards read here.

  fingerprint, counts, rows_of: see `pipeline.Batches`; counts are of the shards read here
  batch_size: rows of the whole batch; mine: which of them are this process's
  """

  def __init__(
    self, open_shard: Open, parts: int = 1, rows: Callable[[int], Any] = np.arange
  ):
    """
    open_shard: makes one of the pipelines
    parts: processes with rows of their own; S is as many of them as divide the records
      of a batch
    rows: which rows of so many this process needs, in order
    """
    self._open = open_shard
    whole = open_shard(0, 1, True)
    self._read = {0: whole}
    self.records, self.group, self.pad_id = whole.records, whole.group, whole.pad_id
    self.batch_size, self.max_length = whole.batch_size, whole.max_length
    self.packing, self.has_labels = whole.packing, whole.has_labels
    self.fingerprint = {
      name: x for name, x in whole.fingerprint.items() if not name.startswith('process')
    }
    self.mine = np.asarray(rows(self.batch_size))
    self._shards, self._places = 1, self.mine
    shards = math.gcd(parts, self.fingerprint['batch_size'])
    if shards > 1:
      self._deal(shards)

  def _deal(self, shards: int) -> None:
    """Opens those of so many shards that rows are needed of."""
    self.close()
    self._shards = shards
    size = self.batch_size // shards
    needed = sorted({int(row) // size for row in self.mine})
    self._read = {shard: self._open(shard, shards, False) for shard in needed}
    starts = {shard: place * size for place, shard in enumerate(needed)}
    self._places = np.array([starts[r // size] + r % size for r in self.mine.tolist()])

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    """This process's rows of the next batch.

    Raises hosts.Alone, of several processes, for what one of them cannot read.
    """
    with hosts.alone():
      parts = [next(batches) for batches in self._read.values()]
    if len(parts) == 1 and len(self._places) == len(parts[0]['tokens']):
      return parts[0]
    return {
      name: np.concatenate([part[name] for part in parts])[self._places]
      for name in parts[0]
    }

  @contextlib.contextmanager
  def holding(self) -> Iterator[None]:
    """If the block fails, the batch that it read is the next one again."""
    with contextlib.ExitStack() as all_of_them:
      for batches in self._read.values():
        all_of_them.enter_context(batches.holding())
      yield

  def rows_of(self, record: int) -> dict[str, np.ndarray] | None:
    """The `[G, T]` rows of a record of preferences; None if it is dropped."""
    return next(iter(self._read.values())).rows_of(record)

  def counts(self) -> dict[str, int]:
    """Records read so far, and what became of those too long: a sum over shards."""
    counts = [batches.counts() for batches in self._read.values()]
    return {name: sum(each[name] for each in counts) for name in counts[0]}

  def get_state(self) -> dict[str, Any]:
    """Of all shards, in every process; plain JSON. All processes must ask for it."""
    mine = {str(s): batches.get_state() for s, batches in self._read.items()}
    every: dict[str, Any] = {}
    for states in hosts.exchange(mine):
      every |= states
    return {'shards': [every[str(shard)] for shard in range(self._shards)]}

  def set_state(self, state: dict[str, Any]) -> None:
    """Raises StateMismatch if the state is of another data set or other arguments."""
    states: Sequence[dict[str, Any]] = state['shards']
    saved = states[0]['fingerprint']['batch_size'] * len(states)
    ours = self.fingerprint['batch_size']
    if saved != ours:
      raise StateMismatch(
        f'data state was saved with batch_size={saved!r} but this pipeline has '
        f'batch_size={ours!r}: the run cannot continue exactly; restore the old value or '
        'start a new run'
      )
    if len(states) != self._shards:
      self._deal(len(states))
    for shard, batches in self._read.items():
      batches.set_state(states[shard])

  def close(self) -> None:
    """Stops the workers."""
    for batches in self._read.values():
      batches.close()
    self._read = {}
