"""Generalised advantage estimation on the device: float32, any number of rows at once.

  δ_t = r_t + γ·V_{t+1} − V_t      A_t = Σ_l (γλ)^l·δ_{t+l}      R_t = A_t + V_t

John Schulman et al., "High-dimensional continuous control using generalized advantage
estimation", 2015, eqs. 11–16, arXiv:1506.02438. Values of 0 and λ = 1 make R_t the
discounted return Σ_l γ^l·r_{t+l}.

Not here, because it does not pay (figures: benchmarks/README.md, advantage.py): group
normalisation, a few microseconds on rewards that are born on the host, where float64 is
exact (losses/advantages.py); and the clipped loss, which XLA makes of losses/grpo.py in two
passes over what a step of the model dwarfs. Both were written for Pallas, and left out.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Num, Shaped

from educe.kernels import dispatch
from educe.kernels.advantage import pallas, reference

IMPLEMENTATIONS = {'reference': reference.gae, 'pallas': pallas.gae}


def gae(
  rewards: Num[ArrayLike, 'B T'],
  values: Num[ArrayLike, 'B T'],
  mask: Shaped[ArrayLike, 'B T'],
  *,
  gamma: float = 1.0,
  lam: float = 0.95,
  bootstrap: Num[ArrayLike, 'B T'] | None = None,
  segments: Int[ArrayLike, 'B T'] | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
  """(advantages, returns = advantages + values), 0 where the mask is 0.

  `losses.advantages.gae` in float32, for code under jit; its arguments, but for

    segments: ids of 0 and above
    implementation: a name in IMPLEMENTATIONS; None: what was measured best here, else
      reference

  No gradient flows through: to a policy's loss both are constants.

  Raises ValueError as that function does, and for an unknown implementation.
  """
  check(gamma, lam, mask, rewards=rewards, values=values, bootstrap=bootstrap,
        segments=segments)  # fmt: skip
  numbers = [
    None if x is None else jnp.asarray(x, jnp.float32)
    for x in (rewards, values, mask, bootstrap)
  ]
  which = None if segments is None else jnp.asarray(segments, jnp.int32)
  operands = jax.lax.stop_gradient((*numbers, which))
  how = dict(gamma=gamma, lam=lam)
  trial = dispatch.Trial(lambda op: partial(op, **how), operands, str(how))
  op = dispatch.choose('gae', IMPLEMENTATIONS, implementation, trial)
  return op(*operands, **how)


def check(
  gamma: float, lam: float, mask: ArrayLike, **arrays: ArrayLike | None
) -> None:
  """Raises ValueError for γ or λ outside [0, 1], and arrays that are not all `[B, T]`."""
  if not (0 <= gamma <= 1 and 0 <= lam <= 1):
    raise ValueError(f'gae: gamma={gamma} and lam={lam} must be in [0, 1]')
  shape = np.shape(mask)
  for name, x in arrays.items():
    if x is not None and (np.shape(x) != shape or len(shape) != 2):
      raise ValueError(f'gae: {name} has shape {np.shape(x)}, mask {shape}')
