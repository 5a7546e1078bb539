"""A mixture of experts: who goes where, the experts' work, and what balances them.

  y = Σ_{e ∈ top-k of p} w_e · down_e(silu(x·gate_e) ⊙ (x·up_e))      p = softmax(x·router)
  w_e = p_e, or p_e / Σ_{e ∈ top-k} p_e where `renormalise`

Every token goes to the k experts that its router finds most probable, and the outputs are
weighted by those probabilities (Shazeer et al. 2017, arXiv:1701.06538), by these or, where
`renormalise`, by their shares of the k (Mixtral, Jiang et al. 2024, arXiv:2401.04088). No
expert has a capacity, so that none drops a token (MegaBlocks, Gale et al. 2023,
arXiv:2211.15841): choices are sorted by expert, and three grouped matmuls
(`jax.lax.ragged_dot`) read each expert's own rows. On CPU and GPU JAX 0.10–0.12 makes that
a dense matmul of every row with every expert: E times the work, and exact.

The router is float32 whatever the dtypes (Fedus et al. 2022, arXiv:2101.03961, §2.4).

Two auxiliary losses, of sequence s with n tokens and layer l:

  load_balance  E·Σ_e f_e·P_e            f_e = choices of e / n, P_e = mean probability of e
                (Fedus et al. 2022, eq. 4–6); k when all experts are chosen alike
  router_z      mean of (log Σ_e e^x_e)²                      x: the router's logits
                (ST-MoE, Zoph et al. 2022, eq. 5, arXiv:2202.08906)

**Differs from the paper**: Fedus et al. take f and P over a whole batch, which is no sum
over rows. Here they are those of one sequence and one layer, and their loss is a mean over
both, so that microbatches, packing, shared prompts and meshes change nothing (as the
sequence-wise loss of DeepSeek-V3, 2024, eq. 17–20, arXiv:2412.19437).

Dimensions: B rows · T tokens · N tokens of all rows · E experts (e of them here) · k
choices of a token · D width · F hidden width of an expert · A = N·k choices.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import ragged_dot
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from educe import sharding
from educe.models.attention import Causal, Fork
from educe.types import Mean

Totals = dict[str, Array]  # of one layer


def mlp(
  x: Float[Array, 'B T D'],
  logits: Float[Array, 'B T E'],
  gate: Float[Array, 'E D F'],
  up: Float[Array, 'E D F'],
  down: Float[Array, 'E F D'],
  *,
  k: int,
  renormalise: bool,
) -> tuple[Float[Array, 'B T D'], Int[Array, 'B T k']]:
  """(Σ of k experts' weighted outputs, who they are), on the mesh in use if there is one.

  There a device holds some experts and a part of their width, and reads the rows of all
  devices with which it shares them, for its own experts: what it gets is a gather of the
  rows, and what it gives a sum that scatters them. Of P parts of the experts a token's row
  goes to the P − 1 others; an all-to-all would send it once for each choice, of which
  k·(P − 1)/P are elsewhere. Where k ≥ P that is no less, and it would need a capacity.
  Its buffers are for the worst case: all choices of all those rows.
  """
  run = functools.partial(_here, k=k, renormalise=renormalise)
  # A row's tokens may be split too; here they need nothing of each other.
  by_expert = sharding.split(len(x), len(gate), 'experts', x.shape[1])
  by_width = sharding.split(len(x), gate.shape[2], 'mlp')
  if by_expert is None or by_width is None:
    return run(x, logits, gate, up, down)
  mesh, rows = by_expert.mesh, by_expert.rows
  expert, width = by_expert.across, by_width.across
  of_x = PartitionSpec(rows or None, by_expert.along)
  _, stored, _ = sharding.spec(('experts', 'embed', 'mlp'), gate.shape, mesh)
  into, out = PartitionSpec(expert, stored, width), PartitionSpec(expert, width, stored)
  run = functools.partial(
    run, expert=expert, gathered=bool(rows), width=width, stored=stored
  )
  # The collectives are written out, and ragged_dot says not what its results vary over.
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(of_x, of_x, into, into, out),
    out_specs=(of_x, of_x),
    check_vma=False,
  )(x, logits, gate, up, down)


def _here(
  x,
  logits,
  gate,
  up,
  down,
  *,
  k: int,
  renormalise: bool,
  expert: str | None = None,
  gathered: bool = False,
  width: str | None = None,
  stored: str | None = None,
):
  """`mlp` of one device: its rows, and its part of the weights.

  expert, width: mesh axes that experts and their width are split over
  gathered: rows are split over `expert` too
  stored: see `experts`
  """
  weight, chosen = route(logits, k, renormalise)
  parts = [x, weight, chosen]
  first = 0 if expert is None else jax.lax.axis_index(expert) * len(gate)
  if expert is not None and gathered:
    parts = [jax.lax.all_gather(y, expert, axis=0, tiled=True) for y in parts]
  x, weight, among = (y.reshape(-1, y.shape[-1]) for y in parts)
  found = experts(x, weight, among, gate, up, down, first, stored)
  found = found.reshape(parts[0].shape)
  if expert is not None and gathered:
    found = jax.lax.psum_scatter(found, expert, scatter_dimension=0, tiled=True)
  elif expert is not None:
    found = jax.lax.psum(found, expert)
  if width is not None:
    found = jax.lax.psum(found, width)
  return found, chosen


def router_logits(
  x: Float[Array, 'B T D'], router: Float[Array, 'D E']
) -> Float[Array, 'B T E']:
  """Float32, and so multiplied: a rounded logit is another choice."""
  return jnp.einsum(
    'btd,de->bte',
    x.astype(jnp.float32),
    jnp.asarray(router, jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )


def route(
  logits: Float[Array, '*n E'], k: int, renormalise: bool
) -> tuple[Float[Array, '*n k'], Int[Array, '*n k']]:
  """(weight, index) of each token's k most probable experts; float32."""
  weight, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), k)
  if renormalise:
    weight = weight / weight.sum(-1, keepdims=True)
  return weight, chosen


def experts(
  x: Float[Array, 'N D'],
  weight: Float[Array, 'N k'],
  chosen: Int[Array, 'N k'],
  gate: Float[Array, 'e D F'],
  up: Float[Array, 'e D F'],
  down: Float[Array, 'e F D'],
  first: Int[Array, ''] | int = 0,
  stored: str | None = None,
) -> Float[Array, 'N D']:
  """Σ_k weight · expert(x) of the experts first … first + e − 1; the others add 0.

  stored: mesh axis over which the weights' D is kept in parts; it is read whole, and of a
    gradient each device gets its part
  """
  own = chosen.reshape(-1) - first
  own = jnp.where((own >= 0) & (own < len(gate)), own, len(gate))  # elsewhere: the end
  order = jnp.argsort(own)
  back = jnp.argsort(order)
  sizes = (own[:, None] == jnp.arange(len(gate))).sum(0, dtype=jnp.int32)
  # What ragged_dot says of rows that are in no group depends on the backend.
  ours = (jnp.arange(len(own)) < sizes.sum())[:, None]
  rows = jnp.where(ours, _sorted(x, order, back, chosen.shape[1]), 0)

  def product(rows, matrices, dim: int):
    # Gathered again for the gradient: kept, those of all layers would be there at once.
    run = jax.checkpoint(functools.partial(_product, stored, dim), prevent_cse=False)
    return run(rows, matrices, sizes)

  hidden = jax.nn.silu(product(rows, gate, 1)) * product(rows, up, 1)
  out = jnp.where(ours, product(hidden, down, 2), 0)
  # The way back: `back` is the order now, and `order` its inverse.
  out = _sorted(out, back, order, 1).reshape(*chosen.shape, -1)
  # Its own sum over k, not a matmul: those of float32 are rounded on some backends.
  return (out.astype(jnp.float32) * weight[..., None]).sum(1).astype(x.dtype)


def _product(stored: str | None, dim: int, rows, matrices, sizes):
  """Each group's rows by its matrix, of which dimension `dim` is kept in parts."""
  if stored is not None:
    matrices = jax.lax.all_gather(matrices, stored, axis=dim, tiled=True)
  return ragged_dot(rows, matrices, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sorted(x: Float[Array, 'N D'], order, back, k: int) -> Float[Array, 'A D']:
  """Each row k times, in this order; `back` is its inverse, for the gradient: a gather in
  place of a scatter."""
  return x[order // k]


def _sorted_forward(x, order, back, k):
  return x[order // k], back


def _sorted_backward(k, back, cotangent):
  found = cotangent[back]
  if k > 1:
    found = found.reshape(-1, k, found.shape[-1]).sum(1, dtype=jnp.float32)
  return found.astype(cotangent.dtype), None, None


_sorted.defvjp(_sorted_forward, _sorted_backward)


def everything(
  tokens: Int[Array, 'B T'], visible: Causal | Fork, real: Bool[Array, 'B T'] | None
) -> Bool[Array, 'R N']:
  """Which of the tokens that a model reads count, as it reads them.

  real: of `tokens`, which may go on from a shared prompt; None: all that are no padding
  """
  if real is None:
    real = jnp.ones(tokens.shape, bool)
  if isinstance(visible, Causal):
    return real if visible.segments is None else real & (visible.segments > 0)
  return jnp.concatenate([visible.prompt, real.reshape(len(visible.prompt), -1)], 1)


def totals(
  logits: Float[Array, 'R N E'],
  chosen: Int[Array, 'R N k'],
  real: Bool[Array, 'R N'],
  visible: Causal | Fork,
) -> Totals:
  """One layer's auxiliary losses, summed: over sequences, and `router_z` over tokens.

  A sequence is a row, a document of a packed row, or a completion with its prompt, whose
  tokens count in each of them.
  """
  k, E = chosen.shape[-1], logits.shape[-1]
  probability = jax.nn.softmax(logits, axis=-1)
  hits = (chosen[..., None] == jnp.arange(E)).sum(-2, dtype=jnp.float32)
  z = jnp.square(jax.nn.logsumexp(logits, axis=-1, keepdims=True))

  def of(x):
    return _by_sequence(x, real, visible)

  n = jnp.maximum(of(jnp.ones_like(z)), 1)
  f, P = of(hits) / n, of(probability) / n
  return {
    'load_balance': E * (f * P).sum(),
    'router_z': of(z).sum(),
    'router/max_load': f.max(-1).sum() / k,
  }


def means(
  layers: Totals, count: int, real: Bool[Array, 'R N'], visible: Causal | Fork
) -> dict[str, Mean]:
  """Of all `count` layers, stacked: per sequence and layer, or per token and layer."""
  tokens = _by_sequence(jnp.ones((*real.shape, 1), jnp.float32), real, visible)
  sequences = (tokens > 0).sum(dtype=jnp.float32)
  per = {'router_z': tokens.sum()}
  return {
    name: Mean(total.sum(), count * per.get(name, sequences))
    for name, total in layers.items()
  }


def _by_sequence(x: Float[Array, 'R N n'], real, visible: Any) -> Float[Array, 's n']:
  """Sums over the real tokens of each sequence."""
  x = jnp.where(real[..., None], x, 0)
  if isinstance(visible, Fork):
    start, shape = visible.prompt.shape[1], (len(x), -1, visible.length)
    rest = x[:, start:].reshape(*shape, x.shape[-1]).sum(2)
    # A completion without a token that counts has no prompt that does.
    there = real[:, start:].reshape(shape).any(-1)
    rest += jnp.where(there[..., None], x[:, None, :start].sum(2), 0)
    return rest.reshape(-1, x.shape[-1])
  if visible.segments is None:
    return x.sum(1)
  # Documents of a row: at most its tokens, and 0 for padding.
  summed = functools.partial(jax.ops.segment_sum, num_segments=x.shape[1] + 1)
  return jax.vmap(summed)(x, visible.segments).reshape(-1, x.shape[-1])
