"""Every output of a small language under a model: exact log-probs, by enumeration.

With S symbols and L places there are Sᴸ outputs. One forward pass over the S^(L−1) ways to
write all but the last symbol has every conditional that is needed,

  log π(y|x) = Σ_l log π(y_l | x, y_1 … y_{l−1})

so that what a sampler only estimates is known (environments/language.py: 4,096 outputs).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from educe.types import Model, Params


def sequence_logp(
  model: Model,
  params: Params,
  prompts: Int[np.ndarray, 'P T'],
  symbols: np.ndarray,
  length: int,
  *,
  temperature: float = 1.0,
  batch_size: int = 2048,
) -> Float[np.ndarray, 'P Y']:
  """log π(y|x) of all Y = Sᴸ outputs, in lexicographic order of `symbols` (nats).

  prompts: token ids, of one length
  symbols: `[S]` token ids; other tokens have the mass that is missing from a row's sum
  batch_size: rows of a forward pass

  Raises ValueError for a length or batch_size below 1 and a temperature that is not
  positive.
  """
  if length < 1 or batch_size < 1 or not temperature > 0:
    raise ValueError(
      f'enumeration: {length=} and {batch_size=} must be at least 1, {temperature=} above 0'
    )
  count, size = len(prompts), len(symbols)
  # [S^(L−1), L−1]; of a single place, the one way to write nothing.
  ways = np.indices((size,) * (length - 1)).reshape(length - 1, size ** (length - 1)).T
  rows = np.concatenate(
    [
      np.repeat(np.asarray(prompts), len(ways), 0),
      np.tile(np.asarray(symbols)[ways], (count, 1)),
    ],
    axis=1,
  )
  hashable = model._replace(axes=None, architecture=None, values=None)
  read = functools.partial(
    _steps, hashable, params, jnp.asarray(symbols), length, temperature
  )
  missing = -len(rows) % batch_size  # one shape, one program
  full = np.pad(rows, ((0, missing), (0, 0)))
  parts = [
    np.asarray(read(jnp.asarray(full[at : at + batch_size])), np.float64)
    for at in range(0, len(full), batch_size)
  ]
  steps = np.concatenate(parts)[: len(rows)].reshape(count, len(ways), length, size)
  # Of all but the last step, the symbol that the row goes on with.
  taken = np.take_along_axis(steps[:, :, :-1], ways[None, :, :, None], -1)[..., 0]
  return (taken.sum(-1)[..., None] + steps[:, :, -1]).reshape(count, -1)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _steps(model: Model, params: Params, symbols, length, temperature, tokens):
  """`[B, L, S]`: log-probs of each symbol at each of the last L places."""
  states, _ = model.hidden(params, tokens)
  head = model.head(params)
  logits = jnp.einsum(
    'bld,dv->blv',
    states[:, -length:] * jnp.asarray(head.scale, states.dtype),
    head.matrix,
    preferred_element_type=jnp.float32,
    precision=jax.lax.Precision.HIGHEST,
  )
  if head.softcap is not None:
    logits = head.softcap * jnp.tanh(logits / head.softcap)
  return jax.nn.log_softmax(logits / temperature)[..., symbols]
