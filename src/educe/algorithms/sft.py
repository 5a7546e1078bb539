"""SFT: the next batch is the next batch of the data. Nothing else happens."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from educe.types import Algorithm, Batch, LossFn, TrainState


def make(data: Any, loss: LossFn, *, packing: bool = False) -> Algorithm:
  """Algorithm over an iterator of host arrays (data/pipeline.py).

  info: `data/ids_crc32`, a fingerprint of which examples the batch held, in order, so
  that two runs can be seen to have read the same data.

  Args:
    packing: rows hold several documents; positions and segments go to the model.
  """

  def next_batch(_: TrainState) -> tuple[Batch, dict[str, Any]]:
    rows = next(data)
    batch = Batch(rows['tokens'], rows['mask'])
    if packing:
      batch = batch._replace(positions=rows['positions'], segments=rows['segments'])
    ids = np.ascontiguousarray(rows['ids'])
    return batch, {'data/ids_crc32': zlib.crc32(ids.tobytes())}

  return Algorithm(next_batch, loss, data)
