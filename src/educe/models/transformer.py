"""The decoder: RMSNorm, rotary positions, grouped-query attention, gated SiLU MLP.

Llama (Touvron et al. 2023, arXiv:2302.13971) with grouped queries (Ainslie et al. 2023,
arXiv:2305.13245), rotate-half RoPE (Su et al. 2021, arXiv:2104.09864), RMSNorm (Zhang &
Sennrich 2019, arXiv:1910.07467) and SwiGLU (Shazeer 2020, arXiv:2002.05202). Two more
things of its kin: normed queries and keys (Qwen3, Yang et al. 2025, arXiv:2505.09388) and
a mixture of experts in place of the MLP (moe.py).

One block serves training (`nn.scan` over stacked layers) and sampling (a Python loop
with a cache per layer): a stacked cache would be copied whole at every step.

Dimensions: B rows · T queries · S keys · D width · H heads · K kv heads · G = H/K
queries a kv head · h head width · F hidden width of the MLP · L layers · V vocabulary.
Norms, rotations and the softmax are float32 whatever the dtypes of params and compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from educe.models import lora, moe, quantized
from educe.models.architecture import REMAT, Architecture
from educe.models.attention import Causal, Fork, attend
from educe.sharding import by_row, by_token, in_use, lay, token_parts
from educe.types import Mean

# Collections beside the params that a layer may have some of.
BESIDE = (lora.KEY, quantized.KEY)
# A loop over two layers costs a third of a small model's step; so few compile as fast
# without one. Recomputed layers keep it, or XLA would merge what is to be recomputed.
SHALLOW = 4


class LayerCache(NamedTuple):
  """What one layer remembers. Heads come before slots: a step reads along slots."""

  keys: Float[Array, 'B K S h']
  values: Float[Array, 'B K S h']


class Cache(NamedTuple):
  """`positions` is shared by all layers; -1 marks a slot that holds nothing."""

  layers: list[LayerCache]
  positions: Int[Array, 'B S']


def rotary(
  architecture: Architecture, positions: Int[Array, 'B T']
) -> tuple[Float[Array, 'B T half'], Float[Array, 'B T half']]:
  """Cosine and sine of position · theta^(-2i/h), float32, half = h/2."""
  h = architecture.head_dim
  frequency = 1 / architecture.rope_theta ** (jnp.arange(0, h, 2, jnp.float32) / h)
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, 'B T N h'], cos, sin) -> Float[Array, 'B T N h']:
  """Rotates the pairs (x[i], x[i + h/2]) by their position's angle; float32 out."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


def project(
  x: Float[Array, 'B T *n'], weight: Array | lora.Adapted | quantized.Weight
) -> Array:
  """x [B, T, *n] · weight [*n, *m] → [B, T, *m], as a matmul of two matrices.

  Not an einsum: the gradient of a dot of rank 3 makes XLA's CPU backend transpose the
  weights in memory, at every layer of every step. Where the tokens of a row lie on several
  devices, rows and tokens do not merge, and it is one. An adapter is two thin matmuls more:
  never W + A·B, whose gradient would be as large as W's.
  """
  if isinstance(weight, lora.Adapted):
    y = project(x, weight.weight) + project(project(x, weight.a), weight.b)
    return y if weight.gain is None else (weight.gain * y).astype(y.dtype)
  if isinstance(weight, quantized.Weight):
    inputs = weight.inputs

    def multiply(x, leaves):
      return project(x, quantized.dense(leaves, inputs).astype(x.dtype))

    # Made again for the gradient: kept, the weights of all layers would be there at once.
    return jax.checkpoint(multiply, prevent_cse=False)(x, weight.leaves)
  inner = x.shape[2:]
  if token_parts(in_use()) > 1:
    return jnp.tensordot(x, weight, len(inner))
  outer = weight.shape[len(inner) :]
  matrix = weight.reshape(math.prod(inner), math.prod(outer))
  return (x.reshape(-1, matrix.shape[0]) @ matrix).reshape(*x.shape[:2], *outer)


def _normal(scale: float, *axes: str | None):
  return nn.with_logical_partitioning(nn.initializers.normal(scale), axes)


def _residual(architecture: Architecture, *axes: str):
  """Writes to the residual stream shrink with depth (GPT-2, Radford et al. 2019)."""
  return _normal(0.02 / (2 * architecture.layers) ** 0.5, *axes)


def _weight(
  module: Any, name: str, init: Any, shape: tuple[int, ...], dtype: Any
) -> Any:
  """A weight as `project` takes it: an array, or stored in few bits; adapted or not."""
  value: Any = quantized.read(module, name)
  if value is None:
    value = module.param(name, init, shape, module.architecture.param_dtype)
    value = value.astype(dtype)
  return lora.adapted(module, name, value, dtype)


class RMSNorm(nn.Module):
  architecture: Architecture
  axis: str | None = 'embed'

  @nn.compact
  def __call__(self, x: Float[Array, '*n D']) -> Float[Array, '*n D']:
    a = self.architecture
    init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
    scale = self.param('scale', init, x.shape[-1:], a.param_dtype)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + a.norm_eps)
    return (y * jnp.asarray(scale, jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
  architecture: Architecture

  @nn.compact
  def __call__(self, x, angles, visible, cache: LayerCache | None, slot):
    a = self.architecture

    def weight(name, init, *shape):
      return _weight(self, name, init, shape, x.dtype)

    into = ('embed', 'heads', 'head_dim'), ('embed', 'kv_heads', 'head_dim')
    query = weight('query', _normal(0.02, *into[0]), a.dim, a.heads, a.head_dim)
    key = weight('key', _normal(0.02, *into[1]), a.dim, a.kv_heads, a.head_dim)
    value = weight('value', _normal(0.02, *into[1]), a.dim, a.kv_heads, a.head_dim)
    out = weight(
      'out', _residual(a, 'heads', 'head_dim', 'embed'), a.heads, a.head_dim, a.dim
    )
    q, k, v = project(x, query), project(x, key), project(x, value)
    if a.qk_norm != 'none':
      q, k = self.normed('query_norm', q), self.normed('key_norm', k)
    q = rotate(q, *angles) * a.head_dim**-0.5
    k = rotate(k, *angles)
    k, v = (jnp.swapaxes(y.astype(x.dtype), 1, 2) for y in (k, v))
    if cache is not None:
      start = (0, 0, slot, 0)
      k = jax.lax.dynamic_update_slice(cache.keys, k, start)
      v = jax.lax.dynamic_update_slice(cache.values, v, start)
      k, v = (lay(x, 'rows', 'kv_heads') for x in (k, v))
      cache = LayerCache(k, v)
    # Params are drawn anywhere, also where the model will not run.
    how = 'portable' if self.is_initializing() else a.attention
    mixed = attend(q.astype(x.dtype), k, v, visible, how)
    return project(mixed, out), cache

  def normed(self, name: str, x: Float[Array, 'B T N h']) -> Float[Array, 'B T N h']:
    norm = RMSNorm(self.architecture, None, name=name)
    if self.architecture.qk_norm == 'head':
      return norm(x)
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


class MLP(nn.Module):
  architecture: Architecture

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    a = self.architecture

    def weight(name, init, *shape):
      return _weight(self, name, init, shape, x.dtype)

    gate = weight('gate', _normal(0.02, 'embed', 'mlp'), a.dim, a.ffn)
    up = weight('up', _normal(0.02, 'embed', 'mlp'), a.dim, a.ffn)
    down = weight('down', _residual(a, 'mlp', 'embed'), a.ffn, a.dim)
    return project(jax.nn.silu(project(x, gate)) * project(x, up), down)


class Experts(nn.Module):
  """The MLP of a mixture of experts, and who of them was chosen: see moe.py."""

  architecture: Architecture

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']):
    a = self.architecture
    init = _normal(0.02, 'embed', None)
    router = self.param('router', init, (a.dim, a.experts), a.param_dtype)
    logits = moe.router_logits(x, router)

    def weight(name, init, *shape):
      return self.param(name, init, shape, a.param_dtype).astype(x.dtype)

    into = _normal(0.02, 'experts', 'embed', 'mlp')
    gate = weight('gate', into, a.experts, a.dim, a.ffn)
    up = weight('up', into, a.experts, a.dim, a.ffn)
    down = weight(
      'down', _residual(a, 'experts', 'mlp', 'embed'), a.experts, a.ffn, a.dim
    )
    k, renormalise = a.experts_per_token, a.renormalise
    y, chosen = moe.mlp(x, logits, gate, up, down, k=k, renormalise=renormalise)
    return y, logits, chosen


class Block(nn.Module):
  """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

  real: tokens that count in the auxiliary losses of experts, whose totals come out too.
  """

  architecture: Architecture

  @nn.compact
  def __call__(
    self, x, angles, visible, real=None, cache: LayerCache | None = None, slot=None
  ):
    a = self.architecture
    y = RMSNorm(a, name='attention_norm')(x)
    y, cache = Attention(a, name='attention')(y, angles, visible, cache, slot)
    x = by_token(x + y)
    y = RMSNorm(a, name='mlp_norm')(x)
    totals: moe.Totals = {}
    if a.experts:
      y, logits, chosen = Experts(a, name='experts')(y)
      if real is not None:
        totals = moe.totals(logits, chosen, real, visible)
    else:
      y = MLP(a, name='mlp')(y)
    return by_token(x + y), (cache, totals)


class Transformer(nn.Module):
  """Tokens to final hidden states, layers scanned; `policy` makes a `Model` of it."""

  architecture: Architecture

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    positions: Int[Array, 'B T'] | None = None,
    segments: Int[Array, 'B T'] | None = None,
    prefix: Int[Array, 'P S'] | None = None,
    real: Bool[Array, 'B T'] | None = None,
  ) -> tuple[Float[Array, 'B T D'], dict[str, Mean]]:
    a = self.architecture
    rows, T = tokens.shape
    embedding = self.param(
      'embedding', _normal(0.02, 'vocab', 'embed'), (a.vocab_size, a.dim), a.param_dtype
    )
    if not a.tied:  # read by policy.head, which multiplies outside of this module
      init = _normal(0.02, 'embed', 'vocab')
      self.param('head', init, (a.dim, a.vocab_size), a.param_dtype)
    if positions is None:
      positions = jnp.arange(T)[None]
    visible: Causal | Fork = Causal(segments)
    if prefix is not None:
      visible = Fork(prefix >= 0, T)
    real = moe.everything(tokens, visible, real) if a.experts else None
    if prefix is not None:
      start = jnp.broadcast_to(jnp.arange(prefix.shape[1]), prefix.shape)
      tokens = _forked(jnp.maximum(prefix, 0), tokens)
      positions = _forked(start, positions)
    block = Block
    if REMAT[a.remat] is not None:
      block = nn.remat(Block, prevent_cse=False, policy=REMAT[a.remat])
    # By width, as the embedding lies, and then handed out by row: left to itself the
    # compiler may sum all of its gradient on every device.
    looked_up = embedding[tokens].astype(a.compute_dtype)
    x = by_token(lay(looked_up, 'blocks', 'length', 'embed'))
    x, (_, totals) = nn.scan(
      block,
      length=a.layers,
      unroll=a.layers if a.layers <= SHALLOW and block is Block else 1,
      variable_axes={'params': 0, lora.KEY: 0, quantized.KEY: 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(a, name='layers')(x, rotary(a, positions), visible, real)
    aux = {} if real is None else moe.means(totals, a.layers, real, visible)
    if prefix is not None:
      x = x[:, prefix.shape[1] :].reshape(rows, T, a.dim)
    return RMSNorm(a, name='norm')(x), aux


def _forked(prefix: Int[Array, 'P S'], rest: Int[Array, 'B T']) -> Int[Array, 'P N']:
  """A row a prompt: its tokens, then those of each of the B/P rows that go on from it."""
  return jnp.concatenate([prefix, rest.reshape(len(prefix), -1)], 1)


def init_cache(architecture: Architecture, batch_size: int, length: int) -> Cache:
  a = architecture
  shape = (batch_size, a.kv_heads, length, a.head_dim)

  def zeros():
    return lay(jnp.zeros(shape, a.compute_dtype), 'rows', 'kv_heads')

  layers = [LayerCache(zeros(), zeros()) for _ in range(a.layers)]
  return Cache(layers, by_row(jnp.full((batch_size, length), -1, jnp.int32)))


def unstack(params, part=lambda x, layer: x[layer]):
  """Params whose layers are a list, one tree a layer, instead of stacked arrays.

  `decode` takes both. A loop of decode steps should unstack before it starts: from
  stacked params every step would copy each layer's weights out of the stack. Params
  without stacked layers come back as they are.
  """
  layers = params.get('layers') if isinstance(params, Mapping) else None
  if not isinstance(layers, Mapping):
    return params
  count = jax.tree.leaves(layers)[0].shape[0]

  def split(stack):
    return [jax.tree.map(lambda x, i=i: part(x, i), stack) for i in range(count)]

  beside = {
    key: {'layers': split(params[key]['layers'])} for key in BESIDE if key in params
  }
  return {**params, 'layers': split(layers), **beside}


def narrowed(params, dtype: Any):
  """Params that `decode` makes the same of, where it multiplies in this dtype: what it
  would cast at every step is cast, if that makes it smaller. Norms and routers it reads as
  they are. Other params come back as they are."""
  if not isinstance(params, Mapping):
    return params

  def cast(path, x):
    wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > dtype.itemsize
    return x.astype(dtype) if wide and path[-1].key not in ('scale', 'router') else x

  own = {key: x for key, x in params.items() if key not in BESIDE}
  return {**params, **jax.tree_util.tree_map_with_path(cast, own)}


def decode(
  architecture: Architecture,
  params,
  cache: Cache,
  tokens: Int[Array, 'B T'],
  positions: Int[Array, 'B T'],
  slot: Int[Array, ''] | int,
) -> tuple[Float[Array, 'B T D'], Cache]:
  """Appends T tokens to every row's cache at `slot` and returns their hidden states.

  The same function prefills (T > 1) and steps (T = 1). A key is seen by the queries at
  its position and later; position -1 (padding) is never seen, and sees nothing.
  slot + T must not exceed the cache's length: a traced slot cannot be checked, and XLA
  would move the write back over the last slots. An adapter is folded (lora.py).
  """
  a = architecture
  params = unstack(params)
  positions = positions.astype(jnp.int32)
  stored = jax.lax.dynamic_update_slice(cache.positions, positions, (0, slot))
  visible = (stored >= 0)[:, None, :] & (stored[:, None, :] <= positions[:, :, None])
  angles = rotary(a, positions)
  block = Block(a)
  x = params['embedding'][tokens].astype(a.compute_dtype)
  layers = []
  for number, layer in enumerate(cache.layers):
    own = {key: params[key]['layers'][number] for key in BESIDE if key in params}
    own['params'] = params['layers'][number]
    applied: Any = block.apply(own, x, angles, visible, None, layer, slot)
    x, (layer, _) = applied
    layers.append(layer)
  states: Any = RMSNorm(a).apply({'params': params['norm']}, x)
  return states, Cache(layers, stored)
