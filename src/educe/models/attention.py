"""Softmax attention, plain and forked: the one place where tokens see each other.

Dimensions as in transformer.py: B rows · T queries · S keys · H heads · K kv heads ·
h head width. Scores and the softmax are float32 whatever the dtypes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Finite, so that a row of masked scores has a softmax; float32's lowest would overflow
# when two of them are added.
MASKED = -1e30


def attend(
  q: Float[Array, 'B T H h'],
  k: Float[Array, 'B K S h'],
  v: Float[Array, 'B K S h'],
  visible: Bool[Array, '#B T S'],
) -> Float[Array, 'B T H h']:
  """Softmax attention; H/K queries share a kv head, without repeating k and v.

  q comes scaled by 1/√h. A query that sees no key gets zeros, and zero gradient.
  """
  B, T, H, h = q.shape
  K, S = k.shape[1:3]
  G = H // K
  # One axis for the queries of a kv head: XLA's CPU backend is slow (3× in a decode
  # step) at products whose left side has two free axes.
  q = jnp.moveaxis(q.reshape(B, T, K, G, h), 1, 3).reshape(B, K, G * T, h)
  scores = jnp.einsum('bkqh,bksh->bkqs', q, k, preferred_element_type=jnp.float32)
  scores = scores.reshape(B, K, G, T, S)
  visible = visible[:, None, None]
  weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1)
  # Where nothing is visible the softmax above is uniform, not zero.
  weights = jnp.where(visible, weights, 0).astype(v.dtype)
  mixed = jnp.einsum('bkqs,bksh->bkqh', weights.reshape(B, K, G * T, S), v)
  return jnp.moveaxis(mixed.reshape(B, K, G, T, h), 3, 1).reshape(B, T, H, h)


class Fork(NamedTuple):
  """Rows of one prompt and G completions: S tokens that all of them go on from, then G
  times T that see those S and, of the others, their own alone."""

  prompt: Bool[Array, 'B S']  # which of the S are there at all
  causal: Bool[Array, '#B T T']  # of a completion


def attend_forked(
  q: Float[Array, 'B N H h'],
  k: Float[Array, 'B K N h'],
  v: Float[Array, 'B K N h'],
  fork: Fork,
) -> Float[Array, 'B N H h']:
  """`attend` where N = S + G·T tokens are a fork: no score is made that none can see.

  The prompt's keys are multiplied with all completions' queries at once.
  """
  B, N, H, h = q.shape
  K, S, T = k.shape[1], fork.prompt.shape[1], fork.causal.shape[1]
  G, R = (N - S) // T, H // K
  earlier = jnp.tril(jnp.ones((S, S), bool)) & fork.prompt[:, None]
  stem = attend(q[:, :S], k[:, :, :S], v[:, :, :S], earlier)
  # Heads before tokens, and the queries of a key together: see `attend`.
  q = jnp.moveaxis(q[:, S:].reshape(B, G, T, K, R, h), (3, 4), (1, 3))
  own_k, own_v = (x[:, :, S:].reshape(B, K, G, T, h) for x in (k, v))
  of_prompt = jnp.einsum(
    'bkqh,bksh->bkqs',
    q.reshape(B, K, G * R * T, h),
    k[:, :, :S],
    preferred_element_type=jnp.float32,
  ).reshape(B, K, G, R, T, S)
  of_own = jnp.einsum(
    'bkgqh,bkgsh->bkgqs',
    q.reshape(B, K, G, R * T, h),
    own_k,
    preferred_element_type=jnp.float32,
  ).reshape(B, K, G, R, T, T)
  of_prompt = jnp.where(fork.prompt[:, None, None, None, None], of_prompt, MASKED)
  of_own = jnp.where(fork.causal[:, None, None, None], of_own, MASKED)
  # One softmax over both, without joining them. A token sees itself: no total is 0.
  top = jnp.maximum(of_prompt.max(-1), of_own.max(-1))[..., None]
  top = jax.lax.stop_gradient(top)
  of_prompt, of_own = jnp.exp(of_prompt - top), jnp.exp(of_own - top)
  total = of_prompt.sum(-1) + of_own.sum(-1)
  of_prompt, of_own = of_prompt.astype(v.dtype), of_own.astype(v.dtype)
  mixed = jnp.einsum(
    'bkqs,bksh->bkqh', of_prompt.reshape(B, K, G * R * T, S), v[:, :, :S]
  ).reshape(B, K, G, R, T, h)
  mixed += jnp.einsum(
    'bkgqs,bkgsh->bkgqh', of_own.reshape(B, K, G, R * T, T), own_v
  ).reshape(B, K, G, R, T, h)
  mixed = (mixed / total[..., None]).astype(v.dtype)
  branches = jnp.moveaxis(mixed, (1, 3), (3, 4)).reshape(B, G * T, H, h)
  return jnp.concatenate([stem, branches], 1)
