"""Pallas for TPU: no logit leaves the chip's vector memory.

Forward, a tile of tokens walks through the vocabulary and keeps its `Moments` (tile.py);
each logit is made once: F = 2·N·D·V flops, N·D·V/rows of W's bytes from HBM. Backward,
the tiles are made again, once for dH and once for dW, since one grid cannot sum over
tokens and over the vocabulary at the same time without reading and writing HBM: 4F.

A matrix that does not fit is cut along D as well: products of its pieces add up in a
float32 tile of logits, and backward the pieces pass a second time.

Everything is float32 but the operands of the matmuls. What lies beyond the edge of N
or V is garbage, and kept out where it would be summed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from educe.kernels.dispatch import device_kind, interpreted
from educe.kernels.logprob import op, tile
from educe.kernels.logprob.tpu_chips import CHIPS, LANES, SMALLEST, Tiles, divisor
from educe.types import Scores, Split

ROOM = 0.9  # of the vector memory; the compiler spills registers into the rest


class Settings(NamedTuple):
  temperature: float
  softcap: float | None
  tiles: Tiles
  interpret: bool


def logprob(
  hidden: Float[Array, 'N D'],
  head: Float[Array, 'D V'],
  targets: Int[Array, 'N'],
  *,
  temperature: float = 1.0,
  softcap: float | None = None,
  needed: Bool[Array, 'N'] | None = None,
  split: Split | None = None,
  tiles: Tiles | None = None,
  interpret: bool | None = None,
) -> Scores:
  """See `educe.kernels.logprob.logprob`.

  tiles: None: those of this chip, or of the smallest
  interpret: run it as plain XLA; None: where there is no TPU
  """
  kind = device_kind()
  if interpret is None:
    interpret = interpreted('pallas_tpu')
  if tiles is None:
    tiles = CHIPS.get(kind, SMALLEST)
  width = hidden.shape[1]
  step = divisor(width, tiles.width)
  if not step:  # no piece of lanes divides D: zeros add nothing to a product
    step = min(tiles.width, -(-width // LANES) * LANES)
    more = -width % step
    hidden = jnp.pad(hidden, ((0, 0), (0, more)))
    head = jnp.pad(head, ((0, more), (0, 0)))
  settings = Settings(temperature, softcap, tiles._replace(width=step), interpret)
  return op.apply(PASSES, settings, split, hidden, head, targets, needed)


class Grid(NamedTuple):
  """How many tiles there are of N, V and D."""

  rows: int
  vocab: int
  width: int


def _grid(tiles: Tiles, hidden, head) -> tuple[Tiles, Grid]:
  """Tiles no larger than what they are cut from, and the number of them."""
  (rows, width), vocab = hidden.shape, head.shape[1]
  tiles = tiles._replace(
    rows=min(tiles.rows, -(-rows // 16) * 16),  # 16 rows of bfloat16 are a register
    vocab=min(tiles.vocab, -(-vocab // LANES) * LANES),
  )
  return tiles, Grid(
    pl.cdiv(rows, tiles.rows), pl.cdiv(vocab, tiles.vocab), width // tiles.width
  )


def _call(settings, kernel, tiles, grid, inputs, outputs, scratch, cost, name):
  """pallas_call of a grid whose first dimension is sums of its own."""
  specs, operands = zip(*inputs, strict=True)
  out_specs, out_shapes = zip(*outputs, strict=True)
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=specs,
    out_specs=out_specs,
    out_shape=out_shapes,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=tiles.vmem,
    ),
    cost_estimate=cost,
    interpret=settings.interpret,
    name=name,
  )(*operands)


def _cost(hidden, head, grid: Grid, products: int, reads: int):
  """products: passes over N·D·V · reads: bytes of the operands that pass again"""
  (rows, width), vocab = hidden.shape, head.shape[1]
  return pl.CostEstimate(
    flops=2 * products * rows * width * vocab,
    transcendentals=rows * vocab,
    bytes_accessed=hidden.nbytes + head.nbytes + reads,
  )


def moments(settings, hidden, head, targets, needed) -> tile.Moments:
  tiles, grid = _grid(settings.tiles, hidden, head)
  rows, vocab = len(hidden), head.shape[1]

  def kernel(h, w, y, *refs):
    *out, s = refs
    v, d = pl.program_id(1), pl.program_id(2)
    _accumulate(s, d, _dot(h[...], w[...], 1, 0))

    @pl.when(d == grid.width - 1)
    def whole_product():
      z, _ = tile.squash(s[...], settings.temperature, settings.softcap)
      before = v * tiles.vocab
      column = before + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
      new = tile.moments(z, column == y[...], column < vocab)
      count = jnp.minimum(tiles.vocab, vocab - before)

      @pl.when(v == 0)
      def first():
        _write(out, new)

      @pl.when(v > 0)
      def later():
        old = tile.Moments(*(ref[...] for ref in out))
        _write(out, tile.join(old, before * 1.0, new, count * 1.0))

  column = pl.BlockSpec((tiles.rows, 1), lambda n, v, d: (n, 0))
  out = _call(
    settings,
    kernel,
    tiles,
    (grid.rows, grid.vocab, grid.width),
    [
      (pl.BlockSpec((tiles.rows, tiles.width), lambda n, v, d: (n, d)), hidden),
      (pl.BlockSpec((tiles.width, tiles.vocab), lambda n, v, d: (d, v)), head),
      (column, targets[:, None]),
    ],
    [(column, jax.ShapeDtypeStruct((rows, 1), jnp.float32))]
    * len(tile.Moments._fields),
    [pltpu.VMEM((tiles.rows, tiles.vocab), jnp.float32)],
    _cost(hidden, head, grid, 1, (grid.rows - 1) * head.nbytes),
    'logprob_moments',
  )
  return tile.Moments(*(x[:, 0] for x in out))


def _roomy(tiles: Tiles, width: int, dtypes, itemsize: int) -> Tiles:
  """Tiles with room for dH or dW of all of D, a float32 sum and two of what is written (one
  on its way out), beside two of each operand."""
  reads = 2 * itemsize * tiles.width * (tiles.rows + tiles.vocab)

  def fit(size: int, least: int, dtype) -> int:
    each = width * (4 + 2 * jnp.dtype(dtype).itemsize)
    while size > least and size * each + reads > ROOM * tiles.vmem:
      size //= 2
    return size

  rows, vocab = fit(tiles.rows, 16, dtypes[0]), fit(tiles.vocab, LANES, dtypes[1])
  return tiles._replace(rows=rows, vocab=vocab)


def gradients(settings, hidden, head, targets, needed, known, dtypes):
  width, itemsize = hidden.shape[1], jnp.result_type(hidden, head).itemsize
  tiles = _roomy(settings.tiles, width, dtypes, itemsize)
  tiles, grid = _grid(tiles, hidden, head)
  rows, size = len(hidden), head.shape[1]
  known = [x[:, None] for x in (targets, *known)]
  dtype = jnp.result_type(hidden, head)
  # A D in one piece is multiplied twice at one step, in several when they come again.
  passes = 1 if grid.width == 1 else 2 * grid.width

  def dlogits(s, v, known):
    y, *known = (ref[...] for ref in known)
    z, slope = tile.squash(s[...], settings.temperature, settings.softcap)
    column = v * tiles.vocab + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    return tile.gradient(z, slope, column == y, known)

  def kernel(outer, inner, count, axis, product):
    """One of the two: `axis` is that of ds which is summed over, of size `count`."""

    def body(h, w, *refs):
      *known, out, s, ds, acc = refs
      at, d = pl.program_id(1), pl.program_id(2)
      v = at if axis == 1 else pl.program_id(0)

      @pl.when(d < grid.width)
      def _():
        _accumulate(s, d, _dot(h[...], w[...], 1, 0))

      @pl.when(d == grid.width - 1)
      def _():
        new = dlogits(s, v, known)
        place = at * inner + jax.lax.broadcasted_iota(jnp.int32, new.shape, axis)
        ds[...] = jnp.where(place < count, new, 0.0).astype(dtype)

      @pl.when((at == 0) & (d == 0))
      def _():
        acc[...] = jnp.zeros_like(acc)

      @pl.when(d >= passes - grid.width)
      def _():
        acc[d - (passes - grid.width)] += product(h[...], w[...], ds[...], at)

      @pl.when((at == pl.num_programs(1) - 1) & (d == passes - 1))
      def _():
        for piece in range(grid.width):
          span = slice(piece * tiles.width, (piece + 1) * tiles.width)
          if axis == 1:
            out[:, span] = acc[piece].astype(out.dtype)
          else:
            out[span, :] = acc[piece].astype(out.dtype)

    return body

  def real(x, axis, at, step, count):
    """x with nothing beyond the edge, where 0 · garbage might be NaN."""
    if count % step == 0:
      return x
    place = at * step + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(place < count, x, jnp.zeros_like(x))

  def to_hidden(h, w, ds, at):
    return _dot(ds, real(w, 1, at, tiles.vocab, size), 1, 1)

  def to_head(h, w, ds, at):
    return _dot(real(h, 0, at, tiles.rows, rows), ds, 0, 0)

  cost = _cost(hidden, head, grid, 2, (grid.rows - 1) * head.nbytes + hidden.nbytes)
  flat = (tiles.rows, tiles.vocab)

  def specs(order):
    """Blocks of hidden, of the head and of one number a token; order: grid → (n, v)."""

    def block(shape, index):
      return pl.BlockSpec(shape, lambda i, j, d: index(*order(i, j), d % grid.width))

    return (
      block((tiles.rows, tiles.width), lambda n, v, d: (n, d)),
      block((tiles.width, tiles.vocab), lambda n, v, d: (d, v)),
      block((tiles.rows, 1), lambda n, v, d: (n, 0)),
    )

  def run(kernel, order, shape, out, scratch, steps, name):
    rows_of, head_of, column = specs(order)
    inputs = [(rows_of, hidden), (head_of, head), *((column, x) for x in known)]
    scratch = [pltpu.VMEM(flat, jnp.float32), pltpu.VMEM(flat, dtype), scratch]
    return _call(
      settings, kernel, tiles, steps, inputs, [(shape, out)], scratch, cost, name
    )[0]

  whole = grid.width * tiles.width
  d_hidden = run(
    kernel(tiles.rows, tiles.vocab, size, 1, to_hidden),
    lambda n, v: (n, v),
    pl.BlockSpec((tiles.rows, whole), lambda n, v, d: (n, 0)),
    jax.ShapeDtypeStruct(hidden.shape, dtypes[0]),
    pltpu.VMEM((grid.width, tiles.rows, tiles.width), jnp.float32),
    (grid.rows, grid.vocab, passes),
    'logprob_d_hidden',
  )
  d_head = run(
    kernel(tiles.vocab, tiles.rows, rows, 0, to_head),
    lambda v, n: (n, v),
    pl.BlockSpec((whole, tiles.vocab), lambda v, n, d: (0, v)),
    jax.ShapeDtypeStruct(head.shape, dtypes[1]),
    pltpu.VMEM((grid.width, tiles.width, tiles.vocab), jnp.float32),
    (grid.vocab, grid.rows, passes),
    'logprob_d_head',
  )
  return d_hidden, d_head


PASSES = op.Passes(moments, gradients)


def _dot(a, b, a_axis: int, b_axis: int):
  """A float32 product of two matrices over one axis of each."""
  return jax.lax.dot_general(
    a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
  )


def _accumulate(ref, step, part):
  @pl.when(step == 0)
  def _():
    ref[...] = part

  @pl.when(step > 0)
  def _():
    ref[...] += part


def _write(refs, values):
  for ref, value in zip(refs, values, strict=True):
    ref[...] = value
