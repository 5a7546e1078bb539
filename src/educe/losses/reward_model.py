"""Reward models: a scalar for a text, from comparisons, ratings or judged steps.

With r the value of a whole text, y its rating, c chosen, j rejected, and
z = r_c − r_j − margin·(y_c − y_j),

  bradley_terry  −(1−ε)·log σ(z) − ε·log σ(−z) + centre_coef·(r_c + r_j)²    (nats a pair)
  regression     ½·(r − y)²                                                  (a row)
  process        −y_t·log σ(V_t) − (1−y_t)·log σ(−V_t)                  (nats a step)

Bradley–Terry: Long Ouyang et al., "InstructGPT", 2022, eq. 1, arXiv:2203.02155. Margins:
Hugo Touvron et al., "Llama 2", 2023, eq. 2, arXiv:2307.09288. Centring: Jacob Eisenstein
et al., 2023, eq. 4, arXiv:2312.09244. Label smoothing: Binghai Wang et al., "Secrets of
RLHF II", 2024, §2.3, arXiv:2401.06080. Steps: Hunter Lightman et al., "Let's verify step
by step", 2023, arXiv:2305.20050.

Differs from the papers: Ouyang et al. take all pairs of K answers to a prompt as one
element of a batch; ours are pairs. Only differences of r are learned without centring.

A text is scored where the mask is 1: values[b, t] is of tokens[b, :t], so that a text of
n tokens has its score at column n, and its row one token more. Of several such places the
last counts.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from educe.losses import aggregate as agg
from educe.types import Batch, Mean, Scores

OBJECTIVES = ('bradley_terry', 'regression', 'process')


def loss(
  scores: Scores,
  batch: Batch,
  *,
  objective: str = 'bradley_terry',
  margin: float = 0.0,
  centre_coef: float = 0.0,
  label_smoothing: float = 0.0,
) -> tuple[Mean, dict[str, Mean]]:
  """The loss at the top of this file, and its metrics; one text a row.

  Reads scores.values `[B, T]`. Pairs are rows 2i (chosen) and 2i+1 (rejected); a pair with
  a row whose mask is 0 throughout is not counted.

  Args:
    objective: 'bradley_terry'; 'regression' on batch.labels `[B]` (NaN: not rated, not
      counted); 'process', steps judged 0 or 1 in batch.returns `[B, T]`, each where the
      mask is 1
    margin: by which a pair's difference in batch.labels is to be exceeded; 0 for none. A
      pair with a label of NaN has no margin.
    centre_coef: η, usually 0.01; keeps scores near 0
    label_smoothing: ε, share of pairs thought to be the wrong way round

  metrics, bradley_terry: rewards/{chosen, rejected, margins, accuracies} ·
    rewards/mean, rewards/mean_square: over all texts; std² = mean_square − mean² ·
    rewards/confidence: mean of σ(|r_c − r_j|), equal to the accuracy of a calibrated model
  regression: rewards/mean, rewards/mean_square, error/mean (r − y), error/absolute
  process: rewards/accuracies (of V > 0), rewards/confidence (as above),
    rewards/probability (mean of σ(V)), rewards/labels (their mean)

  Raises ValueError for a bad setting, one that another objective reads, or one that the
  batch has no arrays for.
  """
  _check(scores, batch, objective, margin, centre_coef, label_smoothing)
  assert scores.values is not None
  values = agg.clean(scores.values, batch.mask)
  if objective == 'process':
    return _process(values, batch)
  # The last marked place: none is marked after it.
  after = jnp.cumsum(batch.mask[:, ::-1] > 0, -1)[:, ::-1]
  reward = jnp.where((batch.mask > 0) & (after == 1), values, 0.0).sum(-1)
  there = (batch.mask > 0).any(-1)
  if objective == 'regression':
    return _regression(reward, there, batch)
  return _pairs(reward, there, batch, margin, centre_coef, label_smoothing)


def _pairs(reward, there, batch, margin, centre_coef, label_smoothing):
  pairs = there.reshape(-1, 2).all(-1)
  chosen, rejected = reward.reshape(-1, 2).T
  gap = chosen - rejected
  z = gap
  if margin:
    rated = batch.labels.reshape(-1, 2)
    z = z - margin * jnp.nan_to_num(rated[:, 0] - rated[:, 1], nan=0.0)
  term = -(1 - label_smoothing) * jax.nn.log_sigmoid(z)
  term = term - label_smoothing * jax.nn.log_sigmoid(-z)
  term = term + centre_coef * (chosen + rejected) ** 2
  both = jnp.repeat(pairs, 2)
  metrics = {
    'rewards/chosen': agg.over(chosen, pairs),
    'rewards/rejected': agg.over(rejected, pairs),
    'rewards/margins': agg.over(gap, pairs),
    'rewards/accuracies': agg.over((gap > 0) * 1.0, pairs),
    'rewards/mean': agg.over(reward, both),
    'rewards/mean_square': agg.over(reward**2, both),
    'rewards/confidence': agg.over(jax.nn.sigmoid(jnp.abs(gap)), pairs),
  }
  return agg.over(term, pairs), metrics


def _regression(reward, there, batch):
  rated = there & ~jnp.isnan(batch.labels)
  error = reward - jnp.where(rated, batch.labels, 0.0)
  metrics = {
    'rewards/mean': agg.over(reward, rated),
    'rewards/mean_square': agg.over(reward**2, rated),
    'error/mean': agg.over(error, rated),
    'error/absolute': agg.over(jnp.abs(error), rated),
  }
  return agg.over(error**2 / 2, rated), metrics


def _process(values, batch):
  y = agg.clean(batch.returns, batch.mask)
  term = -y * jax.nn.log_sigmoid(values) - (1 - y) * jax.nn.log_sigmoid(-values)
  metrics = {
    'rewards/accuracies': agg.token_mean(((values > 0) == (y > 0.5)) * 1.0, batch.mask),
    'rewards/confidence': agg.token_mean(jax.nn.sigmoid(jnp.abs(values)), batch.mask),
    'rewards/probability': agg.token_mean(jax.nn.sigmoid(values), batch.mask),
    'rewards/labels': agg.token_mean(y, batch.mask),
  }
  return agg.token_mean(term, batch.mask), metrics


def _check(scores, batch, objective, margin, centre_coef, label_smoothing) -> None:
  """One clear line for what cannot be."""
  if objective not in OBJECTIVES:
    raise ValueError(
      f'reward_model: objective={objective!r} is not one of {list(OBJECTIVES)}'
    )
  pairwise = dict(
    margin=margin, centre_coef=centre_coef, label_smoothing=label_smoothing
  )
  given = [f'{name}={x}' for name, x in pairwise.items() if x]
  wrong = None
  if scores.values is None:
    wrong = "the model has no value head: add a section config.value, trunk='shared'"
  elif given and objective != 'bradley_terry':
    wrong = f"{given[0]} belongs to objective='bradley_terry', not {objective!r}"
  elif not 0 <= label_smoothing < 0.5:
    wrong = f'label_smoothing={label_smoothing} must be in [0, 0.5)'
  elif not 0 <= centre_coef < math.inf:
    wrong = f'centre_coef={centre_coef} must be at least 0, and finite (0.01 is usual)'
  elif not 0 <= margin < math.inf:
    wrong = f'margin={margin} must be at least 0, and finite'
  elif batch.segments is not None:
    wrong = 'batch.segments is set: one text a row, with packing=False'
  elif objective == 'bradley_terry' and len(batch.mask) % 2:
    wrong = (
      f'{len(batch.mask)} rows are not pairs: chosen and rejected, one after another'
    )
  elif batch.labels is None and (margin or objective == 'regression'):
    need = f'{margin=}' if margin else f'{objective=}'
    wrong = f'{need} needs ratings (batch.labels), and these data have none'
  elif batch.returns is None and objective == 'process':
    wrong = "objective='process' needs judged steps (batch.returns)"
  if wrong:
    raise ValueError(f'reward_model: {wrong}')
