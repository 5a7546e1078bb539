"""What the base earns without training: the nulls that a trained policy has to beat.

A policy that only trusts its first guess more has been sharpened. Three ways to sharpen a
base at no training are majority voting (`majority`), the best of n samples by a verifier,
at as many sampled tokens as the policy spends, and the power base

  p_α(y) = p0(y)^α / Z          (α > 1 sharpens, α < 1 flattens; over whole sequences,

which is not a temperature of each token: Aayush Karan & Yilun Du, 2025, arXiv:2510.14901).
α is chosen on one part of the prompts and reported on the other. From samples of p0 with
their log-probs, a sample weighs w = p0(y)^(α−1), and

  pass@k of p_α  ≈  1 − Σ_S Π_{i∈S} w_i·[i is wrong] / Σ_S Π_{i∈S} w_i

over all k-subsets S: self-normalised importance sampling. At α = 1 it is the unbiased
pass@k; else numerator and denominator are unbiased up to one constant, and their ratio has
a bias that falls with the effective sample size (Σw)²/Σw² (Augustine Kong et al., 1994,
doi:10.1080/01621459.1994.10476469). Where that is a handful, little is known of p_α; and
it knows nothing of texts that were never drawn, which for α < 1 would weigh most.

Log-probs are of samples as they were drawn: at temperature 1, nothing cut off, else the
weights are wrong. NumPy, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from educe.environments import tabular
from educe.measurement import best_of_n, pass_at_k
from educe.measurement.pass_at_k import CORRECT, Curve

ALPHAS = tuple(2.0 ** (np.arange(-4, 9) / 2))  # 1/4 … 16


class Sharpened(NamedTuple):
  alpha: float  # that was best on the development prompts, at the first k
  development: float  # pass@k[0] there
  curve: Curve  # on the other prompts
  values: np.ndarray  # [P', K] pass@k of those, to compare a policy with
  prompts: np.ndarray  # [P'] which they are
  effective: float | None  # median over them, samples; None: from probabilities

  def __str__(self) -> str:
    samples = '' if self.effective is None else f', {self.effective:.1f} samples'
    return f'p0^{self.alpha:.4g}{samples}: {self.curve}'


def power(p0: ArrayLike, alpha: float) -> np.ndarray:
  """p0^α/Σ p0^α, `[…, Y]` over the last axis: the tilt of equal chances by α·log p0.

  Raises ValueError unless α > 0 is finite.
  """
  p0 = np.asarray(p0, np.float64)
  with np.errstate(divide='ignore'):
    return tabular.gibbs(np.ones_like(p0), np.log(p0), 1 / _exponent(alpha))


def power_estimates(
  rewards: ArrayLike, logp: ArrayLike, alpha: float, k: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
  """(pass@k of p0^α `[P, K]`, effective samples `[P]`), from samples of p0.

  rewards: `[P, N]`, 1 or more is correct; NaN: not scored, the sample is left out
  logp: `[P, N]`, log p0 of each sample, nats per sequence
  k: `[K]` samples; memory and time grow as P·N·(the largest k)

  Raises ValueError where a prompt has fewer than k scored samples, for a log-prob of a
  scored sample that is not finite, for shapes that differ, and as `power`.
  """
  rewards, logp = np.asarray(rewards, np.float64), np.asarray(logp, np.float64)
  pass_at_k.estimates(rewards, k)  # refuses what has no pass@k
  scored = ~np.isnan(rewards)
  if logp.shape != rewards.shape or not np.isfinite(logp[scored]).all():
    raise ValueError(
      f'power base: logp {list(logp.shape)} must be finite for every scored sample of '
      f'rewards {list(rewards.shape)}; measure with log-probs of the base'
    )
  log_w = np.where(scored, (_exponent(alpha) - 1) * np.where(scored, logp, 0), -np.inf)
  log_w -= log_w.max(-1, keepdims=True)
  w = np.exp(log_w)
  effective = w.sum(-1) ** 2 / (w**2).sum(-1)
  k = np.atleast_1d(np.asarray(k)).astype(int)
  wrong = np.where(rewards < CORRECT, log_w, -np.inf)
  log_miss = _log_subsets(wrong, k) - _log_subsets(log_w, k)
  # Sums in another order may put the share of misses above 1 by a rounding.
  return 0.0 - np.expm1(np.minimum(log_miss, 0)), effective


def sharpened(
  rewards: ArrayLike,
  logp: ArrayLike,
  k: ArrayLike,
  *,
  alphas: Sequence[float] = ALPHAS,
  development: ArrayLike | None = None,
  resamples: int = 2000,
  seed: int = 0,
) -> Sharpened:
  """The power base with the best α, from samples, as in `power_estimates`.

  development: `[P]` bool, the prompts on which α is chosen by mean pass@k at the first
    of `k` (of equal ones the α nearest to 1); None: a random half of them
  resamples, seed: of the intervals; seed also of the random half

  Raises ValueError where one of the two parts has no prompt, and as `power_estimates`.
  """
  return _choose(
    lambda alpha: power_estimates(rewards, logp, alpha, k),
    k,
    alphas,
    development,
    resamples,
    seed,
  )


def sharpened_exact(
  p0: ArrayLike,
  correct: ArrayLike,
  k: ArrayLike,
  *,
  alphas: Sequence[float] = ALPHAS,
  development: ArrayLike | None = None,
  resamples: int = 2000,
  seed: int = 0,
) -> Sharpened:
  """As `sharpened`, from probabilities `[P, Y]` and what is correct `[P, Y]`, 0 or 1."""

  def values(alpha):
    solved = (power(p0, alpha) * np.asarray(correct, np.float64)).sum(-1)
    return pass_at_k.exact(solved[:, None], np.atleast_1d(k)), None

  return _choose(values, k, alphas, development, resamples, seed)


def affordable(tokens: float, lengths: ArrayLike) -> float:
  """n: how many samples of the base cost as much as another policy's answer, at least 1.

  tokens: what that policy samples for a prompt on average (k times its mean length)
  lengths: `[P, N]`, tokens, of the base's samples; NaN: none

  Raises ValueError unless both are positive.
  """
  lengths = np.asarray(lengths, np.float64)
  mean = lengths[~np.isnan(lengths)].mean() if not np.isnan(lengths).all() else math.nan
  if not (tokens > 0 and mean > 0):
    raise ValueError(
      f'best of n: {tokens} tokens at {mean} a sample; both must be positive'
    )
  return max(1.0, float(tokens / mean))


def best_of(
  rewards: ArrayLike, n: float, *, scores: ArrayLike | None = None
) -> np.ndarray:
  """Chance that the best of n samples by a verifier is correct, `[P]`, unbiased.

  rewards: `[P, N]`, 1 or more is correct; NaN: not scored, the sample is left out
  n: samples; 2.3 is 3 of them in three prompts of ten and 2 in the others, so that the
    tokens spent are what `affordable` was given, on average
  scores: `[P, N]`, the verifier's; ties are broken at random. None: the verifier knows
    what is correct, and this is pass@n.

  Raises ValueError unless 1 ≤ n ≤ N of every prompt, and for a score that is missing.
  """
  rewards = np.asarray(rewards, np.float64)
  correct = np.where(np.isnan(rewards), np.nan, rewards >= CORRECT)
  scores = correct if scores is None else np.asarray(scores, np.float64)
  if scores.shape != rewards.shape:
    raise ValueError(
      f'best of n: scores {list(scores.shape)} and rewards {list(rewards.shape)} must '
      'be one [P, N]'
    )
  most, _ = pass_at_k.counts(rewards)
  if not 1 <= n <= most.min():
    raise ValueError(
      f'best of n: n={n:.4g} must be between 1 and the {most.min()} scored samples that '
      'a prompt has; sample more of the base, or give it fewer tokens'
    )
  fewer, share = int(n), n - int(n)
  out = []
  for right, score in zip(correct, scores, strict=True):
    there = ~np.isnan(right)
    value = best_of_n.expected(score[there], fewer, worth=right[there])
    if share:
      more = best_of_n.expected(score[there], fewer + 1, worth=right[there])
      value = (1 - share) * value + share * more
    out.append(value)
  return np.array(out)


def _choose(
  values: Callable, k, alphas, development, resamples: int, seed: int
) -> Sharpened:
  if not len(alphas):
    raise ValueError('power base: alphas is empty; name at least one exponent')
  # The nearest to 1 comes first, and of equal ones argmax takes the first.
  nearest = sorted(
    (float(x) for x in alphas), key=lambda x: abs(math.log(_exponent(x)))
  )
  tried = [values(alpha) for alpha in nearest]
  prompts = len(tried[0][0])
  if development is None:
    order = np.random.default_rng(seed).permutation(prompts)
    chosen = np.isin(np.arange(prompts), order[: prompts // 2])
  else:
    chosen = np.asarray(development, bool)
  if chosen.shape != (prompts,) or chosen.all() or not chosen.any():
    raise ValueError(
      f'power base: development {list(chosen.shape)} has {int(chosen.sum())} of '
      f'{prompts} prompts; some must be in it, and some not'
    )
  earned = np.array([x[chosen, 0].mean() for x, _ in tried])
  best = int(earned.round(12).argmax())  # rounding makes no difference of two
  reported, effective = tried[best]
  return Sharpened(
    nearest[best],
    float(earned[best]),
    pass_at_k.curve(reported[~chosen], k, resamples=resamples, seed=seed),
    reported[~chosen],
    np.flatnonzero(~chosen),
    None if effective is None else float(np.median(effective[~chosen])),
  )


def _log_subsets(log_w: np.ndarray, k: np.ndarray) -> np.ndarray:
  """log Σ_S Π_{i∈S} w_i over all k-subsets of each row of `[P, N]`, `[P, K]`."""
  total = np.full((len(log_w), int(k.max()) + 1), -np.inf)
  total[:, 0] = 0  # of the empty set
  for sample in log_w.T:
    total[:, 1:] = np.logaddexp(total[:, 1:], total[:, :-1] + sample[:, None])
  return total[:, k]


def _exponent(alpha: float) -> float:
  if not 0 < alpha < math.inf:
    raise ValueError(f'power base: alpha={alpha} must be a positive number')
  return alpha
