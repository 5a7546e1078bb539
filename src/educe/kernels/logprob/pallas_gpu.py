"""Mosaic GPU for Hopper: tensor cores and softmax in one kernel, tile by tile of logits.

A block of three warpgroups holds 128 tokens × 256 entries of the vocabulary. One of them
does nothing but fetch (TMA) the next pieces of H and W; each of the other two multiplies
64 tokens (wgmma), 64 × 256 float32 sums being what its registers can hold, and makes what
is wanted of the logits while they are there:

  forward   the `Moments` (tile.py) of each token in this part of the vocabulary, which
            plain XLA then joins: F = 2·N·D·V flops and 20 bytes a token and part
  backward  ∂/∂logits, in the operands' dtype, for WAVE tokens at a time: the two products
            with it are the library's, which no kernel of ours would beat. 3F in all

Sizes that do not divide are filled up: H and W with zeros that add nothing to a product,
columns beyond V kept out by their number.

Blocks walk in a snake over the tiles, so that those at work share rows and columns in L2.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from educe.kernels.logprob import op, tile
from educe.types import Scores, Split

ROWS, VOCAB, WIDTH = 64, 256, 64  # of a warpgroup's tile, and of D at a time
WARPGROUPS = 2  # that multiply
STAGES = 4  # pieces of H and W on their way; 48 KiB each of 227
# Columns at a time of what is made of the sums; with more, registers are spilled.
PIECE = 64
WAVE = 4096  # tokens whose ∂/∂logits are there at once
SNAKE = 8  # tiles, of a turn


class Settings(NamedTuple):
  temperature: float
  softcap: float | None
  multiprocessors: int


def logprob(
  hidden: Float[Array, 'N D'],
  head: Float[Array, 'D V'],
  targets: Int[Array, 'N'],
  *,
  temperature: float = 1.0,
  softcap: float | None = None,
  needed: Bool[Array, 'N'] | None = None,
  split: Split | None = None,
  multiprocessors: int | None = None,
) -> Scores:
  """See `educe.kernels.logprob.logprob`. hidden and head in one dtype of 16 bits.

  multiprocessors: of the chip; None: of this one, or 132

  Raises ValueError for other dtypes, which wgmma does not multiply in full.
  """
  if hidden.dtype != head.dtype or hidden.dtype.itemsize != 2:
    raise ValueError(
      f'pallas_gpu: hidden is {hidden.dtype} and head {head.dtype}; both must be bfloat16, '
      'or both float16 (config.model.compute_dtype)'
    )
  if multiprocessors is None:
    multiprocessors = getattr(jax.devices()[0], 'core_count', None) or 132
  settings = Settings(temperature, softcap, multiprocessors)
  return op.apply(PASSES, settings, split, hidden, head, targets, needed)


def moments(settings, hidden, head, targets, needed) -> tile.Moments:
  rows, vocab = len(hidden), head.shape[1]
  h, w = _filled(hidden, head)
  y = jnp.pad(targets, (0, len(h) - rows))
  parts = tile.Moments(*(x[:, :rows] for x in _part_moments(settings, h, w, y, vocab)))
  # All parts about one maximum, each with as many entries as are real.
  first = VOCAB * jnp.arange(len(parts.top))[:, None]
  count = jnp.minimum(VOCAB, vocab - first).astype(jnp.float32)
  top = parts.top.max(0, keepdims=True)
  found = tile.about(parts, top, count)
  return tile.Moments(top[0], *(x.sum(0) for x in found[1:]))


def gradients(settings, hidden, head, targets, needed, known: Any, dtypes):
  rows, vocab = len(hidden), head.shape[1]
  wave = min(WAVE, -(-rows // (WARPGROUPS * ROWS)) * WARPGROUPS * ROWS)
  waves = -(-rows // wave)
  h, w = _filled(hidden, head, wave)
  # Rows that fill up have cotangents of 0, and so no part in dW.
  y, *known = (jnp.pad(x, (0, waves * wave - rows)) for x in (targets, *known))

  def body(d_head, xs):
    h, *known = xs
    ds = _dlogits(settings, h, w, known, vocab)
    d_hidden = jnp.einsum('nv,dv->nd', ds, w, preferred_element_type=jnp.float32)
    d_head += jnp.einsum('nd,nv->dv', h, ds, preferred_element_type=jnp.float32)
    return d_head, d_hidden.astype(dtypes[0])

  xs = [x.reshape(waves, wave, *x.shape[1:]) for x in (h, y, *known)]
  d_head, d_hidden = jax.lax.scan(body, jnp.zeros(w.shape, jnp.float32), xs)
  d_hidden = d_hidden.reshape(waves * wave, -1)[:rows, : hidden.shape[1]]
  return d_hidden, d_head[: head.shape[0], :vocab].astype(dtypes[1])


PASSES = op.Passes(moments, gradients)


def _mosaic() -> Any:
  # Its names move from version to version; ours are those of jax 0.12.
  if jax.version.__version_info__ < (0, 12):
    raise NotImplementedError(
      f'pallas_gpu: jax is {jax.__version__}; it needs 0.12, or choose chunked'
    )
  return importlib.import_module('jax.experimental.pallas.mosaic_gpu')


def _filled(hidden, head, rows: int = WARPGROUPS * ROWS):
  """Both with zeros up to whole tiles."""
  more_rows, more_width = -len(hidden) % rows, -hidden.shape[1] % WIDTH
  more_vocab = -head.shape[1] % VOCAB
  return (
    jnp.pad(hidden, ((0, more_rows), (0, more_width))),
    jnp.pad(head, ((0, more_width), (0, more_vocab))),
  )


def _part_moments(settings, h, w, y, vocab: int):
  """Five arrays `[V/256, N]`: the Moments of each part of the vocabulary."""
  parts = w.shape[1] // VOCAB
  out = jax.ShapeDtypeStruct((parts, len(h)), jnp.float32)

  def finish(s, part, rows, refs, smem):
    plgpu = _mosaic()
    y, *out = refs
    y = plgpu.load(y.at[rows], layout=plgpu.Layout.WGMMA.reduce(1))
    found = _tile_moments(settings, s, _columns(part), y, vocab)
    for index, value in enumerate(found):
      smem[index] = value
    plgpu.commit_smem()
    for index, ref in enumerate(out):
      plgpu.copy_smem_to_gmem(smem.at[index], ref.at[part, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  scratch = (len(tile.Moments._fields), ROWS), jnp.float32, None
  return _over_tiles(settings, h, w, (y,), (out,) * 5, scratch, finish)


def _tile_moments(settings, s, column, y, vocab) -> tile.Moments:
  """tile.moments of a warpgroup's sums, a piece of the columns at a time: beside the sums
  there is no room in its registers for another array as large."""

  def pieces():
    for start in range(0, VOCAB, PIECE):
      span = slice(start, start + PIECE)
      z, _ = tile.squash(s[:, span], settings.temperature, settings.softcap)
      inside = column[:, span] < vocab
      yield jnp.where(inside, z, tile.LOWEST), inside, column[:, span]

  def across(x):
    return jax.lax.broadcast_in_dim(x, (ROWS, PIECE), [0])

  top = functools.reduce(jnp.maximum, (z.max(axis=1) for z, *_ in pieces()))
  found = []
  for z, inside, at in pieces():
    above = z - across(top)
    e = jnp.exp(above)
    above = jnp.where(inside, above, 0.0)
    target = jnp.where(at == across(y), z, 0.0)
    parts = e, e * above, above, target
    found.append([part.sum(axis=1) for part in parts])
  return tile.Moments(
    top, *(sum(part[1:], part[0]) for part in zip(*found, strict=True))
  )


def _dlogits(settings, h, w, known, vocab: int):
  """∂/∂logits `[N, V]` in the dtype of h, 0 beyond the vocabulary."""
  out = jax.ShapeDtypeStruct((len(h), w.shape[1]), h.dtype)

  def finish(s, part, rows, refs, smem):
    plgpu = _mosaic()
    *known, out = refs
    layout = plgpu.Layout.WGMMA.reduce(1)
    y, *constants = (
      jax.lax.broadcast_in_dim(
        plgpu.load(x.at[rows], layout=layout), (ROWS, PIECE), [0]
      )
      for x in known
    )
    column = _columns(part)
    for piece, start in enumerate(range(0, VOCAB, PIECE)):
      span, slot = slice(start, start + PIECE), piece % 2
      z, slope = tile.squash(s[:, span], settings.temperature, settings.softcap)
      hit, inside = column[:, span] == y, column[:, span] < vocab
      ds = tile.gradient(z, slope, hit, constants)
      plgpu.wait_smem_to_gmem(1, wait_read_only=True)
      smem[slot] = jnp.where(inside, ds, 0.0).astype(h.dtype)
      plgpu.commit_smem()
      columns = pl.ds(part * VOCAB + start, PIECE)
      plgpu.copy_smem_to_gmem(smem.at[slot], out.at[rows, columns])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  scratch = (2, ROWS, PIECE), h.dtype, PIECE
  (ds,) = _over_tiles(settings, h, w, known, (out,), scratch, finish)
  return ds


def _columns(part):
  """The number of each entry's column in the vocabulary, `[64, 256]`."""
  plgpu = _mosaic()
  return part * VOCAB + plgpu.broadcasted_iota(
    jnp.int32, (ROWS, VOCAB), 1, layout=plgpu.Layout.WGMMA
  )


def _over_tiles(settings, h, w, rows_in: Any, out: Any, scratch: Any, finish: Any):
  """Multiplies every tile of h·w and hands it to `finish`, a warpgroup at a time.

  rows_in: arrays of one number a token · out: shapes
  scratch: (shape, dtype, columns that it is swizzled by) of each warpgroup's shared memory
  finish(sums [64, 256], which part of the vocabulary, their rows, refs of rows_in and out,
    shared memory)
  """
  plgpu = _mosaic()

  def swizzled(columns):
    swizzle = plgpu.find_swizzle(columns * 16)
    tiling = plgpu.TilingTransform((8, swizzle // 2))
    return tiling, plgpu.SwizzleTransform(swizzle)

  layout = swizzled(WIDTH)
  block = WARPGROUPS * ROWS
  many, parts = len(h) // block, w.shape[1] // VOCAB
  shape, dtype, wide = scratch

  def pipeline(body, context):
    return plgpu.emit_pipeline_warp_specialized(
      body,
      grid=(h.shape[1] // WIDTH,),
      in_specs=[
        plgpu.BlockSpec((block, WIDTH), lambda d: (0, d), transforms=layout),
        plgpu.BlockSpec((WIDTH, VOCAB), lambda d: (d, 0), transforms=layout),
      ],
      memory_registers=40,
      wg_axis='warpgroup',
      num_compute_wgs=WARPGROUPS,
      max_concurrent_steps=STAGES,
      compute_context=context,
    )

  def kernel(h_ref, w_ref, *refs):
    nothing = lambda *_, **__: None  # noqa: E731  (its allocations need no functions)

    @functools.partial(
      pl.run_scoped,
      buffers=pipeline(nothing, nothing).get_allocations(h_ref, w_ref),
      smem=plgpu.SMEM(
        (WARPGROUPS, *shape), dtype, transforms=swizzled(wide) if wide else ()
      ),
      collective_axes='warpgroup',
    )
    def _(buffers, smem):
      mine = jax.lax.axis_index('warpgroup')
      own = pl.ds(mine * ROWS, ROWS)

      @plgpu.nd_loop((many * parts,), collective_axes='blocks')
      def _(loop):
        row, part = plgpu.planar_snake(loop.index[0], (many, parts), 0, SNAKE)

        def compute(run):
          @functools.partial(pl.run_scoped, sums=plgpu.ACC((ROWS, VOCAB), jnp.float32))
          def _(sums):
            run(sums)
            rows = pl.ds(row * block + mine * ROWS, ROWS)
            finish(sums[...], part, rows, refs, smem.at[mine])

        def multiply(_, h, w, sums):
          plgpu.wgmma(sums, h.at[own], w)
          plgpu.wgmma_wait(0)
          return sums

        pipeline(multiply, compute)(
          h_ref.at[pl.ds(row * block, block), :],
          w_ref.at[:, pl.ds(part * VOCAB, VOCAB)],
          allocations=buffers,
        )

  return plgpu.kernel(
    kernel,
    out_type=out,
    grid=(settings.multiprocessors,),
    grid_names=('blocks',),
    num_threads=WARPGROUPS + 1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=False
    ),
  )(h, w, *rows_in)
