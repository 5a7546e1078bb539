"""Reward models: a value head trained to score whole completions, or each of their steps.

  pairs   the chosen completion above the rejected one          (Bradley–Terry)
  rated   a number, or right and wrong, for each completion     (regression, outcome)
  steps   right or wrong at the end of each step                (process rewards)

The value of a text stands after it: `Scores.values[b, t]` is the value of tokens[b, :t]
(losses/logprobs.py). So every row gets one more column, and the mask is 1 where a score is
read, and only there: behind the last token of a completion, stop token and all, and behind
the last token of each step. The loss is losses/reward_model.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from educe import hosts
from educe.data import pipeline
from educe.data.pipeline import Batches
from educe.losses.dry_run import dry_run
from educe.types import Algorithm, Batch, LossFn, Model, TrainState

RECORDS = ('pairs', 'rated', 'steps')
READS = {  # by the objectives of losses/reward_model.py
  'bradley_terry': ('pairs',),
  'regression': ('pairs', 'rated'),
  'process': ('rated', 'steps'),
}
PEEK = 8  # records looked at before the first step


def make(model: Model, data: Batches, loss: LossFn) -> Algorithm:
  """Algorithm over batches of preferences; a row has data.max_length + 1 tokens.

  The batches have `labels`, the ratings of pairs and of rated completions, and `returns`,
  the targets where the mask is 1: of steps their labels, of rated completions the rating.

  info: `data/ids_crc32`, and the pipeline's own counts, as for SFT.

  Raises ValueError, before the first step, for a model without a value head, for records
  that the loss's objective does not read, and for what the loss refuses; and, when they
  come, for ratings outside 0..1 that objective='process' would take for probabilities.
  """
  if model.values is None:
    raise ValueError(
      "the model has no value head to train: add config.value=dict(trunk='shared')"
    )
  if data.records not in RECORDS:
    raise ValueError(
      f'config.data.records={data.records!r}: reward_model reads {", ".join(RECORDS)}'
    )
  setting = inspect.signature(loss).parameters.get('objective')
  objective = '' if setting is None else setting.default
  reads = READS.get(objective, RECORDS)
  if data.records not in reads:
    raise ValueError(
      f'config.loss.objective={objective!r} reads {" or ".join(reads)}, and config.data.'
      f'records={data.records!r}; change one of them'
    )
  judged = objective == 'process' and data.records == 'rated'
  for record in range(min(PEEK, data.fingerprint['records']) if judged else 0):
    _check_judged(data.rows_of(record) or {})
  fields = ['labels'] if data.has_labels else []
  if data.records in ('rated', 'steps'):
    fields.append('returns')
  dry_run(loss, *fields)

  def next_batch(_: TrainState) -> tuple[Batch, dict[str, Any]]:
    with data.holding():  # what was refused is refused again, not skipped
      rows, info = pipeline.read(data)
      if judged:
        with hosts.alone():
          _check_judged(rows)
    return readings(rows, pad_id=data.pad_id), info

  return Algorithm(
    next_batch,
    loss,
    data,
    data.batch_size,
    group=data.group,
    fields=tuple(fields),
    longer=1,
  )


def _check_judged(rows: dict[str, Any]) -> None:
  labels = np.asarray(rows.get('labels', ()))
  wrong = labels[(labels < 0) | (labels > 1)]
  if len(wrong):
    raise ValueError(
      "config.loss.objective='process' reads ratings from 0 (wrong) to 1 (right), and one "
      f"of config.data.records='rated' is {wrong[0]:g}; set objective='regression', or "
      'rescale them'
    )


def readings(rows: dict[str, Any], *, pad_id: int) -> Batch:
  """`[B, T]` of data/preference_rows.py as `[B, T + 1]`: the mask is 1 where a score is."""
  tokens, ids = rows['tokens'], rows['ids']
  lengths = (ids >= 0).sum(-1)
  mask = np.zeros((len(tokens), tokens.shape[1] + 1), np.float32)
  returns = None
  if 'targets' in rows:
    targets = np.pad(rows['targets'], ((0, 0), (1, 0)), constant_values=np.nan)
    mask = np.isfinite(targets).astype(np.float32)
    returns = np.nan_to_num(targets, nan=0.0)
  else:
    real = np.flatnonzero(lengths)
    mask[real, lengths[real]] = 1
    if 'labels' in rows:
      returns = mask * rows['labels'][:, None]
  arrays: dict[str, Any] = dict(
    tokens=np.pad(tokens, ((0, 0), (0, 1)), constant_values=pad_id),
    mask=mask,
    returns=returns,
    labels=rows.get('labels'),
  )
  return Batch(**arrays)
