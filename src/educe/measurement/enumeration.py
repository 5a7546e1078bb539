"""Every output of a small language under a model: exact log-probs, by enumeration.

With S symbols and L places there are Sᴸ outputs. All ways to write l symbols go on from
the same keys and values, each S times, so that every prefix is read once, and

  log π(y|x) = Σ_l log π(y_l | x, y_1 … y_{l−1})

so that what a sampler only estimates is known (environments/language.py: 4,096 outputs).
What holds a token that is no symbol is no output, and is counted as one event.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from educe.kernels.logprob import reference
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
  batch_size: rows of the widest pass, but at least the S^(L−1) of one prompt

  Raises ValueError for a length or batch_size below 1 and a temperature that is not
  positive.
  """
  logp, _ = _enumerated(
    model, params, prompts, symbols, length, temperature, batch_size
  )
  return logp


def distribution(
  model: Model,
  params: Params,
  prompts: Int[np.ndarray, 'P T'],
  symbols: np.ndarray,
  length: int,
  *,
  temperature: float = 1.0,
  batch_size: int = 2048,
) -> Float[np.ndarray, 'P Y+1']:
  """π(y|x) of all Y outputs and, last, of anything else; rows sum to 1.

  Arguments and errors are those of `sequence_logp`. The last is a sum over the prefixes
  after which a token that is no symbol comes, and no difference from 1: it is as exact at
  1e-9 as at ½.
  """
  logp, other = _enumerated(
    model, params, prompts, symbols, length, temperature, batch_size
  )
  p = np.column_stack([np.exp(logp), other])
  return p / p.sum(-1, keepdims=True)  # of float32 log-probs: 1 within 1e-6


def _enumerated(model, params, prompts, symbols, length, temperature, batch_size):
  """(log π of all outputs `[P, Y]`, π of anything else `[P]`)."""
  if length < 1 or batch_size < 1 or not temperature > 0:
    raise ValueError(
      f'enumeration: {length=} and {batch_size=} must be at least 1, {temperature=} above 0'
    )
  prompts, symbols = np.asarray(prompts), np.asarray(symbols)
  size = max(1, batch_size // len(symbols) ** (length - 1))  # prompts side by side
  full = np.pad(prompts, ((0, -len(prompts) % size), (0, 0)))  # one shape, one program
  hashable = model._replace(axes=None, architecture=None, aux_coefs=None, values=None)
  out, others = [], []
  for at in range(0, len(full), size):
    logp, other = np.zeros((size, 1)), np.zeros(size)
    for steps, rest in _steps(
      hashable, length, temperature, params, jnp.asarray(symbols), full[at : at + size]
    ):
      other += np.exp(logp + np.asarray(rest, np.float64).reshape(size, -1)).sum(-1)
      longer = np.asarray(steps, np.float64).reshape(size, -1, len(symbols))
      logp = (logp[..., None] + longer).reshape(size, -1)
    out.append(logp)
    others.append(other)
  return np.concatenate(out)[: len(prompts)], np.concatenate(others)[: len(prompts)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _steps(
  model: Model, length: int, temperature: float, params: Params, symbols, rows
):
  """Of each place l, after each prefix: log-probs of each symbol, `[B·S^l, S]`, and of
  all other tokens together, `[B·S^l]`."""
  read = rows.shape[1]
  cache = model.init_cache(len(rows), read + length - 1)
  positions = jnp.broadcast_to(jnp.arange(read), rows.shape)
  out, slot = [], 0
  for place in range(length):
    states, cache = model.decode(params, cache, rows, positions, slot)
    logp = _log_probs(model, params, states[:, -1], temperature)
    rest = jax.nn.logsumexp(logp.at[:, symbols].set(-jnp.inf), -1)
    out.append((logp[:, symbols], rest))
    count, slot = len(rows), read + place
    rows = jnp.tile(symbols, count)[:, None]
    positions = jnp.full(rows.shape, slot)
    cache = jax.tree.map(lambda x: jnp.repeat(x, len(symbols), 0), cache)
  return out


def _log_probs(model: Model, params: Params, states, temperature: float):
  """`[B, V]` of `[B, D]`."""
  head = model.head(params)
  scaled = states * jnp.asarray(head.scale, states.dtype)
  with jax.default_matmul_precision('highest'):
    logits = reference.logits(
      scaled, head.matrix, temperature=temperature, softcap=head.softcap
    )
  return jax.nn.log_softmax(logits)
