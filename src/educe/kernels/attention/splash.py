"""Softmax attention by splash attention, JAX's own Pallas kernel for TPU.

No score leaves the chip's vector memory, and blocks that no query sees are not made, so
that a fork costs what it must: the mask of its completions is known before it runs.
Which tokens are there, and which document they are of, is not; it comes as segment ids.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  BlockSizes,
  CausalMask,
  Mask,
  MultiHeadMask,
  SegmentIds,
  make_splash_mha,
)
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from educe.types import Split

LANES = 128  # a block is a multiple of them
BLOCK = 512  # queries, and keys, at most


class ForkMask(Mask):
  """Causal, but completions do not see each other; see `cudnn.lineage`."""

  def __init__(self, length: int, S: int, T: int):
    self.key = (length, S, T)

  @property
  def shape(self) -> tuple[int, int]:
    return self.key[0], self.key[0]

  def __getitem__(self, index) -> np.ndarray:
    length, S, T = self.key
    query, key = (np.arange(length)[part] for part in index)
    query = query[:, None]
    branch = (query - S) // T == (key - S) // T
    return (key <= query) & ((key < S) | branch)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, ForkMask) and self.key == other.key

  def __hash__(self) -> int:
    return hash((type(self), self.key))


def attend(
  q: Float[Array, 'B N H h'],
  k: Float[Array, 'B K N h'],
  v: Float[Array, 'B K N h'],
  segments: Int[Array, 'B N'] | None = None,
  fork: tuple[int, int] | None = None,
  *,
  split: Split | None = None,
  interpret: bool = False,
) -> Float[Array, 'B N H h']:
  """Causal, within segments; see `portable.causal` and, for fork, `portable.forked`.

  fork: (S, T) of rows that are a prompt of S tokens and completions of T
  split: of operands on a mesh, which the compiler cannot find out for a kernel; B and K
    divide by their axes. None: all of it is here
  interpret: run it as plain XLA
  """
  N = q.shape[1]
  pieces = -(-N // BLOCK)
  block = -(-N // (pieces * LANES)) * LANES
  more = pieces * block - N  # keys that come after every query which is there

  def run(q, k, v, segments):
    q = jnp.pad(jnp.swapaxes(q, 1, 2), ((0, 0), (0, 0), (0, more), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (k, v))
    if segments is not None:
      padded = jnp.pad(segments, ((0, 0), (0, more)))
      segments = SegmentIds(padded, padded)
    length, heads = N + more, q.shape[1]
    mask = CausalMask((length, length)) if fork is None else ForkMask(length, *fork)
    kernel = make_splash_mha(
      MultiHeadMask([mask] * heads),
      block_sizes=BlockSizes(*(block,) * 8),
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
    )
    out = jax.vmap(kernel)(q, k, v, segments)
    return jnp.swapaxes(out[:, :, :N], 1, 2)

  if split is None:
    return run(q, k, v, segments)
  rows = split.rows or None
  of_q = PartitionSpec(rows, None, split.across)
  of_kv = PartitionSpec(rows, split.across)
  of_segments = None if segments is None else PartitionSpec(rows)
  return jax.shard_map(
    run,
    mesh=split.mesh,
    in_specs=(of_q, of_kv, of_kv, of_segments),
    out_specs=of_q,
    check_vma=False,  # a Pallas call does not say what its results vary over
  )(q, k, v, segments)
