"""What a model thinks of whole completions: Σ_t log π(y_t | x, y_<t), nats."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from educe.losses.logprobs import score
from educe.sharding import fetch, using_that_of
from educe.types import Batch, Model, Params


def sequence_logp(
  model: Model,
  params: Params,
  tokens: Int[Array, 'B T'],
  mask: Float[Array, 'B T'],
  *,
  temperature: float = 1.0,
  batch_size: int = 64,
) -> Float[np.ndarray, 'B']:
  """Of the tokens under the mask, at the temperature they were drawn at; float64.

  Rows that are equal are scored once: short answers often are.
  """
  # A static argument, compiled once: without what cannot be hashed, or is not asked.
  model = model._replace(axes=None, architecture=None, aux_coefs=None, values=None)
  said, there = np.asarray(tokens), np.asarray(mask)
  both = np.concatenate([said, there], -1)
  _, first, back = np.unique(both, axis=0, return_index=True, return_inverse=True)
  parts = []
  for at in range(0, len(first), batch_size):
    rows = first[at : at + batch_size]
    # Few shapes, few programs: what is left over is filled up to a power of two.
    missing = (1 << (len(rows) - 1).bit_length()) - len(rows)
    filled = np.pad(rows, (0, missing), 'edge')
    arrays: dict[str, Any] = dict(tokens=said[filled], mask=there[filled])
    batch = Batch(**arrays)
    with using_that_of(params):
      logp = fetch(_logp(model, params, batch, temperature))
    parts.append(np.asarray(logp, np.float64)[: len(rows)])
  return np.concatenate(parts)[back.ravel()]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logp(model, params, batch: Batch, temperature: float):
  logp = score(model, params, batch, temperature=temperature).logp
  return jnp.where(batch.mask > 0, logp, 0.0).sum(-1)
