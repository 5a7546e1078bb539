"""Whose tensor is which of our params: the one table that every file format shares.

Files keep a layer's matrix as [out, in]; we keep [in, out], heads split from the width
and layers stacked in front: `blk.3.attn_q.weight` [H·h, D] is
`layers/attention/query`[3] [D, H, h]. Of experts each has a tensor of its own.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from educe.models import policy
from educe.models.architecture import Architecture
from educe.models.parts import path_text
from educe.types import Params

# ours · Hugging Face · GGUF · llama2.c ({} is the layer)
TABLE = [
  ('embedding', 'model.embed_tokens.weight', 'token_embd.weight', 'token_embedding'),
  (
    'layers/attention_norm/scale',
    'model.layers.{}.input_layernorm.weight',
    'blk.{}.attn_norm.weight',
    'rms_att.{}',
  ),
  (
    'layers/attention/query',
    'model.layers.{}.self_attn.q_proj.weight',
    'blk.{}.attn_q.weight',
    'wq.{}',
  ),
  (
    'layers/attention/key',
    'model.layers.{}.self_attn.k_proj.weight',
    'blk.{}.attn_k.weight',
    'wk.{}',
  ),
  (
    'layers/attention/value',
    'model.layers.{}.self_attn.v_proj.weight',
    'blk.{}.attn_v.weight',
    'wv.{}',
  ),
  (
    'layers/attention/out',
    'model.layers.{}.self_attn.o_proj.weight',
    'blk.{}.attn_output.weight',
    'wo.{}',
  ),
  (
    'layers/attention/query_norm/scale',
    'model.layers.{}.self_attn.q_norm.weight',
    'blk.{}.attn_q_norm.weight',
    None,
  ),
  (
    'layers/attention/key_norm/scale',
    'model.layers.{}.self_attn.k_norm.weight',
    'blk.{}.attn_k_norm.weight',
    None,
  ),
  (
    'layers/mlp_norm/scale',
    'model.layers.{}.post_attention_layernorm.weight',
    'blk.{}.ffn_norm.weight',
    'rms_ffn.{}',
  ),
  (
    'layers/mlp/gate',
    'model.layers.{}.mlp.gate_proj.weight',
    'blk.{}.ffn_gate.weight',
    'w1.{}',
  ),
  (
    'layers/mlp/up',
    'model.layers.{}.mlp.up_proj.weight',
    'blk.{}.ffn_up.weight',
    'w3.{}',
  ),
  (
    'layers/mlp/down',
    'model.layers.{}.mlp.down_proj.weight',
    'blk.{}.ffn_down.weight',
    'w2.{}',
  ),
  ('norm/scale', 'model.norm.weight', 'output_norm.weight', 'rms_final'),
  ('head', 'lm_head.weight', 'output.weight', 'wcls'),
]
# Of a mixture of experts, in Hugging Face files alone: ours · most · Mixtral's (the second
# {} is the expert)
EXPERTS = [
  (
    'layers/experts/router',
    'model.layers.{}.mlp.gate.weight',
    'model.layers.{}.block_sparse_moe.gate.weight',
  ),
  (
    'layers/experts/gate',
    'model.layers.{}.mlp.experts.{}.gate_proj.weight',
    'model.layers.{}.block_sparse_moe.experts.{}.w1.weight',
  ),
  (
    'layers/experts/up',
    'model.layers.{}.mlp.experts.{}.up_proj.weight',
    'model.layers.{}.block_sparse_moe.experts.{}.w3.weight',
  ),
  (
    'layers/experts/down',
    'model.layers.{}.mlp.experts.{}.down_proj.weight',
    'model.layers.{}.block_sparse_moe.experts.{}.w2.weight',
  ),
]
COLUMNS = {'huggingface': 1, 'gguf': 2, 'llama2c': 3, 'mixtral': 1}
EXPERTS_COLUMNS = {'huggingface': 1, 'mixtral': 2}
# Formats whose RoPE turns neighbours (2i, 2i+1), not halves (i, i + h/2): the rows of q
# and k are dealt out again. (GGUF's were rotate-half; llama.cpp's conversion permutes.)
INTERLEAVED = {'gguf', 'llama2c'}


class Found(NamedTuple):
  """A tensor in a file, before it is read: shape as [out, in]."""

  shape: tuple[int, ...]
  dtype: str


class Mapped(NamedTuple):
  """One tensor of a file and the slice of our params that it fills."""

  source: str
  source_shape: tuple[int, ...]
  source_dtype: str
  name: str  # e.g. 'layers/attention/query'
  layer: int | None
  shape: tuple[int, ...]  # of the slice
  expert: int | None = None

  def of(self, leaf: Any) -> Any:
    """The slice of our param; of a NumPy array a view."""
    for index in (self.layer, self.expert):
      leaf = leaf if index is None else leaf[index]
    return leaf


def leaves(tree: Params) -> dict[str, Any]:
  """A tree of dicts as {'layers/mlp/up': leaf, …}."""
  paths, _ = jax.tree.flatten_with_path(tree)
  return {path_text(path): leaf for path, leaf in paths}


def expected(architecture: Architecture, form: str) -> Iterator[Mapped]:
  """What a complete file of `form` (a key of COLUMNS) holds, in our table's order."""
  ours = leaves(policy.shapes(architecture))
  named = [(row[0], row[COLUMNS[form]]) for row in TABLE]
  if form in EXPERTS_COLUMNS:
    named += [(row[0], row[EXPERTS_COLUMNS[form]]) for row in EXPERTS]
  for name, source in named:
    if name not in ours or source is None:
      continue  # tied: no head
    layers = range(architecture.layers) if name.startswith('layers/') else [None]
    experts = range(architecture.experts) if source.count('{}') == 2 else [None]
    for layer, expert in itertools.product(layers, experts):
      part = ours[name].shape[(layer is not None) + (expert is not None) :]
      file = source.format(layer, expert)
      shape = _file_shape(name, part)
      yield Mapped(file, shape, '', name, layer, part, expert)


def _file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """[out, in] of a matrix that we keep as `shape`; vectors and embeddings are equal."""
  if len(shape) == 1 or name == 'embedding':
    return shape
  split = len(shape) - 1 if name == 'layers/attention/out' else 1
  return math.prod(shape[split:]), math.prod(shape[:split])


def plan(
  architecture: Architecture, form: str, found: Mapping[str, Found], *, file: object
) -> list[Mapped]:
  """Which tensor of a file goes where: the report, and the order of reading.

  Raises ValueError that names the file and the tensor if one is missing, left over or
  of another shape than the architecture says.
  """
  rows = []
  for want in expected(architecture, form):
    got = found.get(want.source)
    if got is None:
      raise ValueError(
        f'{file}: no tensor {want.source!r} of shape {list(want.source_shape)}; '
        'the file is incomplete or of another architecture'
      )
    if tuple(got.shape) != want.source_shape:
      raise ValueError(
        f'{file}: {want.source!r} has shape {list(got.shape)}, but its own description '
        f'of the model makes it {list(want.source_shape)}; use the file that belongs '
        'to this description'
      )
    rows.append(want._replace(source_dtype=got.dtype))
  if extra := sorted(found.keys() - {row.source for row in rows}):
    raise ValueError(
      f'{file}: {extra[0]!r} and {len(extra) - 1} more tensors have no place in this '
      'architecture; the model is of a family that is not supported'
    )
  return rows


def to_ours(
  row: Mapped, array: np.ndarray, architecture: Architecture, form: str
) -> np.ndarray:
  """A file's [out, in] array as our slice; a view wherever that is possible."""
  if form in INTERLEAVED and row.name in (
    'layers/attention/query',
    'layers/attention/key',
  ):
    pairs = architecture.head_dim // 2
    array = array.reshape(-1, pairs, 2, array.shape[-1]).swapaxes(1, 2)
    array = array.reshape(row.source_shape)
  if len(row.source_shape) == 2 and row.name != 'embedding':
    array = array.T
  return array.reshape(row.shape)


def to_file(row: Mapped, array: np.ndarray) -> np.ndarray:
  """Our slice as the [out, in] array of a rotate-half file, contiguous."""
  if len(row.source_shape) == 2 and row.name != 'embedding':
    array = array.reshape(row.source_shape[::-1]).T
  return np.ascontiguousarray(array)


def read(
  architecture: Architecture,
  form: str,
  rows: list[Mapped],
  tensor: Callable[[str], np.ndarray],
) -> Params:
  """Fills new host (NumPy) params of `architecture.param_dtype` tensor by tensor.

  The whole model is held once, plus a tensor a thread. `tensor(source)` is called from
  several threads. Raises ValueError for integers, NaN and infinities.
  """
  tree = policy.shapes(architecture)
  dtype = np.dtype(
    getattr(ml_dtypes, architecture.param_dtype, None) or architecture.param_dtype
  )
  tree = jax.tree.map(lambda leaf: np.empty(leaf.shape, dtype), tree)
  ours = leaves(tree)

  def fill(row: Mapped):
    into = row.of(ours[row.name])
    array = tensor(row.source)
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(
        f'{row.source!r} holds {array.dtype}, not floats; fetch the file again'
      )
    if not np.isfinite(array).all():
      raise ValueError(
        f'{row.source!r} holds NaN or infinite weights; fetch the file again'
      )
    into[...] = to_ours(row, array, architecture, form)

  workers = min(8, os.cpu_count() or 1)
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for _ in pool.map(fill, rows):  # pool.map raises what a worker raised
      pass
  return tree


def describe(rows: list[Mapped], architecture: Architecture) -> str:
  """The report as text: one line a tensor, and the number of parameters."""
  width = max(len(row.source) for row in rows)
  lines = []
  for row in rows:
    at = [x for x in (row.layer, row.expert) if x is not None]
    ours = row.name + ''.join(f'[{x}]' for x in at)
    lines.append(
      f'{row.source:{width}} {row.source_dtype:>9} {list(row.source_shape)!s:>16} -> '
      f'{ours} {list(row.shape)} {architecture.param_dtype}'
    )
  total = sum(math.prod(row.shape) for row in rows)
  return '\n'.join([*lines, f'{len(rows)} tensors, {total:,} parameters'])
