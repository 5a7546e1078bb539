"""From the rewards of a whole batch to advantages. Host side, float64, before the step.

Rewards are `[B]`, group-major: rows i·G … i·G+G−1 share prompt i. r̄ is the mean of a
group, s its standard deviation. A reward of NaN was not scored: its row is in no
statistic and gets advantage 0.

  group_relative      (r − r̄) / (s + eps), or r − r̄     GRPO; Dr. GRPO with std=False
  rloo                r − mean of the others in its group
  batch_whitened      (r − mean of the batch) / (std of the batch + eps)
  reinforce_plus_plus whitened returns, with the KL in the reward, or its `baseline` form
  remax               r − r(greedy completion of the same prompt)
  pass_at_k           k · E over k−1 of the others of (r − their best)₊

With a critic rewards and values are `[B, T]`, a number for each token:

  gae                 Σ_l (γλ)^l·δ_{t+l}, δ_t = r_t + γ·V_{t+1} − V_t
  whitened            (x − mean) / (std + eps) over the trained tokens of the batch

Sources: GRPO: Zhihong Shao et al., "DeepSeekMath", 2024, §4.1, arXiv:2402.03300. Dr. GRPO:
Zichen Liu et al., 2025, §3.2, arXiv:2503.20783. RLOO: Arash Ahmadian et al., "Back to
basics", 2024, §3, arXiv:2402.14740. REINFORCE++: Jian Hu et al., 2025, arXiv:2501.03262.
ReMax: Ziniu Li et al., 2023, arXiv:2310.10505. pass@k: Christian Walder and Deep
Karkhanis, "Pass@K policy optimization", 2025, s^(loo−1), arXiv:2505.15201. GAE: John
Schulman et al., 2015, eqs. 11–16, arXiv:1506.02438.

Differs from the papers: DeepSeekMath does not say which standard deviation; ours divides
by n − ddof with ddof=1, as most code does. eps is added to it, 1e-6. Rows whose rewards
are all equal get exactly 0, not a rounding residue divided by eps.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from educe.kernels import advantage as on_device

EPS = 1e-6


def group_relative(
  rewards: ArrayLike,
  group: int,
  *,
  std: bool = True,
  ddof: int = 1,
  eps: float = EPS,
) -> np.ndarray:
  """GRPO's (r − r̄) / (s + eps), `[B]`; r − r̄ (Dr. GRPO's) with std=False.

  ddof: s² divides by n − ddof, n the scored rows of the group; 0 where n ≤ ddof

  Raises ValueError for groups of one, or rows that are not whole groups.
  """
  r = _groups(rewards, group, 'group_relative')
  centred = _centred(r)
  return (centred / (_std(r, ddof) + eps) if std else centred).reshape(-1)


def rloo(rewards: ArrayLike, group: int) -> np.ndarray:
  """r_i − mean_{j≠i} r_j = n/(n−1) · (r_i − r̄), `[B]`, n the scored rows of the group.

  A row that alone is scored gets 0. Raises ValueError as `group_relative` does.
  """
  r = _groups(rewards, group, 'rloo')
  n = np.isfinite(r).sum(-1, keepdims=True)
  return (_centred(r) * n / np.maximum(n - 1, 1)).reshape(-1)


def batch_whitened(
  rewards: ArrayLike, group: int = 1, *, ddof: int = 1, eps: float = EPS
) -> np.ndarray:
  """(r − mean) / (std + eps) over all scored rows, `[B]`. Every row counts once."""
  r = _groups(rewards, group, None).reshape(1, -1)
  return (_centred(r) / (_std(r, ddof) + eps)).reshape(-1)


def reinforce_plus_plus(
  rewards: ArrayLike,
  group: int = 1,
  mask: ArrayLike | None = None,
  kl: ArrayLike | None = None,
  *,
  kl_coef: float = 0.0,
  baseline: bool = False,
  ddof: int = 1,
  eps: float = EPS,
) -> np.ndarray:
  """REINFORCE++: returns r − kl_coef·Σ_{s≥t} kl_s, whitened over the batch's tokens.

  Without `mask`, no KL: `[B]`, each row counted once. With it: `[B, T]`, each trained
  token counted once, so that a long completion weighs more; 0 where the mask is 0.

  Args:
    mask: [B, T], 1 where a token is trained on; other tokens are stepped over.
    kl: [B, T], log π_old − log π_ref of the sampled tokens (k1, nats).
    baseline: r − r̄ in place of r (the paper's REINFORCE++-baseline, whose KL belongs in
      the loss). Only divided by the std, not shifted: a group whose rewards are all
      equal stays at exactly 0. Without a mask the mean is 0 anyway.

  Raises ValueError for kl_coef without kl and mask or with baseline, for a baseline over
  groups of one, and for rows that are not whole groups.
  """
  if kl_coef and (kl is None or mask is None):
    raise ValueError(f'reinforce_plus_plus: kl_coef={kl_coef} needs kl and mask')
  if kl_coef and baseline:
    raise ValueError(
      f'reinforce_plus_plus: baseline=True with kl_coef={kl_coef}: put the KL into the '
      "loss (config.loss.kl_coef, kl_estimator='k2')"
    )
  r = _groups(
    rewards, group, 'reinforce_plus_plus(baseline=True)' if baseline else None
  )
  r = (np.where(np.isnan(r), np.nan, _centred(r)) if baseline else r).reshape(-1, 1)
  trained = np.ones_like(r) if mask is None else np.asarray(mask)
  returns = np.where(trained > 0, r, np.nan)
  if kl is not None and kl_coef:
    penalty = np.where(trained > 0, kl, 0).astype(np.float64)
    returns = returns - kl_coef * np.cumsum(penalty[:, ::-1], -1)[:, ::-1]
  flat = returns.reshape(1, -1)
  shifted = np.nan_to_num(flat) if baseline else _centred(flat)
  out = (shifted / (_std(flat, ddof) + eps)).reshape(returns.shape)
  return out[:, 0] if mask is None else out


def remax(rewards: ArrayLike, group: int, greedy: ArrayLike) -> np.ndarray:
  """r − r(greedy), `[B]`. A prompt whose greedy reward is NaN gets 0.

  greedy: [P], reward of the greedy completion of each prompt

  Raises ValueError if `greedy` is not one reward a prompt.
  """
  r = _groups(rewards, group, None)
  b = np.asarray(greedy, np.float64)
  if b.shape != (len(r),):
    raise ValueError(
      f'remax: greedy has shape {b.shape}; {len(r)} prompts need one each'
    )
  return np.nan_to_num(r - b[:, None]).reshape(-1)


def pass_at_k(rewards: ArrayLike, group: int, *, k: int) -> np.ndarray:
  """Advantages that ascend E[the best reward of k samples], `[B]`.

  A_i = k · mean over the (k−1)-subsets S of the others of (max(r_i, max_S r) − max_S r)

  so that (1/n) Σ_i A_i ∇log π(y_i) is unbiased for ∇ E[max of k]: pass@k if rewards are
  0 or 1. Never negative; 0 for whatever is not the best of some subset. It is n · s_i
  with s^(loo−1) of Walder and Karkhanis (2025), whose sum over i is our mean. A group
  with fewer than k scored rows gets 0. k=1 is `rloo`.

  Raises ValueError unless 2 ≤ k ≤ group.
  """
  r = _groups(rewards, group, 'pass_at_k')
  if not 2 <= k <= group:
    raise ValueError(f'pass_at_k: k={k} must be between 2 and group={group}')
  out = np.zeros_like(r)
  for row, values in zip(out, r, strict=True):
    scored = np.flatnonzero(np.isfinite(values))
    n = len(scored)
    if n < k:
      continue
    # P(the best of k−1 drawn from the n−1 others is the one at ascending rank m).
    chance = [math.comb(m, k - 2) / math.comb(n - 1, k - 1) for m in range(n - 1)]
    for i in scored:
      others = np.sort(values[scored[scored != i]])
      row[i] = k * np.dot(chance, np.maximum(values[i] - others, 0))
  return out.reshape(-1)


def gae(
  rewards: ArrayLike,
  values: ArrayLike,
  mask: ArrayLike,
  *,
  gamma: float = 1.0,
  lam: float = 0.95,
  bootstrap: ArrayLike | None = None,
  segments: ArrayLike | None = None,
  implementation: str | None = 'numpy',
) -> tuple[np.ndarray, np.ndarray]:
  """(advantages, returns = advantages + values), `[B, T]`, 0 where the mask is 0.

  Token t is an action, its value that of the state which it was drawn from. Tokens that
  the policy did not draw (mask 0: prompts, observations, padding) are no steps in time:
  δ and the chain of λ go over them, to the next token that it drew, and whatever stands
  there, NaN too, is never read.

  Args:
    rewards, values: [B, T], of each token drawn
    gamma, lam: γ, λ in [0, 1]
    bootstrap: [B, T], read at the last drawn token of a sequence alone: the value of the
      state that it leads to, where the sequence was cut off rather than ended. None: 0.
    segments: [B, T], of packed rows; a sequence ends where they change. None: one a row.
    implementation: 'numpy', here in float64; a name of kernels/advantage, on the device
      in float32; None: the device's best

  Raises ValueError for γ or λ outside [0, 1], arrays of different shapes, and an unknown
  implementation.
  """
  given = dict(rewards=rewards, values=values, bootstrap=bootstrap, segments=segments)
  arrays = {name: np.asarray(x) for name, x in given.items() if x is not None}
  trained = np.asarray(mask)
  on_device.check(gamma, lam, trained, **arrays)
  if implementation != 'numpy':
    a, returns = on_device.gae(
      mask=trained, gamma=gamma, lam=lam, implementation=implementation, **arrays
    )
    return np.asarray(a, np.float64), np.asarray(returns, np.float64)
  drawn = trained > 0
  r, v, ahead = (
    np.where(drawn, arrays.get(name, 0.0), 0).astype(np.float64)
    for name in ('rewards', 'values', 'bootstrap')
  )
  which = arrays.get('segments', np.zeros(drawn.shape, int))
  advantages = np.zeros(drawn.shape)
  rows = len(drawn)
  # Of the token drawn next, as the scan goes backwards: its value, advantage, segment.
  value, advantage, segment = np.zeros(rows), np.zeros(rows), np.full(rows, -1)
  for t in reversed(range(drawn.shape[1])):
    here, ends = drawn[:, t], which[:, t] != segment
    delta = r[:, t] + gamma * np.where(ends, ahead[:, t], value) - v[:, t]
    new = delta + gamma * lam * np.where(ends, 0, advantage)
    advantages[:, t] = np.where(here, new, 0)
    value = np.where(here, v[:, t], value)
    advantage = np.where(here, new, advantage)
    segment = np.where(here, which[:, t], segment)
  return advantages, advantages + v


def whitened(
  x: ArrayLike,
  mask: ArrayLike,
  *,
  centre: bool = True,
  ddof: int = 1,
  eps: float = EPS,
) -> np.ndarray:
  """(x − mean) / (std + eps) over the trained tokens of the batch, `[B, T]`; else 0.

  centre: False adds the mean again, so that only the spread is normalised (for rewards).
  With fewer than two tokens, or all equal, what is centred is 0.
  """
  there = np.asarray(mask) > 0
  flat = np.where(there, x, np.nan).astype(np.float64).reshape(1, -1)
  out = _centred(flat) / (_std(flat, ddof) + eps)
  if not centre and there.any():
    out = out + np.nanmean(flat)
  return np.where(there, out.reshape(there.shape), 0.0)


def _groups(rewards, group: int, relative: str | None) -> np.ndarray:
  """`[P, G]` in float64. `relative` names a baseline that needs groups of two or more."""
  r = np.asarray(rewards, np.float64)
  if r.ndim != 1 or group < 1 or len(r) % group:
    raise ValueError(
      f'rewards of shape {r.shape} are not rows of whole groups of group={group}'
    )
  if np.isinf(r).any():
    raise ValueError(
      f'rewards[{int(np.isinf(r).argmax())}] is infinite; NaN means not scored'
    )
  if relative and group < 2:
    raise ValueError(
      f'{relative} compares the completions of a prompt: group={group} must be 2 or more '
      '(config.rollouts.group)'
    )
  return r.reshape(-1, group)


def _centred(r):
  """r − mean of each row's scored entries; 0 where not scored or where all are equal."""
  scored = np.isfinite(r)
  n = np.maximum(scored.sum(-1, keepdims=True), 1)
  mean = np.where(scored, r, 0).sum(-1, keepdims=True) / n
  high = np.where(scored, r, -np.inf).max(-1, keepdims=True)
  low = np.where(scored, r, np.inf).min(-1, keepdims=True)
  # 0.35 × 7 has no exact mean: its residue, divided by eps, would be an advantage.
  return np.where(scored & (high > low), r - mean, 0.0)


def _std(r, ddof: int):
  """Standard deviation of each row's scored entries; ∞ where n ≤ ddof, which gives 0."""
  n = np.isfinite(r).sum(-1, keepdims=True)
  squares = (_centred(r) ** 2).sum(-1, keepdims=True)
  return np.where(n > ddof, np.sqrt(squares / np.maximum(n - ddof, 1)), np.inf)
