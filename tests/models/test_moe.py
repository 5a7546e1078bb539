"""A mixture of experts: against float64 loops, and over meshes against one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe import sharding
from educe.data.sharing import share
from educe.losses import sft
from educe.losses.logprobs import lose, score
from educe.measurement import agreement, enumeration, sequence_logp
from educe.models import moe, policy, presets, transformer
from educe.models.attention import Causal, Fork
from educe.types import Batch

DEBUG = dataclasses.replace(
  presets.debug_moe, layers=1, balance_coef=0.01, router_z_coef=0.001
)
B, T, D, E, F, K = 2, 3, 5, 6, 4, 2


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  shapes = dict(x=(B, T, D), logits=(B, T, E), gate=(E, D, F), up=(E, D, F))
  return {k: rng.normal(size=s) for k, s in (shapes | dict(down=(E, F, D))).items()}


def loop(x, logits, gate, up, down, renormalise):
  """Token by token, choice by choice, in float64."""
  out = np.zeros_like(x)
  for b, t in np.ndindex(B, T):
    p = np.exp(logits[b, t]) / np.exp(logits[b, t]).sum()
    best = np.argsort(-p)[:K]
    weights = p[best] / (p[best].sum() if renormalise else 1)
    for weight, e in zip(weights, best, strict=True):
      h = x[b, t] @ gate[e]
      h = h / (1 + np.exp(-h)) * (x[b, t] @ up[e])
      out[b, t] += weight * (h @ down[e])
  return out


@pytest.mark.parametrize('renormalise', [False, True])
def test_outputs_and_gradients_are_those_of_a_loop_in_float64(arrays, renormalise):
  rng = np.random.default_rng(1)
  of_out = rng.normal(size=(B, T, D))
  narrow = {k: x.astype(np.float32) for k, x in arrays.items()}

  @functools.partial(jax.value_and_grad, has_aux=True)
  def total(given):
    out, chosen = moe.mlp(**given, k=K, renormalise=renormalise)
    return (out * of_out).sum(), (out, chosen)

  (_, (out, chosen)), slopes = jax.jit(total)(narrow)
  want = loop(**arrays, renormalise=renormalise)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  assert (np.asarray(chosen) == np.argsort(-arrays['logits'])[..., :K]).all()
  for name in arrays:
    # Along a random direction; the choices stay as they are.
    step = 1e-6 * rng.normal(size=arrays[name].shape)
    ends = [
      (
        loop(**(arrays | {name: arrays[name] + s * step}), renormalise=renormalise)
        * of_out
      ).sum()
      for s in (1, -1)
    ]
    slope = float((np.asarray(slopes[name], np.float64) * step).sum() / 1e-6)
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-5), name


def test_parts_of_the_experts_add_up_to_all_of_them(arrays):
  x = {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}
  weight, chosen = moe.route(x['logits'].reshape(-1, E), K, False)
  flat = x['x'].reshape(-1, D), weight, chosen
  whole = moe.experts(*flat, x['gate'], x['up'], x['down'])
  parts = [
    moe.experts(
      *flat, *(x[n][first : first + 2] for n in ('gate', 'up', 'down')), first
    )
    for first in range(0, E, 2)
  ]
  np.testing.assert_allclose(sum(parts), whole, atol=1e-6)
  assert np.abs(parts[0] - whole).max() > 0.1


def test_bfloat16_is_float32_of_rounded_numbers_to_its_precision(arrays):
  x = {k: jnp.asarray(v, jnp.bfloat16) for k, v in arrays.items()}
  x['logits'] = jnp.asarray(arrays['logits'], jnp.float32)
  narrow, _ = moe.mlp(**x, k=K, renormalise=True)
  wide = {k: np.asarray(v, np.float64) for k, v in x.items()}
  want = loop(**wide, renormalise=True)
  assert narrow.dtype == jnp.bfloat16
  # Three products of 8 bits each.
  assert np.abs(np.asarray(narrow, np.float64) - want).max() < 0.02 * np.abs(want).max()


def test_auxiliary_losses_are_those_of_the_equations():
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(3, 7, E)).astype(np.float32)
  real = np.arange(7) < np.array([[7], [4], [0]])
  _, chosen = moe.route(logits, K, True)
  found = moe.totals(logits, chosen, real, Causal())
  balance = z = busiest = 0.0
  for row in range(3):
    n = int(real[row].sum())
    if not n:
      continue
    x = logits[row, :n].astype(np.float64)
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    hits = np.bincount(np.argsort(-p)[:, :K].ravel(), minlength=E)
    balance += E * (hits / n * p.mean(0)).sum()
    busiest += hits.max() / hits.sum()
    z += (np.log(np.exp(x).sum(-1)) ** 2).sum()
  assert float(found['load_balance']) == pytest.approx(balance, rel=1e-6)
  assert float(found['router_z']) == pytest.approx(z, rel=1e-6)
  assert float(found['router/max_load']) == pytest.approx(busiest, rel=1e-6)
  means = moe.means({k: jnp.stack([x, x]) for k, x in found.items()}, 2, real, Causal())
  assert {k: float(x.count) for k, x in means.items()} == {
    'load_balance': 4,  # rows with a token · layers
    'router_z': 22,  # tokens · layers
    'router/max_load': 4,
  }


def rows_of(lengths, width, prompt=3, vocab=264):
  rng = np.random.default_rng(3)
  tokens = np.zeros((len(lengths), width), np.int32)
  mask = np.zeros(tokens.shape, np.float32)
  for row, length in enumerate(lengths):
    tokens[row, :length] = rng.integers(1, vocab, length)
    mask[row, prompt:length] = 1
  return Batch(tokens, mask)


@functools.cache
def model_and_params(architecture=DEBUG):
  model = policy.build(architecture)
  params = model.init(jax.random.key(0))
  # A router that has something to say: at its start all experts are alike.
  params['layers']['experts']['router'] *= 20
  return model, params


def objective(model, params, batch):
  mean, _, aux = lose(model, params, batch, sft.loss)
  parts = [coef * aux[name].value for name, coef in model.aux_coefs.items()]
  return mean.value + sum(parts), aux


@functools.cache
def compiled(architecture):
  model = policy.build(architecture)
  run = jax.value_and_grad(functools.partial(objective, model), has_aux=True)
  return jax.jit(lambda params, batch: run(params, batch))


def same(found, want, atol=1e-6):
  """(value, aux), gradients: of one number and of all params."""
  ((a, aux), slope), ((b, other), theirs) = found, want
  np.testing.assert_allclose(a, b, rtol=1e-6)
  for name in other:
    for x, y in zip(aux[name], other[name], strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, err_msg=name)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), slope, theirs)


def test_padding_changes_nothing():
  _, params = model_and_params()
  run = compiled(DEBUG)
  short = rows_of([8, 6], 8)
  wide = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 5))), short)
  same(run(params, wide), run(params, short))


def test_packing_documents_changes_nothing():
  _, params = model_and_params()
  batch = rows_of([8, 6, 5], 8)
  # Two documents in the first row, one in the second, and a tail that is not trained on.
  take = [(0, 8), (1, 6), (2, 5)]
  flat = [(batch.tokens[r, :n], batch.mask[r, :n]) for r, n in take]
  packed = {
    name: np.zeros((2, 16), np.int32) for name in ('tokens', 'positions', 'seg')
  }
  mask = np.zeros((2, 16), np.float32)
  for row, start, segment, which in ((0, 0, 1, 0), (0, 8, 2, 1), (1, 0, 1, 2)):
    tokens, trained = flat[which]
    at = slice(start, start + len(tokens))
    packed['tokens'][row, at], mask[row, at] = tokens, trained
    packed['positions'][row, at], packed['seg'][row, at] = range(len(tokens)), segment
  both = Batch(packed['tokens'], mask, packed['positions'], packed['seg'])
  same(compiled(DEBUG)(params, both), compiled(DEBUG)(params, batch))


def test_sharing_a_prompt_changes_nothing():
  _, params = model_and_params()
  batch = rows_of([40, 33, 38, 30], 48, prompt=24)
  batch.tokens[1, :24] = batch.tokens[0, :24]
  batch.tokens[3, :24] = batch.tokens[2, :24]
  shared = share(batch, 2)
  assert shared.prefix is not None
  same(compiled(DEBUG)(params, shared), compiled(DEBUG)(params, batch))


MESHES = {
  'expert': dict(expert=8),
  'expert_tensor': dict(expert=4, tensor=2),
  'data_fsdp_expert': dict(data=2, fsdp=2, expert=2),
  'fsdp_expert_tensor': dict(fsdp=2, expert=2, tensor=2),
  'expert_context': dict(expert=4, context=2),
}


@pytest.mark.parametrize('name', MESHES)
def test_on_a_mesh_loss_and_gradients_are_those_of_one_device(mesh_of, name):
  model, params = model_and_params()
  batch = rows_of([12, 9, 5, 11, 12, 4, 8, 7], 12)
  want = compiled(DEBUG)(params, batch)
  mesh = mesh_of(**MESHES[name])
  run = jax.value_and_grad(functools.partial(objective, model), has_aux=True)

  def on_mesh(params, batch):
    with sharding.using(mesh):
      return run(params, batch)

  placed = sharding.place(params, model.axes, mesh)
  split = sharding.place_batch(batch, mesh)
  if 'expert' in MESHES[name]:
    gate = placed['layers']['experts']['gate']
    assert gate.addressable_shards[0].data.shape[1] == 8 // MESHES[name]['expert']
  same(jax.jit(on_mesh)(placed, split), want)


@pytest.mark.parametrize(
  ('rows', 'experts', 'ffn'),
  [(3, 8, 6), (8, 6, 5), (3, 6, 5)],
  ids=['rows', 'experts and width', 'nothing'],
)
def test_what_does_not_divide_stays_whole(mesh_of, rows, experts, ffn):
  rng = np.random.default_rng(4)
  shapes = dict(x=(rows, 2, D), logits=(rows, 2, experts), gate=(experts, D, ffn))
  shapes |= dict(up=shapes['gate'], down=(experts, ffn, D))
  given = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}

  def total(given):
    return (moe.mlp(**given, k=K, renormalise=True)[0] ** 2).sum()

  mesh = mesh_of(expert=4, tensor=2)

  def on_mesh(given):
    with sharding.using(mesh):
      return jax.value_and_grad(total)(given)

  everywhere = sharding.replicate_rest(jax.tree.map(jnp.asarray, given), mesh)
  value, slopes = jax.jit(on_mesh)(everywhere)
  want, theirs = jax.jit(jax.value_and_grad(total))(given)
  assert float(value) == pytest.approx(float(want), rel=1e-6)
  for name, slope in slopes.items():
    error = np.abs(slope - theirs[name]).max()
    assert error <= 1e-6 * np.abs(theirs[name]).max(), name


def test_each_device_multiplies_with_its_own_experts_alone(mesh_of):
  """No device holds the weights of all experts, and none the choices of all rows."""
  mesh = mesh_of(data=2, expert=4)
  model, params = model_and_params()

  def on_mesh(params, tokens):
    with sharding.using(mesh):
      return jax.grad(lambda p: model.hidden(p, tokens)[0].sum())(params)

  placed = sharding.place(params, model.axes, mesh)
  tokens = sharding.place_batch(np.ones((8, 16), np.int32), mesh)
  text = jax.jit(on_mesh).lower(placed, tokens).compile().as_text()
  assert 'f32[2,32,16]' in text  # two of eight experts
  assert 'f32[8,32,16]' not in text
  assert f'f32[{8 * 16 * 2},32]' not in text  # choices of all rows, of width D


def test_decoding_equals_one_pass(mesh_of):
  model, params = model_and_params()
  tokens = rows_of([8] * 4, 8).tokens

  def stepwise(params):
    cache = model.init_cache(4, 8)
    params, states = transformer.unstack(params), []
    for t, width in ((0, 6), (6, 1), (7, 1)):
      position = jnp.arange(t, t + width) + jnp.zeros((4, 1), jnp.int32)
      said = tokens[:, t : t + width]
      state, cache = model.decode(params, cache, said, position, t)
      states.append(state)
    return jnp.concatenate(states, 1)

  want, _ = jax.jit(model.hidden)(params, tokens)
  np.testing.assert_allclose(jax.jit(stepwise)(params), want, atol=1e-5)
  mesh = mesh_of(expert=2, tensor=2)

  def on_mesh(params):
    with sharding.using(mesh):
      return stepwise(params)

  placed = sharding.place(params, model.axes, mesh)
  np.testing.assert_allclose(jax.jit(on_mesh)(placed), want, atol=1e-5)


def test_a_gradient_reaches_the_router_by_the_choices_and_by_each_loss():
  model, params = model_and_params()
  batch = jax.tree.map(jnp.asarray, rows_of([9, 9], 9))

  def said(router):
    layers = params['layers'] | {'experts': params['layers']['experts'] | router}
    found = score(model, {**params, 'layers': layers}, batch)
    totals = {name: mean.total for name, mean in found.aux.items()}
    return {'logp': found.logp.sum(), **totals}

  @jax.jit
  def slopes(router):
    out, back = jax.vjp(said, router)
    return {n: back({m: 1.0 * (m == n) + 0 * x for m, x in out.items()}) for n in out}

  found = slopes({'router': params['layers']['experts']['router']})
  largest = {n: float(jnp.abs(x['router']).max()) for n, (x,) in found.items()}
  assert largest.pop('router/max_load') == 0
  assert min(largest.values()) > 1e-4
  assert set(largest) == {'logp', 'load_balance', 'router_z'}


def test_a_dense_model_has_no_auxiliary_losses():
  with pytest.raises(ValueError, match=r'balance_coef = 0\.01: this model has no exp'):
    dataclasses.replace(presets.debug, balance_coef=0.01)
  model = policy.build(presets.debug)
  assert model.aux_coefs is None


def test_a_completion_that_is_not_trained_on_is_no_sequence_of_a_shared_prompt():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(1, 3 + 2 * 2, 4)), jnp.float32)
  _, chosen = moe.route(logits, 2, True)
  visible = Fork(jnp.ones((1, 3), bool), 2)
  real = jnp.asarray([[1, 1, 1, 1, 1, 0, 0]], bool)  # of the second completion nothing
  found = moe.totals(logits, chosen, real, visible)
  alone = moe.totals(logits[:, :5], chosen[:, :5], real[:, :5], Causal())
  for name in found:
    np.testing.assert_allclose(found[name], alone[name], rtol=1e-6, err_msg=name)


def test_a_mixture_is_measured_as_it_is_scored():
  """Where a model is a static argument: log-probs of sequences, agreement, enumeration."""
  model = policy.build(presets.debug_moe)
  params = model.init(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 256, (3, 8)).astype(np.int32)
  mask = np.ones((3, 8), np.float32)
  mask[:, :4] = 0
  want = np.asarray(score(model, params, Batch(tokens, mask)).logp).sum(-1)
  found = sequence_logp.sequence_logp(model, params, tokens, mask)
  np.testing.assert_allclose(found, want, atol=1e-4)
  symbols = np.array([5, 9, 77])
  logp, _ = enumeration._enumerated(model, params, tokens[:, :4], symbols, 2, 1.0, 8)
  assert logp.shape == (3, 9)
  bare = model._replace(axes=None, aux_coefs=None)
  read = agreement._read(bare, params, Batch(tokens, mask), 'logp')
  np.testing.assert_allclose(np.asarray(read).sum(-1), want, atol=1e-4)
