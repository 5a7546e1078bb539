"""A language model whose exact distribution is known, to the contract of types.Model.

The next token's logits are row (Σ tokens so far) mod V of a table: they depend on the
whole history, so wrong positions, attended padding or a stale cache show at once.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np

from educe.types import Head, Model


def model(vocabulary=8, max_length=64, scale=1.0, softcap=None):
  """(Model, params); params is the table [V, V]."""

  def init_cache(rows, length):
    blank = jnp.zeros((rows, length), jnp.int32)
    return {'tokens': blank, 'positions': blank - 1}

  def decode(params, cache, tokens, positions, slot):
    cache = {
      'tokens': _write(cache['tokens'], tokens, slot),
      'positions': _write(cache['positions'], positions, slot),
    }
    stored = cache['positions'][:, None, :]
    seen = (stored >= 0) & (stored <= positions[:, :, None])
    total = jnp.where(seen, cache['tokens'][:, None, :], 0).sum(-1)
    return jnp.eye(vocabulary)[total % vocabulary], cache

  def _write(array, values, slot):
    return jax.lax.dynamic_update_slice(array, values, (0, slot))

  def hidden(params, tokens, positions=None, segments=None):
    return jnp.eye(vocabulary)[jnp.cumsum(tokens, -1) % vocabulary], {}

  table = np.random.default_rng(0).normal(size=(vocabulary, vocabulary)) * 1.5
  return (
    Model(
      init=lambda key: jnp.asarray(table, jnp.float32),
      hidden=hidden,
      head=lambda params: Head(params, scale, softcap),
      init_cache=init_cache,
      decode=decode,
      axes=None,
      architecture=types.SimpleNamespace(max_length=max_length),
    ),
    jnp.asarray(table, jnp.float32),
  )


def logits(table, history):
  return np.asarray(table, np.float64)[sum(history) % len(table)]


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))
