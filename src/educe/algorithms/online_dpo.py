"""Online DPO: pairs that the policy has just written, judged now.

  Shangmin Guo et al., "Direct language model alignment from online AI feedback" (OAIF),
  2024, arXiv:2402.04792; exploration (alpha > 0): Tengyang Xie et al. (XPO), 2024,
  Algorithm 1, arXiv:2405.21046, in losses/xpo.py.

round   prompts × group completions, their rewards from the environment or a judge
pairs   of each prompt the best and the worst; with alpha, each completion of the policy
        and one of the reference, which of them is chosen being the rewards' to say
updates epochs passes over the pairs with any loss of losses/dpo.py

Differs from the papers: OAIF compares two completions of a prompt, of a larger group this
takes the ends; XPO updates after each pair and on all pairs so far, here on a round's.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from educe import sharding
from educe.algorithms import on_policy
from educe.algorithms.dpo import check_records, couples
from educe.losses import xpo
from educe.losses.dry_run import dry_run
from educe.models.parts import over
from educe.rollouts import transcripts
from educe.rollouts.joining import joined, rows_of
from educe.rollouts.position import Position
from educe.rollouts.rounds import Round, Rounds
from educe.types import Algorithm, Batch, LossFn, Model, Rollouts, TrainState


def make(
  model: Model,
  rollouts: Rounds,
  loss: LossFn,
  place: Callable[..., Batch],
  run_dir: pathlib.Path,
  *,
  batch_size: int,
  epochs: int = 1,
  reference_every: int | None = 0,
  alpha: float = 0.0,
) -> Algorithm:
  """Algorithm whose step is `batch_size` pairs; rows 2i are chosen, 2i + 1 rejected.

  Writes rollouts/<round>.jsonl: each completion with `chosen`, 1, −1 where rejected, or 0.

  Args:
    batch_size: pairs a step; the last of a round is filled up with empty ones.
    epochs: passes over a round's pairs, each in an order of its own.
    reference_every: None keeps no reference, for losses that read none; 0 keeps the
      initial policy; n copies the policy every n steps.
    alpha: α of XPO's bonus (nats are multiplied by it); 0 is online DPO.

  Pairs of equal rewards, or of the same tokens, are dropped and counted (`pairs/ties`),
  and so are prompts with too few scores (`pairs/unscored`). labels are the rewards, so that
  loss.margin_coef can ask for a margin in proportion to them. A round without any pair is
  a pass over an empty batch, whose gradient is 0 and whose loss is NaN, a mean of nothing.

  Raises ValueError for values out of range.
  """
  _check(rollouts, batch_size, epochs, reference_every, alpha)
  check_records(loss, 'pairs')
  fields = ['labels']
  fields += [] if reference_every is None else ['ref_logp']
  dry_run(loss, *fields)
  size = 2 * batch_size
  read = on_policy.reader(model, rollouts, place, size)
  data = Position(rollouts)

  def next_batch(state: TrainState) -> tuple[Batch, dict[str, Any]]:
    info: dict[str, Any] = {}
    if data.spent:
      info = begin(state)
    assert data.whole is not None
    pairs = data.take(len(data.whole.tokens) // 2, batch_size)
    return data.rows(rows_of(pairs, 2)), info

  def begin(state: TrainState) -> dict[str, Any]:
    """Begins the next round. Its numbers."""
    current = rollouts.next(state.params, int(state.step))
    with rollouts.holding(current):  # the judge may be down for the reference's half
      return paired(state, current)

  def paired(state: TrainState, current: Round) -> dict[str, Any]:
    both = current.rollouts
    if alpha:
      first = sharding.to_device(over(state.params, state.reference))
      both = joined(both, rollouts.beside(first, current))
    rows, counts = against(both) if alpha else ends(both)
    info = {**current.info, **{f'pairs/{name}': float(n) for name, n in counts.items()}}
    _write(run_dir, current, both, rows, int(state.step))
    whole = batch_of(both, rows, state)
    data.begin(whole, current.number, epochs * (len(whole.tokens) // size))
    return info

  def batch_of(both: Rollouts, rows: np.ndarray, state: TrainState) -> Batch:
    """The pairs as one batch, filled up to whole steps."""
    missing = (0, -len(rows) % size if len(rows) else size)
    tokens, mask = (
      np.pad(np.asarray(x)[rows], (missing, (0, 0))) for x in (both.tokens, both.mask)
    )
    labels = np.pad(np.asarray(both.rewards, np.float32)[rows], missing)
    ref = None
    if reference_every is not None:
      ref = read(over(state.params, state.reference), tokens, mask)[0]
    bonus = None
    if alpha:
      theirs = np.pad(rows >= len(both.rewards) // 2, missing)
      bonus = (-alpha * theirs[:, None] * mask).astype(np.float32)
    arrays: dict[str, Any] = dict(
      tokens=tokens, mask=mask, ref_logp=ref, advantages=bonus, labels=labels
    )
    return Batch(**arrays)

  return Algorithm(
    next_batch,
    xpo.with_bonus(loss) if alpha else loss,
    data,
    size,
    temperature=rollouts.temperature,
    reference_every=reference_every,
    asks_policy=True,
    group=2,
    shares=2,
    couples=couples(loss),
    fields=(*fields, *(['advantages'] if alpha else [])),
  )


def ends(rollouts: Rollouts) -> tuple[np.ndarray, dict[str, int]]:
  """(rows, counts): the best and the worst of each group, one after the other.

  The first of equals is the best, and the last of equals the worst.
  """
  rewards = np.asarray(rollouts.rewards, np.float64).reshape(-1, rollouts.group)
  scored = np.isfinite(rewards)
  first = np.arange(len(rewards)) * rollouts.group
  best = first + np.where(scored, rewards, -np.inf).argmax(-1)
  backwards = np.where(scored, rewards, np.inf)[:, ::-1]
  worst = first + rollouts.group - 1 - backwards.argmin(-1)
  return _kept(rollouts, best, worst, scored.sum(-1) > 1)


def against(both: Rollouts) -> tuple[np.ndarray, dict[str, int]]:
  """(rows, counts): each row of the first half with the same row of the second."""
  pairs = np.arange(len(both.rewards)).reshape(2, -1)
  rewards = np.asarray(both.rewards)[pairs]
  best, worst = np.where(rewards[0] >= rewards[1], pairs, pairs[::-1])
  return _kept(both, best, worst, np.isfinite(rewards).all(0))


def _kept(rollouts: Rollouts, best, worst, scored) -> tuple[np.ndarray, dict[str, int]]:
  """Without the pairs that are not scored, and those that are no preference."""
  rewards, tokens = np.asarray(rollouts.rewards), np.asarray(rollouts.tokens)
  same = (rewards[best] == rewards[worst]) | (tokens[best] == tokens[worst]).all(-1)
  rows = np.stack([best, worst], -1)[scored & ~same]
  return rows.ravel(), {
    'kept': len(rows),
    'ties': int((scored & same).sum()),
    'unscored': int((~scored).sum()),
  }


def _write(
  run_dir, current: Round, both: Rollouts, rows: np.ndarray, step: int
) -> None:
  chosen = dict.fromkeys(rows[::2].tolist(), 1) | dict.fromkeys(rows[1::2].tolist(), -1)
  own = len(current.rollouts.rewards)
  marked = [
    {
      **transcript,
      'chosen': chosen.get(row, 0),
      **({} if row < own else {'reference': True}),
    }
    for row, transcript in enumerate(both.transcripts)
  ]
  transcripts.save_round(run_dir, current.number, step, marked)


def _check(rollouts: Rounds, batch_size, epochs, reference_every, alpha) -> None:
  """One clear line for what cannot be."""
  rollouts.must_score()
  wrong = None
  if batch_size < 1 or epochs < 1:
    wrong = f': {batch_size=} and {epochs=} must be at least 1'
  elif (reference_every or 0) < 0:
    wrong = f'.reference_every={reference_every} must be ≥ 0, or None'
  elif not 0 <= alpha < np.inf:
    wrong = f'.alpha={alpha} must be a number ≥ 0'
  elif alpha and reference_every is None:
    wrong = f'.alpha={alpha} samples from the reference: set reference_every=0'
  elif alpha and rollouts.compares:
    wrong = (
      f'.alpha={alpha} sets the policy against the reference, and config.judge compares '
      "completions of one of them: judge.style='scalar', or alpha=0"
    )
  elif alpha and rollouts.publisher is not None:
    wrong = (
      f'.alpha={alpha} samples from the reference too, and rollouts.server serves the '
      'policy alone: alpha=0, or sample here (rollouts.server=None)'
    )
  elif not alpha and rollouts.group < 2:
    wrong = f': rollouts.group={rollouts.group} gives no two completions to compare'
  if wrong:
    raise ValueError(f'algorithm{wrong}')
