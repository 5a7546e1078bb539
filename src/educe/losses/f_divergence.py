"""The implicit reward of a policy, for divergences other than the KL.

The policy that maximises E_π[r] − β·D_f(π‖π_ref), D_f = E_{π_ref}[f(π/π_ref)], satisfies
r(y) = β·f'(u(y)) + const(x), u = π/π_ref, so that a Bradley–Terry model of r is one of
β·f'(u). With h = log u and φ(h) = f'(e^h) − f'(1), which is 0 at the reference,

              f(u)                                          φ(h)
  reverse_kl  u·log u                                       h
  forward_kl  −log u                                        1 − e^{−h}
  js          u·log u − (u + 1)·log((u + 1)/2)              log 2 + log σ(h)
  alpha       (u^{1−α} − (1 − α)·u − α)/(α·(α − 1))         (1 − e^{−αh})/α

α in (0, 1) lies between reverse_kl (α → 0) and forward_kl (α → 1).

Chaoqi Wang et al., "Beyond reverse KL: generalizing direct preference optimization with
diverse divergence constraints", 2023, Table 1 and eq. 9, arXiv:2309.16240.

Differs from the paper: the constant f'(1) is taken off (a margin never sees it); where
the exponent passes 20, e^x goes on along its tangent, so that a completion that the
policy has all but lost still has a finite reward and a way back.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from educe.losses.kl import LIMIT

DIVERGENCES = ('reverse_kl', 'forward_kl', 'js', 'alpha')


def implicit_reward(
  log_ratio: Float[Array, '*shape'], divergence: str = 'reverse_kl', alpha: float = 0.5
) -> Float[Array, '*shape']:
  """φ(h) of log-ratios h = log π/π_ref (nats); rises with h, and is 0 at 0.

  alpha: of the α-divergence, in (0, 1); read by 'alpha' alone

  Raises ValueError for an unknown divergence, or an alpha outside (0, 1).
  """
  check(divergence, alpha)
  if divergence == 'forward_kl':
    return -_expm1(-log_ratio)
  if divergence == 'js':
    return math.log(2) + jax.nn.log_sigmoid(log_ratio)
  if divergence == 'alpha':
    return -_expm1(-alpha * log_ratio) / alpha
  return log_ratio


def check(divergence: str, alpha: float) -> None:
  """Raises ValueError as implicit_reward does."""
  if divergence not in DIVERGENCES:
    raise ValueError(f'f_divergence={divergence!r} is not one of {list(DIVERGENCES)}')
  if divergence == 'alpha' and not 0 < alpha < 1:
    raise ValueError(
      f'f_alpha={alpha} must be in (0, 1): 0 would be reverse_kl, and 1 forward_kl'
    )


def _expm1(x):
  # Two branches, not a sum: e^20·(x − inside) would swamp the gradient where it is 0.
  near = jnp.expm1(jnp.minimum(x, LIMIT))
  tangent = math.expm1(LIMIT) + math.exp(LIMIT) * (x - LIMIT)
  return jnp.where(x > LIMIT, tangent, near)
