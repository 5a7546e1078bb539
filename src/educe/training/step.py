"""One update: score, lose, differentiate, step. Pure, jitted, donated.

A loss is a sum and a count, so the gradient of any batch is

  ∇L = Σ_i ∇total_i / Σ_i count_i

over its microbatches i, however it is cut; only the division waits for the end. An
auxiliary loss of a sparse model has a count of its own, A, and is added to a microbatch as

  total_i + coef · aux_i.total · C / A        C, A: the counts of the whole batch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from educe import sharding
from educe.losses.logprobs import lose
from educe.models import value_head
from educe.models.parts import over
from educe.training.optimizer import Optimizer, wide
from educe.types import Batch, LossFn, Max, Mean, Model, Params, ScoreFn, TrainState

Metrics = dict[str, Any]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(
  params: Params, optimizer: Optimizer, key: jax.Array, *, reference: bool = False
) -> TrainState:
  """Step 0. The state owns `params` from here on: the first step donates them.

  reference: keep a copy of what is trained of them, without a critic; laid over the params
    (models/parts.over) it is the policy as it was.
  """
  copy = None
  if reference:
    copy = jax.tree.map(jnp.copy, optimizer.split(value_head.without(params))[0])
  return TrainState(jnp.int32(0), params, optimizer.init(params), key, copy)


def make_step(
  model: Model,
  loss: LossFn,
  optimizer: Optimizer,
  *,
  microbatches: int = 1,
  temperature: float = 1.0,
  reference_every: int | None = None,
  reference_alpha: float = 1.0,
  scorer: ScoreFn | None = None,
  state_shardings: Any = None,
) -> Step:
  """The jitted `step(state, batch) -> (state, metrics)`; it consumes `state`.

  Args:
    microbatches: parts that the rows are cut into, one in memory at a time.
    temperature: of the distribution that is scored: the sampling temperature, if the
      loss compares with the sampler.
    reference_every: steps between updates of the state's reference; 0 and None leave it
      as it is.
    reference_alpha: α; it becomes α·params + (1 − α)·reference. 1 is a copy.
    scorer: what scores a batch, where that takes the state's reference too (a teacher);
      None scores with `model` alone, at `temperature`.
    state_shardings: a TrainState of shardings, when on a mesh: what comes out lies where
      what went in lay, also in the memory of the host (sharding.to_host).

  metrics: scalars on the device: `loss` (without auxiliary ones), the loss's own metrics,
  the model's auxiliary losses, `grad_norm` (before clipping), `learning_rate`,
  `num_tokens` (trained), `skipped_updates` (so far) and `skipped_in_a_row`. An update
  whose gradients are not finite leaves params and optimizer as they were.
  """

  coefs = {name: coef for name, coef in (model.aux_coefs or {}).items() if coef}
  of = ('loss', *coefs)

  def step(state, batch):
    if state_shardings is not None:
      state = sharding.to_device(state, state_shardings)
    trained, frozen = optimizer.split(state.params)

    def means_of(params, batch):
      if scorer is None:
        mean, metrics, aux = lose(model, params, batch, loss, temperature=temperature)
      else:
        scores = scorer(params, state.reference, batch)
        (mean, metrics), aux = loss(scores, batch), scores.aux or {}
      return {'loss': mean, **metrics, **aux}

    counts = None
    if coefs and microbatches > 1:
      # They follow from the batch; the rest of this pass is dead code to the compiler.
      counts = {k: x.count for k, x in means_of(state.params, batch).items() if k in of}

    def total(trained, batch):
      means = means_of(over(frozen, trained), batch)
      known = counts or {name: means[name].count for name in of}
      return means['loss'].total + _penalty(coefs, means, known), means

    gradient = jax.grad(total, has_aux=True)
    grads, means = accumulate(gradient, trained, batch, microbatches)
    count = jnp.where(means['loss'].count > 0, means['loss'].count, 1)
    # In float32: bfloat16 has no 257, and would divide by 256.
    grads = jax.tree.map(lambda g: g / count, wide(grads))
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    params = over(frozen, optax.apply_updates(trained, updates))
    metrics = {name: mean.value for name, mean in means.items()}
    metrics |= {
      'grad_norm': opt_state.grad_norm,
      'learning_rate': optimizer.learning_rate(state.step - state.opt_state.skipped),
      'num_tokens': batch.mask.sum(),
      'skipped_updates': opt_state.skipped,
      'skipped_in_a_row': opt_state.skipped_in_a_row,
    }
    reference = state.reference
    if reference_every:
      due = (state.step + 1) % reference_every == 0
      policy = optimizer.split(value_head.without(params))[0]
      reference = jax.lax.cond(
        due, lambda: mixed(policy, reference, reference_alpha), lambda: reference
      )
    return TrainState(state.step + 1, params, opt_state, state.key, reference), metrics

  if state_shardings is None:
    return jax.jit(step, donate_argnums=0)
  mesh = jax.tree.leaves(state_shardings)[0].mesh

  def on_mesh(state, batch):
    with sharding.using(mesh):
      return step(state, batch)

  return jax.jit(on_mesh, donate_argnums=0, out_shardings=(state_shardings, None))


def _penalty(coefs: Mapping[str, float], means: Metrics, counts: Metrics) -> Any:
  """Σ coef · total · C / A, which a division by C makes Σ coef · mean."""
  C = jax.lax.stop_gradient(counts['loss'])
  return sum(
    coef * means[name].total * C / jnp.maximum(counts[name], 1)
    for name, coef in coefs.items()
  )


def mixed(params: Params, reference: Params, alpha: float) -> Params:
  """α·params + (1 − α)·reference, in float32 on the way. Alexey Gorbatovski et al., "Learn
  your reference model for real good alignment" (TR-DPO), 2024, eq. 4, arXiv:2404.09656."""
  if alpha == 1:
    return params

  def mix(new, old):
    mean = alpha * new.astype(jnp.float32) + (1 - alpha) * old.astype(jnp.float32)
    return mean.astype(old.dtype)

  return jax.tree.map(mix, params, reference)


def accumulate(gradient, params, batch: Batch, microbatches: int):
  """Σ over microbatches of (gradient, Means). Sums are float32."""
  if microbatches == 1:
    return gradient(params, batch)
  parts = jax.tree.map(
    lambda x: x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:]), batch
  )

  def add(sums, part):
    grads, means = gradient(params, part)
    return jax.tree.map(_plus, sums, (grads, means), is_leaf=_is_metric), None

  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(gradient, params, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
  sums, _ = jax.lax.scan(add, zeros, parts)
  return sums


def _is_metric(x: Any) -> bool:
  return isinstance(x, Mean | Max)


def _plus(total: Any, x: Any) -> Any:
  return total + (x if _is_metric(x) else x.astype(total.dtype))
