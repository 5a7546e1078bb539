"""PPO for language models: rounds of rollouts → KL in the reward → GAE → clipped updates.

  r_t = −kl_coef·(log π_old(y_t) − log π_ref(y_t))  + [t is the last token]·score
  A, R = GAE(r, V; γ, λ), A whitened over the round's tokens     losses/advantages.py
  updates: epochs (μ) × minibatches of losses/ppo.py, π_old and V_old fixed at their start

With kl_target the coefficient follows the KL of a completion (nats; n completions a round):

  kl_coef ← kl_coef·(1 + clip(KL/kl_target − 1, −0.2, 0.2)·n/kl_horizon)

Daniel Ziegler et al., "Fine-tuning language models from human preferences", 2019, §2.2,
arXiv:1909.08593 (e_t and K_β = n/kl_horizon, as in their code); Nisan Stiennon et al.,
2020, arXiv:2009.01325; Long Ouyang et al., 2022, §3.5, arXiv:2203.02155.

Differs from the papers: advantages are whitened over the whole round, not each minibatch. A
completion without its end loses `missing_eos_penalty`; Ziegler et al. replace its score.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from educe.algorithms import on_policy
from educe.data.tokenizer import Tokenizer
from educe.kernels import advantage
from educe.losses import advantages as adv
from educe.losses.dry_run import dry_run
from educe.models.parts import over
from educe.rollouts.position import Position
from educe.rollouts.rounds import Round, Rounds
from educe.types import Algorithm, Batch, LossFn, Model, TrainState


def make(
  model: Model,
  tokenizer: Tokenizer,
  rollouts: Rounds,
  loss: LossFn,
  place: Callable[..., Batch],
  run_dir: pathlib.Path,
  *,
  epochs: int = 4,
  minibatches: int = 1,
  reference_every: int | None = 0,
  kl_coef: float = 0.05,
  kl_target: float | None = None,
  kl_horizon: int = 10_000,
  gamma: float = 1.0,
  lam: float = 0.95,
  gae: str | None = 'numpy',
  missing_eos_penalty: float = 0.0,
  bootstrap: bool = False,
  whiten: bool = True,
  whiten_rewards: bool = False,
  normalise_scores: bool = False,
) -> Algorithm:
  """Algorithm whose step is one minibatch; a round is epochs × minibatches steps.

  Writes rollouts/<round>.jsonl as algorithm grpo does. A completion that was not scored
  (NaN) is not trained on.

  Args:
    epochs: μ, passes over a round's rollouts.
    minibatches: parts of a pass, of whole groups (which may be of one), in an order of
      its own.
    reference_every: 0 keeps the initial policy as the reference; n copies the policy
      every n steps; None keeps none, which needs kl_coef=0.
    kl_coef: of the KL in the reward (k1; reward per nat); the first, with kl_target.
    kl_target: nats a completion that the coefficient is steered to; None: it stays.
    kl_horizon: completions; the larger, the slower it is steered.
    gamma, lam: γ and λ of GAE.
    gae: 'numpy' computes it on the host in float64; 'reference' and 'pallas' on the device
      in float32, None by whichever is best there (kernels/advantage).
    missing_eos_penalty: reward that a completion loses that ran out of room.
    bootstrap: such a completion is worth, at its end, what the critic expects to follow.
    whiten: advantages to mean 0 and standard deviation 1 over the round's tokens.
    whiten_rewards: the r_t to standard deviation 1, their mean kept.
    normalise_scores: by the mean and standard deviation (n − 1) of the first round's, the
      initial policy's: Ziegler et al., §2.1. The penalty and the KL are in that unit then.

  info, every step, of its round: objective/kl (nats a completion; k1), objective/kl_coef
    (used), objective/scores (mean; normalised, if they are), objective/non_score_reward
    (−kl_coef·KL, before whitening, and penalties), objective/rlhf_reward (their sum),
    objective/entropy (−log π of a completion), explained_variance (of the returns by
    V_old; over tokens), advantages/std (before whitening)

  Raises ValueError for what cannot be, before anything is sampled: a model without a value
  head, settings that the loss refuses, groups that do not divide into minibatches.
  """
  on_policy.check(rollouts, loss, epochs, minibatches, reference_every)
  rows = rollouts.prompts * rollouts.group
  wrong = None
  if model.values is None:
    wrong = "ppo needs a value head: add a section config.value = dict(trunk='shared')"
  elif not 0 <= kl_coef < math.inf:
    wrong = f'{kl_coef=} must be at least 0, and finite'
  elif kl_coef and reference_every is None:
    wrong = f'{kl_coef=} needs a reference policy: reference_every=0, or kl_coef=0'
  elif kl_target is not None and not (0 < kl_target < math.inf and kl_coef > 0):
    wrong = f'{kl_target=} must be above 0 (nats), with kl_coef={kl_coef} above 0 too'
  elif kl_target is not None and kl_horizon < rows:
    wrong = f'{kl_horizon=} must be at least the {rows} completions of a round'
  elif not (0 <= gamma <= 1 and 0 <= lam <= 1):
    wrong = f'{gamma=} and {lam=} must be in [0, 1]'
  elif gae not in (None, 'numpy', *advantage.IMPLEMENTATIONS):
    wrong = (
      f"{gae=} must be 'numpy', None or one of {sorted(advantage.IMPLEMENTATIONS)}"
    )
  elif not 0 <= missing_eos_penalty < math.inf:
    wrong = f'{missing_eos_penalty=} must be at least 0: it is subtracted'
  if wrong:
    raise ValueError(f'algorithm: {wrong}')
  given: tuple[str, ...]
  given = ('sampler_logp', 'old_logp', 'advantages', 'returns', 'old_values')
  given += () if reference_every is None else ('ref_logp',)
  dry_run(loss, *given)

  size = rollouts.prompts // minibatches * rollouts.group
  read = on_policy.reader(model, rollouts, place, size)
  read_alone = on_policy.reader(model._replace(values=None), rollouts, place, size)
  data = Position(rollouts)
  data.extra = {'kl_coef': kl_coef, 'moments': None, 'numbers': {}}

  def prepare(state: TrainState, current: Round) -> tuple[Batch, dict[str, Any]]:
    """The whole round as one batch."""
    r = current.rollouts
    tokens, drawn = np.asarray(r.tokens), np.asarray(r.mask)
    # A column more, for the state after a last token that fills its row.
    wide = np.pad(tokens, ((0, 0), (0, 1))), np.pad(drawn, ((0, 0), (0, 1)))
    old, values = read(state.params, *wide)
    assert values is not None
    after, old, values = values[:, 1:], old[:, :-1], values[:, :-1] * drawn
    ref = None
    if reference_every is not None:
      first = over(state.params, state.reference)
      ref = read_alone(first, tokens, drawn)[0]

    scores = np.asarray(r.rewards, np.float64)
    scored, cut = np.isfinite(scores), 1 - np.asarray(r.stopped)
    if normalise_scores and scored.any():
      data.extra['moments'] = data.extra['moments'] or _moments(scores[scored])
      mean, std = data.extra['moments']
      scores = (scores - mean) / std
    mask = drawn * scored[:, None]
    kl = np.zeros(mask.shape) if ref is None else (np.float64(old) - ref) * mask
    # A coefficient that is steered goes on from where it was; a fixed one may be changed.
    coef = kl_coef if kl_target is None else data.extra['kl_coef']
    rewards = -coef * kl
    shaped = np.where(scored, scores - missing_eos_penalty * cut, 0)
    last = mask.shape[1] - 1 - (drawn[:, ::-1] > 0).argmax(-1)
    rewards[np.arange(len(rewards)), last] += shaped
    numbers = _objective(old * mask, kl, coef, scores, shaped, scored)
    if whiten_rewards:
      rewards = adv.whitened(rewards, mask, centre=False)
    advantages, returns = adv.gae(
      rewards,
      values,
      mask,
      gamma=gamma,
      lam=lam,
      bootstrap=after * cut[:, None] if bootstrap else None,
      implementation=gae,
    )
    numbers |= _critic(advantages, returns, mask)
    if whiten:
      advantages = adv.whitened(advantages, mask)
    data.extra['numbers'] = numbers
    arrays: dict[str, Any] = dict(
      tokens=tokens,
      mask=mask,
      sampler_logp=on_policy.drawn_logp(r),
      old_logp=old,
      ref_logp=ref,
      advantages=advantages.astype(np.float32),
      returns=returns.astype(np.float32),
      old_values=(values * mask).astype(np.float32),
    )
    batch = Batch(**arrays)
    on_policy.write(run_dir, tokenizer, current, batch, old, int(state.step))
    # Last of all, for a round that was not written comes again. A KL that is no number
    # says nothing, and would be the coefficient's end.
    known = scored.any() and math.isfinite(numbers['objective/kl'])
    if kl_target is not None and known:
      error = np.clip(numbers['objective/kl'] / kl_target - 1, -0.2, 0.2)
      data.extra['kl_coef'] = float(coef * (1 + error * scored.sum() / kl_horizon))
    return batch, dict(current.info)

  walk = on_policy.walk(data, prepare, epochs, minibatches)

  def next_batch(state: TrainState) -> tuple[Batch, dict[str, Any]]:
    batch, info = walk(state)
    return batch, {**info, **data.extra['numbers']}

  return Algorithm(
    next_batch,
    loss,
    data,
    size,
    temperature=rollouts.temperature,
    reference_every=reference_every,
    asks_policy=True,
    shares=rollouts.group,
    fields=given,
  )


def _moments(scores: np.ndarray) -> tuple[float, float]:
  """(mean, standard deviation) of the first round's scores."""
  std = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
  if not std:
    raise ValueError(
      f'algorithm: normalise_scores=True, and the {len(scores)} scores of the first round '
      'do not differ; raise rollouts.prompts, or set it to False'
    )
  return float(scores.mean()), std


def _objective(logp, kl, coef, scores, shaped, scored) -> dict[str, float]:
  """Means over the completions that were scored."""
  count = max(scored.sum(), 1)
  kl_mean = kl.sum() / count
  score = np.where(scored, scores, 0).sum() / count
  other = shaped.sum() / count - score - coef * kl_mean
  return {
    'objective/kl': float(kl_mean),
    'objective/kl_coef': float(coef),
    'objective/scores': float(score),
    'objective/non_score_reward': float(other),
    'objective/rlhf_reward': float(score + other),
    'objective/entropy': float(-np.float64(logp).sum() / count),
  }


def _critic(advantages, returns, mask) -> dict[str, float]:
  """How much of the returns the critic knew: 1 − Var(R − V)/Var(R), R − V = A."""
  a, target = advantages[mask > 0], returns[mask > 0]
  spread = target.var() if len(target) else 0.0
  return {
    'explained_variance': float(1 - a.var() / spread) if spread > 0 else math.nan,
    'advantages/std': float(a.std()) if len(a) else math.nan,
  }
