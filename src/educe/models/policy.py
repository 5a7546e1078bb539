"""An architecture as a `types.Model`: pure functions of plain params.

Flax stays behind this file: what comes out are functions of dicts of arrays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from educe.models import lora, transformer
from educe.models.architecture import Architecture
from educe.models.transformer import narrowed as narrowed
from educe.types import Head, Model, Params


def unstack(params: Params, **how: Any) -> Params:
  """What `decode` would make of these params at every step; see transformer.unstack."""
  return transformer.unstack(_folded(params), **how)


def _folded(params: Params) -> Params:
  return lora.folded(params) if isinstance(params, Mapping) else params


def build(architecture: Architecture) -> Model:
  """The decoder that `architecture` describes. Allocates nothing."""
  module = transformer.Transformer(architecture)

  def init_boxed(key):
    # One token is enough: no parameter's shape depends on the length.
    return module.init(key, jnp.zeros((1, 1), jnp.int32))['params']

  @jax.jit
  def init(key) -> Params:
    return nn.unbox(init_boxed(key))

  def hidden(params, tokens, positions=None, segments=None, prefix=None, real=None):
    ready = lora.folded(params)
    own = {key: ready[key] for key in transformer.BESIDE if key in ready}
    said = tokens, positions, segments, prefix, real
    return module.apply({'params': params, **own}, *said)

  def decode(params, *rest):
    return transformer.decode(architecture, lora.folded(params), *rest)

  def head(params) -> Head:
    matrix = params['embedding'].T if architecture.tied else params['head']
    return Head(matrix.astype(architecture.compute_dtype))

  boxed = jax.eval_shape(init_boxed, jax.random.key(0))
  axes = jax.tree.map(
    lambda box: tuple(box.names),
    boxed,
    is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
  )
  return Model(
    init=init,
    hidden=hidden,
    head=head,
    init_cache=functools.partial(transformer.init_cache, architecture),
    decode=decode,
    axes=axes,
    architecture=architecture,
    aux_coefs={
      'load_balance': architecture.balance_coef,
      'router_z': architecture.router_z_coef,
    }
    if architecture.experts
    else None,
  )


def shapes(architecture: Architecture) -> Params:
  """The params' tree of `jax.ShapeDtypeStruct`."""
  return jax.tree.map(lambda x: x, _shapes(architecture))  # a tree of the caller's own


@functools.cache
def _shapes(architecture: Architecture) -> Params:
  return jax.eval_shape(build(architecture).init, jax.random.key(0))


def described(
  make: Callable[[Params], tuple[Model, Params]], params: Params
) -> tuple[Model, Params]:
  """What `make(params)` returns, its params as `shapes` are: nothing is computed."""
  built = []

  def made(params):
    model, params = make(params)
    built.append(model)
    return params

  like = jax.eval_shape(made, params)
  return built[0], like


def count(params: Params) -> int:
  """How many numbers a tree holds; works on arrays and on `shapes`."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
