"""SFT: the next batch is the next batch of the data. Nothing else happens."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np

from educe.data.pipeline import Batches
from educe.types import Algorithm, Batch, LossFn, Scores, TrainState


def make(data: Batches, loss: LossFn) -> Algorithm:
  """Algorithm over an iterator of host arrays (data/pipeline.py).

  info: `data/ids_crc32`, a fingerprint of which examples the batch held, in order, so
  that two runs can be seen to have read the same data; and the pipeline's own counts.

  Of packed rows, which hold several documents, positions and segments go to the model.

  Raises ValueError, before any device is touched, if the loss refuses such batches.
  """
  packed, shape = data.packing, (2, 2)
  floats = jax.ShapeDtypeStruct(shape, np.float32)
  ints = jax.ShapeDtypeStruct(shape, np.int32)
  packing: Any = {'positions': ints, 'segments': ints} if packed else {}
  scores: Any = Scores(floats, floats, mean_logp=floats)  # type: ignore[arg-type]
  jax.eval_shape(loss, scores, Batch(ints, floats, **packing))  # type: ignore[arg-type]

  def next_batch(_: TrainState) -> tuple[Batch, dict[str, Any]]:
    rows = next(data)
    extra = {name: rows[name] for name in ('positions', 'segments') if packed}
    ids = np.ascontiguousarray(rows['ids'])
    info = {'data/ids_crc32': zlib.crc32(ids.tobytes())}
    info |= {f'data/{name}': count for name, count in data.counts().items()}
    return Batch(rows['tokens'], rows['mask'], **extra), info

  return Algorithm(next_batch, loss, data, data.batch_size)
