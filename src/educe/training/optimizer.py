"""Any optimizer of Optax by its name, with the four things every run needs around it:
a schedule, a clip, a weight-decay mask, and frozen params.

  config.optimizer = dict(name='adamw', learning_rate=2e-5, weight_decay=0.1, b2=0.95)

What is not a keyword of `make` goes to the Optax function itself and is checked against
its signature.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from educe.models.parts import hit, paths, split
from educe.spelling import near
from educe.types import Params

SCHEDULES = ('constant', 'linear', 'cosine')
# What a number must be: (the words, the test, the settings that it is asked of).
RULES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
  (
    'more than 0, and finite',
    lambda x: 0 < x < math.inf,
    ('learning_rate', 'clip_norm'),
  ),
  (
    'at least 0, and finite',
    lambda x: 0 <= x < math.inf,
    ('warmup_steps', 'weight_decay', 'eps'),
  ),
  ('from 0 to 1', lambda x: 0 <= x <= 1, ('final_fraction',)),
  (
    'at least 0 and less than 1',
    lambda x: 0 <= x < 1,
    ('b1', 'b2', 'b3', 'momentum', 'decay'),
  ),
)


class Optimizer(NamedTuple):
  """An Optax transformation that skips what is not finite, and what a step asks of it."""

  init: Callable[[Params], Any]
  update: Callable[[Params, Any, Params], tuple[Params, Any]]  # of the trained part
  learning_rate: Callable[[Any], Any]  # updates applied so far → rate of the next
  split: Callable[[Params], tuple[Params, Params]]  # (trained, frozen); models/parts.py


class OptState(NamedTuple):
  inner: Any
  skipped: jax.Array  # updates skipped because a gradient was not finite
  skipped_in_a_row: jax.Array
  grad_norm: jax.Array  # of the last gradient, before clipping, over trained params


def make(
  steps: int,
  *,
  name: str = 'adamw',
  learning_rate: float,
  schedule: str = 'cosine',
  warmup_steps: int = 0,
  final_fraction: float = 0.0,
  clip_norm: float | None = 1.0,
  no_decay: tuple[str, ...] = ('norm', 'bias', 'embed'),
  freeze: tuple[str, ...] = (),
  **options: Any,
) -> Optimizer:
  """An Optimizer from config.

  Args:
    steps: the run's length; the schedule ends there.
    name: a function of Optax that takes `learning_rate`: adamw, lion, adafactor, …
    schedule: constant, linear or cosine decay to final_fraction · learning_rate, after
      `warmup_steps` of linear warm-up from 0.
    clip_norm: bound of the global gradient norm, or None.
    no_decay: regular expressions; a param whose path matches one gets no weight decay.
    freeze: likewise, for params that keep their value and hold no optimizer state.
    **options: go to the Optax function (b1, b2, eps, weight_decay, …).

  Raises:
    ValueError: an unknown name, schedule or option, or a number that makes no sense.
  """
  given = locals() | options
  factory = getattr(optax, name, None)
  accepted = inspect.signature(factory).parameters if callable(factory) else {}
  if factory is None or 'learning_rate' not in accepted:
    raise ValueError(f'optimizer.name={name!r}: Optax has no such optimizer')
  ours = inspect.signature(make).parameters.keys() - {'steps', 'name', 'options'}
  for key in sorted(set(options) - set(accepted)):
    raise ValueError(
      f'optimizer.{key}={options[key]!r}: {name} takes no {key!r}'
      + near(key, ours | set(accepted))
    )
  for must, holds, keys in RULES:
    for key in keys:
      value = given.get(key)
      if isinstance(value, int | float) and not holds(value):
        raise ValueError(f'optimizer.{key}={value!r} must be {must}')
  if warmup_steps > steps:
    raise ValueError(
      f'optimizer.warmup_steps={warmup_steps} exceeds steps={steps}; lower it, or raise '
      'steps'
    )
  rate = make_schedule(schedule, learning_rate, steps, warmup_steps, final_fraction)
  for mask in {'mask', 'weight_decay_mask'} & set(accepted):
    options[mask] = lambda params: paths(params, lambda path: not hit(no_decay, path))
  inner = factory(learning_rate=rate, **options)
  if clip_norm is not None:
    inner = optax.chain(optax.clip_by_global_norm(clip_norm), inner)

  def init(params):
    labels = jax.tree.leaves(paths(params, lambda path: hit(freeze, path)))
    if freeze and (all(labels) or not any(labels)):
      count = 'every param' if all(labels) else 'no param'
      raise ValueError(f'optimizer.freeze={freeze} matches {count}')
    # Separate buffers: the step donates each of them.
    state = inner.init(wide(split(params, freeze)[0]))
    return OptState(state, jnp.int32(0), jnp.int32(0), jnp.float32(0))

  def update(grads, state, params):
    grads, params = wide(grads), wide(params)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    updates, new = inner.update(grads, state.inner, params)
    updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state.inner)
    bad = jnp.where(finite, 0, 1).astype(jnp.int32)
    row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
    return updates, OptState(kept, state.skipped + bad, row, norm)

  return Optimizer(init, update, rate, lambda params: split(params, freeze))


def make_schedule(schedule, learning_rate, steps, warmup_steps, final_fraction):
  """Updates applied so far → learning rate."""
  if schedule not in SCHEDULES:
    raise ValueError(f'optimizer.schedule={schedule!r} is not one of {SCHEDULES}')
  after = max(steps - warmup_steps, 1)
  if schedule == 'constant':
    body = optax.constant_schedule(learning_rate)
  elif schedule == 'linear':
    body = optax.linear_schedule(learning_rate, final_fraction * learning_rate, after)
  else:
    body = optax.cosine_decay_schedule(learning_rate, after, alpha=final_fraction)
  if not warmup_steps:
    return body
  # Rate 0 at update 0 would waste it: warm up through 1/(w+1), 2/(w+1), …
  first = learning_rate / (warmup_steps + 1)
  warmup = optax.linear_schedule(first, learning_rate, warmup_steps)
  return optax.join_schedules([warmup, body], [warmup_steps])


def wide(tree: Params) -> Params:
  """Moments and updates are float32 whatever the params: a bf16 second moment with
  b2 = 0.999 rounds its own decay away."""
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
