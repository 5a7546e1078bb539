"""Adapters: matrices of low rank beside frozen weights.

  y = x·W + s·(x·A)·B            A [n, r], B [r, m], s = α/r

Edward Hu et al., "LoRA: low-rank adaptation of large language models", 2021, eq. 3,
arXiv:2106.09685. With `stabilised` s = α/√r: Damjan Kalajdzievski, "A rank stabilization
scaling factor for fine-tuning with LoRA", 2023, arXiv:2312.03732.

  y = m ⊙ (x·V)/‖V‖              V = W + s·A·B, ‖·‖ of each column, held constant

Shih-Yang Liu et al., "DoRA: weight-decomposed low-rank adaptation", 2024, eq. 5 and §4.3,
arXiv:2402.09353.

B starts at 0 and A as in the authors' code, uniform in ±1/√n, so that the model does what
it did, bit for bit. Params are the policy's with one more key, `adapter`: {'scale': s,
'layers': {'attention': {'query': {'a', 'b'}, …}, …}}, stacked as the layers are, float32.
What reads them is in transformer.py, and needs no more than that they are there.

Differs from the paper: DoRA keeps m − ‖W‖ (`magnitude`, 0 at first) instead of m. Its
gradient is the same, weight decay draws to the base's norm and not to 0, and what is 0
leaves the base exactly as it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient as sg

from educe.models import parts, quantized
from educe.models.parts import WEIGHTS
from educe.types import Model, Params

KEY = 'adapter'
KINDS = ('lora', 'dora')
# What an optimizer must freeze, so that adapters and a value head alone are trained.
FROZEN = rf'^(?!{KEY}/layers/|value/)|/{KEY}/scale$'


class Adapted(NamedTuple):
  """A weight with its adapter, ready to multiply: s is in `b`; gain = m/‖V‖, of DoRA."""

  weight: Any
  a: Any
  b: Any
  gain: Any = None


def attach(
  model: Model,
  params: Params,
  *,
  rank: int = 16,
  alpha: float = 32.0,
  kind: str = 'lora',
  targets: tuple[str, ...] = tuple(WEIGHTS),
  stabilised: bool = False,
  base: str | None = None,
  seed: int = 0,
  merge: bool = False,
) -> tuple[Model, Params]:
  """(model, params) with an adapter that changes nothing yet.

  An adapter that is there already, of the same settings, is kept: training goes on with it.

  Args:
    rank: r, columns of A and rows of B
    alpha: α; the product is multiplied by s = α/r
    kind: 'lora' or 'dora'
    targets: the weights that get one, in every layer: query, key, value and out of the
      attention, gate, up and down of the MLP
    stabilised: s = α/√r
    base: 'int8' or 'nf4' stores the layers' dense matrices in 8 or 4 bits (quantized.py)
    seed: of A
    merge: an adapter that is there already goes into the weights, and a new one begins

  Raises ValueError for settings that cannot be, a target that the model has not, and an
  adapter that is there with other settings.
  """
  check(rank, alpha, kind, targets, base)
  scale = alpha / (math.sqrt(rank) if stabilised else rank)
  if not isinstance(params, Mapping) or not isinstance(params.get('layers'), Mapping):
    raise ValueError('adapter: params must be those of a transformer, layers stacked')
  axes = plain_axes(model.axes)
  plain = jax.eval_shape(quantized.restored, params)['layers']
  dense = [name for name in WEIGHTS if _is_dense(axes, plain, name)]
  if missing := [name for name in targets if name not in dense]:
    raise ValueError(
      f'adapter.targets: {missing[0]!r} is no dense weight of this model; choose from '
      f'{dense}'
    )

  def new(params, key) -> Params:
    layers: dict[str, dict[str, Any]] = {}
    for name in targets:
      module, inputs = WEIGHTS[name]
      shape = plain[module][name].shape
      into, out = shape[1 : 1 + inputs], shape[1 + inputs :]
      bound = 1 / math.sqrt(math.prod(into))
      own = jax.random.fold_in(key, list(WEIGHTS).index(name))
      a = jax.random.uniform(
        own, (shape[0], *into, rank), jnp.float32, minval=-bound, maxval=bound
      )
      leaves = {'a': a, 'b': jnp.zeros((shape[0], rank, *out), jnp.float32)}
      if kind == 'dora':
        leaves['magnitude'] = jnp.zeros((shape[0], *out), jnp.float32)
      layers.setdefault(module, {})[name] = leaves
    # A number also where all else is traced: another adapter is compared with it.
    return {**params, KEY: {'scale': np.float32(scale), 'layers': layers}}

  def init(key) -> Params:
    start = quantized.restored(without(model.init(key)))
    start = quantized.store(start, base, dense) if base else start
    return new(start, jax.random.fold_in(key, seed))

  if axes:
    axes = _with_axes(
      quantized.stored_axes(axes, dense) if base else axes, axes, targets, kind
    )
  adapted = model._replace(init=init, axes=axes)
  if merge:
    params = merged(params)
  if KEY not in params:
    params = quantized.store(params, base, dense) if base else params
    return adapted, new(params, jax.random.key(seed))
  fresh = jax.eval_shape(lambda x: new(x, jax.random.key(0)), params)
  there, ours = _described(params), _described(fresh)
  own = params[KEY]['scale']
  if not isinstance(own, jax.core.Tracer):  # of what is traced the shapes are known
    there['scale'], ours['scale'] = float(own), float(np.float32(scale))
  there['base'], ours['base'] = quantized.kind_of(params), base
  for name in sorted(there.keys() | ours.keys()):
    if there.get(name) != ours.get(name):
      raise ValueError(
        f'adapter: {name} is {there.get(name, "absent")} in the one that is there and '
        f'{ours.get(name, "absent")} in this one; restore its settings, or set merge=True'
      )
  return adapted, params


def check(
  rank: int,
  alpha: float,
  kind: str,
  targets: tuple[str, ...],
  base: str | None,
) -> None:
  """Raises ValueError for settings that no model could have."""
  if rank < 1:
    raise ValueError(f'rank={rank} must be at least 1')
  if not 0 < alpha < math.inf:
    raise ValueError(f'alpha={alpha} must be more than 0, and finite')
  if kind not in KINDS:
    raise ValueError(f'kind={kind!r} must be one of {list(KINDS)}')
  if base not in (None, *quantized.KINDS):
    raise ValueError(f'base={base!r} must be None or one of {list(quantized.KINDS)}')
  if not targets:
    raise ValueError(f'targets={targets} names no weight')
  for name in targets:
    if name not in WEIGHTS:
      raise ValueError(f'targets: {name!r} is none of {list(WEIGHTS)}')


def without(params: Params) -> Params:
  """The base alone; params without an adapter are returned as they are."""
  return parts.without(params, KEY)


def folded(params: Params) -> Params:
  """Params whose adapter is ready to multiply: s in B, and DoRA's m/‖V‖ for its m.

  Costs little beside a forward pass, and much beside a step of decoding: then fold once.
  Those without an adapter, and those that are folded, are returned as they are.
  """
  if KEY not in params or 'scale' not in params[KEY]:
    return params
  scale = sg(params[KEY]['scale'])
  layers: dict[str, dict[str, Any]] = {}
  for module, name, leaves in _each(params):
    ready = {'a': leaves['a'], 'b': scale * leaves['b']}
    if 'magnitude' in leaves:
      norm, ratio = sg(_norms(params, module, name, ready['a'], ready['b']))
      ready['gain'] = (1 + leaves['magnitude'] / norm) * ratio
    layers.setdefault(module, {})[name] = ready
  return {**params, KEY: {'layers': layers}}


def merged(params: Params) -> Params:
  """The params of a plain model that does what base and adapter do together.

  In float32, and then of the dtype that each weight has. What is quantized becomes arrays;
  without any of it, params are returned as they are.
  """
  if KEY not in params:
    return quantized.restored(params)
  ready, params = folded(params), quantized.restored(params)
  layers = dict(params['layers'])
  for module, name, leaves in _each(ready):
    whole = jax.lax.map(
      lambda x: _whole(*x), (layers[module][name], *Adapted(None, **leaves)[1:])
    )
    layers[module] = {**layers[module], name: whole}
  return {**without(params), 'layers': layers}


def adapted(module: Any, name: str, weight: Any, dtype: Any) -> Any:
  """`weight` of a Linen module, with its adapter where it has one (transformer.project)."""
  if not module.has_variable(KEY, name):
    return weight
  leaves = module.get_variable(KEY, name)
  a, b = (leaves[x].astype(dtype) for x in 'ab')
  return Adapted(weight, a, b, leaves.get('gain'))


def norms(params: Params) -> dict[str, dict[str, Any]]:
  """‖W‖ of each column of each weight with an adapter: DoRA's m is ‖W‖ + magnitude."""
  found: dict[str, dict[str, Any]] = {}
  for module, name, leaves in _each(params):
    norm, _ = _norms(params, module, name, leaves['a'], leaves['b'])
    found.setdefault(module, {})[name] = norm
  return found


def _norms(params: Params, module: str, name: str, a, b):
  """`_norm` of every layer, one after another."""
  weight = params['layers'].get(module, {}).get(name)
  if weight is None:
    weight = params[quantized.KEY]['layers'][module][name]
  inputs = WEIGHTS[name][1]
  return jax.lax.map(
    lambda x: _norm(quantized.dense(x[0], inputs), *x[1:]), (weight, a, b)
  )


def _each(params: Params):
  """(module, name, leaves) of every weight with an adapter."""
  for module, weights in params[KEY]['layers'].items():
    for name, leaves in weights.items():
      yield module, name, leaves


def _matrices(weight, a, b):
  """[*n, *m], [*n, r] and [r, *m] as float32 matrices."""
  rank = b.shape[0]
  a, b = a.reshape(-1, rank), b.reshape(rank, -1)
  return weight.reshape(len(a), -1).astype(jnp.float32), a, b


def _norm(weight, a, b):
  """(‖W‖, ‖W‖/‖W + A·B‖) of each column, without the sum itself:

  ‖w + A·b‖² = ‖w‖² + b·(2·Aᵀw + AᵀA·b), so that the ratio is exactly 1 where b is 0.
  """
  shape = b.shape[1:]
  weight, a, b = _matrices(weight, a, b)
  dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  square = (weight * weight).sum(0)
  more = (b * (2 * dot(a.T, weight) + dot(dot(a.T, a), b))).sum(0)
  norm = jnp.sqrt(square)
  return norm.reshape(shape), (1 / jnp.sqrt(1 + more / square)).reshape(shape)


def _whole(weight, a, b, gain=None):
  wide, a, b = _matrices(weight, a, b)
  wide += jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  if gain is not None:
    wide *= gain.reshape(-1)
  return wide.reshape(weight.shape).astype(weight.dtype)


def plain_axes(axes: Any) -> Any:
  """Of the merged model."""
  return quantized.restored_axes(without(axes))


def _is_dense(axes: Any, layers: Params, name: str) -> bool:
  """Whether every layer has this weight, and once, not for each expert."""
  module = WEIGHTS[name][0]
  names = (axes or {}).get('layers', {}).get(module, {}).get(name, ())
  return name in layers.get(module, {}) and 'experts' not in names


def _with_axes(base: Any, plain: Any, targets: tuple[str, ...], kind: str) -> Any:
  """A's inputs lie as the weight's do, B's outputs too; the rank is whole everywhere."""
  layers: dict[str, dict[str, Any]] = {}
  for name in targets:
    module, inputs = WEIGHTS[name]
    layer, *rest = plain['layers'][module][name]
    into, out = rest[:inputs], rest[inputs:]
    leaves = {'a': (layer, *into, None), 'b': (layer, None, *out)}
    if kind == 'dora':
      leaves['magnitude'] = (layer, *out)
    layers.setdefault(module, {})[name] = leaves
  return {**base, KEY: {'scale': (), 'layers': layers}}


def _described(params: Params) -> dict[str, Any]:
  """name → shape of each matrix of an adapter."""
  return {
    f'{name}.{leaf}': tuple(x.shape)
    for _, name, leaves in _each(params)
    for leaf, x in leaves.items()
  }
