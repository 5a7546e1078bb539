"""A value head against float64, on trunks of its own and of the policy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe import sharding
from educe.losses.logprobs import score
from educe.models import policy, presets, value_head
from educe.types import Batch

TRUNKS = ('shared', 'separate')


@functools.cache
def build(trunk='shared', tied=True, init_std=0.3, **changes):
  """(model without, its params, model with, its params)."""
  architecture = dataclasses.replace(presets.get('debug'), tied=tied, **changes)
  model = policy.build(architecture)
  params = model.init(jax.random.key(0))
  return (
    model,
    params,
    *value_head.attach(model, params, trunk=trunk, init_std=init_std),
  )


def draw(rows=3, length=9, seed=0):
  tokens = np.random.default_rng(seed).integers(0, 264, (rows, length))
  return jnp.asarray(tokens, jnp.int32)


@functools.cache
def compiled(trunk, **changes):
  """(values, score) of `build(trunk)`, each one program a shape, not one an operation."""
  model = build(trunk, **changes)[2]

  def values(params, tokens, *rest):
    states, _ = model.hidden(params, tokens, *rest)
    return model.values(params, states, tokens, *rest)[0]

  return jax.jit(values), jax.jit(functools.partial(score, model))


def values_of(trunk, params, tokens, *rest, **changes):
  return np.asarray(compiled(trunk, **changes)[0](params, tokens, *rest))


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('trunk', TRUNKS)
def test_a_value_is_the_head_on_the_state_of_each_token(trunk, tied):
  old, base, _, params = build(trunk, tied=tied)
  head = {**params['value']['head'], 'bias': jnp.float32(0.7)}
  params = {**params, 'value': {**params['value'], 'head': head}}
  tokens = draw()
  states, _ = jax.jit(old.hidden)(base, tokens)
  want = np.float64(states) @ np.float64(params['value']['head']['weight']) + 0.7
  got = values_of(trunk, params, tokens, tied=tied)
  assert got.dtype == np.float32
  assert want.std() > 0.5
  np.testing.assert_allclose(
    got, want, atol=1e-5
  )  # 32 products of about 0.3 in float32


def test_a_trunk_of_experts_has_auxiliary_losses_of_its_own():
  model = policy.build(dataclasses.replace(presets.debug_moe, balance_coef=0.1))
  params = model.init(jax.random.key(0))
  batch = Batch(draw(), jnp.ones((3, 9)))
  shared, with_head = value_head.attach(model, params, trunk='shared')
  assert shared.aux_coefs == {'load_balance': 0.1, 'router_z': 0.0}
  alone = jax.jit(functools.partial(score, shared))(with_head, batch).aux
  assert set(alone) == {'load_balance', 'router_z', 'router/max_load'}
  separate, with_head = value_head.attach(model, params, trunk='separate')
  assert separate.aux_coefs == {
    **shared.aux_coefs,
    'value/load_balance': 0.1,
    'value/router_z': 0.0,
  }
  own = with_head['value']['trunk']['layers']['experts']
  own['router'] = -2 * own['router']
  both = jax.jit(functools.partial(score, separate))(with_head, batch).aux
  for name, mean in alone.items():
    assert float(both[name].value) == pytest.approx(float(mean.value), rel=1e-6)
    other = both[f'value/{name}']
    assert float(other.count) == float(mean.count)
    assert float(other.value) != pytest.approx(float(mean.value), rel=1e-6)


@pytest.mark.parametrize('trunk', TRUNKS)
def test_score_puts_a_value_on_the_token_drawn_from_its_state(trunk):
  _, _, _, params = build(trunk)
  tokens = draw()
  read = values_of(trunk, params, tokens)
  batch = Batch(tokens, jnp.ones(tokens.shape))
  scores = compiled(trunk)[1]
  aligned = np.asarray(scores(params, batch).values)
  assert (aligned[:, 0] == 0).all()
  np.testing.assert_allclose(aligned[:, 1:], read[:, :-1], atol=1e-6)
  other = batch._replace(tokens=tokens.at[:, 5].add(1))
  changed = np.asarray(scores(params, other).values) != aligned
  assert not changed[:, :6].any()  # the value on a token has not seen it
  assert changed[:, 6:].all()


@pytest.mark.parametrize('trunk', TRUNKS)
def test_packed_documents_have_the_values_that_they_have_alone(trunk):
  _, _, _, params = build(trunk)
  tokens = draw(2, 5)
  alone = values_of(trunk, params, tokens)
  row = jnp.concatenate([tokens[0], tokens[1], jnp.zeros(2, jnp.int32)])[None]
  positions = jnp.array([[*range(5), *range(5), 0, 0]])
  segments = jnp.array([[1] * 5 + [2] * 5 + [0] * 2])
  packed = values_of(trunk, params, row, positions, segments)
  np.testing.assert_allclose(packed[0, :10], alone.reshape(-1), atol=1e-5)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('trunk', TRUNKS)
def test_the_policy_is_what_it_was(trunk, tied):
  """Log-probs, decoding and the head: bit by bit."""
  old, base, model, params = build(trunk, tied=tied)
  tokens = draw()
  batch = Batch(tokens, jnp.ones(tokens.shape))
  a = jax.jit(functools.partial(score, old))(base, batch)
  b = compiled(trunk, tied=tied)[1](params, batch)
  np.testing.assert_array_equal(a.logp, b.logp)
  np.testing.assert_array_equal(a.entropy, b.entropy)
  assert a.values is None
  positions = jnp.broadcast_to(jnp.arange(9), (3, 9))
  decode = jax.jit(lambda p, cache: model.decode(p, cache, tokens, positions, 0)[0])
  before = decode(base, old.init_cache(3, 12))
  for p in (params, policy.unstack(params)):
    np.testing.assert_array_equal(decode(p, model.init_cache(3, 12)), before)
  jax.tree.map(np.testing.assert_array_equal, value_head.without(params), base)


@pytest.mark.parametrize('trunk', TRUNKS)
def test_the_gradient_of_values_reaches_the_trunk_that_they_are_read_from(trunk):
  _, _, model, params = build(trunk)
  batch = Batch(draw(), jnp.ones((3, 9)))

  @jax.jit
  @jax.grad
  def by_values(params):
    return (score(model, params, batch).values ** 2).sum()

  slope = jax.tree.map(lambda g: float(np.abs(g).max()), by_values(params))
  value = slope.pop('value')
  assert min(jax.tree.leaves(value)) > 0
  if trunk == 'separate':
    assert max(jax.tree.leaves(slope)) == 0
    by_logp = jax.jit(jax.grad(lambda p: score(model, p, batch).logp.sum()))(params)
    assert not any(np.any(x) for x in jax.tree.leaves(by_logp['value']))
    assert np.any(by_logp['embedding'])
  else:
    assert min(jax.tree.leaves(slope)) > 0


def test_a_new_head_is_zero_or_small_and_of_its_own_seed():
  model, params, _, zero = build(init_std=0.0)
  assert not np.any(zero['value']['head']['weight'])
  heads = [
    value_head.attach(model, params, init_std=0.5, seed=seed)[1]['value']['head']
    for seed in (0, 0, 1)
  ]
  a, b, c = (np.asarray(head['weight']) for head in heads)
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - c).max() > 0.1
  assert 0.3 < a.std() < 0.7  # 32 draws of 0.5
  assert a.dtype == np.float32


def test_the_head_is_float32_whatever_the_trunk():
  dtypes = dict(param_dtype='bfloat16', compute_dtype='bfloat16')
  _, _, model, params = build('separate', **dtypes)
  assert params['value']['head']['weight'].dtype == jnp.float32
  assert params['value']['trunk']['embedding'].dtype == jnp.bfloat16
  states, _ = jax.jit(model.hidden)(params, draw())
  assert states.dtype == jnp.bfloat16
  want = np.float64(states) @ np.float64(params['value']['head']['weight'])
  np.testing.assert_allclose(
    values_of('separate', params, draw(), **dtypes), want, atol=1e-5
  )


def test_a_separate_trunk_has_buffers_of_its_own_and_no_unembedding():
  model, base, _, _ = build('shared', tied=False)
  mine = jax.tree.map(jnp.copy, base)  # they are gone afterwards
  _, params = value_head.attach(model, mine, trunk='separate')
  assert 'head' in base
  assert 'head' not in params['value']['trunk']
  donate = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
  donate(params)  # raises if a buffer is there twice


@pytest.mark.parametrize('trunk', TRUNKS)
def test_axes_have_the_shape_of_the_params_and_place_them(trunk, mesh_of):
  _, _, model, params = build(trunk)
  is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
  assert jax.tree.structure(params) == jax.tree.structure(model.axes, is_leaf=is_axes)
  mesh = mesh_of(2, 2, 2)
  placed = sharding.place(params, model.axes, mesh)
  assert placed['value']['head']['weight'].sharding.spec[0] == 'fsdp'
  whole = values_of(trunk, params, draw(4))
  np.testing.assert_allclose(values_of(trunk, placed, draw(4)), whole, atol=1e-5)
  made = model.init(jax.random.key(3))
  assert jax.tree.structure(made) == jax.tree.structure(params)


@pytest.mark.parametrize('theirs', TRUNKS)
@pytest.mark.parametrize('ours', TRUNKS)
def test_a_head_can_start_as_anothers(ours, theirs):
  """A critic that starts from a reward model says what the reward model says."""
  _, _, _, reward = build(theirs)
  reward = jax.tree.map(lambda x: x * 1.1, reward)  # trained, so to speak
  model, params, _, _ = build()
  start = value_head.taken(reward)
  _, with_start = value_head.attach(model, params, start, trunk=ours)
  if ours == 'separate':
    want = values_of(theirs, reward, draw())
    np.testing.assert_allclose(values_of(ours, with_start, draw()), want, atol=1e-5)
  weight = with_start['value']['head']['weight']
  np.testing.assert_array_equal(weight, reward['value']['head']['weight'])
  jax.tree.map(np.testing.assert_array_equal, value_head.without(with_start), params)


def test_bad_input_is_one_clear_line():
  model, params, _, with_value = build()
  for options, message in (
    (dict(trunk='own'), r"trunk='own' must be one of \['shared', 'separate'\]"),
    (dict(init_std=-1.0), 'init_std=-1.0 must be at least 0'),
    (dict(start=dict(head=dict(weight=jnp.ones(5)))), 'reads 5 numbers, .* has 32'),
    (
      dict(start=value_head.taken(with_value), init_std=0.1),
      'init_std=0.1 is of a new head',
    ),
  ):
    with pytest.raises(ValueError, match=message):
      value_head.attach(model, params, **options)
  with pytest.raises(ValueError, match="without a key 'value'"):
    value_head.attach(model, with_value)
