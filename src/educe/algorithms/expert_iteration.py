"""Expert iteration: sample, keep what was verified, imitate it.

  STaR: Eric Zelikman et al., 2022, arXiv:2203.14465 · RAFT (the best of n by reward):
  Hanze Dong et al., 2023, arXiv:2304.06767 · expert iteration for reasoning: Alex
  Havrilla et al., 2024, arXiv:2403.04642.

One round of it, from a base model, is rejection-sampled SFT; its loss is losses/sft.py.

Differs from the papers: training goes on from the last policy; STaR starts each round
from the initial one and adds rationales for problems it failed, given the answer.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np

from educe.losses.dry_run import dry_run
from educe.rollouts import transcripts
from educe.rollouts.position import Position
from educe.rollouts.rounds import Rounds
from educe.types import Algorithm, Batch, LossFn, Rollouts, TrainState

KEEP = ('verified', 'best')
PATIENCE = 10  # rounds in a row that may keep nothing


def make(
  rollouts: Rounds,
  loss: LossFn,
  run_dir: pathlib.Path,
  *,
  batch_size: int,
  epochs: int = 1,
  keep: str = 'verified',
  per_prompt: int = 1,
) -> Algorithm:
  """Algorithm whose step is one batch of kept completions.

  Writes rollouts/<round>.jsonl, each completion with `kept`, 0 or 1.

  Args:
    batch_size: rows a step; the last of a round is filled up with empty ones.
    epochs: passes over what a round kept, each in an order of its own.
    keep: 'verified' completions, or the 'best' of each prompt by reward.
    per_prompt: different completions kept of one prompt, at most.

  Raises ValueError for values out of range and, while it runs, when ten rounds in a row
  kept nothing.
  """
  if batch_size < 1 or epochs < 1:
    raise ValueError(f'algorithm: {batch_size=} and {epochs=} must be at least 1')
  if keep not in KEEP:
    raise ValueError(f'algorithm.keep={keep!r} must be one of {list(KEEP)}')
  if not 1 <= per_prompt <= rollouts.group:
    raise ValueError(
      f'algorithm.per_prompt={per_prompt} must be in 1..rollouts.group={rollouts.group}'
    )
  rollouts.must_score()
  dry_run(loss)
  data = Position(rollouts)

  def next_batch(state: TrainState) -> tuple[Batch, dict[str, Any]]:
    info: dict[str, Any] = {}
    if data.spent:
      info = imitate(state)
    assert data.whole is not None
    chosen = data.take(len(data.whole.tokens), batch_size)
    missing = ((0, batch_size - len(chosen)), (0, 0))
    return jax.tree.map(lambda x: np.pad(x, missing), data.rows(chosen)), info

  def imitate(state: TrainState) -> dict[str, Any]:
    """Begins the next round that keeps anything. Its numbers."""
    for _ in range(PATIENCE):
      current = rollouts.next(state.params, int(state.step))
      r, info = current.rollouts, dict(current.info)
      rows = kept(r, keep, per_prompt)
      marks = np.isin(np.arange(len(r.rewards)), rows)
      rows_of_file = [
        {**row, 'kept': int(mark)}
        for row, mark in zip(r.transcripts, marks, strict=True)
      ]
      with rollouts.holding(current):  # the disk may be full
        transcripts.save_round(run_dir, current.number, int(state.step), rows_of_file)
      info |= {'kept/rows': len(rows), 'kept/prompts': len({*(rows // r.group)})}
      if len(rows):
        chosen: dict[str, Any] = dict(
          tokens=np.asarray(r.tokens)[rows], mask=np.asarray(r.mask)[rows]
        )
        steps = epochs * -(-len(rows) // batch_size)
        data.begin(Batch(**chosen), current.number, steps)
        return info
    raise ValueError(
      f'no completion was kept in {PATIENCE} rounds: choose easier prompts, a larger '
      "rollouts.group, or keep='best'"
    )

  return Algorithm(next_batch, loss, data, batch_size, asks_policy=True)


def kept(rollouts: Rollouts, keep: str, per_prompt: int) -> np.ndarray:
  """Rows to imitate, in order: no prompt twice with the same completion."""
  rewards = np.asarray(rollouts.rewards, np.float64).reshape(-1, rollouts.group)
  rows = []
  for prompt, scores in enumerate(rewards):
    texts: set[str] = set()
    # Best first; a stable sort leaves equals in the order they were sampled.
    for index in np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind='stable'):
      row = prompt * rollouts.group + int(index)
      transcript = rollouts.transcripts[row]
      right = transcript['outcome'] == 'verified'
      if (right if keep == 'verified' else np.isfinite(scores[index])) and (
        len(texts) < per_prompt and transcript['completion'] not in texts
      ):
        texts.add(transcript['completion'])
        rows.append(row)
  return np.array(rows, int)
