"""SFT: the next batch is the next batch of the data. Nothing else happens."""

from __future__ import annotations

from typing import Any

from educe.data import pipeline
from educe.data.pipeline import Batches
from educe.losses.dry_run import dry_run
from educe.types import Algorithm, Batch, LossFn, TrainState


def make(data: Batches, loss: LossFn) -> Algorithm:
  """Algorithm over an iterator of host arrays (data/pipeline.py).

  info: `data/ids_crc32`, a fingerprint of which examples the batch held, in order, so
  that two runs can be seen to have read the same data; and the pipeline's own counts.

  Of packed rows, which hold several documents, positions and segments go to the model.

  Raises ValueError, before any device is touched, for data that are not documents, and
  if the loss refuses such batches.
  """
  fields = extra_fields(data)
  dry_run(loss, *fields)

  def next_batch(_: TrainState) -> tuple[Batch, dict[str, Any]]:
    return read(data)

  return Algorithm(next_batch, loss, data, data.batch_size, fields=fields)


def read(data: Batches) -> tuple[Batch, dict[str, Any]]:
  """The next batch of texts, and its info."""
  with data.holding():  # a file may be out of reach for a while
    rows, info = pipeline.read(data)
  extra = {name: rows[name] for name in extra_fields(data)}
  return Batch(rows['tokens'], rows['mask'], **extra), info


def extra_fields(data: Batches) -> tuple[str, ...]:
  """Of packed rows, which hold several documents, what the model must know of them.

  Raises ValueError for data that are not documents.
  """
  if data.records != 'documents':
    raise ValueError(
      f'config.data.records={data.records!r}: sft imitates all that it reads, and of '
      "preferences not all is to be imitated; use records='documents'"
    )
  return ('positions', 'segments') if data.packing else ()
