"""A scalar head: what a critic says of a prefix, and a reward model of a whole text.

  V(x_{≤t}) = w·h_t + b                    h_t: the trunk's state after token t; float32

`shared`: h is the policy's own, and the head's gradient reaches its trunk. `separate`: h
comes from a second trunk, and the two never touch (the critic of Long Ouyang et al.,
2022, §3.5 and C.4, arXiv:2203.02155, which starts from the reward model).

Params are the policy's with one more key, `value`: {'head': {'weight' [D], 'bias' []}},
and 'trunk' where it is separate, so that a policy is read out of them by leaving it out.
Beside an adapter (lora.py) a separate trunk is an adapter of its own on the same base.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from educe.models import lora, parts, quantized
from educe.types import Mean, Model, Params

KEY = 'value'
TRUNKS = ('shared', 'separate')


def attach(
  model: Model,
  params: Params,
  start: Mapping[str, Any] | None = None,
  *,
  trunk: str = 'shared',
  init_std: float = 0.0,
  seed: int = 0,
) -> tuple[Model, Params]:
  """(model, params) with a value head; all that they did before, they go on doing.

  Args:
    start: what `taken` took from another run: its head, and its trunk where ours is
      separate. None: a new head, and a copy of the policy's trunk, or of its adapter.
    trunk: 'shared' or 'separate'
    init_std: standard deviation of a new head's weights; with 0 every value starts at 0.
      Of a new head only
    seed: of those weights

  Raises ValueError for an unknown trunk, a negative init_std, one beside a `start`, params
  that are no dict or have a head already, and a `start` of another width.
  """
  check(trunk, init_std)
  if not isinstance(params, Mapping) or KEY in params:
    raise ValueError(f'value: params must be a dict without a key {KEY!r}')
  width = jax.eval_shape(model.head, params).matrix.shape[0]

  own = None if start is None else start.get('trunk')

  def new(params, key) -> Params:
    weight = init_std * jax.random.normal(key, (width,), jnp.float32)
    added: Params = {'head': {'weight': weight, 'bias': jnp.zeros((), jnp.float32)}}
    if trunk == 'separate':
      # Buffers of its own: a step donates each of them.
      added['trunk'] = jax.tree.map(lambda x: x.copy(), _trunk(params))
    return {**params, KEY: added}

  def init(key) -> Params:
    return new(model.init(key), jax.random.fold_in(key, seed))

  head_axes = {'weight': ('embed',), 'bias': ()}
  axes = model.axes and {**model.axes, KEY: {'head': head_axes}}
  if axes and trunk == 'separate':
    axes[KEY]['trunk'] = _trunk(
      model.axes if own is None else lora.plain_axes(model.axes)
    )
  coefs = model.aux_coefs
  if coefs and trunk == 'separate':
    coefs = {**coefs, **{f'{KEY}/{name}': coef for name, coef in coefs.items()}}
  with_head = model._replace(
    init=init,
    axes=axes,
    values=functools.partial(_values, model),
    aux_coefs=coefs,
  )
  if start is None:
    return with_head, new(params, jax.random.key(seed))
  if init_std:
    raise ValueError(f'value: {init_std=} is of a new head, and value_from gives one')
  if start['head']['weight'].shape != (width,):
    raise ValueError(
      f'value: its head reads {start["head"]["weight"].shape[0]} numbers, and this model '
      f'has {width}; start from a run of the same architecture'
    )
  added = {'head': start['head']}
  if trunk == 'separate':
    added['trunk'] = start['trunk']
  return with_head, {**params, KEY: added}


def check(trunk: str, init_std: float) -> None:
  """Raises ValueError for settings that no model could have."""
  if trunk not in TRUNKS:
    raise ValueError(f'trunk={trunk!r} must be one of {list(TRUNKS)}')
  if not 0 <= init_std < math.inf:
    raise ValueError(f'init_std={init_std} must be at least 0, and finite')


def taken(params: Params) -> dict[str, Any]:
  """{'head', 'trunk'} of params with a value head: what makes its values, and no more.

  The trunk is the one that the head reads: the policy's own where it is shared. An adapter
  is merged into it.
  """
  trunk = _trunk(lora.merged(_read_by(params)))
  return {'head': params[KEY]['head'], 'trunk': trunk}


def without(params: Params) -> Params:
  """The policy alone; params without a value head are returned as they are."""
  return parts.without(params, KEY)


def _trunk(params: Params) -> Params:
  """All but an untied unembedding, which no value is read from; or an adapter alone."""
  if lora.KEY in params:
    return {lora.KEY: params[lora.KEY]}
  return {name: x for name, x in params.items() if name not in (KEY, 'head')}


def _read_by(params: Params) -> Params:
  """The policy as its head sees it: with the head's own trunk, or adapter."""
  policy, trunk = without(params), params[KEY].get('trunk')
  if trunk is None:
    return policy
  if lora.KEY not in trunk:
    policy = {x: y for x, y in policy.items() if x not in (lora.KEY, quantized.KEY)}
  # A module asks for all of its params, an unembedding that it will not use included.
  return {**policy, **trunk}


def _values(model: Model, params, states, *said):
  value = params[KEY]
  aux: dict[str, Mean] = {}
  if 'trunk' in value:
    states, aux = model.hidden(_read_by(params), *said)
    aux = {f'{KEY}/{name}': mean for name, mean in aux.items()}
  head = value['head']
  values = (
    jnp.einsum(
      'btd,d->bt',
      states.astype(jnp.float32),
      head['weight'],
      precision=jax.lax.Precision.HIGHEST,
    )
    + head['bias']
  )
  return values, aux
