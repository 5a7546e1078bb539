"""How often a policy, or a reward model, agrees with held-out judgements, and how surely.

A pair is agreed on where the chosen completion has the higher reward r; where the rewards
are equal a coin would decide, and it counts as half. The reward is one of

  implicit   β·Σ_t log π(y_t)/π_ref(y_t): what DPO trained (Rafael Rafailov et al., 2023,
             §4, arXiv:2305.18290)
  average    β·(1/|y|)·Σ_t log π(y_t): without a reference, as SimPO has it (Yu Meng et
             al., 2024, arXiv:2405.14734)
  value      of a reward model, behind the last token

A reward model of completions that were judged right or wrong (records='rated'), or of
their steps ('steps'), agrees where its value V is on the right side of 0. With the margin
V, or −V where it was wrong, all that is said here of pairs holds of them.

Under the Bradley–Terry model the chosen one wins with p = σ(r_w − r_l). Calibrated means
that of the pairs on which a side is given confidence c = max(p, 1 − p), the share c is
right: the expected calibration error is the mean of |share right − mean c| over bins of c,
weighted by their pairs (Chuan Guo et al., 2017, eq. 3, arXiv:1706.04599).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from educe.algorithms.reward_model import readings
from educe.data import pipeline
from educe.data.tokenizer import Tokenizer
from educe.losses.logprobs import score
from educe.measurement.accuracy import wilson
from educe.sharding import fetch, mesh_of, place_batch, row_parts, using_that_of
from educe.types import Batch, Model, Params

RECORDS = ('pairs', 'rated', 'steps')
REWARDS = ('implicit', 'average', 'value')
BINS = 10  # of confidence, from 0.5 to 1


class Agreement(NamedTuple):
  rate: float  # agreed on / total
  low: float  # Wilson 95 %
  high: float
  total: int  # pairs, or judgements
  margin: float  # mean of r_w − r_l
  nll: float  # mean of −log p (nats per pair)
  ece: float  # expected calibration error, 0..1
  # Of those that are not empty: (pairs, mean confidence, share right).
  bins: list[tuple[int, float, float]]
  dropped: int  # records too long to be read
  transcripts: list[dict[str, Any]]
  what: str = 'pairs'

  @property
  def verb(self) -> str:
    return 'agrees with'

  def metrics(self) -> dict[str, float]:
    """What goes into metrics.jsonl."""
    return {
      'accuracy': self.rate,
      'accuracy/low': self.low,
      'accuracy/high': self.high,
      'preferences/margin': self.margin,
      'preferences/nll': self.nll,
      'preferences/ece': self.ece,
    }

  def __str__(self) -> str:
    interval = f'95 % interval {self.low:.1%} to {self.high:.1%}'
    left = f'; {self.dropped} too long' if self.dropped else ''
    return (
      f'{self.rate:.1%} of {self.total} {self.what} ({interval}{left}), calibration error '
      f'{self.ece:.3f}'
    )


def agreement(
  chosen: np.ndarray,
  rejected: np.ndarray,
  *,
  dropped: int = 0,
  transcripts: Sequence[dict[str, Any]] = (),
  what: str = 'pairs',
) -> Agreement:
  """Rewards `[P]` of both sides, in float64; `what` they are is only said.

  Raises ValueError for no pairs and for a reward that is not finite.
  """
  margins = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
  if not margins.size:
    raise ValueError('agreement: there are no pairs')
  if not np.isfinite(margins).all():
    raise ValueError(
      f'agreement: the rewards of pair {int(np.argmin(np.isfinite(margins)))} are not '
      'finite'
    )
  right = (margins > 0) + 0.5 * (margins == 0)
  confidence = 1 / (1 + np.exp(-np.abs(margins)))
  edges = np.linspace(0.5, 1, BINS + 1)
  of = np.clip(np.searchsorted(edges, confidence, side='right') - 1, 0, BINS - 1)
  bins = []
  for index in range(BINS):
    inside = of == index
    if inside.any():
      mean = float(confidence[inside].mean()), float(right[inside].mean())
      bins.append((int(inside.sum()), *mean))
  total = len(margins)
  low, high = wilson(float(right.sum()), total)
  return Agreement(
    rate=float(right.mean()),
    low=low,
    high=high,
    total=total,
    margin=float(margins.mean()),
    nll=float(np.logaddexp(0, -margins).mean()),
    ece=sum(n * abs(share - mean) for n, mean, share in bins) / total,
    bins=bins,
    dropped=dropped,
    transcripts=list(transcripts),
    what=what,
  )


def evaluate(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  reference: Params | None = None,
  *,
  source: Sequence[Any],
  max_length: int,
  reward: str = 'implicit',
  beta: float | None = None,
  batch_size: int = 8,
  overlong: str = 'drop',
  size: int | None = None,
  records: str = 'pairs',
) -> Agreement:
  """Agreement with judgements: what the config section `evaluation` runs.

  reference: of implicit rewards: the run's, which may move (TR-DPO); where it keeps none,
    the policy that it started from
  source: a section of its own, of records that are not trained on
  records: 'pairs'; or, for reward='value' alone, 'rated' or 'steps', judged 0 or 1. The
    steps of one completion are no independent judgements, and the interval takes them so
  reward, beta: see the top of this file; 'value' takes no beta, the others the loss's
  batch_size: records at a time
  max_length, overlong: as for config.data
  size: the first so many records of the source; None for all

  Raises ValueError for an implicit reward without a reference, a value without a value
  head, ratings that are no judgements, and records that cannot be read.
  """
  check(
    max_length=max_length,
    reward=reward,
    beta=beta,
    batch_size=batch_size,
    size=size,
    records=records,
  )
  if reward == 'implicit' and reference is None:
    raise ValueError(
      "evaluation.reward='implicit' compares with a reference, and none is given; "
      "'average' needs none"
    )
  if reward == 'value' and model.values is None:
    raise ValueError(
      "evaluation.reward='value' is of a reward model, and this model has no value head: "
      "add config.value, or choose 'implicit'"
    )
  batches = pipeline.make(
    source if size is None else source[:size],
    tokenizer,
    learns=False,
    batch_size=batch_size,
    max_length=max_length,
    records=records,
    shuffle=False,
    epochs=1,
    overlong=overlong,
    drop_remainder=False,
  )
  # A static argument, compiled once a run; a reference has no value head.
  values = model.values if reward == 'value' else None
  hashable = model._replace(axes=None, aux_coefs=None, values=values)
  rewards, transcripts = [], []
  for rows in batches:
    if records != 'pairs':
      for row, values, labels in _judged(hashable, params, rows, tokenizer.pad_id):
        margins = values * (2 * labels - 1)
        rewards += [np.array([margin, 0.0]) for margin in margins]
        transcripts.append(_read_out(tokenizer, rows, row, values, labels))
      continue
    found = _rewards(hashable, params, reference, rows, reward, beta, tokenizer.pad_id)
    for pair in range(0, len(found), 2):
      if rows['ids'][pair, 0] >= 0:
        rewards.append(found[pair : pair + 2])
        transcripts.append(_transcript(tokenizer, rows, pair, rewards[-1]))
  counts = batches.counts()
  batches.close()
  chosen, rejected = np.array(rewards).T
  return agreement(
    chosen,
    rejected,
    dropped=counts['dropped_overlong'] + counts['dropped_masked'],
    transcripts=transcripts,
    what={'pairs': 'pairs', 'rated': 'completions', 'steps': 'steps'}[records],
  )


def check(
  *,
  max_length: int,
  reward: str,
  beta: float | None,
  batch_size: int,
  size: int | None,
  records: str,
) -> None:
  """Raises ValueError for arguments of `evaluate` that no model could make good."""
  if reward not in REWARDS:
    raise ValueError(f'reward={reward!r} is not one of {list(REWARDS)}')
  if records not in RECORDS:
    raise ValueError(f'records={records!r} is not one of {list(RECORDS)}')
  if records != 'pairs' and reward != 'value':
    raise ValueError(
      f"records={records!r} is of a reward model: reward='value', not {reward!r}"
    )
  if reward == 'value' and beta is not None:
    raise ValueError(f"beta={beta}: reward='value' takes none; delete it")
  if reward != 'value' and not (beta is not None and 0 < beta < float('inf')):
    raise ValueError(f'beta={beta} must be positive: the β of config.loss')
  if max_length < 2 or batch_size < 1 or (size is not None and size < 1):
    raise ValueError(
      f'max_length={max_length} must be at least 2, batch_size={batch_size} and '
      f'size={size} at least 1'
    )


@functools.partial(jax.jit, static_argnames=('model', 'what'))
def _read(model: Model, params: Params, batch: Batch, what: str):
  return getattr(score(model, params, batch), what)


def _rewards(model, params, reference, rows, reward, beta, pad_id) -> np.ndarray:
  """`[B]`, in float64."""
  batch = Batch(rows['tokens'], rows['mask'])
  if reward == 'value':
    batch = readings(rows, pad_id=pad_id)
  mask = np.asarray(batch.mask, np.float64)
  batch = _spread(batch, params)

  def read(weights, what):
    with using_that_of(weights):
      return np.asarray(fetch(_read(model, weights, batch, what)), np.float64)

  if reward == 'value':
    return np.where(mask > 0, read(params, 'values'), 0).sum(-1)
  logp = read(params, 'logp')
  if reward == 'average':
    return beta * (logp * mask).sum(-1) / np.maximum(mask.sum(-1), 1)
  return beta * ((logp - read(reference, 'logp')) * mask).sum(-1)


def _judged(model, params, rows, pad_id):
  """(row, V, y) of each real row, at the places that are judged, in float64."""
  batch = readings(rows, pad_id=pad_id)
  labels, mask = np.asarray(batch.returns, np.float64), np.asarray(batch.mask)
  with using_that_of(params):
    found = fetch(_read(model, params, _spread(batch, params), 'values'))
  values = np.asarray(found, np.float64)
  for row in np.flatnonzero(rows['ids'][:, 0] >= 0):
    at = mask[row] > 0
    if not np.isin(labels[row, at], (0, 1)).all():
      raise ValueError(
        f"evaluation.records='rated': record {rows['ids'][row, 0]} is rated "
        f'{labels[row, at][0]:g}; agreement is with right (1) and wrong (0)'
      )
    yield row, values[row, at], labels[row, at]


def _spread(batch: Batch, params: Params) -> Batch:
  """Its rows over the mesh of the params, or else every device would read all of them."""
  mesh = mesh_of(params)
  if mesh is None or len(batch.tokens) % row_parts(mesh):
    return batch
  return place_batch(batch, mesh)


def _transcript(tokenizer, rows, pair, rewards) -> dict[str, Any]:
  """A pair for people."""
  chosen, rejected = map(float, rewards)
  return {
    'id': int(rows['ids'][pair, 0]),
    'prompt': _text(tokenizer, rows, pair, 0),
    'chosen': _text(tokenizer, rows, pair, 1),
    'rejected': _text(tokenizer, rows, pair + 1, 1),
    'rewards': {'chosen': chosen, 'rejected': rejected},
  }


def _read_out(tokenizer, rows, row, values, labels) -> dict[str, Any]:
  """A judged completion for people."""
  return {
    'id': int(rows['ids'][row, 0]),
    'prompt': _text(tokenizer, rows, row, 0),
    'judged': _text(tokenizer, rows, row, 1),
    'values': values.tolist(),
    'labels': labels.tolist(),
  }


def _text(tokenizer, rows, row, trained) -> str:
  where = (rows['mask'][row] == trained) & (rows['ids'][row] >= 0)
  return tokenizer.decode(rows['tokens'][row][where], skip_special=True)
