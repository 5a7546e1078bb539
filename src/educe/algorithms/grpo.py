"""GRPO and its kin: rounds of rollouts → advantages → clipped updates.

  round      prompts × group completions of the policy, judged       rollouts/rounds.py
  advantages from the rewards of the whole round, on the host    losses/advantages.py
  updates    epochs (μ) × minibatches of whole groups, old_logp fixed at their start

The loss decides what is done with them (losses/grpo.py); GRPO, Dr. GRPO, DAPO, GSPO,
CISPO, RLOO, REINFORCE++ and SAPO are presets of these parts in configs/grpo.py.
"""

from __future__ import annotations

import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from educe.algorithms import on_policy
from educe.data.tokenizer import Tokenizer
from educe.losses.dry_run import dry_run
from educe.models.parts import over
from educe.rollouts import statistics
from educe.rollouts.position import Position
from educe.rollouts.rounds import Round, Rounds
from educe.types import Algorithm, Batch, LossFn, Model, Rollouts, TrainState


def make(
  model: Model,
  tokenizer: Tokenizer,
  rollouts: Rounds,
  advantage: functools.partial,
  loss: LossFn,
  place: Callable[..., Batch],
  run_dir: pathlib.Path,
  *,
  epochs: int = 1,
  minibatches: int = 1,
  reference_every: int | None = None,
  kl_in_reward: float = 0.0,
  overlong_buffer: int = 0,
  drop_truncated: bool = False,
  drop_equal: bool = False,
) -> Algorithm:
  """Algorithm whose step is one minibatch; a round is epochs × minibatches steps.

  Writes rollouts/<round>.jsonl: every completion with its reward, its advantage, its
  tokens and, where the policy scored them again, log π_old − the sampler's log-prob.

  Args:
    epochs: μ, passes over a round's rollouts.
    minibatches: parts of a pass, of whole groups, in an order of its own.
    reference_every: None keeps no reference policy; 0 keeps the initial one; n copies
      the policy every n steps.
    kl_in_reward: β; each reward loses β·Σ_t (log π_old − log π_ref) of its completion
      (k1; nats). advantage reinforce_plus_plus has its own, token by token.
    overlong_buffer: tokens; DAPO's soft overlong punishment (eq. 13, arXiv:2503.14476):
      a completion loses from 0 to 1 as it goes through the last so many tokens of
      max_new_tokens.
    drop_truncated: completions that ran out of room are not trained on.
    drop_equal: nor are groups whose rewards (the environment's, or the judge's) are all
      equal. Relative to their group they have advantage 0, but their tokens count in
      the loss's average unless they are dropped.

  With top_k, top_p or min_p the sampler's log-probs are those of what they left
  standing, so that a correction against them is one for the truncation too.

  Raises ValueError for what cannot be, before anything is sampled: settings that the
  loss or the advantages refuse, groups that do not divide into minibatches.
  """
  on_policy.check(rollouts, loss, epochs, minibatches, reference_every)
  if not kl_in_reward >= 0:
    raise ValueError(f'algorithm: {kl_in_reward=} must be ≥ 0')
  if not 0 <= overlong_buffer <= rollouts.max_new_tokens:
    raise ValueError(
      f'algorithm.overlong_buffer={overlong_buffer} must be in 0..rollouts.'
      f'max_new_tokens={rollouts.max_new_tokens}'
    )
  if drop_equal and rollouts.group < 2:
    raise ValueError(
      f'algorithm.drop_equal=True would drop all: rollouts.group={rollouts.group} has '
      'nothing to differ from; set it to 2 or more, or drop_equal=False'
    )
  wants = inspect.signature(advantage.func).parameters
  needs_kl = bool(kl_in_reward or advantage.keywords.get('kl_coef'))
  if needs_kl and reference_every is None:
    raise ValueError(
      'a KL in the reward needs a reference policy: set algorithm.reference_every=0 '
      '(the initial one), or kl_in_reward=0 and advantage.kl_coef=0'
    )
  several = epochs * minibatches > 1
  scored = several or needs_kl or rollouts.behind

  def assign(rewards, **supply):
    named = {name: x for name, x in supply.items() if name in wants}
    return advantage(rewards, rollouts.group, **named)

  # What they refuse is said now.
  rows = rollouts.prompts * rollouts.group
  ones = np.ones((rows, 2), np.float32)
  try:
    assign(np.zeros(rows), mask=ones, kl=ones, greedy=np.zeros(rollouts.prompts))
  except ValueError as error:
    raise ValueError(f'config.advantage: {error}') from error
  asked = {'old_logp': scored, 'ref_logp': reference_every is not None}
  given = (name for name, there in asked.items() if there)
  fields = ('sampler_logp', 'advantages', *given)
  dry_run(loss, *fields)
  size = rollouts.prompts // minibatches * rollouts.group
  read = on_policy.reader(model, rollouts, place, size)

  def prepare(state: TrainState, current: Round) -> tuple[Batch, dict[str, Any]]:
    """The whole round as one batch."""
    r = current.rollouts
    mask, info = np.array(r.mask), dict(current.info)
    # The update may not need it, but the rounds that people look at show it.
    shown = rollouts.show_every and current.number % rollouts.show_every == 0
    # A round sampled ahead, before a restart that switched `ahead` off, is stale as well.
    needed = scored or current.step != int(state.step)
    seen = read(state.params, r.tokens, mask)[0] if needed or shown else None
    old = seen if needed else None
    ref = None
    if reference_every is not None:
      ref = read(over(state.params, state.reference), r.tokens, mask)[0]
    rewards = np.asarray(r.rewards, np.float64)
    if overlong_buffer:
      rewards = rewards - _overlong(r, rollouts.max_new_tokens, overlong_buffer)
    kl = None if old is None or ref is None else (old - ref) * mask
    if kl_in_reward:
      assert kl is not None
      rewards = rewards - kl_in_reward * kl.sum(-1)
      info['reward/kl'] = float(kl.sum(-1).mean())
    if drop_truncated:
      mask = mask * np.asarray(r.stopped)[:, None]
    if drop_equal:
      mask = mask * np.repeat(~statistics.equal(r), r.group)[:, None]
    values = assign(rewards, mask=mask, kl=kl, greedy=current.greedy)
    values = np.asarray(values if values.ndim == 2 else values[:, None] * mask)
    arrays: dict[str, Any] = dict(
      tokens=np.asarray(r.tokens),
      mask=mask,
      sampler_logp=on_policy.drawn_logp(r),
      old_logp=old,
      ref_logp=ref,
      advantages=(values * mask).astype(np.float32),
    )
    batch = Batch(**arrays)
    on_policy.write(run_dir, tokenizer, current, batch, seen, int(state.step))
    return batch, info

  data = Position(rollouts)
  next_batch = on_policy.walk(
    data, prepare, epochs, minibatches, greedy='greedy' in wants
  )
  return Algorithm(
    next_batch,
    loss,
    data,
    size,
    temperature=rollouts.temperature,
    reference_every=reference_every,
    asks_policy=True,
    shares=rollouts.group,
    fields=fields,
  )


def _overlong(rollouts: Rollouts, limit: int, buffer: int) -> np.ndarray:
  """What each row loses: 0 up to limit − buffer tokens, then linearly to 1 at limit."""
  lengths = np.asarray(rollouts.mask).sum(-1)
  return np.clip((lengths - (limit - buffer)) / buffer, 0, 1)
