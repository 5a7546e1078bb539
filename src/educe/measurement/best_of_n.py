"""Best-of-n: what the best of n samples earns, and how far choosing it moves the policy.

Of n completions drawn from p0 the one with the highest score is kept. With N ≥ n samples
at hand, every subset of n of them is one such draw, and the mean over all subsets is

  R̂_n = Σ_i v_i · [C(≤_i, n) − C(<_i, n)] / ((≤_i − <_i) · C(N, n))

(≤_i, <_i: how many samples score no more, less, than i; v_i what i is worth), an unbiased
estimate from each N (Jacob Hilton & Leo Gao, "Measuring Goodhart's law", OpenAI, 2022; for
gold against proxy as in Leo Gao et al., 2022, arXiv:2210.10760). Where all outcomes are
known, the policy itself is

  π_n(y) = p0(y) · [F(s_y)ⁿ − F(s_y⁻)ⁿ] / p0(score = s_y)      F(s) = p0(score ≤ s)

and KL(π_n‖p0) ≤ log n − (n−1)/n: equal where no two samples ever have the same score, an
upper bound for every other p0, and a loose one once n·p0(best) is large (Ahmad Beirami et
al., "Theoretical guarantees on the best-of-n alignment policy", 2024, arXiv:2401.01879).

Equal scores are broken at random throughout. NumPy, float64.
"""

from __future__ import annotations

import math

import numpy as np


def expected(
  scores: np.ndarray, n: int, *, worth: np.ndarray | None = None
) -> np.ndarray:
  """R̂_n, `[…]`: the mean worth of the best of n, from N samples of each prompt.

  scores: `[…, N]`, by which the best is chosen (the proxy)
  worth: `[…, N]`, what is averaged (the gold reward); None: the scores themselves

  Unbiased for independent samples; estimates at several n share them, and so are
  correlated.

  Raises ValueError unless 1 ≤ n ≤ N, all numbers are finite and the shapes agree.
  """
  scores = np.asarray(scores, np.float64)
  worth = scores if worth is None else np.asarray(worth, np.float64)
  if scores.ndim < 1 or worth.shape != scores.shape:
    raise ValueError(
      f'best of n: worth {list(worth.shape)} and scores {list(scores.shape)} must have '
      'one shape, samples last'
    )
  size = scores.shape[-1]
  if not 1 <= n <= size:
    raise ValueError(f'best of n: n={n} must be between 1 and the {size} samples')
  if not (np.isfinite(scores).all() and np.isfinite(worth).all()):
    raise ValueError('best of n: a score is not finite; leave its sample out')
  # C(m, n)/C(N, n) for m = N … 0, by C(m−1, n) = C(m, n)·(m−n)/m.
  m = np.arange(size, 0, -1)
  share = np.concatenate([[1.0], np.cumprod(np.maximum(m - n, 0) / m)])[::-1]
  weights = np.empty_like(scores)
  for index in np.ndindex(scores.shape[:-1]):
    row = scores[index]
    ranked = np.sort(row)
    below = np.searchsorted(ranked, row, 'left')
    upto = np.searchsorted(ranked, row, 'right')
    weights[index] = (share[upto] - share[below]) / (upto - below)
  return (weights * worth).sum(-1)


def policy(p0: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
  """π_n, `[…, N]`: the exact distribution of the best of n, over all N outcomes.

  p0: `[…, N]`, sums to 1 · scores: `[…, N]`, finite

  Raises ValueError for n < 1, a score that is not finite, or a p0 that is no
  distribution.
  """
  p0, scores = np.broadcast_arrays(
    np.asarray(p0, np.float64), np.asarray(scores, np.float64)
  )
  if n < 1:
    raise ValueError(f'best of n: n={n} must be 1 or more')
  if not np.isfinite(scores).all():
    raise ValueError('best of n: a score is not finite')
  if (p0 < 0).any() or not np.allclose(p0.sum(-1), 1, rtol=0, atol=1e-6):
    raise ValueError(f'best of n: p0 sums to {p0.sum(-1)}, not to 1 over its last axis')
  out = np.empty(p0.shape)
  for index in np.ndindex(p0.shape[:-1]):
    _, group = np.unique(-scores[index], return_inverse=True)  # 0 is the best
    mass = np.bincount(group, weights=p0[index])
    # From the tail of the best: 1 − F loses no digits where F itself rounds to 1.
    over = np.concatenate([[0.0], np.minimum(np.cumsum(mass), 1)])
    with np.errstate(divide='ignore', invalid='ignore'):
      log_f = np.log1p(-over)  # F(s) of group k stands at k, F(s⁻) at k + 1
      chance = -np.exp(n * log_f[:-1]) * np.expm1(n * np.diff(log_f))
      per_mass = np.where(mass > 0, chance / mass, 0.0)
    out[index] = p0[index] * per_mass[group]
  return out


def kl_bound(n: int) -> float:
  """log n − (n−1)/n, nats: KL(π_n‖p0) where scores never tie, else more than it.

  Raises ValueError for n < 1.
  """
  if n < 1:
    raise ValueError(f'best of n: n={n} must be 1 or more')
  return math.log(n) - (n - 1) / n
