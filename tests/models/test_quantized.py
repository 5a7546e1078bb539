"""Weights in few bits against loops in float64, and a model on them against a plain one."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from educe import sharding
from educe.losses import sft
from educe.losses.logprobs import score
from educe.models import lora, policy, presets, quantized
from educe.models.parts import WEIGHTS
from educe.training import optimizer
from educe.training.step import init_state, make_step
from educe.types import Batch

KINDS = quantized.KINDS


def test_the_sixteen_values_are_those_of_the_paper():
  """Appendix E: quantiles of a normal, 8 on one side and 9 on the other, 0 among them."""
  edge = (1 - 1 / 32 + 1 - 1 / 30) / 2
  below = scipy.stats.norm.ppf(np.linspace(1 - edge, 0.5, 8))
  above = scipy.stats.norm.ppf(np.linspace(0.5, edge, 9))
  both = np.concatenate([below / -below[0], above[1:] / above[-1]])
  np.testing.assert_allclose(quantized.NF4, both, atol=2e-7)


def by_hand(weight, kind, axis):
  """The nearest value in each block's own scale, one weight at a time."""
  moved = np.moveaxis(np.float64(weight), axis, -1)
  rows = moved.reshape(-1, math.gcd(64, moved.shape[-1])).copy()
  for row in rows:
    scale = np.abs(row).max() or 1.0
    for i, w in enumerate(row):
      if kind == 'int8':
        row[i] = round(w / scale * 127) / 127 * scale
      else:
        values = np.float64(quantized.NF4)
        row[i] = values[np.abs(values - w / scale).argmin()] * scale
  return np.moveaxis(rows.reshape(moved.shape), -1, axis)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  ('shape', 'inputs'), [((128, 3), 1), ((96, 2, 3), 1), ((2, 12, 5), 2)]
)
def test_a_weight_is_the_nearest_in_its_blocks_scale(kind, shape, inputs):
  weight = np.random.default_rng(0).normal(0, 0.3, shape).astype(np.float32)
  weight[..., -1] = 0  # a column of nothing
  leaves = quantized.quantize(jnp.asarray(weight), kind, inputs)
  got = np.asarray(quantized.dense(leaves, inputs))
  np.testing.assert_allclose(got, by_hand(weight, kind, inputs - 1), atol=1e-6)
  bits = 8 * leaves['codes'].nbytes / weight.size
  assert bits == (8 if kind == 'int8' else 4)
  block = math.gcd(64, shape[inputs - 1])
  assert leaves['scale'].size == weight.size // block
  # Half of a step; of nf4 half of the widest gap, which is between −1 and −0.696.
  worst = 0.5 / 127 if kind == 'int8' else 0.152
  assert np.abs(got - weight).max() <= worst * np.abs(weight).max() + 1e-7


@functools.cache
def build(kind):
  """(model on a stored base, its params, the same base as arrays)."""
  model = policy.build(presets.debug)
  model, params = lora.attach(
    model, model.init(jax.random.key(0)), rank=4, kind='dora', base=kind
  )
  rng = np.random.default_rng(1)
  drawn = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32) if x.ndim else x,
    params['adapter'],
  )
  params = {**params, 'adapter': drawn}
  return model, params, quantized.restored(params)


def batch(rows=4, length=9):
  tokens = np.random.default_rng(0).integers(0, 256, (rows, length)).astype(np.int32)
  return Batch(tokens, np.ones(tokens.shape, np.float32))


@pytest.mark.parametrize('kind', KINDS)
def test_a_model_on_it_is_the_model_on_what_it_stands_for(kind):
  """Log-probs, the adapter's gradient, decoding, and what is merged."""
  model, params, plain = build(kind)
  assert quantized.kind_of(params) == kind
  assert 'attention' not in params['layers']
  assert set(plain['layers']['attention']) == {'query', 'key', 'value', 'out'}

  @jax.jit
  @jax.value_and_grad
  def loss(adapter, rest):
    part = jax.tree.map(jnp.asarray, batch())
    return -score(model, {**rest, 'adapter': adapter}, part).logp.mean()

  got, want = (loss(p['adapter'], lora.without(p)) for p in (params, plain))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got[1], want[1]
  )
  assert max(np.abs(x).max() for x in jax.tree.leaves(got[1])) > 1e-2
  tokens = jnp.asarray(batch().tokens)
  positions = jnp.broadcast_to(jnp.arange(9), (4, 9))
  states = jax.jit(lambda p: model.hidden(p, tokens)[0])(params)
  decode = jax.jit(lambda p, cache: model.decode(p, cache, tokens, positions, 0)[0])
  decoded = decode(policy.unstack(params), model.init_cache(4, 12))
  np.testing.assert_allclose(decoded, states, atol=3e-5)
  a, b = lora.merged(params), lora.merged(plain)
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), a, b)


@pytest.mark.parametrize('kind', KINDS)
def test_a_stored_base_takes_a_quarter_or_an_eighth(kind):
  _, params, plain = build(kind)
  arrays = [plain['layers'][module][name] for name, (module, _) in WEIGHTS.items()]
  stored, whole = (
    sum(x.nbytes for x in jax.tree.leaves(tree))
    for tree in (params['quantized'], arrays)
  )
  # Blocks of 32 inputs at this width, or of 8 in `out`: scales take more than at 64.
  assert stored / whole < (0.31 if kind == 'int8' else 0.19)


def test_a_step_never_holds_the_weights_of_all_layers():
  """They are made again for the gradient: temporaries stay below what they would take."""
  sizes = dict(dim=128, ffn=512, heads=4, kv_heads=4, head_dim=32, layers=8)
  model = policy.build(dataclasses.replace(presets.debug, **sizes))
  tx = optimizer.make(10, learning_rate=0.1, freeze=(lora.FROZEN,))
  plain = jax.eval_shape(model.init, jax.random.key(0))
  stack = sum(math.prod(plain['layers'][m][n].shape) for n, (m, _) in WEIGHTS.items())

  def temporaries(base):
    like = lora.attach(model, model.init(jax.random.key(0)), rank=2, base=base)
    state = jax.eval_shape(lambda p: init_state(p, tx, jax.random.key(0)), like[1])
    step = make_step(like[0], sft.loss, tx)
    lowered = step.lower(state, jax.tree.map(jnp.asarray, batch(1, 8)))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporaries('nf4') - temporaries(None) < 0.5 * 4 * stack


@pytest.mark.parametrize('kind', KINDS)
def test_a_step_trains_the_adapter_alone_also_on_a_mesh(kind, mesh_of):
  model, params, _ = build(kind)
  is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
  assert jax.tree.structure(params) == jax.tree.structure(model.axes, is_leaf=is_axes)
  tx = optimizer.make(
    10, name='sgd', learning_rate=0.5, schedule='constant', freeze=(lora.FROZEN,)
  )

  def train(mesh):
    mine = jax.tree.map(jnp.copy, params)
    shardings, part = None, batch(8, 12)
    if mesh is not None:
      mine = sharding.place(mine, model.axes, mesh)
      part = sharding.place_batch(part, mesh)
    state = init_state(mine, tx, jax.random.key(0), reference=True)
    if mesh is not None:
      state = sharding.replicate_rest(state, mesh)
      shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_step(model, sft.loss, tx, state_shardings=shardings)
    return step(state, part)

  want, ours = train(None)
  got, theirs = train(mesh_of(2, 2, 2))
  np.testing.assert_allclose(theirs['loss'], ours['loss'], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6),
    jax.device_get(got.params['adapter']),
    jax.device_get(want.params['adapter']),
  )
  for state in (got, want):
    jax.tree.map(
      np.testing.assert_array_equal, lora.without(state.params), lora.without(params)
    )
    assert len(jax.tree.leaves(state.reference)) == 7 * 3
  codes = got.params['quantized']['layers']['mlp']['up']['codes']
  assert tuple(codes.sharding.spec) == (None, 'fsdp', 'tensor')


def test_going_on_asks_for_the_same_base_and_odd_inputs_are_refused():
  model, params, plain = build('nf4')
  again, same = lora.attach(model, params, rank=4, kind='dora', base='nf4')
  assert same is params
  assert jax.tree.structure(again.axes, is_leaf=lambda x: isinstance(x, tuple)) == (
    jax.tree.structure(params)
  )
  with pytest.raises(ValueError, match=r'base is nf4 in .* there and None in this one'):
    lora.attach(model, params, rank=4, kind='dora')
  merged, fresh = lora.attach(model, params, rank=2, merge=True)
  assert quantized.kind_of(fresh) is None
  assert 'quantized' not in merged.axes
  with pytest.raises(ValueError, match=r"base='int2' must be None or one of \['int8'"):
    lora.attach(model, plain, base='int2')
  axes = {
    'mlp': {'up': ('layers', 'experts', 'embed', 'mlp')},
    'attention': {'key': ('layers', 'embed', 'kv_heads', 'head_dim')},
  }
  up = jnp.ones((1, 3, 4, 2))
  layers = {'mlp': {'up': up}, 'attention': {'key': jnp.ones((1, 4, 1, 2))}}
  _, some = lora.attach(
    model._replace(axes={'layers': axes}),
    {'embedding': jnp.ones(2), 'layers': layers},
    targets=('key',),
    base='nf4',
  )
  assert set(some['quantized']['layers']) == {'attention'}  # experts stay as they are
  assert some['layers']['mlp']['up'] is up
  odd = {'embedding': jnp.ones(2), 'layers': {'mlp': {'up': jnp.ones((1, 3, 2))}}}
  with pytest.raises(ValueError, match="base='nf4': up has 3 inputs, no pairs"):
    quantized.store(odd, 'nf4')
  assert set(quantized.store(odd, 'int8')) == {'embedding', 'layers', 'quantized'}
