"""A frozen base in 8 or 4 bits a weight, for an adapter to be trained on.

Every block of 64 inputs of a column has a scale of its own, its largest |w|, float32:

  int8   w ≈ scale/127 · c                 c in −127..127
  nf4    w ≈ scale · q[c]                  c in 0..15, two of them in a byte

q are the 16 values of NormalFloat: Tim Dettmers et al., "QLoRA: efficient finetuning of
quantized LLMs", 2023, eq. 4 and appendix E, arXiv:2305.14314. Only the storage is small: a
layer's weights are made again, in the dtype of compute, where they are multiplied, and once
more for the gradient of what comes in.

Params have these weights under one more key, `quantized`, and not in `layers`:
{'layers': {'attention': {'query': {'codes', 'scale'}, …}, …}}.

Differs from the paper: the scales are not quantized again (half a bit a weight), and blocks
lie along the inputs, so that codes and scales are split over a mesh as the weight would be.
(The PyPI package qwix flattens nf4 to make it dense, which gathers a weight that is split;
of its int8 no more than `quantize` and `dense` would be used.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from educe.models.parts import WEIGHTS
from educe.types import Params

KEY = 'quantized'
KINDS = ('int8', 'nf4')
BLOCK = 64
NF4 = np.array(
  [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
  ],
  np.float32,
)  # fmt: skip


class Weight(NamedTuple):
  """One layer's weight, as it is stored."""

  leaves: dict[str, Any]
  inputs: int  # how many axes of it are inputs; blocks lie along the last of them


def quantize(weight: Any, kind: str, inputs: int) -> dict[str, Any]:
  """{'codes', 'scale'} of a weight [*n, *m]; nf4 wants an even number along the block."""
  axis, shape = inputs - 1, weight.shape
  block = math.gcd(BLOCK, shape[axis])
  x = weight.astype(jnp.float32)
  x = x.reshape(*shape[:axis], -1, block, *shape[axis + 1 :])
  scale = jnp.abs(x).max(axis + 1)
  x = x / jnp.expand_dims(jnp.where(scale > 0, scale, 1), axis + 1)
  if kind == 'int8':
    return {'codes': jnp.round(127 * x).astype(jnp.int8).reshape(shape), 'scale': scale}
  middle = (NF4[1:] + NF4[:-1]) / 2
  codes = sum((x > m).astype(jnp.uint8) for m in middle)
  pairs = codes.reshape(*shape[:axis], -1, 2, *shape[axis + 1 :])
  low, high = (jnp.take(pairs, i, axis + 1) for i in (0, 1))
  return {'codes': low | high << 4, 'scale': scale}


def dense(leaves: Any, inputs: int) -> Any:
  """The weight that they stand for, float32; a weight that is none is returned as it is."""
  if not isinstance(leaves, Mapping):
    return leaves
  axis, codes, scale = inputs - 1, leaves['codes'], leaves['scale']
  if codes.dtype == jnp.uint8:
    codes = jnp.stack([codes & 15, codes >> 4], axis + 1)
    x = jnp.asarray(NF4)[codes]
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
  else:
    x = codes.astype(jnp.float32) / 127
  shape = x.shape
  x = x.reshape(*shape[:axis], scale.shape[axis], -1, *shape[axis + 1 :])
  return (x * jnp.expand_dims(scale, axis + 1)).reshape(shape)


def store(params: Params, kind: str, names: Iterable[str] = WEIGHTS) -> Params:
  """Params with these matrices of the layers quantized; embedding, head and norms are not.

  Raises ValueError for an odd number of inputs, of which nf4 makes no bytes.
  """
  layers: dict[str, Any] = dict(params['layers'])
  kept: dict[str, Any] = {}
  for name in names:
    module, inputs = WEIGHTS[name]
    if name not in layers.get(module, {}):
      continue
    weight = layers[module][name]
    if kind == 'nf4' and weight.shape[inputs] % 2:
      raise ValueError(
        f"base='nf4': {name} has {weight.shape[inputs]} inputs, no pairs"
      )
    kept.setdefault(module, {})[name] = _stored(jnp.asarray(weight), kind, inputs)
    layers[module] = {x: leaf for x, leaf in layers[module].items() if x != name}
  layers = {name: module for name, module in layers.items() if module}
  return {**params, 'layers': layers, KEY: {'layers': kept}}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _stored(stack, kind, inputs):
  """Layer by layer: what float32 needs is one layer's."""
  return jax.lax.map(lambda weight: quantize(weight, kind, inputs), stack)


def restored(params: Params) -> Params:
  """Params with every weight an array, of the embedding's dtype; others as they are."""
  if KEY not in params:
    return params
  dtype, layers = params['embedding'].dtype, dict(params['layers'])
  for module, weights in params[KEY]['layers'].items():
    whole = {
      name: jax.lax.map(lambda x, n=WEIGHTS[name][1]: dense(x, n).astype(dtype), leaves)
      for name, leaves in weights.items()
    }
    layers[module] = {**layers.get(module, {}), **whole}
  return {**{x: y for x, y in params.items() if x != KEY}, 'layers': layers}


def stored_axes(axes: Any, names: Iterable[str] = WEIGHTS) -> Any:
  """Axes of `store`'s params, of those of plain ones: a block lies as its inputs do."""
  layers: dict[str, Any] = dict(axes['layers'])
  kept: dict[str, Any] = {}
  for name in names:
    module, _ = WEIGHTS[name]
    if name in layers.get(module, {}):
      own = layers[module][name]
      kept.setdefault(module, {})[name] = {'codes': own, 'scale': own}
      layers[module] = {x: names for x, names in layers[module].items() if x != name}
  layers = {name: module for name, module in layers.items() if module}
  return {**axes, 'layers': layers, KEY: {'layers': kept}}


def restored_axes(axes: Any) -> Any:
  """… and back."""
  if not axes or KEY not in axes:
    return axes
  layers = dict(axes['layers'])
  for module, weights in axes[KEY]['layers'].items():
    own = {name: names['codes'] for name, names in weights.items()}
    layers[module] = {**layers.get(module, {}), **own}
  return {**{x: y for x, y in axes.items() if x != KEY}, 'layers': layers}


def kind_of(params: Params) -> str | None:
  """How the base of these params is stored; None: as it is."""
  if KEY not in params:
    return None
  codes = jax.tree.leaves(params[KEY]['layers'])[0]
  return 'nf4' if codes.dtype == jnp.uint8 else 'int8'


def read(module: Any, name: str) -> Weight | None:
  """The stored weight of a Linen module; None where it is a param of its own."""
  if not module.has_variable(KEY, name):
    return None
  return Weight(module.get_variable(KEY, name), WEIGHTS[name][1])
