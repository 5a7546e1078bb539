"""Adapters against float64 loops, and against the model that they are merged into."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from educe import sharding
from educe.losses import sft
from educe.losses.logprobs import score
from educe.models import lora, parts, policy, presets, value_head
from educe.training import optimizer
from educe.training.step import init_state, make_step
from educe.types import Batch

KINDS = lora.KINDS


@functools.cache
def base(**changes):
  model = policy.build(dataclasses.replace(presets.debug, **changes))
  return model, model.init(jax.random.key(0))


@functools.cache
def build(kind='lora', rank=4, **changes):
  """(model, params) whose adapter does nothing yet."""
  return lora.attach(*base(**changes), rank=rank, alpha=12.0, kind=kind)


def stirred(params, seed=1, size=0.1):
  """… and one that does: every matrix of the adapter drawn."""
  rng = np.random.default_rng(seed)

  def draw(x):
    return jnp.asarray(rng.normal(0, size, x.shape), jnp.float32) if x.ndim else x

  return {**params, 'adapter': jax.tree.map(draw, params['adapter'])}


def draw(rows=3, length=9, seed=0):
  tokens = np.random.default_rng(seed).integers(0, 256, (rows, length))
  return jnp.asarray(tokens, jnp.int32)


def whole(tokens):
  return Batch(tokens, jnp.ones(tokens.shape))


def scorer(model):
  return jax.jit(lambda params, batch: score(model, params, batch)[:2])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', KINDS)
def test_a_new_adapter_changes_no_bit(kind, dtype):
  dtypes = dict(param_dtype=dtype, compute_dtype=dtype)
  plain, params = base(**dtypes)
  model, adapted = build(kind, **dtypes)
  jax.tree.map(np.testing.assert_array_equal, lora.without(adapted), params)
  batch = whole(draw())
  want = scorer(plain)(params, batch)
  jax.tree.map(np.testing.assert_array_equal, scorer(model)(adapted, batch), want)
  merged = lora.merged(adapted)
  jax.tree.map(np.testing.assert_array_equal, merged, params)
  assert merged['embedding'] is params['embedding']
  dtypes = {x.dtype for x in jax.tree.leaves(adapted['adapter'])}
  assert dtypes == {jnp.dtype('float32')}


def by_hand(params, name, layer, kind):
  """W′ [n, m] of one weight in float64, column by column, as the papers write it."""
  module, inputs = parts.WEIGHTS[name]
  W = np.float64(params['layers'][module][name][layer])
  leaves = params['adapter']['layers'][module][name]
  n = math.prod(W.shape[:inputs])
  W = W.reshape(n, -1)
  A = np.float64(leaves['a'][layer]).reshape(n, -1)
  B = np.float64(leaves['b'][layer]).reshape(A.shape[1], -1)
  V = W + 12.0 / A.shape[1] * A @ B
  if kind == 'lora':
    return V
  m = np.float64(leaves['magnitude'][layer]).ravel()
  out = np.empty_like(V)
  for j in range(V.shape[1]):
    length = math.sqrt(sum(w * w for w in W[:, j]))
    out[:, j] = (length + m[j]) * V[:, j] / math.sqrt(sum(v * v for v in V[:, j]))
  return out


@pytest.mark.parametrize('kind', KINDS)
def test_merging_is_the_papers_equation(kind):
  params = stirred(build(kind)[1])
  merged = lora.merged(params)
  assert 'adapter' not in merged
  for name, (module, _) in parts.WEIGHTS.items():
    for layer in range(2):
      got = np.asarray(merged['layers'][module][name][layer])
      want = by_hand(params, name, layer, kind)
      # Sums of up to 64 products of about 0.1 in float32.
      np.testing.assert_allclose(got.reshape(want.shape), want, rtol=0, atol=3e-6)
      start = np.asarray(params['layers'][module][name][layer]).reshape(want.shape)
      assert np.abs(want - start).max() > 0.01


@pytest.mark.parametrize('kind', KINDS)
def test_a_merged_model_says_what_the_adapter_made_of_it(kind):
  plain, _ = base()
  model, params = build(kind)
  params = stirred(params)
  batch = whole(draw())
  got = scorer(model)(params, batch)
  want = scorer(plain)(lora.merged(params), batch)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=3e-6)
  before = scorer(plain)(lora.without(params), batch)
  assert np.abs(got[0] - before[0]).max() > 0.05


@pytest.mark.parametrize('kind', KINDS)
def test_decoding_sees_the_adapter_as_training_does(kind):
  """Stacked, unstacked, and in the rows that share a prompt."""
  model, params = build(kind)
  params, tokens = stirred(params), draw(4)
  states, _ = jax.jit(model.hidden)(params, tokens)
  positions = jnp.broadcast_to(jnp.arange(9), (4, 9))
  decode = jax.jit(lambda p, cache: model.decode(p, cache, tokens, positions, 0)[0])
  for p in (params, policy.unstack(params)):
    got = decode(p, model.init_cache(4, 12))
    np.testing.assert_allclose(got, states, atol=2e-6)
  same = tokens.at[:, :5].set(tokens[:1, :5])
  want, _ = jax.jit(model.hidden)(params, same)
  later = jnp.broadcast_to(jnp.arange(5, 9), (4, 4))
  forked, _ = jax.jit(model.hidden)(params, same[:, 5:], later, None, same[:1, :5])
  np.testing.assert_allclose(forked, want[:, 5:], atol=5e-6)


def test_the_norm_that_dora_divides_by_is_held_constant():
  """§4.3: the gradient in A is that of m/‖V‖ · x·V, its factor a number."""
  model, params = build('dora')
  params, tokens = stirred(params), draw()
  weight = params['layers']['mlp']['up'][0]
  leaves = jax.tree.map(lambda x: x[0], params['adapter']['layers']['mlp']['up'])
  x = jax.random.normal(jax.random.key(3), (1, 5, 32))
  gain = lora.folded(params)['adapter']['layers']['mlp']['up']['gain'][0]
  length = np.sqrt((np.float64(weight) ** 2).sum(0))

  def by_model(leaves):
    one = jax.tree.map(lambda x: x[None], leaves)
    tree = {'scale': params['adapter']['scale'], 'layers': {'mlp': {'up': one}}}
    only = {'layers': {'mlp': {'up': weight[None]}}, 'adapter': tree}
    ready = lora.folded(only)['adapter']['layers']['mlp']['up']
    a, b, gain = (ready[name][0] for name in ('a', 'b', 'gain'))
    return (((x @ weight + x @ a @ b) * gain) ** 2).sum()

  def by_paper(leaves):
    V = weight + 3.0 * leaves['a'] @ leaves['b']
    constant = gain / (length + params_m) * (length + leaves['magnitude'])
    return ((x @ V * constant) ** 2).sum()

  params_m = leaves['magnitude']
  got, want = jax.grad(by_model)(leaves), jax.grad(by_paper)(leaves)
  for name in ('a', 'b', 'magnitude'):
    scale = np.abs(want[name]).max()
    assert scale > 0
    np.testing.assert_allclose(got[name] / scale, want[name] / scale, atol=1e-5)
  assert model.hidden(params, tokens)[0].shape == (3, 9, 32)


def test_the_scale_is_alpha_over_the_rank_or_its_root():
  for stabilised, want in ((False, 3.0), (True, 6.0)):
    _, params = lora.attach(*base(), rank=4, alpha=12.0, stabilised=stabilised)
    assert float(params['adapter']['scale']) == want


def test_a_is_uniform_within_one_over_the_root_of_its_inputs():
  _, params = lora.attach(*base(), rank=64, targets=('out', 'down', 'key'))
  layers = params['adapter']['layers']
  assert set(layers) == {'attention', 'mlp'}
  assert set(layers['attention']) == {'out', 'key'}
  for leaves, inputs in (
    (layers['attention']['out'], 32),
    (layers['attention']['key'], 32),
    (layers['mlp']['down'], 64),
  ):
    a = np.asarray(leaves['a'])
    assert 0.97 < np.abs(a).max() * math.sqrt(inputs) <= 1  # of 4,096 draws
    assert abs(a.std() * math.sqrt(3 * inputs) - 1) < 0.05
    assert not np.any(leaves['b'])
    assert np.abs(a[0] - a[1]).max() > 0  # each layer its own
  again = lora.attach(*base(), rank=64, targets=('key',))[1]
  other = lora.attach(*base(), rank=64, targets=('key',), seed=1)[1]
  a, b, c = (
    x['adapter']['layers']['attention']['key']['a'] for x in (params, again, other)
  )
  np.testing.assert_array_equal(a, b)
  assert np.abs(a - c).max() > 0


def frozen(**options):
  settings = dict(learning_rate=0.01, schedule='constant', freeze=(lora.FROZEN,))
  return optimizer.make(10, **(settings | options))


def train(model, params, steps=2, mesh=None, tx=None, **options):
  tx, place, shardings = tx or frozen(), lambda x: x, None
  params = jax.tree.map(jnp.copy, params)
  if mesh is not None:
    params = sharding.place(params, model.axes, mesh)
    place = functools.partial(sharding.place_batch, mesh=mesh)
  state = init_state(params, tx, jax.random.key(0))
  if mesh is not None:
    state = sharding.replicate_rest(state, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
  step = make_step(model, sft.loss, tx, state_shardings=shardings, **options)
  losses = []
  for number in range(steps):
    tokens = np.asarray(draw(8, 12, seed=number))
    state, metrics = step(
      state, place(Batch(tokens, np.ones(tokens.shape, np.float32)))
    )
    losses.append(float(metrics['loss']))
  return state, losses


@pytest.mark.parametrize('kind', KINDS)
def test_only_the_adapter_is_trained_whatever_the_bases_dtype(kind):
  model, params = build(kind, param_dtype='bfloat16')
  state, losses = train(model, params, steps=3)
  jax.tree.map(
    np.testing.assert_array_equal, lora.without(state.params), lora.without(params)
  )
  assert float(state.params['adapter']['scale']) == 3.0
  moved = jax.tree.map(
    lambda a, b: bool(np.any(a != b)),
    state.params['adapter']['layers'],
    params['adapter']['layers'],
  )
  assert all(jax.tree.leaves(moved))
  dtypes = {x.dtype for x in jax.tree.leaves(state.params['adapter'])}
  assert dtypes == {jnp.dtype('float32')}
  shapes = {x.shape for x in jax.tree.leaves(params['adapter']['layers'])}
  held = {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim}
  assert held == shapes
  assert np.isfinite(losses).all()


def test_a_value_head_beside_an_adapter_is_trained_on_the_same_base():
  model, params = build('lora')
  model, params = value_head.attach(model, stirred(params), trunk='separate')
  assert set(params['value']['trunk']) == {'adapter'}  # no copy of the base
  is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
  assert jax.tree.structure(params) == jax.tree.structure(model.axes, is_leaf=is_axes)
  tokens = draw()
  states, _ = jax.jit(model.hidden)(params, tokens)
  head = {'weight': jnp.ones(32), 'bias': jnp.float32(0)}
  params = {**params, 'value': {**params['value'], 'head': head}}
  values, _ = jax.jit(model.values)(params, states, tokens)
  np.testing.assert_allclose(values, states.sum(-1), atol=2e-5)
  own = jax.tree.map(lambda x: x * 2, params['value']['trunk'])
  other = {**params, 'value': {'head': head, 'trunk': own}}
  apart, _ = jax.jit(model.values)(other, states, tokens)
  assert np.abs(apart - values).max() > 0.1
  taken = value_head.taken(other)
  assert 'adapter' not in taken['trunk']  # merged: it reads the same on its own
  plain, bare = base()
  alone, with_it = value_head.attach(plain, bare, taken, trunk='separate')
  np.testing.assert_allclose(
    jax.jit(alone.values)(with_it, states, tokens)[0], apart, atol=5e-5
  )
  # Beside an adapter of the policy's own, a trunk that came whole stays free of it.
  model, both = value_head.attach(*build('lora'), taken, trunk='separate')
  assert jax.tree.structure(both) == jax.tree.structure(model.axes, is_leaf=is_axes)
  both = {**stirred(both), 'value': both['value']}
  got, _ = jax.jit(model.values)(both, states, tokens)
  np.testing.assert_allclose(got, apart, atol=5e-5)
  trained = frozen().split(both)[0]
  assert trained['value']['trunk']['embedding'] is not None
  assert trained['embedding'] is trained['adapter']['scale'] is None


def test_the_gradient_of_the_base_is_not_computed():
  """No product of the compiled step is as large as a weight; FLOPs say the same."""
  sizes = dict(vocab_size=520, dim=128, ffn=384, heads=4, kv_heads=2, head_dim=32)
  plain, params = base(**sizes)
  model, adapted = build('lora', **sizes)
  tokens = jnp.zeros((6, 60), jnp.int32)

  def compiled(model, params, tx):
    state = jax.eval_shape(lambda p: init_state(p, tx, jax.random.key(0)), params)
    program = make_step(model, sft.loss, tx).lower(state, whole(tokens)).compile()
    shapes = re.findall(r'= f32\[([\d,]+)\]\S* dot\(', program.as_text())
    products = collections.Counter(math.prod(map(int, s.split(','))) for s in shapes)
    return program.cost_analysis()['flops'], products

  flops, products = compiled(plain, params, optimizer.make(10, learning_rate=0.1))
  fewer, ours = compiled(model, adapted, frozen())
  # query and out · key and value · gate, up and down · the head; of two layers
  weights = {128 * 128: 4, 128 * 64: 4, 128 * 384: 6, 128 * 520: 1}
  assert {size: products[size] for size in weights} == weights
  assert not any(ours[size] for size in weights)
  total = sum(size * count for size, count in weights.items())
  assert flops - fewer == pytest.approx(2 * total * tokens.size, rel=0.05)


@pytest.mark.parametrize('kind', KINDS)
def test_a_mesh_trains_an_adapter_as_one_device_does(kind, mesh_of):
  model, params = build(kind)
  params = stirred(params)
  want, want_losses = train(model, params, tx=frozen(name='sgd', learning_rate=0.5))
  mesh = mesh_of(2, 2, 2)
  got, losses = train(
    model, params, mesh=mesh, tx=frozen(name='sgd', learning_rate=0.5)
  )
  np.testing.assert_allclose(losses, want_losses, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    jax.device_get(got.params),
    jax.device_get(want.params),
  )
  leaves = got.params['adapter']['layers']['mlp']['down']
  assert tuple(leaves['a'].sharding.spec) == (None, 'tensor', None)
  assert tuple(leaves['b'].sharding.spec) == (None, None, 'fsdp')


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_recomputed_layers_give_the_same_gradient(remat):
  model, params = build('dora')
  again, _ = build('dora', remat=remat)
  params, batch = stirred(params), whole(draw())

  def gradient(model):
    def loss(adapter):
      return score(model, {**params, 'adapter': adapter}, batch).logp.sum()

    return jax.jit(jax.grad(loss))(params['adapter'])

  a, b = gradient(model), gradient(again)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), a, b)
  assert float(a['scale']) == 0  # it is no param
  assert max(np.abs(x).max() for x in jax.tree.leaves(a)) > 0.1


def test_a_reference_is_the_adapter_as_it_was_and_no_more():
  model, params = build('lora')
  tx = frozen(learning_rate=0.1)
  params = stirred(params)
  before = jax.tree.map(np.array, params)
  state = init_state(
    jax.tree.map(jnp.copy, params), tx, jax.random.key(0), reference=True
  )
  size = sum(x.nbytes for x in jax.tree.leaves(state.reference))
  assert size == sum(x.nbytes for x in jax.tree.leaves(params['adapter']['layers']))
  batch = whole(draw())
  step = make_step(model, sft.loss, tx, reference_every=2, reference_alpha=0.25)
  for number in range(2):
    state, _ = step(state, batch)
    if not number:
      first = parts.over(state.params, state.reference)
      jax.tree.map(np.testing.assert_array_equal, first, before)
  want = jax.tree.map(
    lambda new, old: 0.25 * np.float64(new) + 0.75 * np.float64(old),
    state.params['adapter']['layers'],
    before['adapter']['layers'],
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7),
    state.reference['adapter']['layers'],
    want,
  )


def test_attaching_again_goes_on_or_merges():
  model, params = build('dora')
  params = stirred(params)
  again, same = lora.attach(model, params, rank=4, alpha=12.0, kind='dora', seed=9)
  assert same is params
  assert jax.tree.structure(again.init(jax.random.key(1))) == jax.tree.structure(params)
  new, fresh = lora.attach(model, params, rank=2, targets=('key',), merge=True)
  assert set(fresh['adapter']['layers']) == {'attention'}
  batch = whole(draw())
  a, b = (scorer(m)(p, batch)[0] for m, p in ((model, params), (new, fresh)))
  np.testing.assert_allclose(a, b, atol=3e-6)
  for options, message in (
    (dict(rank=4, alpha=24.0, kind='dora'), r'scale is 3\.0 in .* there and 6\.0 in'),
    (dict(rank=8, alpha=24.0, kind='dora'), r'down.a is \(2, 64, 4\) .* \(2, 64, 8\)'),
    (dict(rank=4, alpha=12.0), 'down.magnitude is .* and absent in this one'),
  ):
    with pytest.raises(ValueError, match=f'{message}.*merge=True'):
      lora.attach(model, params, **options)


def test_bad_input_is_one_clear_line():
  model, params = base()
  for options, message in (
    (dict(rank=0), 'rank=0 must be at least 1'),
    (dict(alpha=math.inf), 'alpha=inf must be more than 0, and finite'),
    (dict(kind='vera'), r"kind='vera' must be one of \['lora', 'dora'\]"),
    (dict(targets=('q_proj',)), r"targets: 'q_proj' is none of \['query', 'key'"),
    (dict(targets=()), 'targets=.* names no weight'),
  ):
    with pytest.raises(ValueError, match=message):
      lora.attach(model, params, **options)
  with pytest.raises(ValueError, match='params must be those of a transformer'):
    lora.attach(model, {'w': 1})
  sparse = {**params, 'layers': {'attention': params['layers']['attention']}}
  with pytest.raises(ValueError, match=r"'up' is no dense weight .* \['query', 'key'"):
    lora.attach(model, sparse, targets=('key', 'up'))
  axes = {'layers': {**model.axes['layers']}}
  axes['layers']['mlp'] = {'up': ('layers', 'experts', 'embed', 'mlp')}
  with pytest.raises(ValueError, match="'up' is no dense weight"):
    lora.attach(model._replace(axes={**model.axes, **axes}), params, targets=('up',))


def test_any_optimizer_of_optax_takes_a_part():
  _, params = build('lora')
  for name in ('adafactor', 'lion'):
    tx = frozen(name=name, clip_norm=None)
    state = tx.init(params)
    trained = tx.split(params)[0]
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, trained), state, trained)
    new = parts.over(params, optax.apply_updates(trained, updates))
    assert (new['adapter']['layers']['mlp']['up']['b'] < 0).all()
    np.testing.assert_array_equal(new['embedding'], params['embedding'])
