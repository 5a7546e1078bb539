"""Pallas for TPU: GAE in one pass over memory, without a step of a loop for each token.

Rows lie on sublanes, time on lanes, as the arrays do. Tiles come in from the end of time;
in a tile both recurrences are solved by doubling, ⌈log2(tile)⌉ times for all its tokens:

  next drawn token   x_t ← x_t, or x_{t+s} where none was found from t to t+s−1
  A_t = δ_t + c_t·A_{t+1}      δ_t ← δ_t + c_t·δ_{t+s},  c_t ← c_t·c_{t+s}   s = 1, 2, 4, …

c is γλ, 0 where a sequence ends, and 1 where the policy drew nothing (δ = 0): such tokens
hand on what comes later. Of the tiles done, the first token's three numbers are kept in the
chip's vector memory. Nothing is padded; what lies beyond the edge is not drawn.

One device: rows that lie on a mesh are for `jax.shard_map`, since none needs another.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from educe.kernels.dispatch import interpreted

SUBLANES, LANES = 8, 128
# Rows, tokens. On v5e tiles of (8, 128) make 2.6 times as many bundles; larger, no fewer.
TILE = 64, 512


@functools.partial(jax.jit, static_argnames=('gamma', 'lam', 'tile', 'interpret'))
def gae(
  rewards,
  values,
  mask,
  bootstrap=None,
  segments=None,
  *,
  gamma: float,
  lam: float,
  tile: tuple[int, int] = TILE,
  interpret: bool | None = None,
):
  """See `educe.kernels.advantage.gae`.

  tile: rows, tokens; multiples of 8 and of 128
  interpret: run it as plain XLA; None: where there is no TPU
  """
  if interpret is None:
    interpret = interpreted('pallas')
  count, length = mask.shape
  rows = min(tile[0], -(-count // SUBLANES) * SUBLANES)
  width = min(tile[1], -(-length // LANES) * LANES)
  steps = pl.cdiv(length, width)
  given = {'r': rewards, 'v': values, 'mask': mask, 'ahead': bootstrap, 'seg': segments}
  inputs = {name: x for name, x in given.items() if x is not None}

  def kernel(*refs):
    read = dict(zip(inputs, refs, strict=False))
    *_, advantages, returns, value, advantage, segment = refs

    @pl.when(pl.program_id(1) == 0)
    def end_of_time():
      value[...] = jnp.zeros_like(value)
      advantage[...] = jnp.zeros_like(advantage)
      segment[...] = jnp.full_like(segment, -1)

    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, width), 1)
    last = lane == width - 1
    before = (steps - 1 - pl.program_id(1)) * width
    drawn = (read['mask'][...] > 0) & (before + lane < length)

    def clean(name, dtype=jnp.float32):
      if name not in read:
        return jnp.zeros((rows, width), dtype)
      return jnp.where(drawn, read[name][...].astype(dtype), 0)

    def later(x, by):
      """x_{t+by}; beyond the tile, whatever."""
      return pltpu.roll(x, width - by, 1)

    def shifted(x, carried):
      return jnp.where(last, carried, later(x, 1))

    r, v, ahead, seg = clean('r'), clean('v'), clean('ahead'), clean('seg', jnp.int32)
    found = shifted(drawn.astype(jnp.int32), 1)
    next_v, next_seg = shifted(v, value[...]), shifted(seg, segment[...])
    by = 1
    while by < width:
      # The last token has found; so has who would read around the tile's edge.
      next_v = jnp.where(found > 0, next_v, later(next_v, by))
      next_seg = jnp.where(found > 0, next_seg, later(next_seg, by))
      found = found | later(found, by)
      by *= 2

    ends = next_seg != seg
    delta = jnp.where(drawn, r + gamma * jnp.where(ends, ahead, next_v) - v, 0.0)
    c = jnp.where(drawn, jnp.where(ends, 0.0, gamma * lam), 1.0)
    delta = jnp.where(last & (c != 0), delta + c * advantage[...], delta)
    c = jnp.where(last, 0.0, c)
    by = 1
    while by < width:
      # `where`: 0 · NaN would cross the end of a sequence, and the tile's edge.
      delta = jnp.where(c == 0, delta, delta + c * later(delta, by))
      c = c * later(c, by)
      by *= 2

    found_here = drawn[:, :1]
    value[...] = jnp.where(found_here, v[:, :1], next_v[:, :1])
    segment[...] = jnp.where(found_here, seg[:, :1], next_seg[:, :1])
    advantage[...] = delta[:, :1]
    a = jnp.where(drawn, delta, 0.0)
    advantages[...], returns[...] = a, a + v

  block = pl.BlockSpec((rows, width), lambda b, t: (b, steps - 1 - t))
  out = jax.ShapeDtypeStruct(mask.shape, jnp.float32)
  return pl.pallas_call(
    kernel,
    grid=(pl.cdiv(count, rows), steps),
    in_specs=[block] * len(inputs),
    out_specs=(block, block),
    out_shape=(out, out),
    scratch_shapes=[
      pltpu.VMEM((rows, 1), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32)
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
    interpret=interpret,
    name='gae',
  )(*inputs.values())
