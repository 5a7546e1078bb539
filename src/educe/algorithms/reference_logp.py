"""Log-probs of a whole data set of pairs under the initial policy, computed once.

They lie in one file, `<key>.npz`, and the key is a hash of all that they depend on: every
token of every pair as it is trained, the model's description and its weights. Whatever
changes (the data, the chat template, max_length, a single weight) is another key, so what
is read always belongs to the run. A file is whole or not there.
"""

from __future__ import annotations

import hashlib
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from educe import hosts, paths, sharding
from educe.data.pipeline import Batches
from educe.progress import say
from educe.types import Model, Params

Rows = dict[str, Any]  # of one record
Logp = Callable[[Params, np.ndarray, np.ndarray], np.ndarray]


class Stored(NamedTuple):
  """The log-probs of the trained tokens of all records, one after another (nats)."""

  logp: np.ndarray  # [N] float32: chosen's, then rejected's, of each kept record
  starts: np.ndarray  # [records + 1]: record r has logp[starts[r] : starts[r + 1]]

  def rows(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`[B, T]` of a batch of pairs: 0 where the mask is.

    Raises ValueError if a record has not as many trained tokens as it had.
    """
    out = np.zeros(mask.shape, np.float32)
    for row in range(0, len(mask), 2):
      record, both = ids[row, 0], slice(row, row + 2)
      values = np.zeros(0, np.float32)
      if record >= 0:  # not a row of padding
        values = self.logp[self.starts[record] : self.starts[record + 1]]
      where = mask[both] > 0
      if where.sum() != len(values):
        raise ValueError(
          f'record {record} has {where.sum():.0f} trained tokens, and {len(values)} when '
          'its reference log-probs were computed: the data changed during the run'
        )
      out[both][where] = values
    return out


def load_or_compute(
  folder: pathlib.Path, model: Model, params: Params, data: Batches, logp: Logp
) -> Stored:
  """What `folder` has for these data and weights; else computed, a batch at a time.

  logp(params, tokens, mask) -> `[B, T]`, of batches as large as the run's
  """
  folder = paths.output(folder, 'algorithm.precompute')
  # Twice through the data rather than all of it in memory.
  file = folder / f'{key(model, params, _records(data))}.npz'
  if hosts.agreed(file.exists()):  # or some would compute, and wait for the others
    return _load(file)
  count = data.fingerprint['records']
  say(f'log-probs of {count} records under the reference, once: {file}')
  lengths: list[int] = []
  parts: list[np.ndarray] = []
  batch: list[Rows] = []

  def flush() -> None:
    # The last batch is filled up with its own first record: one shape, one program.
    full = (batch + batch[:1] * size)[:size]
    tokens, mask = (np.concatenate([r[n] for r in full]) for n in ('tokens', 'mask'))
    scored = logp(params, tokens, mask).reshape(size, data.group, -1)
    parts.extend(scored[i][r['mask'] > 0] for i, r in enumerate(batch))
    batch.clear()

  size = data.batch_size // data.group
  for record in _records(data):
    lengths.append(0 if record is None else int(record['mask'].sum()))
    batch += [] if record is None else [record]
    if len(batch) == size:
      flush()
  if batch:
    flush()
  if not parts:
    raise ValueError('every record is dropped: raise data.max_length')
  starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  stored = Stored(np.concatenate(parts).astype(np.float32), starts)
  if not np.isfinite(stored.logp).all():
    raise ValueError(
      'the reference has log-probs that are not finite: look at config.model (its '
      'weights, its dtypes); nothing was stored'
    )

  def write() -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with paths.whole(file) as temporary, temporary.open('wb') as stream:
      np.savez(stream, **stored._asdict())

  hosts.by_first(write)
  return stored


def _records(data: Batches) -> Iterator[Rows | None]:
  return (data.rows_of(index) for index in range(data.fingerprint['records']))


def key(model: Model, params: Params, records: Iterable[Rows | None]) -> str:
  """Sixteen hexadecimal digits for these tokens under these weights."""
  digest = hashlib.blake2b(digest_size=8)
  digest.update(repr(model.architecture).encode())
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  for path, leaf in leaves:
    digest.update(f'{path} {leaf.shape} {leaf.dtype}'.encode())
    digest.update(np.ascontiguousarray(sharding.fetch(leaf)).view(np.uint8).tobytes())
  for record in records:
    for name in ('tokens', 'mask'):
      digest.update(b'-' if record is None else record[name].tobytes())
  return digest.hexdigest()


def _load(file: pathlib.Path) -> Stored:
  try:
    with file.open('rb') as stream, np.load(stream) as arrays:
      return Stored(**{name: arrays[name] for name in Stored._fields})
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(
      f'{file} is damaged ({error}); delete it, and it is computed again'
    ) from None
