"""majority@k: how often the answer that most of k samples give is correct.

Ties are broken at random: an answer that is most frequent together with r others wins with
chance 1/(r+1). Both numbers are exact, not drawn:

  estimates   the mean over all k-subsets of the N samples at hand (a U-statistic, unbiased
              for independent samples), by enumeration of how often each answer is drawn
  exact       of k independent draws from known probabilities

Majority voting: Xuezhi Wang et al., "Self-consistency", 2022, arXiv:2203.11171.

How often each answer is drawn are independent numbers given their sum: Binomial(m_a, θ)
where answer a has m_a samples, any θ, or Poisson(k·p_a). Let every answer carry a random
rank u in [0, 1] that breaks ties. Answer a wins with count t and rank u where all others
have less than t, or t and a lower rank:

  P(a wins) = Σ_t ∫_0^1 [x^k] f_a(t)·x^t · Π_{b≠a} (Σ_{s<t} f_b(s)·x^s + u·f_b(t)·x^t) du
              / P(Σ = k)

f: the chance of a count, [x^k]: the coefficient. In u this is a polynomial, of which Gauss
and Legendre's rule takes the integral exactly; every term is positive, so that no digits
are lost. The cost is about answers · k³·log k: for k up to a few hundred. NumPy, float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from educe.measurement.pass_at_k import CORRECT


def estimates(
  answers: Sequence[Sequence[Any]], rewards: ArrayLike, k: Sequence[int]
) -> np.ndarray:
  """Unbiased majority@k of every prompt, `[P, K]`.

  answers: P rows of N, anything hashable; two samples vote together where they are equal.
    None: no answer, which takes a place among the k and does not vote; where nobody
    votes nothing is correct.
  rewards: `[P, N]`, 1 or more is correct; NaN: not scored, the sample is left out. An
    answer whose samples were judged differently is correct by their share.
  k: `[K]` samples

  Raises ValueError where a prompt has fewer than k scored samples, and for shapes that
  differ.
  """
  rewards = np.asarray(rewards, np.float64)
  sizes = [len(row) for row in answers]
  if rewards.ndim != 2 or sizes != [rewards.shape[1]] * len(rewards):
    raise ValueError(
      f'majority@k: {len(answers)} rows of answers and rewards {list(rewards.shape)}; '
      'both must be [P, N]'
    )
  return np.array(
    [
      [_of_samples(row, reward, int(x)) for x in k]
      for row, reward in zip(answers, rewards, strict=True)
    ]
  )


def exact(p: ArrayLike, correct: ArrayLike, k: Sequence[int]) -> np.ndarray:
  """majority@k of k draws from known probabilities, `[P, K]`.

  p: `[P, Y]` over the answers, sums to 1 · correct: `[P, Y]`, 0 or 1, or the share of an
  answer's outputs that are correct

  Raises ValueError for a p that is no distribution, or k < 1.
  """
  p, correct = np.broadcast_arrays(
    np.asarray(p, np.float64), np.asarray(correct, np.float64)
  )
  if p.ndim != 2 or (p < 0).any() or not np.allclose(p.sum(-1), 1, rtol=0, atol=1e-6):
    raise ValueError('majority@k: p must be [P, Y] and sum to 1 over its last axis')
  return np.array(
    [
      [_of_draws(row[row > 0], right[row > 0], int(x)) for x in k]
      for row, right in zip(p, correct, strict=True)
    ]
  )


def _of_samples(answers: Sequence[Any], rewards: np.ndarray, k: int) -> float:
  votes: dict[Any, list[bool]] = {}
  for answer, reward in zip(answers, rewards.tolist(), strict=True):
    if reward == reward:  # NaN is not
      votes.setdefault(answer, []).append(reward >= CORRECT)
  size = sum(map(len, votes.values()))
  if not 1 <= k <= size:
    raise ValueError(
      f'majority@k: k={k} needs 1 to {size} samples, as many as a prompt has that are '
      'scored; sample more or ask for less'
    )
  silent = len(votes.pop(None, []))
  if not votes:
    return 0.0
  theta = k / (size + 1)  # any in (0, 1); this one puts the sum near k
  log_factorial = np.cumsum(np.log(np.maximum(np.arange(size + 1), 1)))
  count = np.arange(k + 1)

  def chances(m):
    drawn = np.minimum(count, m)
    log_ways = log_factorial[m] - log_factorial[drawn] - log_factorial[m - drawn]
    log_p = log_ways + drawn * np.log(theta) + (m - drawn) * np.log1p(-theta)
    return np.where(count <= m, np.exp(log_p), 0)

  won = _plurality(
    np.array([chances(len(x)) for x in votes.values()]),
    np.array([np.mean(x) for x in votes.values()]),
    chances(silent),
  )
  return won / chances(size)[k]


def _of_draws(p: np.ndarray, correct: np.ndarray, k: int) -> float:
  if k < 1:
    raise ValueError(f'majority@k: k={k} must be 1 or more')
  count = np.arange(k + 1)
  log_factorial = np.cumsum(np.log(np.maximum(count, 1)))

  def chances(mean):
    return np.exp(count * np.log(mean) - mean - log_factorial)

  won = _plurality(chances(k * p[:, None]), correct, (count == 0) * 1.0)
  return won / chances(float(k))[k]


def _plurality(counts: np.ndarray, correct: np.ndarray, silent: np.ndarray) -> float:
  """P(the counts sum to k and the most frequent answer is correct).

  counts: `[A, k+1]`, the chance of each count of each answer · correct: `[A]`, shares ·
  silent: `[k+1]`, the chance of each count of those that do not vote
  """
  k = counts.shape[1] - 1
  t, u, weight = _tops(k, len(counts), int(np.flatnonzero(counts.any(0))[-1]))
  s = np.arange(k + 1)
  top = s == t[:, None]  # [J, k+1]
  under = (s < t[:, None]) + u[:, None] * top
  # Polynomials in x, [J, k+1]: nobody has won yet; somebody correct has.
  undecided, won = np.tile(silent, (len(t), 1)), np.zeros((len(t), k + 1))
  for answer in np.argsort(correct > 0, kind='stable'):  # till the first, won is 0
    chance = counts[answer]
    if correct[answer] > 0:
      won = _product(won, chance * under)
      won += correct[answer] * _product(undecided, chance * top)
    undecided = _product(undecided, chance * under)
  return float(weight @ won[:, k])


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Of polynomials in x up to x^k, row by row."""
  out = np.zeros_like(a)
  for s in np.flatnonzero(b.any(0)):
    out[:, s:] += a[:, : a.shape[1] - s] * b[:, s, None]
  return out


def _tops(k: int, answers: int, most: int) -> tuple[np.ndarray, ...]:
  """(t, u, weight), each `[J]`: every count that can win, and the points in u."""
  out = []
  for t in range(1, min(k, most) + 1):
    ties = min((k - t) // t, answers - 1)  # the degree in u
    node, weight = np.polynomial.legendre.leggauss(ties // 2 + 1)
    out += [(t, (x + 1) / 2, w / 2) for x, w in zip(node, weight, strict=True)]
  t, u, weight = np.array(out).T
  return t.astype(int), u, weight
