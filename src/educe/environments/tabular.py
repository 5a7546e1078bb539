"""A world small enough to know the answer: N outcomes, a reward for each, closed forms.

With a base policy p0 and temperature β, the policy that maximises E_π[r] − β·KL(π‖p0) is

  g(y) = p0(y)·e^{r(y)/β} / Z          (Gibbs)        Z = Σ_y p0(y)·e^{r(y)/β}

and F = −β·log Z = min_π {−E_π[r] + β·KL(π‖p0)} is its free energy: any other policy π
misses it by exactly β·KL(π‖g). A KL loss that is differentiated naively as k3 maximises
E_π[r] − β·KL(p0‖π) instead, whose optimum is

  π(y) = β·p0(y) / (λ − r(y))          λ > max r such that Σ_y π(y) = 1

(λ > max r, for a probability is positive; the sum falls from ∞ to 0 in λ, so there is
one.) GRPO's standard deviation multiplies the policy gradient of a prompt that is solved
with probability p by

  c_G(p) = E[√(k(1−k))] / (p(1−p)),    k ~ Binomial(G, p)/G,  s with ddof=0

in place of the 1 of RLOO and the (G−1)/G of Dr. GRPO; ddof=1 multiplies it by √((G−1)/G).

Sources: the Gibbs policy: Brian Ziebart et al., 2008; Rafael Rafailov et al., 2023, eq. 4,
arXiv:2305.18290. The k3 fixed point and c_G are derived here and held by tests.

All probabilities are `[…, N]` over the last axis, NumPy, float64; KL and free energy are
in nats and units of reward.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from educe.types import Environment, Turn


def make(
  *, size: int, outcomes: int = 12, correct: int | None = None, seed: int = 0
) -> Environment:
  """`size` prompts; a completion names one of `outcomes` numbers and is paid its reward.

  correct: so many outcomes of each prompt pay 1, the others 0; None: rewards are spread
    over [0, 1], the best 1 and the worst 0

  A record has `rewards`, the pay of each outcome, and `answer`, the first that pays 1.
  Turn.info has `outcome` ('verified' if it paid 1, 'wrong', 'unparsable') and `answer`.

  Raises ValueError unless size ≥ 1, outcomes ≥ 2 and 1 ≤ correct < outcomes.
  """
  if size < 1 or outcomes < 2:
    raise ValueError(
      f'size={size} must be 1 or more, and outcomes={outcomes} 2 or more'
    )
  if correct is not None and not 1 <= correct < outcomes:
    raise ValueError(f'correct={correct} must be between 1 and outcomes − 1')
  prompts = []
  for index in range(size):
    rewards = _rewards(np.random.default_rng([seed, index]), outcomes, correct)
    text = f'Game {index}: name a number from 0 to {outcomes - 1}.'
    prompts.append(
      {
        'id': f'tabular-{seed}-{index}',
        'prompt': [{'role': 'user', 'content': text}],
        'answer': str(int(rewards.argmax())),
        'rewards': rewards.tolist(),
      }
    )
  return Environment(prompts, functools.partial(_respond, outcomes))


def gibbs(p0: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
  """The optimum of E_π[r] − β·KL(π‖p0), `[…, N]`."""
  tilted = _log(p0) + np.asarray(reward, np.float64) / _positive(beta)
  weights = np.exp(tilted - tilted.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def free_energy(p0: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
  """F = −β·log Z, `[…]`, in units of reward."""
  tilted = _log(p0) + np.asarray(reward, np.float64) / _positive(beta)
  return -beta * np.logaddexp.reduce(tilted, axis=-1)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
  """KL(p‖q) = Σ_y p·log(p/q), `[…]`, nats; 0·log 0 is 0."""
  p = np.asarray(p, np.float64)
  difference = np.where(p > 0, _log(p), 0) - np.where(p > 0, _log(q), 0)
  return np.where(p > 0, p * difference, 0).sum(-1)


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
  """½·Σ_y |p − q|, `[…]`: the most that any event's probability differs."""
  return np.abs(np.asarray(p, np.float64) - q).sum(-1) / 2


def objective(
  policy: np.ndarray, p0: np.ndarray, reward: np.ndarray, beta: float
) -> np.ndarray:
  """E_π[r] − β·KL(π‖p0), `[…]`; at most −free_energy, by β·KL(π‖gibbs)."""
  return (np.asarray(policy, np.float64) * reward).sum(-1) - beta * kl(policy, p0)


def policy_gradient(policy: np.ndarray, reward: np.ndarray) -> np.ndarray:
  """∇_θ E_π[r] = π·(r − E_π[r]) for π = softmax(θ), `[…, N]`."""
  policy = np.asarray(policy, np.float64)
  return policy * (reward - (policy * reward).sum(-1, keepdims=True))


def k3_fixed_point(p0: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
  """β·p0/(λ − r), `[…, N]`: where a naive k3 in the loss leads."""
  p0 = np.asarray(p0, np.float64)
  gap = np.max(reward, -1, keepdims=True) - reward  # λ − r = (λ − max r) + gap
  # Σ π ≥ β·p0(best)/(λ − max r) and ≤ β/(λ − max r), so the root lies between:
  low = _positive(beta) * np.where(gap == 0, p0, 0).sum(-1, keepdims=True)
  high = np.full_like(low, beta)
  for _ in range(200):  # halvings; a float64 has no more than about 60 of use
    middle = (low + high) / 2
    over = (beta * p0 / (middle + gap)).sum(-1, keepdims=True) > 1
    low, high = np.where(over, middle, low), np.where(over, high, middle)
  policy = beta * p0 / (high + gap)
  return policy / policy.sum(-1, keepdims=True)


def group_weight(p: float, group: int, *, ddof: int = 0) -> float:
  """c_G(p), by which group_relative(std=True) multiplies a 0/1 reward's gradient.

  Raises ValueError unless 0 < p < 1 and group ≥ 2.
  """
  if not 0 < p < 1 or group < 2:
    raise ValueError(
      f'group_weight: p={p} must be in (0, 1) and group={group} at least 2'
    )
  total = 0.0
  for wins in range(group + 1):
    chance = math.comb(group, wins) * p**wins * (1 - p) ** (group - wins)
    share = wins / group
    total += chance * math.sqrt(share * (1 - share))
  return total / (p * (1 - p)) * math.sqrt((group - ddof) / group)


def _rewards(
  rng: np.random.Generator, outcomes: int, correct: int | None
) -> np.ndarray:
  if correct is not None:
    return rng.permutation(np.arange(outcomes) < correct).astype(np.float64)
  rewards = rng.random(outcomes)
  return (rewards - rewards.min()) / (rewards.max() - rewards.min())


def _respond(
  outcomes: int, prompt: Mapping[str, Any], transcript: Sequence[str]
) -> Turn:
  named = re.fullmatch(r'\s*([0-9]{1,9})\s*', transcript[-1])
  if named is None or int(named[1]) >= outcomes:
    return Turn(None, 0.0, True, {'outcome': 'unparsable', 'answer': None})
  reward = float(prompt['rewards'][int(named[1])])
  outcome = 'verified' if reward == 1 else 'wrong'
  return Turn(None, reward, True, {'outcome': outcome, 'answer': named[1]})


def _log(p) -> np.ndarray:
  with np.errstate(divide='ignore'):
    return np.log(np.asarray(p, np.float64))


def _positive(beta: float) -> float:
  if not beta > 0:
    raise ValueError(f'beta={beta} must be positive')
  return beta
