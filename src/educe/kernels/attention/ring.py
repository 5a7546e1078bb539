"""Causal softmax attention over tokens that lie on several devices, in plain XLA.

Each of c devices has T/c tokens of every row. Keys and values go round: a device meets
those of all others, one part after another, and keeps of them

  m = max q·k      ℓ = Σ e^{q·k − m}      o = Σ e^{q·k − m} v

rescaled when m grows. No device ever holds T keys, nor more than (T/c)² scores of a head;
the gradient makes them again. Hao Liu et al., "Ring attention with blockwise transformers
for near-infinite context", 2023, §3, arXiv:2310.01889.

Half of the parts that a device meets lie after its queries, and are masked: this is the way
to a long context, not the fastest one (`splash` leaves such blocks out).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from educe.kernels.attention.portable import MASKED
from educe.types import Split


def attend(
  q: Float[Array, 'B T H h'],
  k: Float[Array, 'B K T h'],
  v: Float[Array, 'B K T h'],
  segments: Int[Array, 'B T'] | None,
  *,
  split: Split,
) -> Float[Array, 'B T H h']:
  """`portable.causal` of operands whose tokens lie over `split.along`."""
  rows: Any = split.rows or None
  axis: Any = split.along
  tokens = PartitionSpec(rows, axis)
  of_q = PartitionSpec(rows, axis, split.across)
  of_kv = PartitionSpec(rows, split.across, axis)

  def here(q, k, v, segments):
    return _here(q, k, v, segments, axis, split.mesh.shape[axis])

  return jax.shard_map(
    here,
    mesh=split.mesh,
    in_specs=(of_q, of_kv, of_kv, None if segments is None else tokens),
    out_specs=of_q,
    check_vma=False,  # what goes round varies over an axis that it did not come with
  )(q, k, v, segments)


def _here(q, k, v, segments, axis: str, count: int):
  """Of the queries on this device; T is what it has of a row."""
  B, T, H, h = q.shape
  K = k.shape[1]
  G = H // K
  own = lax.axis_index(axis)
  token = jnp.arange(T)
  # The queries of a kv head together: see `portable.attend`.
  q = jnp.moveaxis(q.reshape(B, T, K, G, h), 1, 3).reshape(B, K, G * T, h)

  @jax.checkpoint
  def fold(found, part, other):
    """What was found so far, and in the part of device `other`."""
    top, total, mixed = found
    k, v, theirs = part
    seen = (own * T + token)[:, None] >= (other * T + token)[None]
    seen = jnp.broadcast_to(seen, (B, T, T))
    if segments is not None:
      same = (segments[:, :, None] == theirs[:, None]) & (theirs[:, None] > 0)
      seen = seen & same
    scores = jnp.einsum('bkqh,bksh->bkqs', q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, G, T, T)
    scores = jnp.where(seen[:, None, None], scores, MASKED).reshape(B, K, G * T, T)
    higher = lax.stop_gradient(jnp.maximum(top, scores.max(-1)))
    weights = jnp.exp(scores - higher[..., None])
    shrunk = jnp.exp(top - higher)
    more = jnp.einsum(
      'bkqs,bksh->bkqh', weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    total = total * shrunk + weights.sum(-1)
    return higher, total, mixed * shrunk[..., None] + more

  def step(carry, distance):
    found, part = carry
    to_next = [(i, (i + 1) % count) for i in range(count)]
    part = jax.tree.map(lambda x: lax.ppermute(x, axis, to_next), part)
    return (fold(found, part, (own - distance) % count), part), None

  # Half of MASKED, so that a query which sees nothing has weights of 0, not of 1.
  zeros = jnp.zeros((B, K, G * T), jnp.float32)
  nothing = zeros + MASKED / 2, zeros, jnp.zeros((B, K, G * T, h), jnp.float32)
  part = k, v, segments
  found = fold(nothing, part, own)
  (found, _), _ = lax.scan(step, (found, part), jnp.arange(1, count))
  _, total, mixed = found
  mixed = (mixed / jnp.where(total > 0, total, 1)[..., None]).astype(v.dtype)
  return jnp.moveaxis(mixed.reshape(B, K, G, T, h), 3, 1).reshape(B, T, H, h)
