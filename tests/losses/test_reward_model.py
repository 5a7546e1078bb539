"""reward_model.loss against a float64 loop written from the equations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.losses import reward_model
from educe.types import Batch, Scores

SETTINGS = {
  'bradley_terry': {},
  'margin': dict(margin=0.7),
  'centred': dict(centre_coef=0.05),
  'smoothed': dict(label_smoothing=0.2),
  'all': dict(margin=1.3, centre_coef=0.01, label_smoothing=0.1),
  'regression': dict(objective='regression'),
  'process': dict(objective='process'),
}


def draw(rows=8, length=6, seed=0):
  """Values, and arrays: row 3 is empty, row 5 not rated, row 6 scored in two places."""
  rng = np.random.default_rng(seed)
  values = rng.normal(size=(rows, length)) * 2
  mask = np.zeros((rows, length))
  mask[np.arange(rows), rng.integers(1, length, rows)] = 1
  mask[3], mask[6, 1], mask[6, 4] = 0, 1, 1
  labels = rng.normal(size=rows)
  labels[5] = np.nan
  returns = rng.integers(0, 2, (rows, length)) * 1.0
  return values, dict(mask=mask, labels=labels, returns=returns)


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


def by_loop(
  v, mask, labels, returns, objective='bradley_terry', margin=0.0, centre_coef=0.0,
  label_smoothing=0.0,
):  # fmt: skip
  """(loss, metrics) in Python floats."""
  seen = {}

  def note(name, value):
    seen.setdefault(name, []).append(float(value))

  terms = []
  if objective == 'process':
    for b, t in zip(*np.nonzero(mask), strict=True):
      p, y = sigmoid(v[b, t]), returns[b, t]
      terms.append(-math.log(p) if y else -math.log(1 - p))
      note('rewards/accuracies', (p > 0.5) == y)
      note('rewards/confidence', max(p, 1 - p))
      note('rewards/probability', p)
      note('rewards/labels', y)
  else:
    read = [v[b, max(np.flatnonzero(mask[b]))] if mask[b].any() else None
            for b in range(len(v))]  # fmt: skip
    if objective == 'regression':
      for r, y in zip(read, labels, strict=True):
        if r is not None and not math.isnan(y):
          terms.append((r - y) ** 2 / 2)
          note('error/mean', r - y)
          note('error/absolute', abs(r - y))
          note('rewards/mean', r)
          note('rewards/mean_square', r * r)
    else:
      for i in range(0, len(v), 2):
        c, j = read[i], read[i + 1]
        if c is None or j is None:
          continue
        m = labels[i] - labels[i + 1]
        z = c - j - (0 if math.isnan(m) else margin * m)
        term = -(1 - label_smoothing) * math.log(sigmoid(z))
        term -= label_smoothing * math.log(sigmoid(-z))
        terms.append(term + centre_coef * (c + j) ** 2)
        note('rewards/chosen', c)
        note('rewards/rejected', j)
        note('rewards/margins', c - j)
        note('rewards/accuracies', c > j)
        note('rewards/confidence', sigmoid(abs(c - j)))
        for r in (c, j):
          note('rewards/mean', r)
          note('rewards/mean_square', r * r)
  return np.mean(terms), {name: np.mean(x) for name, x in seen.items()}


def batch_of(arrays, dtype):
  made = {k: None if x is None else jnp.asarray(x, dtype) for k, x in arrays.items()}
  return Batch(jnp.zeros(arrays['mask'].shape, jnp.int32), **made)


@functools.cache
def compiled(**setting):
  def value(v, batch):
    zero = jnp.zeros_like(v)
    mean, metrics = reward_model.loss(Scores(zero, zero, v), batch, **setting)
    return mean.value, {name: m.value for name, m in metrics.items()}

  return jax.jit(jax.value_and_grad(value, has_aux=True))


def evaluate(values, arrays, dtype=jnp.float64, **setting):
  with jax.enable_x64(dtype == jnp.float64):
    v, batch = jnp.asarray(values, dtype), batch_of(arrays, dtype)
    (value, metrics), slope = compiled(**setting)(v, batch)
    return float(value), np.asarray(slope), jax.tree.map(float, metrics)


@pytest.mark.parametrize('name', SETTINGS)
def test_value_gradient_and_metrics_equal_the_loop(name):
  values, arrays = draw()
  value, slope, metrics = evaluate(values, arrays, **SETTINGS[name])
  want, seen = by_loop(values, **arrays, **SETTINGS[name])
  np.testing.assert_allclose(value, want, rtol=1e-12)
  assert metrics.keys() == seen.keys()
  for key, x in seen.items():
    np.testing.assert_allclose(metrics[key], x, rtol=1e-12, err_msg=key)
  h = 1e-6  # an error of 1e-16 / 1e-6 and of the third derivative × 1e-12
  for place in np.ndindex(values.shape):
    step = np.zeros_like(values)
    step[place] = h
    up, down = (
      by_loop(values + s, **arrays, **SETTINGS[name])[0] for s in (step, -step)
    )
    np.testing.assert_allclose(slope[place], (up - down) / (2 * h), atol=2e-9)


@pytest.mark.parametrize('name', SETTINGS)
def test_float32_and_what_stands_elsewhere(name):
  """NaN and ±inf where the mask is 0, and right padding: neither value nor gradient."""
  values, arrays = draw()
  want, slope, _ = evaluate(values, arrays, **SETTINGS[name])
  wide = {k: np.pad(x, ((0, 0), (0, 3))) if x.ndim == 2 else x
          for k, x in arrays.items()}  # fmt: skip
  off = wide['mask'] == 0
  v = np.pad(values, ((0, 0), (0, 3)))
  v[off] = np.random.default_rng(0).choice([np.nan, np.inf, -np.inf], off.sum())
  wide['returns'][off] = np.nan
  got, wild, metrics = evaluate(v, wide, jnp.float32, **SETTINGS[name])
  np.testing.assert_allclose(got, want, rtol=2e-6)  # a dozen float32 operations
  np.testing.assert_allclose(wild[:, :6], slope, atol=1e-6)
  assert not wild[off].any()
  assert np.isfinite([*metrics.values()]).all()


def test_at_the_start_the_loss_is_ln_2():
  _, arrays = draw()
  value, _, metrics = evaluate(np.zeros((8, 6)), arrays)
  assert value == pytest.approx(math.log(2), rel=1e-15)
  assert metrics['rewards/margins'] == metrics['rewards/accuracies'] == 0
  assert metrics['rewards/confidence'] == 0.5
  wrong = {**arrays, 'returns': np.zeros((8, 6))}
  metrics = evaluate(np.zeros((8, 6)), wrong, objective='process')[2]
  assert (
    metrics['rewards/accuracies'] == 1
  )  # a value of 0 does not say that a step is right


def test_swapping_a_pair_flips_its_margin():
  values, arrays = draw()
  keep = [0, 1]
  one = evaluate(values[keep], {k: x[keep] for k, x in arrays.items()})[2]
  swap = [1, 0]
  two = evaluate(values[swap], {k: x[swap] for k, x in arrays.items()})[2]
  assert one['rewards/margins'] == -two['rewards/margins'] != 0
  assert one['rewards/accuracies'] == 1 - two['rewards/accuracies']


def test_far_apart_scores_stay_finite():
  values, arrays = draw()
  for name, setting in SETTINGS.items():
    value, slope, _ = evaluate(values * 1e4, arrays, jnp.float32, **setting)
    assert np.isfinite(value), name
    assert np.isfinite(slope).all(), name


@pytest.mark.parametrize('name', SETTINGS)
def test_any_split_by_pairs_gives_the_same_sums_and_counts(name):
  values, arrays = draw()

  def part(rows):
    cut = batch_of({k: x[rows] for k, x in arrays.items()}, jnp.float64)
    v = jnp.asarray(values[rows])
    mean, metrics = reward_model.loss(Scores(v, v, v), cut, **SETTINGS[name])
    return {'loss': mean, **metrics}

  with jax.enable_x64():
    whole, first, second = part(slice(None)), part(slice(2)), part(slice(2, 8))
    for key, mean in whole.items():
      np.testing.assert_allclose(first[key] + second[key], mean, rtol=1e-12)


def test_bradley_terry_recovers_the_rewards_that_made_the_labels():
  """Population optimum: with P(i ≻ j) = σ(s_i − s_j) of all pairs, differences are s's."""
  s = np.array([1.2, -0.3, 0.4, 0.0])
  pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
  index = jnp.array(pairs).reshape(-1)
  weight = np.repeat([sigmoid(s[i] - s[j]) for i, j in pairs], 2)
  mask = jnp.ones((len(index), 1))

  def loss(theta):
    total = 0.0
    for p in range(len(pairs)):
      rows = slice(2 * p, 2 * p + 2)
      v = theta[index[rows]][:, None]
      batch = Batch(jnp.zeros((2, 1), jnp.int32), mask[rows])
      mean, _ = reward_model.loss(Scores(v, v, v), batch, centre_coef=1e-6)
      total = total + weight[2 * p] * mean.total
    return total

  with jax.enable_x64():
    step = lambda theta, _: (theta - 0.5 * jax.grad(loss)(theta), None)  # noqa: E731
    theta = jax.jit(lambda x: jax.lax.scan(step, x, length=400)[0])(jnp.zeros(4))
  np.testing.assert_allclose(theta - theta[0], s - s[0], atol=1e-4)


@pytest.mark.parametrize(
  ('setting', 'message'),
  [
    (dict(objective='bt'), "objective='bt' is not one of"),
    (dict(margin=-1.0), 'margin=-1.0 must be at least 0'),
    (dict(centre_coef=-0.1), 'centre_coef=-0.1 must be at least 0'),
    (dict(label_smoothing=0.5), r'label_smoothing=0.5 must be in \[0, 0.5\)'),
    (
      dict(objective='process', margin=1.0),
      "margin=1.0 belongs to objective='bradley_terry', not 'process'",
    ),
  ],
)
def test_bad_settings_are_one_clear_line(setting, message):
  with pytest.raises(ValueError, match=message):
    evaluate(*draw(), **setting)


@pytest.mark.parametrize(
  ('absent', 'setting', 'message'),
  [
    ('labels', dict(margin=1.0), 'margin=1.0 needs ratings'),
    ('labels', dict(objective='regression'), "objective='regression' needs ratings"),
    ('returns', dict(objective='process'), 'needs judged steps'),
  ],
)
def test_what_a_setting_needs_is_named(absent, setting, message):
  values, arrays = draw()
  with pytest.raises(ValueError, match=message):
    evaluate(values, {**arrays, absent: None}, **setting)


def test_a_model_without_a_value_head_odd_rows_and_packing_are_refused():
  values, arrays = draw()
  batch, x = batch_of(arrays, jnp.float32), jnp.float32(values)
  with pytest.raises(ValueError, match=r'no value head: add a section config.value'):
    reward_model.loss(Scores(x, x), batch)
  odd = jax.tree.map(lambda y: y[:3], batch)
  with pytest.raises(ValueError, match='3 rows are not pairs'):
    reward_model.loss(Scores(x[:3], x[:3], x[:3]), odd)
  with pytest.raises(ValueError, match='one text a row'):
    reward_model.loss(Scores(x, x, x), batch._replace(segments=batch.tokens))
