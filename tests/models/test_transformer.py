"""The decoder: what may not change its output, and what must."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.models import policy, presets, transformer

TOKENS = np.random.default_rng(0).integers(0, 97, (3, 12)).astype(np.int32)


def logits(model, params, *inputs):
  return _logits(model.architecture, params, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _logits(architecture, params, *inputs):
  model = policy.build(architecture)
  return model.hidden(params, *inputs)[0] @ model.head(params).matrix


def gradient(model, params, weight, *inputs):
  """Of Σ weight · log p(next token)."""
  return _gradient(model.architecture, params, weight, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(architecture, params, weight, *inputs):
  def total(params):
    logp = jax.nn.log_softmax(
      _logits(architecture, params, *inputs).astype(jnp.float32)
    )
    targets = jnp.asarray(inputs[0])[:, 1:, None]
    return (jnp.take_along_axis(logp[:, :-1], targets, -1)[..., 0] * weight).sum()

  return jax.grad(total)(params)


def largest(tree):
  return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def difference(one, two):
  return largest(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), one, two))


def test_right_padding_changes_nothing_whatever_its_width(tiny):
  model, params = tiny
  short = logits(model, params, TOKENS)
  for width in (1, 4, 20):
    padded = np.pad(TOKENS, ((0, 0), (0, width)))
    segments = (np.arange(12 + width) < 12).astype(np.int32)[None].repeat(3, 0)
    for inputs in [(padded,), (padded, None, segments)]:
      # Of the largest logit: another width is another blocking of the same sums.
      error = difference(logits(model, params, *inputs)[:, :12], short)
      assert error <= 1e-5 * largest(short)


def test_left_padding_changes_nothing_given_positions_and_segments(tiny):
  model, params = tiny
  padded = np.pad(TOKENS, ((0, 0), (5, 0)))
  mask = np.pad(np.ones_like(TOKENS), ((0, 0), (5, 0)))
  positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
  padded = logits(model, params, padded, positions, mask)[:, 5:]
  assert difference(padded, logits(model, params, TOKENS)) <= 1e-5


def test_packed_documents_do_not_see_each_other(tiny):
  model, params = tiny
  lengths = [5, 12, 3]
  tokens = np.concatenate([row[:n] for row, n in zip(TOKENS, lengths, strict=True)])
  positions = np.concatenate([np.arange(n) for n in lengths])
  segments = np.repeat([1, 2, 3], lengths)
  pack = [np.pad(x, (0, 4))[None] for x in (tokens, positions, segments)]
  packed = logits(model, params, *pack)[0]
  weight = np.pad(segments[1:] == segments[:-1], (0, 4)).astype(np.float32)
  total = gradient(model, params, weight, *pack)
  start = 0
  for row, n in zip(TOKENS, lengths, strict=True):
    alone = row[None, :n]
    part = packed[start : start + n]
    assert difference(part, logits(model, params, alone)[0]) <= 1e-5
    start += n
    part = gradient(model, params, 1.0, alone)
    total = jax.tree.map(lambda a, b: np.asarray(a) - b, total, part)
  scale = largest(gradient(model, params, weight, *pack))
  assert largest(total) <= 1e-5 * max(scale, 1)


def test_a_token_sees_itself_and_the_past_only(tiny):
  """Catches a causal mask that is off by one in either direction."""
  model, params = tiny
  before = logits(model, params, TOKENS)
  for t in (0, 5, 11):
    changed = TOKENS.copy()
    changed[:, t] = (changed[:, t] + 1) % 97
    moved = np.abs(logits(model, params, changed) - before).max((0, 2))
    assert (moved[:t] == 0).all()
    assert (moved[t:] > 1e-3).all()


def test_rope_is_relative_and_matters(tiny):
  model, params = tiny
  at = lambda start, step=1: logits(  # noqa: E731
    model, params, TOKENS, (start + step * np.arange(12))[None]
  )
  assert difference(at(0), logits(model, params, TOKENS)) == 0
  assert difference(at(0), at(7)) <= 1e-4  # only differences of positions count
  assert difference(at(0), at(0, 2)) > 0.1
  off_by_one = np.arange(12)
  off_by_one[6:] += 1
  assert difference(at(0), logits(model, params, TOKENS, off_by_one[None])) > 0.1


def test_rotary_is_precise_at_long_range():
  architecture = presets.get('smollm2_135m')
  positions = np.array([[0, 1, 100, 8191]])
  exact = positions[..., None] / 1e5 ** (np.arange(0, 64, 2) / 64)
  cos, sin = jax.jit(transformer.rotary, static_argnums=0)(architecture, positions)
  # A float32 angle of 8191 is known to 5e-4.
  np.testing.assert_allclose(cos, np.cos(exact), atol=1e-3)
  np.testing.assert_allclose(sin, np.sin(exact), atol=1e-3)
  np.testing.assert_allclose(sin[:, :2], np.sin(exact[:, :2]), atol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_row_of_padding_has_finite_value_and_gradient(dtype):
  architecture = dataclasses.replace(
    presets.get('debug'), param_dtype=dtype, compute_dtype=dtype
  )
  model = policy.build(architecture)
  params = model.init(jax.random.key(0))
  segments = np.ones_like(TOKENS)
  segments[1] = 0
  segments[2, 4:] = 0
  inputs = TOKENS, None, segments
  states, _ = jax.jit(model.hidden)(params, *inputs)
  assert states.dtype == dtype
  assert bool(jnp.isfinite(states).all())
  padding = (segments[:, 1:] == 0).astype(np.float32)
  for weight in (np.ones_like(padding), padding):
    slope = gradient(model, params, weight, *inputs)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(slope))
  cache = model.init_cache(3, 12)
  positions = np.where(segments > 0, np.arange(12), -1)
  states, _ = jax.jit(model.decode)(params, cache, TOKENS, positions, 0)
  assert bool(jnp.isfinite(states).all())


def test_bfloat16_stays_near_float32(tiny):
  model, params = tiny
  low = dataclasses.replace(
    model.architecture, param_dtype='bfloat16', compute_dtype='bfloat16'
  )
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  states, _ = jax.jit(policy.build(low).hidden)(params, TOKENS)
  want, _ = jax.jit(model.hidden)(exact, TOKENS)
  error = states.astype(jnp.float32) - want
  assert float(jnp.sqrt((error**2).mean() / (want**2).mean())) < 0.03


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_changes_no_number(tiny, remat):
  model, params = tiny
  again = policy.build(dataclasses.replace(model.architecture, remat=remat))
  assert difference(logits(again, params, TOKENS), logits(model, params, TOKENS)) == 0
  one, two = (gradient(m, params, 1.0, TOKENS) for m in (model, again))
  assert difference(one, two) <= 1e-5 * largest(one)


def test_decoding_equals_one_pass_for_prompts_of_unequal_length(tiny):
  """Prefill of right-padded prompts, then steps whose slots are not positions."""
  model, params = tiny
  prompts = np.array([3, 7, 5])
  width, steps = 7, 5
  full = logits(model, params, TOKENS)
  matrix = np.asarray(model.head(params).matrix)
  traces = []

  @jax.jit
  def decode(*arguments):
    traces.append(1)
    return model.decode(*arguments)

  where = np.arange(width)
  positions = np.where(where < prompts[:, None], where, -1)
  for start in (params, policy.unstack(params)):
    cache = model.init_cache(3, width + steps)
    tokens = np.where(positions >= 0, TOKENS[:, :width], 0)
    states, cache = decode(start, cache, tokens, positions, 0)
    for b, n in enumerate(prompts):
      assert difference(np.asarray(states)[b, :n] @ matrix, full[b, :n]) <= 1e-5
    for step in range(steps):
      at = prompts + step
      token = TOKENS[np.arange(3), at]
      states, cache = decode(start, cache, token[:, None], at[:, None], width + step)
      want = np.asarray(full)[np.arange(3), at]
      assert difference(np.asarray(states)[:, 0] @ matrix, want) <= 1e-5
  assert len(traces) == 4  # a prefill and a step for each layout: the slot is traced


def test_unstacking_before_a_loop_keeps_the_copies_out_of_it(tiny):
  model, params = tiny
  stacked = {leaf.shape for leaf in jax.tree.leaves(params['layers'])}

  def shapes_inside(prepare):
    def run(params):
      params = prepare(params)

      def step(carry):
        slot, cache = carry
        return slot + 1, model.decode(params, cache, token, token, slot)[1]

      token = jnp.zeros((1, 1), jnp.int32)
      carry = jnp.int32(0), model.init_cache(1, 8)
      return jax.lax.while_loop(lambda carry: carry[0] < 8, step, carry)

    (loop,) = [
      equation
      for equation in jax.make_jaxpr(run)(params).eqns
      if equation.primitive.name == 'while'
    ]
    return {v.aval.shape for v in loop.params['body_jaxpr'].jaxpr.invars}

  assert stacked <= shapes_inside(lambda params: params)
  assert not stacked & shapes_inside(policy.unstack)


def primitives(jaxpr):
  """(name, input dtypes) of every operation, those inside scans included."""
  for equation in jaxpr.eqns:
    yield (
      equation.primitive.name,
      {getattr(v.aval, 'dtype', None) for v in equation.invars},
    )
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from primitives(inner)


def test_in_bfloat16_softmax_norms_and_rotation_stay_float32():
  """exp is the softmax's, rsqrt the norms', cos and sin the rotation's."""
  architecture = dataclasses.replace(
    presets.debug, param_dtype='bfloat16', compute_dtype='bfloat16'
  )
  model = policy.build(architecture)
  params = policy.shapes(architecture)
  jaxpr = jax.make_jaxpr(model.hidden)(params, np.zeros((2, 5), np.int32)).jaxpr
  seen = {name: set() for name in ('exp', 'rsqrt', 'cos', 'sin', 'reduce_sum')}
  for name, dtypes in primitives(jaxpr):
    if name in seen:
      seen[name] |= dtypes
    # The rotation itself: every product with a cosine or sine.
    if name == 'mul' and jnp.dtype('float32') in dtypes:
      assert dtypes <= {jnp.dtype('float32')}
  for name, dtypes in seen.items():
    assert dtypes == {jnp.dtype('float32')}, name
