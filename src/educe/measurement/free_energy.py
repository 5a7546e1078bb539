"""How far a run moved a policy from its base, and what the KL was spent on.

With base q and policy π, C the correct outputs, ρ = π(C) and ρ0 = q(C), the chain rule of
the KL is a ledger of a run on verifiable rewards, all of it in nats and at least 0:

  KL(π‖q) = kl(ρ‖ρ0)                  the price of elicitation: to be right more often
          + ρ·KL(π_C‖q_C)             diversity collapse: fewer of the right answers
          + (1 − ρ)·KL(π_N‖q_N)       collateral drift: what no reward asked for

Of the Gibbs policy g ∝ q·e^{r/β} collapse and drift are 0 where rewards are 0 or 1. Any
other policy misses what it attains by

  β·log E_q[e^{r/β}] − (E_π[r] − β·KL(π‖q)) = β·KL(π‖g)            (the gap identity)

and g(y)/q(y) ≤ e^{(r_max − r_min)/β}: a larger ratio is no tilt at this β.

**Exact**: probabilities `[P, Y]` over all outputs. **From samples**: the same functions,
of what `mixture.pool` makes of them. Two estimates need no pooling:
`divergence_from_samples`, a mean of log-ratios over the policy's own samples, which is
unbiased, and `soft_value_from_samples`, of the base's alone.

Intervals are mean ± 1.96 standard errors over prompts: of prompts like these. The ledger is
the chain rule, derived and tested here; the free energy is in environments/tabular.py.
NumPy, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from educe.environments import tabular
from educe.measurement.accuracy import Z
from educe.measurement.mixture import drawn

# Of b = 1/β, per unit of reward: beyond, a float64 holds the base or the best alone.
WEAKEST, STRONGEST = 1e-12, 1e15


class Estimate(NamedTuple):
  """A mean over prompts, or a ratio of two."""

  mean: float
  error: float  # its standard error; NaN for one prompt, or where the mean is infinite
  prompts: int

  @property
  def low(self) -> float:
    return self.mean - Z * self.error

  @property
  def high(self) -> float:
    return self.mean + Z * self.error

  def __str__(self) -> str:
    interval = f'95 % interval {self.low:.3f} to {self.high:.3f}'
    return f'{self.mean:.3f} ({interval}; {self.prompts} prompts)'


class Divergence(NamedTuple):
  """KL(π‖q)."""

  per_sequence: Estimate  # nats
  per_token: Estimate  # nats: of all prompts together, over their tokens together

  def __str__(self) -> str:
    return (
      f'KL {self.per_sequence} nats per sequence, {self.per_token.mean:.4f} per token'
    )


class Ledger(NamedTuple):
  """`[P]`, nats per sequence: total = price + collapse + drift."""

  total: np.ndarray  # KL(π‖q)
  price: np.ndarray  # kl(ρ‖ρ0); infinite where only π can be right
  collapse: np.ndarray  # ρ·KL(π_C‖q_C); 0 where q_C does not exist
  drift: np.ndarray  # (1 − ρ)·KL(π_N‖q_N)

  def estimates(self) -> dict[str, Estimate]:
    return {name: estimate(getattr(self, name)) for name in self._fields}

  def __str__(self) -> str:
    terms = [f'{name} {x.mean:.3f}' for name, x in self.estimates().items()]
    return f'KL {terms[0]} nats = {" + ".join(terms[1:])}'


class SoftValue(NamedTuple):
  value: Estimate  # β·log E_q[e^{r/β}], units of reward
  bias: float  # its first order, ≤ 0: what the value has too little


class RatioCertificate(NamedTuple):
  log_ratio: np.ndarray  # [P], the largest log π/q of each prompt, nats
  bound: float  # b·(r_max − r_min), nats
  beyond: int  # prompts above it, which are no Gibbs tilt at this β
  beta: float  # the largest β at which none would be above it

  def __str__(self) -> str:
    return (
      f'{self.beyond} of {len(self.log_ratio)} prompts beyond e^{self.bound:.2f}, the '
      f'largest ratio e^{self.log_ratio.max():.2f}: a tilt only if β ≤ {self.beta:.3g}'
    )


def estimate(values: np.ndarray) -> Estimate:
  """The mean of `[P]`, one number a prompt.

  Raises ValueError for none, and for NaN.
  """
  return ratio_estimate(np.asarray(values, np.float64), np.ones(np.shape(values)))


def ratio_estimate(top: np.ndarray, bottom: np.ndarray) -> Estimate:
  """mean(top)/mean(bottom), `[P]` both; its error by the linear term.

  NaN where the second is 0. Raises ValueError for none, and for NaN in the first.
  """
  if top.ndim != 1 or not top.size or np.isnan(top).any():
    raise ValueError(f'a mean over prompts needs one number of each, not {top}')
  scale = bottom.mean()
  if scale == 0 or not np.isfinite(top).all():
    return Estimate(np.nan if scale == 0 else float(top.mean()), np.nan, len(top))
  mean = top.mean() / scale
  error = np.nan
  if len(top) > 1:
    error = (top - mean * bottom).std(ddof=1) / abs(scale) / math.sqrt(len(top))
  return Estimate(float(mean), float(error), len(top))


def divergence(policy: np.ndarray, base: np.ndarray, lengths: np.ndarray) -> Divergence:
  """KL(π‖q), exactly. All `[P, Y]`; lengths in tokens."""
  p, q = distributions(policy, base)
  return _divergence(tabular.kl(p, q), (p * lengths).sum(-1))


def divergence_from_samples(log_ratio: np.ndarray, lengths: np.ndarray) -> Divergence:
  """KL(π‖q), the mean of log π/q over the policy's own samples: unbiased.

  log_ratio, lengths: `[P, N]`, nats and tokens of each sample
  """
  ratio = drawn(log_ratio, 'policy')
  return _divergence(ratio.mean(-1), np.asarray(lengths, np.float64).mean(-1))


def ledger(policy: np.ndarray, base: np.ndarray, correct: np.ndarray) -> Ledger:
  """What KL(π‖q) was spent on: the three terms above.

  policy, base: `[P, Y]` · correct: `[P, Y]`, true for the outputs in C

  Raises ValueError where nothing is correct at any prompt, and for what is no
  distribution.
  """
  p, q = distributions(policy, base)
  right = np.broadcast_to(np.asarray(correct, bool), p.shape)
  if not right.any():
    raise ValueError(
      'ledger: no output of any prompt is correct, so there is nothing to elicit; draw '
      'more samples or take easier prompts'
    )
  collapse, rho, rho0 = _within(p, q, right)
  drift, rest, rest0 = _within(p, q, ~right)
  price = tabular.kl(np.stack([rho, rest], -1), np.stack([rho0, rest0], -1))
  return Ledger(tabular.kl(p, q), price, collapse, drift)


def gibbs_gap(
  policy: np.ndarray, base: np.ndarray, reward: np.ndarray, beta: float
) -> np.ndarray:
  """β·KL(π‖g), `[P]`, units of reward: how far π is from the optimum at β.

  By the gap identity, what E_π[r] − β·KL(π‖q) lacks of β·log E_q[e^{r/β}].
  """
  p, q = distributions(policy, base)
  return beta * tabular.kl(p, tabular.gibbs(q, reward, beta))


def nearest_gibbs(
  policy: np.ndarray, base: np.ndarray, reward: np.ndarray
) -> tuple[float, np.ndarray]:
  """(β, KL(π‖g) `[P]`, nats) of the Gibbs policy that is nearest to π, on average.

  All `[P, Y]`. The mean of KL(π‖g) falls in b = 1/β by E_π r − E_g r, so that it is least
  where the mean rewards agree. β is ∞ where π earns no more than the base, and the KL that
  to the base; 0 where it earns all that the base can, and g is the base's best.
  """
  p, q = distributions(policy, base)
  r = np.broadcast_to(np.asarray(reward, np.float64), p.shape)
  earned, most = float((p * r).sum(-1).mean()), np.where(q > 0, r, -np.inf).max(-1)

  def tilt(b: float) -> np.ndarray:
    return tabular.gibbs(q, b * r, 1.0)

  if earned <= (q * r).sum(-1).mean() + 1e-12:
    return math.inf, tabular.kl(p, q)
  if earned >= most.mean() - 1e-12:
    best = np.where((r == most[:, None]) & (q > 0), q, 0)
    return 0.0, tabular.kl(p, best / best.sum(-1, keepdims=True))
  b = float(strength(lambda b: (tilt(b) * r).sum(-1).mean(), earned))
  return 1 / b, tabular.kl(p, tilt(b))


def strength(rising: Callable, target: np.ndarray | float) -> np.ndarray:
  """b with rising(b) = target, of the target's shape, by halving log b.

  rising: of an array of b = 1/β, place by place, what only rises with it: a tilt's KL, its
    mean reward

  A target that no b between WEAKEST and STRONGEST reaches has the nearer of the two.
  """
  low, high = (np.full(np.shape(target), math.log(x)) for x in (WEAKEST, STRONGEST))
  for _ in range(70):  # 62 in log b: then the next float64
    middle = (low + high) / 2
    under = rising(np.exp(middle)) < target
    low, high = np.where(under, middle, low), np.where(under, high, middle)
  return np.exp(high)


def soft_value_from_samples(rewards: np.ndarray, beta: float) -> SoftValue:
  """β·log E_q[e^{r/β}] from the base's samples alone; exactly, −tabular.free_energy.

  rewards: `[P, M]`; NaN: not scored. A prompt with fewer than two is left out.

  The logarithm of a mean is biased down, by β·Var(e^{r/β})/(2·M·Z²) at first: `bias`. That
  is itself a guess from the samples, and says nothing of rewards that they never saw.

  Raises ValueError where no prompt has two scored samples.
  """
  r = np.asarray(rewards, np.float64)
  count = np.isfinite(r).sum(-1)
  if r.ndim != 2 or np.isinf(r).any() or not (count > 1).any():
    raise ValueError(
      f'soft value: rewards {list(r.shape)} must be [P, M], with two or more that are '
      'scored of some prompt, and none infinite'
    )
  r, n = r[count > 1], count[count > 1]
  uniform, seen = np.isfinite(r) / n[:, None], np.nan_to_num(r)
  value = -tabular.free_energy(uniform, seen, beta)
  # Var(w)/Z² of w = e^{r/β} is E[(g/q)²] − 1, with g the Gibbs policy of the samples.
  spread = n * (tabular.gibbs(uniform, seen, beta) ** 2).sum(-1) - 1
  return SoftValue(estimate(value), float((-beta * spread / (2 * (n - 1))).mean()))


def ratio_certificate(
  log_ratio: np.ndarray, *, beta: float, lowest: float = 0.0, highest: float = 1.0
) -> RatioCertificate:
  """The largest π/q against the e^{b·(r_max − r_min)} that no Gibbs policy exceeds.

  log_ratio: `[P, N]`, nats: of all outputs, or of any samples. One sample above the bound
    is a proof, up to the error of its log-probs; none above it proves nothing.
  lowest, highest: r_min, r_max that the verifier can give

  Raises ValueError for beta ≤ 0 and highest < lowest.
  """
  if not beta > 0 or not highest >= lowest:
    raise ValueError(
      f'ratio certificate: beta={beta} must be positive, and highest={highest} at least '
      f'lowest={lowest}'
    )
  largest = np.asarray(log_ratio, np.float64).max(-1)
  span, top = highest - lowest, float(largest.max())
  bound = span / beta
  return RatioCertificate(
    largest, bound, int((largest > bound).sum()), span / top if top > 0 else math.inf
  )


def distributions(
  policy: np.ndarray, base: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Both as float64 that sums to 1.

  Raises ValueError unless they are `[P, Y]`, not negative, and sum to 1 ± 1e-6.
  """
  p, q = np.asarray(policy, np.float64), np.asarray(base, np.float64)
  if p.ndim != 2 or p.shape != q.shape:
    raise ValueError(
      f'policy {list(p.shape)} and base {list(q.shape)} must both be [P, Y] probabilities'
    )
  for name, x in (('policy', p), ('base', q)):
    off = ~((x >= 0).all(-1) & (np.abs(x.sum(-1) - 1) < 1e-6))
    if off.any():
      row = int(off.argmax())
      raise ValueError(
        f'{name}: the probabilities of prompt {row} sum to {x[row].sum():.6g}, the least '
        f'is {x[row].min():.6g}; they must sum to 1 and none be negative'
      )
  return p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)


def _divergence(kl: np.ndarray, tokens: np.ndarray) -> Divergence:
  if not (tokens > 0).any():
    raise ValueError('KL per token: no completion has a token')
  return Divergence(estimate(kl), ratio_estimate(kl, tokens))


def _within(
  p: np.ndarray, q: np.ndarray, inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(p(A)·KL(p_A‖q_A), p(A), q(A)), `[P]` each."""
  p, q = np.where(inside, p, 0), np.where(inside, q, 0)
  mass, mass0 = p.sum(-1), q.sum(-1)
  scale = np.divide(mass, mass0, out=np.zeros_like(mass), where=mass0 > 0)
  return np.where(mass0 > 0, tabular.kl(p, q * scale[:, None]), 0), mass, mass0
