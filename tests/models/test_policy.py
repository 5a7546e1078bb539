"""`Model` as pure functions of plain params."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from educe.models import policy, presets


def test_params_are_plain_and_axes_have_their_shape():
  model = policy.build(presets.get('debug'))
  params = model.init(jax.random.key(0))
  is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
  assert jax.tree.structure(params) == jax.tree.structure(model.axes, is_leaf=is_axes)
  axes = jax.tree.leaves(model.axes, is_leaf=is_axes)
  for array, names in zip(jax.tree.leaves(params), axes, strict=True):
    assert isinstance(array, jax.Array)
    assert len(names) == array.ndim
  assert model.axes['layers']['attention']['key'] == (
    'layers',
    'embed',
    'kv_heads',
    'head_dim',
  )
  assert model.axes['embedding'] == ('vocab', 'embed')


def test_shapes_and_building_allocate_nothing():
  architecture = presets.get('llama3_8b')  # 32 GB, were it made
  assert policy.count(policy.shapes(architecture)) == 8_030_261_248
  assert policy.build(architecture).axes['head'] == ('embed', 'vocab')


def test_initial_predictions_are_near_uniform():
  model = policy.build(presets.get('debug'))
  params = model.init(jax.random.key(0))
  tokens = np.arange(40, dtype=np.int32).reshape(2, 20)
  states, aux = jax.jit(model.hidden)(params, tokens)
  assert aux == {}
  logp = jax.nn.log_softmax(states @ model.head(params).matrix)
  entropy = -(jnp.exp(logp) * logp).sum(-1).mean()
  assert abs(float(entropy) - np.log(256)) < 0.05
  again = model.init(jax.random.key(1))
  assert float(jnp.abs(params['head'] - again['head']).max()) > 0


def test_tied_head_is_the_embedding_and_gets_its_gradient():
  tied = policy.build(dataclasses.replace(presets.get('debug'), tied=True))
  params = tied.init(jax.random.key(0))
  assert 'head' not in params
  head = tied.head(params)
  np.testing.assert_array_equal(head.matrix, params['embedding'].T)
  assert head.scale == 1.0
  assert head.softcap is None
  slope = jax.grad(lambda p: tied.head(p).matrix.sum())(params)
  assert float(slope['embedding'].min()) == 1.0


def test_float32_params_compute_in_bfloat16():
  architecture = dataclasses.replace(presets.get('debug'), compute_dtype='bfloat16')
  model = policy.build(architecture)
  params = model.init(jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  assert (
    jax.eval_shape(model.hidden, params, np.zeros((1, 3), np.int32))[0].dtype
    == jnp.bfloat16
  )
  assert model.head(params).matrix.dtype == jnp.bfloat16
  assert model.init_cache(1, 4).layers[0].keys.dtype == jnp.bfloat16


def test_unstack_leaves_other_params_alone():
  model = policy.build(presets.get('debug'))
  params = model.init(jax.random.key(0))
  split = policy.unstack(params)
  assert len(split['layers']) == 2
  np.testing.assert_array_equal(
    split['layers'][1]['mlp']['up'], params['layers']['mlp']['up'][1]
  )
  assert policy.unstack(split) is split
  table = jnp.zeros((3, 3))
  assert policy.unstack(table) is table
