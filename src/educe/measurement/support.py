"""What a model can produce under a budget: accessible sets, and how far they reach.

A softmax gives every output p > 0, so that support says nothing before a budget says how
small is too small. Of a behaviour b of prompt x (a set of outputs: an answer, or all that
are correct), with the mass p = p0(b|x) under one way of decoding, b is accessible to

  sampling     k samples show it with a chance of δ     1 − (1−p)ᵏ ≥ δ
  training     T visits of G rollouts fail to show it
               with a chance of at most ζ               1 − (1−p)^(G·T) ≥ 1 − ζ
  divergence   κ nats pay for raising it to the mass m  kl(m‖p) ≤ κ, or p ≥ m
  steps        a trace of it is known, of which no step
               is less likely than ε_s (search)         min_i s_i ≥ ε_s

with kl(m‖p) = m·log(m/p) + (1−m)·log((1−m)/(1−p)), which is the least KL(π‖p0) of any
policy with π(b|x) = m. The first three are thresholds of p, and all that is here takes and
returns their logarithms (nats), for a trace of a thousand tokens is no float64: b is
accessible where log_p ≥ sampling(k). From budgets follow the regimes

  basin      p ≥ 1/8
  tail       ε(k) ≤ p < 1/8          p0 shows it, given more samples
  barrier    p < ε(k), and accessible by steps
  singular   neither

Accessible support and the four regimes: Yuhao Li & Shengchao Liu, 2026, §4,
arXiv:2605.08368. **Differs from the paper**: it prescribes no estimator and no number; the
budgets, 1/8 and the defaults δ = 0.95, ζ = 0.05 are this project's, and have to be told
with every result. That k samples without a success leave p ≤ −log(ζ)/k is the same
threshold up to ε²/2 (Fang Wu et al., 2025, arXiv:2507.14843).

NumPy, float64. What a sample shows of p is in `decide`; what traces show of it in
support_evidence.py; what training did to the sets in support_dynamics.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from educe.measurement.accuracy import wilson
from educe.measurement.intervals import TAIL

BASIN = math.log(1 / 8)
REGIMES = ('basin', 'tail', 'barrier', 'singular')
DELTA = 0.95  # chance that k samples show it


class Reach(NamedTuple):
  ks: np.ndarray  # [K] samples
  accessible: np.ndarray  # [K] share of prompts
  undecided: (
    np.ndarray
  )  # [K] share of which the samples cannot tell; 0 where p is exact
  low: np.ndarray  # [K] Wilson 95 % over prompts, the undecided not accessible
  high: np.ndarray  # [K] the same, the undecided accessible
  prompts: int

  def __str__(self) -> str:
    rate, undecided, low, high = (float(x[-1]) for x in self[1:5])
    left = f'; {undecided:.1%} undecided' if undecided else ''
    return (
      f'{rate:.1%} of {self.prompts} prompts accessible in {int(self.ks[-1]):,} samples '
      f'(95 % interval {low:.1%} to {high:.1%}{left})'
    )


def sampling(k: float, delta: float = DELTA) -> float:
  """log ε(k, δ), nats: ε = 1 − (1−δ)^(1/k), seen in k samples with a chance of δ.

  Raises ValueError unless k ≥ 1 and 0 < δ < 1.
  """
  _check(k >= 1, f'k={k} samples must be 1 or more')
  _check(0 < delta < 1, f'delta={delta} must be between 0 and 1')
  return math.log(-math.expm1(math.log1p(-delta) / k))


def training(group: int, visits: float, zeta: float = 0.05) -> float:
  """log ε_train, nats: ε = 1 − ζ^(1/(G·T)); below it a run never meets what to reinforce.

  group: G, rollouts of a prompt at a visit · visits: T, of this prompt in the whole run

  It is of the policy as it was at the start: a prompt may become reachable on the way.

  Raises ValueError unless G and T are 1 or more and 0 < ζ < 1.
  """
  _check(
    group >= 1 and visits >= 1, f'group={group} and visits={visits} must be 1 or more'
  )
  _check(0 < zeta < 1, f'zeta={zeta} must be between 0 and 1')
  return math.log(-math.expm1(math.log(zeta) / (group * visits)))


def divergence(kappa: float, mass: float = 0.5) -> float:
  """log ε_kl, nats: the least p that κ nats per prompt can raise to `mass`.

  Raises ValueError unless κ ≥ 0 and 0 < mass ≤ 1.
  """
  _check(0 <= kappa < math.inf, f'kappa={kappa} nats must be 0 or more')
  _check(0 < mass <= 1, f'mass={mass} must be above 0 and at most 1')
  # kl(m‖p) ≥ −H(m) − m·log p, and so at the lower end it is κ or more.
  low, high = (_negative_entropy(mass) - kappa) / mass, math.log(mass)
  for _ in range(200):  # halvings; a float64 has no more than about 60 of use
    middle = (low + high) / 2
    if cost(mass, middle) > kappa:
      low = middle
    else:
      high = middle
  return high


def cost(mass: float, log_p: ArrayLike) -> np.ndarray:
  """kl(m‖p), `[…]`, nats: the least KL to p0 of a policy that gives b the mass m.

  log_p: `[…]`; 0 where p ≥ m already, ∞ where p is 0.

  Raises ValueError unless 0 < mass ≤ 1, and for what is no log-probability.
  """
  _check(0 < mass <= 1, f'mass={mass} must be above 0 and at most 1')
  log_p = as_log_p(log_p)
  under = np.minimum(log_p, math.log(mass))
  with np.errstate(divide='ignore'):  # at p = m = 1 the second term is 0·log 0
    away = special.xlog1py(1 - mass, -np.exp(under))
  kl = _negative_entropy(mass) - mass * under - away
  return np.where(log_p >= math.log(mass), 0.0, kl)


def regimes(
  log_p: np.ndarray,
  log_step: np.ndarray,
  *,
  k: float,
  eps_step: float,
  delta: float = DELTA,
) -> np.ndarray:
  """Which of REGIMES each behaviour is in, `[…]` of str.

  log_p: `[…]`, log p0(b|x)
  log_step: `[…]`, the least likely step of its best trace (support_evidence.certify);
    −∞ where no trace is known, and then 'singular' says no more than that
  eps_step: ε_s, the least probability of a step that search is paid to find

  Raises ValueError for a k so small that no tail is left below the basin, ε(k) > 1/8.
  """
  log_eps = sampling(k, delta)
  _check(
    log_eps <= BASIN,
    f'k={k} samples leave no tail: ε={math.exp(log_eps):.3f} is over the 1/8 where the '
    'basin begins; take more',
  )
  _check(0 < eps_step <= 1, f'eps_step={eps_step} must be above 0 and at most 1')
  log_p, log_step = as_log_p(log_p), as_log_p(log_step)
  cases = [log_p >= BASIN, log_p >= log_eps, log_step >= math.log(eps_step)]
  return np.select(np.broadcast_arrays(*cases), REGIMES[:3], REGIMES[3])


def reach(log_p: np.ndarray, ks: Sequence[float], *, delta: float = DELTA) -> Reach:
  """The share of prompts accessible in k samples, for each k; p is known.

  log_p: `[P]`, log p0(b|x). The interval is over prompts like these.

  Raises ValueError without prompts, and for what is no log-probability.
  """
  log_p = as_log_p(log_p)
  return _reach([np.where(log_p >= sampling(k, delta), 1, -1) for k in ks], ks)


def sampled_reach(
  correct: np.ndarray,
  samples: np.ndarray,
  ks: Sequence[float],
  *,
  log_least: ArrayLike = -math.inf,
  delta: float = DELTA,
) -> Reach:
  """The same where p is known from samples, and perhaps from log-probs, as in `decide`.

  k may be more than the samples: then prompts are undecided, not denied.

  Raises ValueError as `decide` does.
  """
  eps = [sampling(k, delta) for k in ks]
  return _reach([decide(correct, samples, at, log_least=log_least) for at in eps], ks)


def decide(
  correct: ArrayLike,
  samples: ArrayLike,
  log_eps: float | np.ndarray,
  *,
  log_least: ArrayLike = -math.inf,
) -> np.ndarray:
  """Whether p ≥ ε, `[P]` of 1 (yes), −1 (no) and 0 (the samples cannot tell).

  correct, samples: `[P]`, c successes in N draws; log_eps: log ε, one or `[P]`
  log_least: `[P]`, what p is known to be at least, from log-probs of traces
    (support_evidence.py); it overrules the samples

  By Clopper and Pearson's interval: each answer is wrong with a chance of at most 2.5 %,
  whatever p is, and so are that many of the prompts at most, on average.

  Raises ValueError unless 0 ≤ c ≤ N and N ≥ 1.
  """
  low, high = clopper_pearson(correct, samples)
  eps = np.exp(log_eps)
  drawn = (low >= eps).astype(np.int8) - (high < eps).astype(np.int8)
  return np.where(np.asarray(log_least) >= log_eps, np.int8(1), drawn)


def clopper_pearson(
  correct: ArrayLike, samples: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
  """The exact 95 % interval of a binomial share, `[…]` and `[…]` (1934, Biometrika 26).

  Its ends are the shares at which c or more, or c or fewer, of N have a chance of 2.5 %.

  Raises ValueError unless 0 ≤ c ≤ N and N ≥ 1.
  """
  c, n = (np.asarray(x, np.float64) for x in np.broadcast_arrays(correct, samples))
  bad = ~((c >= 0) & (c <= n) & (n >= 1))
  if bad.any():
    raise ValueError(
      f'support: {c[bad].flat[0]:g} correct of {n[bad].flat[0]:g} samples; N must be 1 '
      'or more and hold them'
    )
  # Where an argument of the inverse would be 0, the end is known.
  low = special.betaincinv(np.maximum(c, 1), n - c + 1, TAIL)
  high = special.betaincinv(c + 1, np.maximum(n - c, 1), 1 - TAIL)
  return np.where(c == 0, 0.0, low), np.where(c == n, 1.0, high)


def as_log_p(log_p: ArrayLike) -> np.ndarray:
  """`[…]`, float64, at most 0: a sum of probabilities may pass 1 by a rounding.

  Raises ValueError for what is no log-probability.
  """
  log_p = np.asarray(log_p, np.float64)
  bad = ~(log_p <= 1e-6)
  if bad.any():
    raise ValueError(
      f'support: {log_p[bad].flat[0]:g} is no log-probability (nats, at most 0); give '
      'np.log of a probability'
    )
  return np.minimum(log_p, 0)


def _reach(decided: list[np.ndarray], ks: Sequence[float]) -> Reach:
  """decided: of each k, `[P]` of 1, 0 and −1."""
  _check(len(decided) > 0, 'ks is empty; name at least one budget k')
  table = np.stack(decided)
  _check(table.ndim == 2 and table.shape[1] > 0, 'there are no prompts [P]')
  prompts = table.shape[1]
  yes, maybe = (table == 1).sum(1), (table == 0).sum(1)
  low = [wilson(int(n), prompts)[0] for n in yes]
  high = [wilson(int(n), prompts)[1] for n in yes + maybe]
  return Reach(
    np.asarray(ks),
    yes / prompts,
    maybe / prompts,
    np.array(low),
    np.array(high),
    prompts,
  )


def _negative_entropy(mass: float) -> float:
  """m·log m + (1−m)·log(1−m)."""
  return float(special.xlogy(mass, mass) + special.xlogy(1 - mass, 1 - mass))


def _check(good: bool, message: str) -> None:
  if not good:
    raise ValueError(f'support: {message}')
