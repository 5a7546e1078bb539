"""Softmax attention in plain XLA: runs everywhere, and says what the others must give.

  o = Σ_s e^{q·k_s − m} v_s / Σ_s e^{q·k_s − m}        over the keys s that q sees

The division comes after the product with v: h numbers a query are divided, not S.
Dimensions: B rows · T queries · S keys · H heads · K kv heads · h head width. q comes
scaled by 1/√h. Scores, m and both sums' terms are float32 whatever the dtypes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row of masked scores has a maximum; float32's lowest would overflow
# when two of them are added.
MASKED = -1e30
# A causal row of LONG queries is cut into so many blocks. Of the scores, (1 + 1/BLOCKS)/2
# are made; 8 blocks are another tenth faster, and take twice as long to compile.
BLOCKS = 4
LONG = 256


def attend(
  q: Float[Array, 'B T H h'],
  k: Float[Array, 'B K S h'],
  v: Float[Array, 'B K S h'],
  visible: Bool[Array, '#B T S'],
) -> Float[Array, 'B T H h']:
  """H/K queries share a kv head, without repeating k and v.

  A query that sees no key gets zeros, and zero gradient.
  """
  B, T, H, h = q.shape
  K, S = k.shape[1:3]
  G = H // K
  # One axis for the queries of a kv head: XLA's CPU backend is slow (3× in a decode
  # step) at products whose left side has two free axes.
  q = jnp.moveaxis(q.reshape(B, T, K, G, h), 1, 3).reshape(B, K, G * T, h)
  scores = jnp.einsum('bkqh,bksh->bkqs', q, k, preferred_element_type=jnp.float32)
  scores = jnp.where(visible[:, None, None], scores.reshape(B, K, G, T, S), MASKED)
  # Half of MASKED, so that a query which sees nothing has weights of 0, not of 1.
  top = jnp.maximum(scores.max(-1, keepdims=True), MASKED / 2)
  weights = jnp.exp(scores - jax.lax.stop_gradient(top))
  total = weights.sum(-1, keepdims=True)
  weights = weights.astype(v.dtype).reshape(B, K, G * T, S)
  mixed = _mix('bkqs,bksh->bkqh', weights, v).reshape(B, K, G, T, h)
  mixed = (mixed / jnp.where(total > 0, total, 1)).astype(v.dtype)
  return jnp.moveaxis(mixed, 3, 1).reshape(B, T, H, h)


def causal(
  q: Float[Array, 'B T H h'],
  k: Float[Array, 'B K T h'],
  v: Float[Array, 'B K T h'],
  segments: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T H h']:
  """`attend` to what came before, in blocks of queries that stop at their last key."""
  out = []
  for start, end in blocks(q.shape[1]):
    visible = jnp.arange(start, end)[None, :, None] >= jnp.arange(end)[None, None]
    if segments is not None:
      own, earlier = segments[:, start:end, None], segments[:, None, :end]
      visible = visible & (own == earlier) & (earlier > 0)
    out.append(attend(q[:, start:end], k[:, :, :end], v[:, :, :end], visible))
  return jnp.concatenate(out, 1) if len(out) > 1 else out[0]


def blocks(length: int) -> list[tuple[int, int]]:
  """(start, end) of the blocks of `length` queries."""
  step = -(-length // BLOCKS) if length >= LONG else length
  return [(start, min(start + step, length)) for start in range(0, length, step)]


def forked(
  q: Float[Array, 'B N H h'],
  k: Float[Array, 'B K N h'],
  v: Float[Array, 'B K N h'],
  prompt: Bool[Array, 'B S'],
  T: int,
) -> Float[Array, 'B N H h']:
  """`attend` where a row is a prompt of S tokens and N − S of G completions, T each.

  prompt: which of the S are there at all

  The prompt's keys are multiplied with all completions' queries at once; no score is
  made between two completions.
  """
  B, N, H, h = q.shape
  K, S = k.shape[1], prompt.shape[1]
  G, R = (N - S) // T, H // K
  stem = causal(q[:, :S], k[:, :, :S], v[:, :, :S], prompt.astype(jnp.int32))
  # Heads before tokens, and the queries of a key together: see `attend`.
  q = jnp.moveaxis(q[:, S:].reshape(B, G, T, K, R, h), (3, 4), (1, 3))
  own_k, own_v = (x[:, :, S:].reshape(B, K, G, T, h) for x in (k, v))
  out = []
  for start, end in blocks(T):
    t, part = end - start, q[:, :, :, :, start:end]
    of_prompt = jnp.einsum(
      'bkqh,bksh->bkqs',
      part.reshape(B, K, G * R * t, h),
      k[:, :, :S],
      preferred_element_type=jnp.float32,
    ).reshape(B, K, G, R, t, S)
    of_own = jnp.einsum(
      'bkgqh,bkgsh->bkgqs',
      part.reshape(B, K, G, R * t, h),
      own_k[:, :, :, :end],
      preferred_element_type=jnp.float32,
    ).reshape(B, K, G, R, t, end)
    of_prompt = jnp.where(prompt[:, None, None, None, None], of_prompt, MASKED)
    earlier = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
    of_own = jnp.where(jnp.expand_dims(earlier, (0, 1, 2, 3)), of_own, MASKED)
    # One softmax over both, without joining them. A token sees itself: no total is 0.
    top = jnp.maximum(of_prompt.max(-1), of_own.max(-1))[..., None]
    top = jax.lax.stop_gradient(top)
    of_prompt, of_own = jnp.exp(of_prompt - top), jnp.exp(of_own - top)
    total = of_prompt.sum(-1) + of_own.sum(-1)
    of_prompt = of_prompt.astype(v.dtype).reshape(B, K, G * R * t, S)
    of_own = of_own.astype(v.dtype).reshape(B, K, G, R * t, end)
    mixed = _mix('bkqs,bksh->bkqh', of_prompt, v[:, :, :S]).reshape(part.shape)
    own = _mix('bkgqs,bkgsh->bkgqh', of_own, own_v[:, :, :, :end])
    mixed += own.reshape(part.shape)
    out.append((mixed / total[..., None]).astype(v.dtype))
  branches = jnp.moveaxis(jnp.concatenate(out, 4), (1, 3), (3, 4))
  return jnp.concatenate([stem, branches.reshape(B, G * T, H, h)], 1)


def _mix(formula: str, weights, v):
  """The product with v, in its dtype; float16 would overflow before it is divided."""
  summed = jnp.promote_types(v.dtype, jnp.bfloat16)
  return jnp.einsum(formula, weights, v, preferred_element_type=summed)
