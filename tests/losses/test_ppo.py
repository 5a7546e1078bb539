"""ppo.loss against a float64 loop written from the equations, value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.losses import grpo, ppo
from educe.types import Batch, Scores

SETTINGS = {
  'default': {},
  'no_value_clip': dict(value_clip=None, value_coef=0.5),
  'tight': dict(clip_low=0.05, clip_high=0.1, value_clip=0.05, value_coef=1.0),
  'entropy': dict(entropy_coef=0.03, dual_clip=1.5),
  'sequences': dict(aggregate='sequence_mean', value_coef=0.7, entropy_coef=0.1),
  'sums': dict(aggregate='sequence_sum', value_coef=0.3),
  'constant': dict(aggregate='constant', max_completion_length=9, entropy_coef=0.1),
  'corrected': dict(sampler_correction='token_truncate', correction_max=1.1),
}


def draw(rows=5, length=7, seed=2, old=True):
  """(log-probs, entropy, values), and arrays. Row 3 has nothing to train on."""
  rng = np.random.default_rng(seed)
  shape = rows, length
  mask = (rng.random(shape) < 0.7) * 1.0
  mask[:, 0], mask[3] = 0, 0
  logp, values = -rng.gamma(2.0, 0.7, shape), rng.normal(size=shape)
  near = lambda x, s: x + s * rng.normal(size=shape)  # noqa: E731
  arrays = dict(
    mask=mask,
    advantages=rng.normal(size=shape),
    returns=near(values, 0.5),
    old_values=near(values, 0.3),
    old_logp=near(logp, 0.4) if old else None,
    sampler_logp=near(logp, 0.3),
    ref_logp=near(logp, 0.6),
  )
  return (logp, rng.gamma(2.0, 0.5, shape), values), arrays


def by_loop(
  x, h, v, arrays, clip_low=0.2, clip_high=0.2, dual_clip=None, value_clip=0.2,
  value_coef=0.1, entropy_coef=0.0, sampler_correction='none', correction_max=2.0,
  aggregate='token_mean', max_completion_length=None, fixed=None,
):  # fmt: skip
  """(loss, metrics). `fixed`: the log-probs where the equation holds them constant."""
  fixed = x if fixed is None else fixed
  seen, rows = {}, []
  parts = {'policy_loss': [], 'value_loss': []}

  def note(name, value):
    seen.setdefault(name, []).append(float(value))

  for b in range(len(x)):
    rows.append([])
    for lists in parts.values():
      lists.append([])
    for t in np.flatnonzero(arrays['mask'][b]):
      a, ret = arrays['advantages'][b, t], arrays['returns'][b, t]
      old = fixed[b, t] if arrays['old_logp'] is None else arrays['old_logp'][b, t]
      rho = np.exp(x[b, t] - old)
      gain = min(rho * a, np.clip(rho, 1 - clip_low, 1 + clip_high) * a)
      note('clip_ratio/low', gain < rho * a and rho < 1 - clip_low)
      note('clip_ratio/high', gain < rho * a and rho > 1 + clip_high)
      if dual_clip and a < 0:
        gain = max(gain, dual_clip * a)
      weight = 1.0
      if sampler_correction != 'none':
        weight = min(np.exp(old - arrays['sampler_logp'][b, t]), correction_max)
      error = (v[b, t] - ret) ** 2
      beyond = error
      if value_clip is not None:
        before = arrays['old_values'][b, t]
        move = np.clip(v[b, t] - before, -value_clip, value_clip)
        beyond = (before + move - ret) ** 2
      parts['policy_loss'][-1].append(-weight * gain)
      parts['value_loss'][-1].append(max(error, beyond) / 2)
      rows[-1].append(
        -weight * gain + value_coef * max(error, beyond) / 2 - entropy_coef * h[b, t]
      )
      note('value_clip_ratio', beyond > error)
      note('importance_ratio', rho)
      note('approx_kl', rho - 1 - np.log(rho))
      note('values', v[b, t])
      note('returns', ret)
      note('value_error', error)
      note('entropy', h[b, t])

  def average(rows):
    flat = [term for row in rows for term in row]
    return {
      'token_mean': lambda: np.mean(flat),
      'sequence_mean': lambda: np.mean([np.mean(row) for row in rows if row]),
      'sequence_sum': lambda: np.mean([np.sum(row) for row in rows if row]),
      'constant': lambda: np.sum(flat) / (len(x) * max_completion_length),
    }[aggregate]()

  metrics = {name: np.mean(values) for name, values in seen.items()}
  return average(rows), metrics | {k: average(rows) for k, rows in parts.items()}


def batch_of(arrays, dtype):
  made = {k: None if x is None else jnp.asarray(x, dtype) for k, x in arrays.items()}
  return Batch(jnp.zeros(arrays['mask'].shape, jnp.int32), **made)


@functools.cache
def compiled(**setting):
  def value(scores, batch):
    mean, metrics = ppo.loss(Scores(*scores), batch, **setting)
    return mean.value, {name: m.value for name, m in metrics.items()}

  return jax.jit(jax.value_and_grad(value, has_aux=True))


def evaluate(scores, arrays, dtype=jnp.float64, **setting):
  """(value, gradients of log-probs, entropy and values, metrics) as NumPy."""
  with jax.enable_x64(dtype == jnp.float64):
    scores = tuple(jnp.asarray(x, dtype) for x in scores)
    out = compiled(**setting)(scores, batch_of(arrays, dtype))
    (value, metrics), slopes = jax.tree.map(np.asarray, out)
  return value, slopes, metrics


@pytest.mark.parametrize('old', [True, False], ids=['off_policy', 'on_policy'])
@pytest.mark.parametrize('name', SETTINGS)
def test_value_gradient_and_metrics_equal_the_loop(name, old):
  scores, arrays = draw(old=old)
  setting = SETTINGS[name]
  value, slopes, metrics = evaluate(scores, arrays, **setting)
  want, seen = by_loop(*scores, arrays, **setting)
  np.testing.assert_allclose(value, want, rtol=1e-12)
  for key, x in seen.items():
    # ρ − 1 − log ρ is a difference of numbers near 1.
    np.testing.assert_allclose(metrics[key], x, rtol=1e-12, atol=1e-15, err_msg=key)
  step = 1e-6  # an error of 1e-16 / 1e-6 and of the third derivative × 1e-12
  for which, slope in enumerate(slopes):
    for place in np.ndindex(slope.shape):
      ends = []
      for sign in (1, -1):
        moved = [x.copy() for x in scores]
        moved[which][place] += sign * step
        ends.append(by_loop(*moved, arrays, **setting, fixed=scores[0])[0])
      near = (ends[0] - ends[1]) / (2 * step)
      np.testing.assert_allclose(slope[place], near, atol=2e-9, err_msg=str(which))


def test_the_draws_reach_every_bound():
  scores, arrays = draw()
  metrics = evaluate(scores, arrays, **SETTINGS['tight'])[2]
  for key in ('clip_ratio/low', 'clip_ratio/high', 'value_clip_ratio'):
    assert 0 < metrics[key] < 1, key
  assert 0 < evaluate(scores, arrays, **SETTINGS['entropy'])[2]['clip_ratio/dual'] < 1


def test_the_policy_half_is_grpo_with_its_clip():
  scores, arrays = draw()
  value, slopes, _ = evaluate(scores, arrays, value_coef=0.0, clip_high=0.3)
  with jax.enable_x64():
    batch = batch_of(arrays, jnp.float64)

    def other(x):
      scored = Scores(x, jnp.asarray(scores[1]))
      return grpo.loss(scored, batch, clip_high=0.3)[0].value

    want, slope = jax.value_and_grad(other)(jnp.asarray(scores[0]))
  np.testing.assert_allclose(value, want, rtol=1e-12)
  np.testing.assert_allclose(slopes[0], slope, rtol=1e-12)
  assert not slopes[2].any()


def test_the_critic_does_not_depend_on_the_number_of_microbatches():
  """Neither does any other part: sums and counts add up, whatever the split."""
  scores, arrays = draw()

  def part(rows, name):
    cut = {k: x[rows] for k, x in arrays.items()}
    here = Scores(*(jnp.asarray(x[rows]) for x in scores))
    mean, metrics = ppo.loss(here, batch_of(cut, jnp.float64), **SETTINGS[name])
    return {'loss': mean, **metrics}

  with jax.enable_x64():
    for name in SETTINGS:
      whole = part(slice(None), name)
      parts = [
        part(slice(0, 1), name),
        part(slice(1, 4), name),
        part(slice(4, 5), name),
      ]
      for key, mean in whole.items():
        total = parts[0][key] + parts[1][key] + parts[2][key]
        np.testing.assert_allclose(total, mean, rtol=1e-12, atol=1e-14, err_msg=key)


@pytest.mark.parametrize('name', SETTINGS)
def test_nothing_at_a_masked_token_reaches_value_or_gradient(name):
  scores, arrays = draw()
  want, tame, _ = evaluate(scores, arrays, jnp.float32, **SETTINGS[name])
  pad = lambda x: np.pad(x, ((0, 0), (0, 4)))  # noqa: E731
  wild = {k: pad(x) for k, x in arrays.items()}
  off = wild['mask'] == 0
  rng = np.random.default_rng(1)
  filled = [pad(x) for x in scores]
  for x in (*filled, *(x for k, x in wild.items() if k != 'mask')):
    x[off] = rng.choice([np.nan, np.inf, -np.inf, 200.0, 3e38], off.sum())
  value, slopes, metrics = evaluate(filled, wild, jnp.float32, **SETTINGS[name])
  np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-9)
  for slope, before in zip(slopes, tame, strict=True):
    assert not slope[off].any()
    np.testing.assert_allclose(slope[:, :7], before, rtol=1e-6, atol=1e-9)
  assert np.isfinite([*metrics.values()]).all()


def test_returns_and_old_values_are_constants():
  """Else the critic would move its own targets."""
  scores, arrays = draw()
  with jax.enable_x64():
    batch = batch_of(arrays, jnp.float64)

    def value(returns, old_values, advantages):
      b = batch._replace(returns=returns, old_values=old_values, advantages=advantages)
      return ppo.loss(Scores(*map(jnp.asarray, scores)), b, value_clip=0.1)[0].value

    slopes = jax.grad(value, (0, 1, 2))(
      batch.returns, batch.old_values, batch.advantages
    )
  assert not any(np.any(x) for x in slopes)


@pytest.mark.parametrize(
  ('setting', 'message'),
  [
    (dict(clip_low=1.5), r'ppo: clip_low=1.5 must be in \[0, 1\]'),
    (dict(dual_clip=1.0), 'ppo: dual_clip=1.0 must be greater than 1'),
    (dict(value_clip=0.0), 'value_clip=0.0 must be above 0, or None'),
    (dict(value_coef=-0.1), 'value_coef=-0.1 must be at least 0'),
    (dict(entropy_coef=float('inf')), 'entropy_coef=inf must be finite'),
    (dict(aggregate='mean'), "aggregate='mean' is not one of"),
  ],
)
def test_bad_settings_are_one_clear_line(setting, message):
  with pytest.raises(ValueError, match=message):
    evaluate(*draw(), **setting)


@pytest.mark.parametrize(
  ('absent', 'message'),
  [
    ('returns', "set config.algorithm.name='ppo', which makes them"),
    ('old_values', 'value_clip=0.2 needs batch.old_values'),
    ('advantages', 'ppo: batch.advantages is None'),
  ],
)
def test_a_batch_without_what_it_needs_is_refused(absent, message):
  scores, arrays = draw()
  with pytest.raises(ValueError, match=message):
    evaluate(scores, {**arrays, absent: None})


def test_a_model_without_a_value_head_is_refused():
  (logp, entropy, _), arrays = draw()
  with pytest.raises(ValueError, match=r'no value head: add a section config.value'):
    ppo.loss(
      Scores(jnp.asarray(logp), jnp.asarray(entropy)), batch_of(arrays, jnp.float32)
    )
