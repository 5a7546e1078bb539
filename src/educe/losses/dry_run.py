"""A loss tried on shapes: what it refuses is said before anything is loaded or sampled."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from educe.types import Batch, LossFn, Scores


def reads(loss: LossFn, *names: str) -> bool:
  """Whether it is refused without these of the scores, as `Scores` names them."""
  shape: Any = jax.ShapeDtypeStruct((2, 2), np.float32)
  row: Any = jax.ShapeDtypeStruct((2,), np.float32)
  every = {name: shape for name in Batch._fields} | {'labels': row, 'segments': None}
  none: dict[str, Any] = dict.fromkeys(names)
  scores = Scores(shape, shape, shape, shape, shape)._replace(**none)
  try:
    jax.eval_shape(loss, scores, Batch(**every))
  except Exception:  # of a loss of one's own, any
    return True
  return False


def dry_run(loss: LossFn, *fields: str) -> None:
  """Traces `loss`. No array is made.

  fields: what the batches will have beside tokens and mask, as `Batch` names it; and
    'divergence' where the scores will have one, from a teacher

  Raises ValueError, naming config.loss, for what the loss refuses.
  """
  shape: Any = jax.ShapeDtypeStruct((2, 2), np.float32)
  row: Any = jax.ShapeDtypeStruct((2,), np.float32)
  shapes = {name: row if name == 'labels' else shape for name in fields}
  distance = shapes.pop('divergence', None)
  try:
    scores = Scores(shape, shape, shape, shape, distance)
    jax.eval_shape(loss, scores, Batch(shape, shape, **shapes))
  except ValueError as error:
    raise ValueError(f'config.loss: {error}') from error
