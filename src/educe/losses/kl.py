"""KL to a reference, from one sampled token at a time.

John Schulman, "Approximating KL divergence" (2020, joschu.net/blog/kl-approx.html). With
d = log π(y) − log π_ref(y) and y ~ π,

  k1 = d                      E k1 = KL(π‖π_ref); can be negative, high variance
  k2 = d²/2                   E k2 ≈ KL, biased; never negative
  k3 = e^{−d} + d − 1         E k3 = KL; never negative, low variance

A good estimate of a value is not a good loss. Differentiating E_π[k] itself, with the
expectation's own dependence on π, gives E[k·∇log π + ∇k]; a loss that only holds k gives
E[∇k], which is

  k1   E[∇log π] = 0: no regularisation at all
  k2   E[d·∇log π] = ∇KL(π‖π_ref)
  k3   E[(1 − e^{−d})·∇log π] = ∇KL(π_ref‖π), the other direction

(Yunhao Tang and Rémi Munos, "On a few pitfalls in KL divergence gradient estimation for
RL", 2025, arXiv:2506.09477; Kezhao Liu et al., "Rethinking KL regularization in RLHF",
2025, arXiv:2510.01555.) So `gradient='unbiased'` keeps the value of the chosen estimator
and takes the gradient of KL(π‖π_ref),

  value  ρ·k        gradient  ρ·d·∇log π        ρ = π / π_old, 1 on policy

with ρ·k and ρ·d held constant. It is what differentiating ρ·k3 gives, since
∇(ρ·k3) = ρ·(k3 + 1 − e^{−d})·∇log π = ρ·d·∇log π, and for k2 on policy it is ∇k2.

Differs from the papers: the log-ratio is clamped to ±20 where it is exponentiated and
where it multiplies ∇log π, so that neither can overflow. The gradient is of the KL of
each next token at the prefixes visited; that π also chooses which prefixes are visited
is seen only by a KL in the reward (Tang and Munos, §4).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.lax import stop_gradient as sg
from jaxtyping import Array, ArrayLike, Float

LIMIT = 20.0  # e^20 is 5e8: far from any policy worth having, far from overflow


def k1(
  logp: Float[ArrayLike, '*shape'], ref_logp: Float[ArrayLike, '*shape']
) -> Float[Array, '*shape']:
  """log π − log π_ref of the sampled tokens (nats)."""
  return jnp.subtract(logp, ref_logp)


def k2(
  logp: Float[ArrayLike, '*shape'], ref_logp: Float[ArrayLike, '*shape']
) -> Float[Array, '*shape']:
  """Half the squared log-ratio (nats²; near the reference, nats of KL)."""
  return k1(logp, ref_logp) ** 2 / 2


def k3(
  logp: Float[ArrayLike, '*shape'], ref_logp: Float[ArrayLike, '*shape']
) -> Float[Array, '*shape']:
  """e^{−d} + d − 1 (nats). Beyond |d| = 20 it stands still and has no gradient."""
  d = clamp(k1(logp, ref_logp))
  return jnp.expm1(-d) + d


def exact(
  log_p: Float[ArrayLike, '*shape V'], log_q: Float[ArrayLike, '*shape V']
) -> Float[Array, '*shape']:
  """KL(p‖q) = Σ_v p(v)·(log p(v) − log q(v)) over whole distributions (nats).

  Both are normalised log-probs over the last axis; −inf is a probability of 0, and
  0·log 0 is 0. Infinite where p has mass that q has not.
  """
  log_p, log_q = jnp.asarray(log_p), jnp.asarray(log_q)
  there = log_p > -jnp.inf
  # The inner where keeps −inf − (−inf) out of the gradient too.
  d = jnp.where(there, log_p, 0.0) - jnp.where(there, log_q, 0.0)
  return jnp.where(there, jnp.exp(log_p) * d, 0.0).sum(-1)


ESTIMATORS = {'k1': k1, 'k2': k2, 'k3': k3}
GRADIENTS = ('naive', 'unbiased')


def penalty(
  logp: Float[Array, '*shape'],
  ref_logp: Float[Array, '*shape'],
  log_ratio: Float[Array, '*shape'],
  *,
  estimator: str,
  gradient: str,
) -> Float[Array, '*shape']:
  """The KL term of a loss, per token (nats).

  Args:
    log_ratio: log π − log π_old, finite; read by gradient='unbiased' alone.
    estimator: 'k1', 'k2' or 'k3'
    gradient: 'naive' differentiates the estimator; 'unbiased' is described above

  Raises ValueError for an unknown name.
  """
  check(estimator, gradient)
  value = ESTIMATORS[estimator](logp, ref_logp)
  if gradient == 'naive':
    return value
  ratio = jnp.exp(clamp(log_ratio))
  score = logp - sg(logp)  # 0, with gradient ∇log π
  return sg(ratio * value) + sg(ratio * clamp(k1(logp, ref_logp))) * score


def check(estimator: str, gradient: str) -> None:
  """Raises ValueError for an unknown name."""
  if estimator not in ESTIMATORS:
    raise ValueError(f'kl_estimator={estimator!r} is not one of {sorted(ESTIMATORS)}')
  if gradient not in GRADIENTS:
    raise ValueError(f'kl_gradient={gradient!r} is not one of {list(GRADIENTS)}')


def clamp(d):
  """A log-ratio that can be exponentiated; no gradient flows where it is cut off."""
  return jnp.clip(d, -LIMIT, LIMIT)
