"""One update of a real (tiny) transformer: exact under every cut of the batch."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from educe import sharding
from educe.data.sharing import share
from educe.losses import sft
from educe.losses.logprobs import score
from educe.models import policy, presets, safetensors
from educe.models.parts import over, paths
from educe.training import optimizer
from educe.training.step import accumulate, init_state, make_step, mixed
from educe.types import Batch, Max, Mean

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
MODEL = policy.build(presets.debug)


def params():
  return MODEL.init(jax.random.key(0))


def draw(rows=8, length=12, seed=0, vocab=256):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
  # Uneven rows: a mean of means would weigh them wrongly.
  trained = np.arange(length)[None] < rng.integers(2, length + 1, (rows, 1))
  mask = trained.astype(np.float32)
  mask[:, 0] = 0
  mask[2] = 0
  return Batch(tokens, mask)


def gradient(batch, microbatches, aggregate='token_mean'):
  loss = functools.partial(sft.loss, aggregate=aggregate)

  def total(p, part):
    mean, metrics = loss(score(MODEL, p, part), part)
    return mean.total, {'loss': mean, **metrics}

  cut = functools.partial(accumulate, jax.grad(total, has_aux=True))
  grads, means = jax.jit(cut, static_argnums=2)(params(), batch, microbatches)
  return jax.tree.map(lambda g: g / means['loss'].count, grads), means['loss'].value


def close(a, b, tolerance):
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale), a, b
  )


@pytest.mark.parametrize('aggregate', ['token_mean', 'sequence_mean'])
def test_loss_and_gradient_are_the_same_for_1_2_and_4_microbatches(aggregate):
  batch = draw()
  whole, loss = gradient(batch, 1, aggregate)
  for parts in (2, 4):
    cut, cut_loss = gradient(batch, parts, aggregate)
    np.testing.assert_allclose(cut_loss, loss, rtol=1e-6)
    close(cut, whole, 1e-6)


MIXTURE = dataclasses.replace(
  presets.debug_moe, layers=1, balance_coef=0.3, router_z_coef=0.2
)


def mixture_step(microbatches, architecture=MIXTURE, loss=sft.loss):
  """(step, state) of plain SGD with a rate of 1, so that the gradient can be read off."""
  model = policy.build(architecture)
  tx = optimizer.make(
    steps=10, name='sgd', learning_rate=1.0, schedule='constant', clip_norm=None
  )
  params = model.init(jax.random.key(0))
  params['layers']['experts']['router'] *= 20  # so that not all experts are alike
  state = init_state(params, tx, jax.random.key(0))
  return make_step(model, loss, tx, microbatches=microbatches), state


@pytest.mark.parametrize(
  ('aggregate', 'cuts'), [('token_mean', (1, 2, 4)), ('sequence_mean', (2,))]
)
def test_auxiliary_losses_have_their_own_counts_in_microbatches(aggregate, cuts):
  loss = functools.partial(sft.loss, aggregate=aggregate)
  batch = jax.tree.map(jnp.asarray, draw())
  model = policy.build(MIXTURE)

  @jax.jit
  @jax.grad
  def slope(params):
    scores = score(model, params, batch)
    aux = scores.aux
    extra = 0.3 * aux['load_balance'].value + 0.2 * aux['router_z'].value
    return loss(scores, batch)[0].value + extra

  metrics = None
  for microbatches in cuts:
    step, state = mixture_step(microbatches, loss=loss)
    before = jax.device_get(state.params)
    want = slope(before)
    state, found = step(state, batch)
    close(jax.tree.map(lambda a, b: a - b, before, state.params), want, 1e-5)
    found = jax.device_get(found)
    metrics = metrics or found
    for name in ('loss', 'load_balance', 'router_z', 'router/max_load', 'grad_norm'):
      np.testing.assert_allclose(found[name], metrics[name], rtol=1e-5, err_msg=name)
  # Balanced experts have 2, and no logits 4.3; one of eight has at least an eighth.
  assert 2 < metrics['load_balance'] < 8
  assert 0.125 < metrics['router/max_load'] < 1


def test_counting_ahead_of_the_microbatches_costs_nothing():
  """The whole batch is read for its counts alone: no matmul of that pass is left."""
  batch = jax.tree.map(jnp.asarray, draw())
  flops = []
  for architecture in (
    MIXTURE,
    dataclasses.replace(MIXTURE, balance_coef=0.0, router_z_coef=0.0),
  ):
    step, state = mixture_step(2, architecture)
    compiled = step.lower(state, batch).compile()
    flops.append(compiled.cost_analysis()['flops'])
  assert flops[0] < 1.05 * flops[1]


def test_packed_equals_the_sum_of_unpacked():
  """Three documents in one row: same loss, same gradient as three rows."""
  rng = np.random.default_rng(1)
  documents = [rng.integers(0, 256, n).astype(np.int32) for n in (5, 9, 4)]
  rows = Batch(np.zeros((3, 9), np.int32), np.zeros((3, 9), np.float32))
  packed = Batch(
    *(np.zeros((1, 20), d) for d in ('int32', 'float32', 'int32', 'int32'))
  )
  at = 0
  for i, tokens in enumerate(documents):
    n = len(tokens)
    rows.tokens[i, :n], rows.mask[i, 1:n] = tokens, 1
    packed.tokens[0, at : at + n], packed.mask[0, at + 1 : at + n] = tokens, 1
    packed.positions[0, at : at + n] = np.arange(n)
    packed.segments[0, at : at + n] = i + 1
    at += n
  want, want_loss = gradient(rows, 1)
  got, got_loss = gradient(packed, 1)
  np.testing.assert_allclose(got_loss, want_loss, rtol=1e-6)
  close(got, want, 1e-6)


def run(batch, steps=3, microbatches=1, mesh=None, loss=sft.loss, **options):
  tx = optimizer.make(
    steps=10, name='sgd', learning_rate=0.5, schedule='constant', **options
  )
  p, place, shardings = params(), lambda x: x, None
  if mesh is not None:
    p = sharding.place(p, MODEL.axes, mesh)
    place = functools.partial(sharding.place_batch, mesh=mesh)
  state = init_state(p, tx, jax.random.key(0))
  if mesh is not None:
    state = sharding.replicate_rest(state, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
  step = make_step(
    MODEL, loss, tx, microbatches=microbatches, state_shardings=shardings
  )
  history = []
  for _ in range(steps):
    state, metrics = step(state, place(batch))
    history.append(jax.device_get(metrics))
  return state, history


def by_sequence(scores, batch):
  """A loss whose gradient at a token reads the others of its row."""
  total = (scores.logp * batch.mask).sum(-1)
  return Mean((total**2).sum() / 100, batch.mask.sum()), {}


def by_weights_of_all_rows(scores, batch):
  """… and one whose weights at a token read the whole batch's tokens."""
  weights = batch.tokens / batch.tokens.max()
  total = -(weights * scores.logp * batch.mask).sum()
  return Mean(total, batch.mask.sum()), {}


SHAPES = [
  dict(data=8),
  dict(fsdp=8),
  dict(data=2, fsdp=2, tensor=2),
  dict(tensor=8),
  dict(context=4),
  dict(data=2, context=2, tensor=2),
]


@pytest.mark.parametrize('loss', [sft.loss, by_sequence, by_weights_of_all_rows])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_eight_devices_equal_one(mesh_of, shape, loss):
  batch = draw()
  want, want_history = run(batch, loss=loss)
  got, history = run(batch, mesh=mesh_of(**shape), loss=loss)
  for a, b in zip(history, want_history, strict=True):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-6)
    np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=1e-5)
  close(jax.device_get(got.params), jax.device_get(want.params), 1e-6)
  specs = {str(x.sharding.spec) for x in jax.tree.leaves(got.params)}
  params_too = {'fsdp', 'tensor'} & set(shape)
  assert not params_too or len(specs) > 1  # something really is split


def test_a_mesh_shares_prompts_and_leaves_out_tokens_device_by_device(mesh_of):
  batch = draw(length=48)
  batch.tokens[:, :32] = np.repeat(batch.tokens[::4, :32], 4, 0)
  batch.mask[:, :32] = 0
  batch.mask[:, 40] = 1
  shared = share(batch, 4, 2)
  assert shared.prefix is not None
  want, want_history = run(batch)
  got, history = run(shared, mesh=mesh_of(2, 1, 4))
  np.testing.assert_allclose(history[-1]['loss'], want_history[-1]['loss'], rtol=1e-6)
  close(jax.device_get(got.params), jax.device_get(want.params), 2e-6)

  def count(name):
    with sharding.using(mesh_of(2, 1, 4)):
      traced = jax.make_jaxpr(lambda *x: score(MODEL, *x).logp)(params(), shared)
    return str(traced).count(name)

  assert count('shard_map') == 1
  assert count('psum') >= 1  # the vocabulary is split as well


def test_frozen_params_stay_cut_and_sharded_as_whole(mesh_of):
  batch = draw(rows=16)
  freeze = ('embedding', 'layers/mlp/', '^head')
  want, history = run(batch, freeze=freeze)
  got, cut = run(batch, microbatches=2, mesh=mesh_of(2, 2, 2), freeze=freeze)
  np.testing.assert_allclose(cut[-1]['grad_norm'], history[-1]['grad_norm'], rtol=1e-5)
  close(jax.device_get(got.params), jax.device_get(want.params), 1e-6)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), got.params, params())
  assert not moved['embedding']
  assert not moved['head']
  assert not any(jax.tree.leaves(moved['layers']['mlp']))
  assert all(jax.tree.leaves(moved['layers']['attention']))


def test_a_reference_holds_what_is_trained_and_no_more():
  tx = optimizer.make(
    10, learning_rate=0.1, freeze=('embedding', 'layers/mlp/', '^head')
  )
  state = init_state(params(), tx, jax.random.key(0), reference=True)
  held = jax.tree.leaves(paths(state.reference, lambda path: path))
  assert held == [
    'layers/attention/key', 'layers/attention/out', 'layers/attention/query',
    'layers/attention/value', 'layers/attention_norm/scale', 'layers/mlp_norm/scale',
    'norm/scale',
  ]  # fmt: skip
  state, _ = make_step(MODEL, sft.loss, tx)(state, draw())
  first = over(state.params, state.reference)
  jax.tree.map(np.testing.assert_array_equal, first, params())
  assert np.any(first['norm']['scale'] != state.params['norm']['scale'])


def test_microbatches_on_a_mesh_equal_one_device(mesh_of):
  batch = draw(rows=16)
  want, _ = run(batch)
  got, _ = run(batch, microbatches=2, mesh=mesh_of(4, 2))
  close(jax.device_get(got.params), jax.device_get(want.params), 1e-6)


def test_moments_rest_in_the_memory_of_the_host(mesh_of):
  """Between steps; a step reads them where it computes, and writes them back."""
  batch, mesh = draw(), mesh_of(2, 2)
  tx = optimizer.make(steps=10, learning_rate=0.1, schedule='constant', eps=1e-3)

  def steps(move):
    state = init_state(
      sharding.place(params(), MODEL.axes, mesh), tx, jax.random.key(0), reference=True
    )
    state = sharding.replicate_rest(state, mesh)
    if move:
      state = state._replace(
        opt_state=sharding.to_host(state.opt_state),
        reference=sharding.to_host(state.reference),
      )
    layout = jax.tree.map(lambda x: x.sharding, state)
    step = make_step(MODEL, sft.loss, tx, reference_every=1, state_shardings=layout)
    for _ in range(2):
      state, metrics = step(state, sharding.place_batch(batch, mesh))
    return state, metrics

  (near, a), (far, b) = steps(False), steps(True)
  for tree, kind in ((near, 'device'), (far, 'pinned_host')):
    away = jax.tree.leaves((tree.opt_state, tree.reference))
    assert {x.sharding.memory_kind for x in away if x.ndim} == {kind}
    here = jax.tree.leaves(tree.params)
    assert {x.sharding.memory_kind for x in here} == {'device'}
  np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-6)
  back = sharding.to_device(far)
  assert {x.sharding.memory_kind for x in jax.tree.leaves(back)} == {'device'}
  for name in ('params', 'opt_state', 'reference'):
    pair = (jax.device_get(getattr(x, name)) for x in (back, near))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *pair)


def test_one_step_is_the_update_written_out():
  """params − η·clip(∇L): no optimizer library, no jit, no donation."""
  batch = draw()
  grads, loss = gradient(batch, 1)
  norm = optax.tree.norm(grads)
  want = jax.tree.map(lambda p, g: p - 0.5 * g / jnp.maximum(norm, 1), params(), grads)
  state, (metrics,) = run(batch, steps=1, clip_norm=1.0)
  close(state.params, want, 1e-6)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-6)
  assert metrics['num_tokens'] == batch.mask.sum()
  assert state.step == 1


def test_a_poisoned_batch_skips_the_update():
  batch = draw()
  bad = batch._replace(tokens=batch.tokens.copy())
  bad.tokens[0, 1] = 999  # outside the vocabulary: NaN loss
  bad.mask[0, 1] = 1
  before, _ = run(batch, steps=0)
  before = jax.device_get(before.params)
  state, history = run(bad, steps=2)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)
  assert [m['skipped_in_a_row'] for m in history] == [1, 2]
  assert state.step == 2


def test_a_batch_without_trained_tokens_is_harmless():
  batch = draw()
  state, (metrics,) = run(batch._replace(mask=np.zeros_like(batch.mask)), steps=1)
  assert metrics['skipped_updates'] == 0
  assert metrics['grad_norm'] == 0
  assert np.isfinite(jax.tree.leaves(state.params)[0]).all()


def test_the_step_never_allocates_the_logits():
  """Temporaries of the compiled step stay well under [B, T, V].

  They do not grow with the rows as the logits do: a chunk of them and its gradient, and
  the head's. Measured with 16 rows 0.60 of the logits, with 64 rows 0.20.
  """
  architecture = presets.debug.__class__(
    vocab_size=32_768, dim=32, layers=1, heads=4, kv_heads=2, head_dim=8, ffn=64,
    max_length=256,
  )  # fmt: skip
  model = policy.build(architecture)
  tx = optimizer.make(steps=10, name='sgd', learning_rate=0.1)
  rows, length = 64, 128
  state = jax.eval_shape(
    lambda key: init_state(model.init(key), tx, key), jax.random.key(0)
  )
  shape = (rows, length)
  batch = Batch(
    jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  compiled = make_step(model, sft.loss, tx).lower(state, batch).compile()
  logits = rows * length * architecture.vocab_size * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * logits


def test_three_adamw_steps_equal_torch():
  """Model, loss, mask, clip, warm-up, decay mask and AdamW, against transformers+torch.

  Made in float64 by tests/golden/make_golden_step.py; ours is float32.
  """
  golden = json.loads((GOLDEN / 'step.json').read_text())
  model, p = safetensors.load(path=str(GOLDEN / 'tiny_llama'))
  tx = optimizer.make(
    10, learning_rate=0.01, schedule='linear', warmup_steps=2, weight_decay=0.1, b2=0.95
  )
  state = init_state(jax.tree.map(jnp.asarray, p), tx, jax.random.key(0))
  step = make_step(model, sft.loss, tx)
  batch = draw(vocab=model.architecture.vocab_size)
  for want in golden['steps']:
    state, metrics = step(state, batch)
    for name, value in want.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
  leaves = [np.float64(x) for x in jax.tree.leaves(state.params)]
  got = {'sum': sum(x.sum() for x in leaves)}
  got['sum_of_squares'] = sum((x**2).sum() for x in leaves)
  for name, value in golden['params'].items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_sums_and_the_division_are_float32_under_bfloat16():
  """bfloat16 has no 257, let alone 259: a sum in it would stop growing."""

  def gradient(_, part):
    n = part.mask.sum()
    return {'w': n.astype(jnp.bfloat16)}, {'loss': Mean(n, n)}

  mask = jnp.array([[256.0], [1.0], [1.0], [1.0]])
  grads, _ = accumulate(gradient, {}, Batch(jnp.zeros((4, 1), jnp.int32), mask), 4)
  assert grads['w'] == 259


def test_the_learning_rate_reported_is_the_one_that_was_used():
  """A skipped update does not move the schedule."""
  batch = draw()
  bad = batch._replace(tokens=np.full_like(batch.tokens, 999))
  tx = optimizer.make(10, name='sgd', learning_rate=0.5, schedule='linear')
  state = init_state(params(), tx, jax.random.key(0))
  step = make_step(MODEL, sft.loss, tx)
  rates = []
  for part in (batch, bad, batch, batch):
    state, metrics = step(state, part)
    rates.append(float(metrics['learning_rate']))
  np.testing.assert_allclose(rates, [0.5, 0.45, 0.45, 0.4], rtol=1e-6)


@pytest.mark.parametrize('microbatches', [1, 2, 4])
def test_a_maximum_is_over_all_microbatches(microbatches):
  def loss(scores, batch):
    mean = sft.loss(scores, batch)[0]
    return mean, {'largest': Max(batch.mask.sum(-1).max()), 'nll': mean}

  tx = optimizer.make(10, learning_rate=0.1)
  state = init_state(params(), tx, jax.random.key(0))
  batch = draw()
  _, metrics = make_step(MODEL, loss, tx, microbatches=microbatches)(state, batch)
  assert metrics['largest'] == batch.mask.sum(-1).max()
  np.testing.assert_allclose(metrics['nll'], metrics['loss'], rtol=1e-6)


@pytest.mark.parametrize(
  ('every', 'copied'), [(None, []), (0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4])]
)
def test_the_reference_is_the_policy_of_every_nth_step(every, copied):
  tx = optimizer.make(10, name='sgd', learning_rate=0.5, schedule='constant')
  state = init_state(params(), tx, jax.random.key(0), reference=every is not None)
  step = make_step(MODEL, sft.loss, tx, reference_every=every)
  want = np.array(state.params['head'])
  for number in range(1, 6):
    state, _ = step(state, draw(seed=number))
    if number in copied:
      want = np.array(state.params['head'])
    if every is None:
      assert state.reference is None
    else:
      np.testing.assert_array_equal(state.reference['head'], want)
      assert (number in copied) == np.array_equal(want, state.params['head'])


def test_a_lagging_reference_takes_a_share_of_the_policy():
  """Every second step; α·policy + (1 − α)·reference, in float64."""
  tx = optimizer.make(10, name='sgd', learning_rate=0.5, schedule='constant')
  state = init_state(params(), tx, jax.random.key(0), reference=True)
  step = make_step(MODEL, sft.loss, tx, reference_every=2, reference_alpha=0.25)
  want = np.array(state.params['head'], np.float64)
  for number in range(1, 6):
    state, _ = step(state, draw(seed=number))
    if number % 2 == 0:
      want = 0.25 * np.array(state.params['head'], np.float64) + 0.75 * want
    # Two roundings of float32 at most, of numbers below 1.
    np.testing.assert_allclose(state.reference['head'], want, rtol=0, atol=3e-7)
  assert np.abs(want - np.array(state.params['head'])).max() > 1e-3


def test_the_mean_of_policy_and_reference_is_taken_in_float32():
  new, old = ({'w': jnp.full(3, x, jnp.bfloat16)} for x in (256.0, 2.0))
  got = mixed(new, old, 0.5)['w']
  assert got.dtype == jnp.bfloat16
  assert got.tolist() == [129.0] * 3
  assert mixed(new, old, 1.0) is new


def test_the_temperature_divides_the_logits_that_are_scored():
  tx = optimizer.make(10, learning_rate=0.1)
  batch, sharp = draw(), {**params(), 'head': params()['head'] * 30}
  seen = []
  for temperature, start in ((0.5, sharp), (1.0, {**sharp, 'head': sharp['head'] * 2})):
    state = init_state(jax.tree.map(jnp.copy, start), tx, jax.random.key(0))
    step = make_step(MODEL, sft.loss, tx, temperature=temperature)
    seen.append(float(step(state, batch)[1]['loss']))
  np.testing.assert_allclose(*seen, rtol=1e-5)


def test_a_scorer_gets_the_reference_as_an_argument_not_as_a_constant():
  """With another reference the same program gives another loss, and no gradient to it."""
  tx = optimizer.make(10, name='sgd', learning_rate=0.5, schedule='constant')
  seen = []

  def scorer(policy, reference, batch):
    seen.append(all(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(reference)))
    return score(MODEL, policy, batch, teacher=(MODEL, reference), beta=0.0)

  def loss(scores, batch):
    return Mean((scores.divergence * batch.mask).sum(), batch.mask.sum()), {}

  step = make_step(MODEL, loss, tx, scorer=scorer, microbatches=2)
  other = jax.tree.map(lambda x: 3 * x, MODEL.init(jax.random.key(5)))
  losses = []
  for reference in (params(), other):
    state = init_state(params(), tx, jax.random.key(0))
    kept = jax.tree.map(np.array, reference)
    state, metrics = step(state._replace(reference=reference), draw())
    losses.append(float(metrics['loss']))
    jax.tree.map(np.testing.assert_array_equal, state.reference, kept)
  assert losses[0] == pytest.approx(0, abs=1e-6)  # of itself
  assert losses[1] > 0.1
  assert seen
  assert all(seen)
  assert step._cache_size() == 1
