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
from jax.sharding import NamedSharding, PartitionSpec
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
  split: of operands on a mesh, which the compiler cannot find out for a kernel; B, K and,
    where its tokens are split, N divide by their axes (`least`). None: all of it is here
  interpret: run it as plain XLA

  Where a row's tokens lie on several devices, each has the keys of all of them while it
  runs (all-gather; Dubey et al. 2024, §3.3.2, arXiv:2407.21783): with few kv heads they
  are small beside what it would take to wait for them part by part.
  """
  N = q.shape[1]
  along = split and split.along
  parts = split.mesh.shape[along] if split and along else 1
  block, more = _blocks(N, parts)
  heads = q.shape[2]
  if split is not None and split.across:
    heads //= split.mesh.shape[split.across]
  mask = CausalMask((N + more,) * 2) if fork is None else ForkMask(N + more, *fork)
  kernel = make_splash_mha(
    MultiHeadMask([mask] * heads),
    block_sizes=BlockSizes(*(block,) * 8),
    head_shards=1,
    q_seq_shards=parts,
    interpret=interpret,
  )

  def run(kernel, q, k, v, segments):
    q = jnp.pad(jnp.swapaxes(q, 1, 2), ((0, 0), (0, 0), (0, more), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (k, v))
    if segments is not None:
      segments = SegmentIds(*(jnp.pad(segments, ((0, 0), (0, more))),) * 2)
    if parts > 1:
      k, v = (jax.lax.all_gather(x, along, axis=2, tiled=True) for x in (k, v))
    if parts > 1 and segments is not None:
      keys = jax.lax.all_gather(segments.kv, along, axis=1, tiled=True)
      segments = segments._replace(kv=keys)
    out = jax.vmap(kernel, (0, 0, 0, 0))(q, k, v, segments)
    return jnp.swapaxes(out[:, :, : q.shape[2] - more], 1, 2)

  if split is None:
    return run(kernel, q, k, v, segments)
  rows = split.rows or None
  of_q = PartitionSpec(rows, along, split.across)
  of_kv = PartitionSpec(rows, split.across, along)
  of_segments = None if segments is None else PartitionSpec(rows, along)
  blocks = NamedSharding(split.mesh, PartitionSpec(None, along))
  return jax.shard_map(
    run,
    mesh=split.mesh,
    in_specs=(kernel.manual_sharding_spec(blocks), of_q, of_kv, of_kv, of_segments),
    out_specs=of_q,
    check_vma=False,  # a Pallas call does not say what its results vary over
  )(kernel, q, k, v, segments)


def _blocks(N: int, parts: int) -> tuple[int, int]:
  """(tokens of a block, keys to add, which come after every query that is there)."""
  if parts > 1:  # each fills its own
    fit = (size for size in range(BLOCK, 0, -LANES) if N // parts % size == 0)
    return next(fit), 0
  block = -(-N // (-(-N // BLOCK) * LANES)) * LANES
  return block, -N % block


def least(split: Split) -> int:
  """What the tokens of a row must be a multiple of, to lie on several devices."""
  return split.mesh.shape[split.along] * LANES
