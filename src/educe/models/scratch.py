"""Random weights: a preset, from scratch."""

from __future__ import annotations

import dataclasses

import jax

from educe.models import policy, presets
from educe.types import Model, Params


def load(
  *,
  preset: str = 'debug',
  seed: int = 0,
  param_dtype: str = 'float32',
  compute_dtype: str = 'float32',
  remat: str = 'none',
  logprob: str = 'auto',
  attention: str = 'auto',
  balance_coef: float = 0.0,
  router_z_coef: float = 0.0,
) -> tuple[Model, Params]:
  """The architecture called `preset` with random params, as jax arrays.

  balance_coef, router_z_coef: of the auxiliary losses of a mixture of experts

  Raises ValueError if there is no such preset.
  """
  architecture = dataclasses.replace(
    presets.get(preset),
    param_dtype=param_dtype,
    compute_dtype=compute_dtype,
    remat=remat,
    logprob=logprob,
    attention=attention,
    balance_coef=balance_coef,
    router_z_coef=router_z_coef,
  )
  model = policy.build(architecture)
  return model, jax.jit(model.init)(jax.random.key(seed))
