"""What algorithms that learn from rounds of their own samples have in common.

round      prompts × group completions of the policy, judged       rollouts/rounds.py
batch      all of them, scored again by the policy; each algorithm makes its own of it
updates    epochs (μ) × minibatches of whole groups, each pass in an order of its own
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from educe import sharding
from educe.data.sharing import restore
from educe.data.tokenizer import Tokenizer
from educe.losses.logprobs import score
from educe.progress import say
from educe.rollouts import transcripts
from educe.rollouts.joining import rows_of
from educe.rollouts.position import Position
from educe.rollouts.rounds import Round, Rounds
from educe.types import Batch, LossFn, Model, Params, Rollouts, TrainState

Made = tuple[Batch, dict[str, Any]]
Prepare = Callable[[TrainState, Round], Made]


def check(
  rollouts: Rounds,
  loss: LossFn,
  epochs: int,
  minibatches: int,
  reference_every: int | None,
) -> None:
  """Raises ValueError for passes that cannot be; warns of what is off policy unweighed."""
  rollouts.must_score()
  if epochs < 1 or minibatches < 1 or rollouts.prompts % minibatches:
    raise ValueError(
      f'algorithm: {epochs=} and {minibatches=} must be at least 1, and '
      f'rollouts.prompts={rollouts.prompts} a multiple of minibatches'
    )
  if (reference_every or 0) < 0:
    raise ValueError(f'algorithm: {reference_every=} must be ≥ 0')
  settings = getattr(loss, 'keywords', {})
  if epochs * minibatches > 1 and settings.get('objective') == 'reinforce':
    say(
      f"warning: loss.objective='reinforce' has no ratio, and with {epochs=} × "
      f"{minibatches=} most updates are off policy; 'clip' has one"
    )
  why = None
  if rollouts.publisher is not None:
    why = 'rollouts.server samples with other kernels than those that train'
  if rollouts.behind:
    why = 'rollouts.ahead samples from the policy of a round ago'
    if not rollouts.ahead:
      why = 'rollouts.server.export_every > 1 samples from the policy of rounds ago'
  if why and settings.get('sampler_correction', 'none') == 'none':
    say(
      f"warning: {why}, and loss.sampler_correction='none' does not weigh that; "
      "'token_truncate' does"
    )


def scoring(model: Model, temperature: float) -> Callable[..., Any]:
  """The jitted `parts(params, batch) -> (log-probs, values)` of a batch, `[B, T]`."""

  @jax.jit
  def parts(params, batch):
    scores = score(model, params, batch, temperature=temperature)
    return scores.logp, scores.values

  return parts


def reader(
  model: Model, rollouts: Rounds, place: Callable[..., Batch], size: int
) -> Callable[..., tuple[np.ndarray, np.ndarray | None]]:
  """read(params, tokens [B, T], mask) -> (log-probs, values) `[B, T]` on the host, at the
  sampling temperature, `size` rows at a time. Log-probs are 0 where the mask is; values
  are not, and None without a value head."""

  parts = scoring(model, rollouts.temperature)

  def read(params: Params, tokens, mask):
    # A value is read behind the last token as well, where a shared row may have ended.
    shares = rollouts.group if model.values is None else 1
    params = sharding.to_device(params)
    cuts = [slice(at, at + size) for at in range(0, len(tokens), size)]
    batches = [place(Batch(tokens[cut], mask[cut]), shares) for cut in cuts]
    with sharding.using_that_of(params):
      found = sharding.fetch([parts(params, batch) for batch in batches])
    logp = [
      restore(x, batch, tokens.shape[1])
      for batch, (x, _) in zip(batches, found, strict=True)
    ]
    if model.values is None:
      return np.concatenate(logp), None
    return np.concatenate(logp), np.concatenate([v for _, v in found])

  return read


def drawn_logp(rollouts: Rollouts) -> np.ndarray:
  """Log-probs under what the sampler drew from, after truncation, `[B, T]` (nats)."""
  drawn = np.asarray(rollouts.sampler_logp)
  return drawn if rollouts.kept is None else drawn - np.log(rollouts.kept)


def walk(
  data: Position,
  prepare: Prepare,
  epochs: int,
  minibatches: int,
  *,
  greedy: bool = False,
) -> Callable[[TrainState], Made]:
  """next_batch(state) -> (batch, info): a minibatch; info is a round's, at its first.

  Args:
    prepare: (state, Round) -> the whole round as one batch, and its numbers
    greedy: rounds also judge the greedy completion of each prompt
  """
  rollouts = data.rollouts

  def next_batch(state: TrainState) -> Made:
    info: dict[str, Any] = {}
    if data.spent:
      current = rollouts.next(state.params, int(state.step), greedy=greedy)
      with rollouts.holding(current):  # the disk may be full
        whole, info = prepare(state, current)
      data.begin(whole, current.number, epochs * minibatches)
    groups = data.take(rollouts.prompts, rollouts.prompts // minibatches)
    if epochs * minibatches == 1:
      groups.sort()  # the whole round, as it was sampled
    return data.rows(rows_of(groups, rollouts.group)), info

  return next_batch


def write(
  run_dir: pathlib.Path,
  tokenizer: Tokenizer,
  current: Round,
  batch: Batch,
  seen: np.ndarray | None,
  step: int,
) -> None:
  """rollouts/<round>.jsonl: every completion with its reward, its advantage, its tokens
  and, where the policy scored them again (`seen`), log π_old − the sampler's log-prob."""
  said = np.asarray(current.rollouts.mask) > 0
  starts = np.cumsum(said.sum(-1))[:-1]

  def by_row(x):
    """What stands where a completion is: a list a row."""
    return [part.tolist() for part in np.split(np.asarray(x)[said], starts)]

  tokens, advantages = by_row(batch.tokens), by_row(batch.advantages)
  texts = {token: tokenizer.decode([token]) for token in set().union(*tokens)}
  rows = [
    {
      **transcript,
      'advantage': sum(values) / max(len(values), 1),
      'tokens': [texts[token] for token in ids],
      'advantages': [round(value, 5) for value in values],
    }
    for transcript, ids, values in zip(
      current.rollouts.transcripts, tokens, advantages, strict=True
    )
  ]
  if seen is not None:
    for row, ratios in zip(rows, by_row(seen - batch.sampler_logp), strict=True):
      row['log_ratio'] = [round(value, 6) for value in ratios]
  transcripts.save_round(run_dir, current.number, step, rows)
