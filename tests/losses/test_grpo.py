"""grpo.loss against a float64 loop written from the equations, value and gradient."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.losses import grpo
from educe.types import Batch, Scores

PRESETS = {
  'grpo': dict(
    kl_coef=0.04, kl_estimator='k3', kl_gradient='naive', aggregate='sequence_mean'
  ),
  'dr_grpo': dict(aggregate='constant', max_completion_length=9),
  'dapo': dict(clip_high=0.28),
  'gspo': dict(
    importance='sequence', clip_low=0.05, clip_high=0.1, aggregate='sequence_mean'
  ),
  'gspo_tokens': dict(importance='sequence', aggregate='token_mean', dual_clip=1.1),
  'cispo': dict(objective='cispo', clip_low=1.0, clip_high=0.3),
  'cispo_two_sided': dict(objective='cispo', importance='sequence', clip_low=0.05),
  'sapo': dict(objective='sapo', aggregate='sequence_mean'),
  'sapo_far': dict(objective='sapo', tau_pos=3.0, tau_neg=5.0),
  'reinforce': dict(objective='reinforce', aggregate='sequence_sum'),
  'dual_clip': dict(dual_clip=1.5),
  'entropy': dict(entropy_coef=0.01),
  'k1_naive': dict(kl_coef=0.5, kl_estimator='k1', kl_gradient='naive'),
  'k2_naive': dict(kl_coef=0.5, kl_estimator='k2', kl_gradient='naive'),
  'k1_unbiased': dict(kl_coef=0.5, kl_estimator='k1'),
  'k2_unbiased': dict(kl_coef=0.5, kl_estimator='k2'),
  'k3_unbiased': dict(kl_coef=0.5, kl_estimator='k3'),
  'token_truncate': dict(
    sampler_correction='token_truncate', correction_max=1.2, kl_coef=0.5
  ),
  'token_mask': dict(
    sampler_correction='token_mask', correction_min=0.8, correction_max=1.2
  ),
  'sequence_truncate': dict(sampler_correction='sequence_truncate', correction_max=1.1),
  'sequence_mask': dict(
    sampler_correction='sequence_mask', correction_min=0.7, entropy_coef=0.1
  ),
}


def draw(rows=6, length=7, seed=0, old=True):
  """Rows 0–3 have signs both ways, row 4 nothing to train on, row 5 advantage 0."""
  rng = np.random.default_rng(seed)
  mask = (rng.random((rows, length)) < 0.7) * 1.0
  mask[:, 0], mask[4], mask[5, 1] = 0, 0, 1
  advantages = np.array([1.3, -0.8, 0.4, -1.7, 2.0, 0.0])[:, None] * np.ones(length)
  advantages[2, 4:] *= -1  # token-level advantages are allowed
  logp = -rng.gamma(2.0, 0.7, (rows, length))
  near = lambda s: logp + s * rng.normal(size=logp.shape)  # noqa: E731
  arrays = {
    'mask': mask,
    'advantages': advantages,
    'old_logp': near(0.4) if old else None,
    'ref_logp': near(0.6),
    'sampler_logp': near(0.2),
  }
  return logp, rng.gamma(2.0, 0.5, (rows, length)), arrays


def batch_of(arrays, dtype=jnp.float64):
  tokens = jnp.zeros(arrays['mask'].shape, jnp.int32)
  made = {k: None if v is None else jnp.asarray(v, dtype) for k, v in arrays.items()}
  return Batch(tokens, **made)


def by_loop(x, entropy, arrays, fixed, **setting):
  """(loss, metrics). `fixed` stands for x wherever the equation has a stop-gradient."""
  s = {k: p.default for k, p in grpo_signature().items()} | setting
  lo, hi = 1 - s['clip_low'], 1 + s['clip_high']
  sequence = s['importance'] == 'sequence'
  seen = {'clip_ratio/low': [], 'clip_ratio/high': [], 'clip_ratio/dual': []}
  seen |= {'kl': [], 'entropy': [], 'importance_ratio': []}
  rows = []
  for b in range(len(x)):
    tokens = [t for t in range(x.shape[1]) if arrays['mask'][b, t]]
    rows.append([])
    if not tokens:
      continue
    old = fixed[b] if arrays['old_logp'] is None else arrays['old_logp'][b]
    product = np.exp(sum(old[t] - arrays['sampler_logp'][b, t] for t in tokens))

    def ratio(lp, t, old=old, b=b, tokens=tokens):
      if sequence:
        return np.exp(sum(lp[b, u] - old[u] for u in tokens) / len(tokens))
      return np.exp(lp[b, t] - old[t])

    for t in tokens:
      a, rho, rho_fixed = arrays['advantages'][b, t], ratio(x, t), ratio(fixed, t)
      low = high = dual = False
      if s['objective'] == 'clip':
        gain = min(rho * a, np.clip(rho, lo, hi) * a)
        low, high = gain < rho * a and rho < lo, gain < rho * a and rho > hi
        if s['dual_clip'] and a < 0 and gain < s['dual_clip'] * a:
          gain, dual = s['dual_clip'] * a, True
      elif s['objective'] == 'cispo':
        gain = np.clip(rho_fixed, lo, hi) * a * x[b, t]
        low, high = rho < lo, rho > hi
      elif s['objective'] == 'sapo':
        tau = s['tau_pos'] if a > 0 else s['tau_neg']
        gain = 4 / tau / (1 + np.exp(-tau * (rho - 1))) * a
      else:
        gain = a * x[b, t]
      how = s['sampler_correction']
      w = product
      if not how.startswith('sequence'):
        w = np.exp(old[t] - arrays['sampler_logp'][b, t])
      inside = s['correction_min'] <= w <= s['correction_max']
      if how.endswith('truncate'):
        w = np.clip(w, s['correction_min'], s['correction_max'])
      elif how.endswith('mask'):
        w = w if inside else 0.0
      else:
        w = 1.0
      k = estimate(x[b, t] - arrays['ref_logp'][b, t], s['kl_estimator'])
      seen['kl'].append(k)
      if s['kl_gradient'] == 'unbiased':
        d = fixed[b, t] - arrays['ref_logp'][b, t]
        behind = np.exp(fixed[b, t] - old[t])
        k = behind * estimate(d, s['kl_estimator'])
        k += behind * d * (x[b, t] - fixed[b, t])
      term = -w * gain + s['kl_coef'] * k - s['entropy_coef'] * entropy[b, t]
      rows[-1].append(term)
      for name, value in (
        ('clip_ratio/low', low),
        ('clip_ratio/high', high),
        ('clip_ratio/dual', dual),
        ('entropy', entropy[b, t]),
        ('importance_ratio', np.exp(x[b, t] - old[t])),
      ):
        seen[name].append(value)
  flat = [term for row in rows for term in row]
  value = {
    'token_mean': lambda: np.mean(flat),
    'sequence_mean': lambda: np.mean([np.mean(row) for row in rows if row]),
    'sequence_sum': lambda: np.mean([np.sum(row) for row in rows if row]),
    'constant': lambda: np.sum(flat) / (len(x) * s['max_completion_length']),
  }[s['aggregate']]()
  return value, {name: np.mean(values) for name, values in seen.items()}


def estimate(d, estimator):
  return {'k1': d, 'k2': d * d / 2, 'k3': np.exp(-d) - 1 + d}[estimator]


def grpo_signature():
  return {
    k: p
    for k, p in inspect.signature(grpo.loss).parameters.items()
    if p.kind is p.KEYWORD_ONLY
  }


@functools.cache
def compiled(dtype, **setting):
  """One compilation for every test that asks for the same thing."""

  def value(x, h, batch):
    mean, metrics = grpo.loss(Scores(x, h), batch, **setting)
    return mean.value, {k: m.value for k, m in metrics.items()}

  return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)


def evaluate(logp, entropy, arrays, dtype=jnp.float64, **setting):
  """(value, gradient of log-probs, gradient of entropy, metrics) as NumPy."""
  with jax.enable_x64(dtype == jnp.float64):
    x, h = jnp.asarray(logp, dtype), jnp.asarray(entropy, dtype)
    out = compiled(dtype, **setting)(x, h, batch_of(arrays, dtype))
    (value, metrics), (by_logp, by_entropy) = jax.tree.map(np.asarray, out)
  return value, by_logp, by_entropy, metrics


def slopes(f, x, h=1e-6):
  """Central differences, one element at a time."""
  out = np.zeros_like(x)
  for place in np.ndindex(x.shape):
    step = np.zeros_like(x)
    step[place] = h
    out[place] = (f(x + step) - f(x - step)) / (2 * h)
  return out


@pytest.mark.parametrize('old', [True, False], ids=['off_policy', 'on_policy'])
@pytest.mark.parametrize('name', PRESETS)
def test_value_gradient_and_metrics_equal_the_loop(name, old):
  logp, entropy, arrays = draw(old=old)
  setting = PRESETS[name]
  value, by_logp, by_entropy, metrics = evaluate(logp, entropy, arrays, **setting)
  want, seen = by_loop(logp, entropy, arrays, logp, **setting)
  np.testing.assert_allclose(value, want, rtol=1e-12)
  for key in seen.keys() & metrics.keys():
    np.testing.assert_allclose(metrics[key], seen[key], rtol=1e-12, err_msg=key)
  want = slopes(lambda x: by_loop(x, entropy, arrays, logp, **setting)[0], logp)
  # Differences of 1e-6: an error of 1e-16 / 1e-6 and of the third derivative × 1e-12.
  np.testing.assert_allclose(by_logp, want, atol=2e-9)
  want = slopes(lambda h: by_loop(logp, h, arrays, logp, **setting)[0], entropy)
  np.testing.assert_allclose(by_entropy, want, atol=2e-9)


def test_the_presets_really_reach_every_bound():
  logp, entropy, arrays = draw()
  for name, keys in (
    ('grpo', ['low', 'high']),
    ('gspo', ['low', 'high']),
    ('cispo', ['high']),
    ('cispo_two_sided', ['low', 'high']),
    ('dual_clip', ['dual']),
    ('gspo_tokens', ['dual']),
  ):
    metrics = evaluate(logp, entropy, arrays, **PRESETS[name])[3]
    for key in keys:
      assert 0 < metrics[f'clip_ratio/{key}'] < 1, (name, key)
  for name in ('token_truncate', 'token_mask', 'sequence_truncate', 'sequence_mask'):
    metrics = evaluate(logp, entropy, arrays, **PRESETS[name])[3]
    assert 0 < metrics['sampling/corrected'] < 1, name


@pytest.mark.parametrize('name', PRESETS)
def test_any_split_of_the_rows_gives_the_same_sums_and_counts(name):
  logp, entropy, arrays = draw()

  def part(rows):
    cut = {k: v[rows] for k, v in arrays.items()}
    scores = Scores(jnp.asarray(logp[rows]), jnp.asarray(entropy[rows]))
    mean, metrics = grpo.loss(scores, batch_of(cut), **PRESETS[name])
    return {'loss': mean, **metrics}

  with jax.enable_x64():
    whole = part(slice(None))
    parts = [part(slice(0, 1)), part(slice(1, 4)), part(slice(4, 6))]
    for key, mean in whole.items():
      total = parts[0][key] + parts[1][key] + parts[2][key]
      np.testing.assert_allclose(total, mean, rtol=1e-12, atol=1e-14, err_msg=key)


WILD = [np.nan, np.inf, -np.inf, 200.0, -200.0, 3e38]


@pytest.mark.parametrize('old', [True, False], ids=['off_policy', 'on_policy'])
@pytest.mark.parametrize('name', PRESETS)
def test_nothing_at_a_masked_token_reaches_value_or_gradient(name, old):
  """Right padding and prompt columns, filled with what overflows an exp."""
  logp, entropy, arrays = draw(old=old)
  tame = evaluate(logp, entropy, arrays, jnp.float32, **PRESETS[name])
  arrays = {
    k: v if v is None else np.pad(v, ((0, 0), (0, 6))) for k, v in arrays.items()
  }
  logp, entropy = (np.pad(v, ((0, 0), (0, 6))) for v in (logp, entropy))
  off = arrays['mask'] == 0
  rng = np.random.default_rng(1)
  for x in (logp, entropy, *arrays.values()):
    if x is not None and x is not arrays['mask']:
      x[off] = rng.choice(WILD, off.sum())
  wild = evaluate(logp, entropy, arrays, jnp.float32, **PRESETS[name])
  for gradient, before in zip(wild[1:3], tame[1:3], strict=True):
    assert (gradient[off] == 0).all()
    np.testing.assert_allclose(gradient[:, :7], before, rtol=1e-6, atol=1e-9)
  for key, value in tame[3].items():
    np.testing.assert_allclose(wild[3][key], value, rtol=1e-6, err_msg=key)
  np.testing.assert_allclose(wild[0], tame[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('name', PRESETS)
@pytest.mark.parametrize('d', [-200.0, 200.0])
def test_an_overflowing_ratio_at_a_trained_token_stays_finite(name, d):
  logp, entropy, arrays = draw()
  for key in ('old_logp', 'ref_logp', 'sampler_logp'):
    arrays[key][0] = logp[0] - d
    arrays[key][1] = logp[1] + d
  value, by_logp, _, _ = evaluate(logp, entropy, arrays, jnp.float32, **PRESETS[name])
  assert np.isfinite(value)
  assert np.isfinite(by_logp).all()


@pytest.mark.parametrize('name', PRESETS)
def test_no_old_log_probs_means_on_policy(name):
  logp, entropy, arrays = draw(old=False)
  absent = evaluate(logp, entropy, arrays, **PRESETS[name])
  arrays['old_logp'] = logp
  given = evaluate(logp, entropy, arrays, **PRESETS[name])
  for a, b in zip(jax.tree.leaves(absent), jax.tree.leaves(given), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12)
  assert absent[3]['importance_ratio'] == 1
  second_step = evaluate(logp + 0.01, entropy, arrays, **PRESETS[name])
  np.testing.assert_allclose(second_step[3]['importance_ratio'], np.exp(0.01))


@pytest.mark.parametrize(
  ('objective', 'importance'),
  [
    (o, i) for o in grpo.OBJECTIVES for i in grpo.IMPORTANCE
    if (o, i) != ('reinforce', 'sequence')  # it has no ratio, and is refused
  ],
)  # fmt: skip
def test_on_policy_every_objective_is_the_policy_gradient(objective, importance):
  """−A·∇log π, token by token; a sequence's ratio spreads A over its tokens alike."""
  logp, entropy, arrays = draw(old=False)
  arrays['advantages'] = arrays['advantages'][:, :1] * np.ones(logp.shape)
  got = evaluate(logp, entropy, arrays, objective=objective, importance=importance)[1]
  want = -arrays['advantages'] * arrays['mask'] / arrays['mask'].sum()
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_ratio_on_the_bound_keeps_its_gradient():
  logp, entropy, arrays = draw(old=False)
  open_ = evaluate(logp, entropy, arrays)[1]
  shut = evaluate(logp, entropy, arrays, clip_low=0.0, clip_high=0.0)[1]
  np.testing.assert_allclose(shut, open_, rtol=1e-12)


def test_the_clip_share_counts_only_where_the_minimum_is_the_clipped_one():
  ratios = np.array([[1, 0.5, 1.5, 1.0, 0.5, 1.5, 1.5]])
  arrays = {
    'mask': np.array([[0.0, 1, 1, 1, 1, 1, 1]]),
    'advantages': np.array([[1.0, 1, 1, 1, -1, -1, 0]]),
    'old_logp': -np.log(ratios),
  }
  zeros = np.zeros((1, 7))
  metrics = evaluate(zeros, zeros, arrays)[3]
  # Low: 0.5 at A = −1. High: 1.5 at A = 1. The other three lie outside for nothing.
  assert metrics['clip_ratio/low'] == metrics['clip_ratio/high'] == 1 / 6


def test_the_sampler_weight_is_on_the_policy_gradient_alone():
  logp, entropy, arrays = draw()
  shut = dict(sampler_correction='token_mask', correction_min=50.0, correction_max=60.0)
  rest = dict(kl_coef=0.3, entropy_coef=0.2)
  masked = evaluate(logp, entropy, arrays, **shut, **rest)
  arrays['advantages'] = np.zeros_like(logp)
  without = evaluate(logp, entropy, arrays, **rest)
  for a, b in zip(masked[:3], without[:3], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12)
  assert np.abs(masked[1]).max() > 0.001


def test_kl_is_reported_three_ways_and_by_the_chosen_name():
  logp, entropy, arrays = draw()
  metrics = evaluate(logp, entropy, arrays, kl_estimator='k2')[3]
  assert metrics['kl'] == metrics['kl/k2']
  assert len({float(metrics[f'kl/{k}']) for k in ('k1', 'k2', 'k3')}) == 3
  without = evaluate(logp, entropy, {**arrays, 'ref_logp': None})[3]
  assert not [key for key in without if key.startswith('kl')]


def test_a_row_of_padding_dilutes_only_the_constant():
  logp, entropy, arrays = draw()
  for how in ('token_mean', 'sequence_mean', 'sequence_sum', 'constant'):
    setting = dict(aggregate=how, max_completion_length=9)
    whole = evaluate(logp, entropy, arrays, **setting)[0]
    keep = [0, 1, 2, 3, 5]
    cut = {k: v[keep] for k, v in arrays.items()}
    without = evaluate(logp[keep], entropy[keep], cut, **setting)[0]
    ratio = 5 / 6 if how == 'constant' else 1
    np.testing.assert_allclose(whole, without * ratio, rtol=1e-12)


@pytest.mark.parametrize(
  ('setting', 'message'),
  [
    (dict(importance='row'), "importance='row' is not one of"),
    (dict(objective='ppo'), "objective='ppo' is not one of"),
    (dict(sampler_correction='tis'), "sampler_correction='tis' is not one of"),
    (dict(kl_estimator='k4'), "kl_estimator='k4' is not one of"),
    (dict(kl_gradient='biased'), "kl_gradient='biased' is not one of"),
    (dict(aggregate='mean'), "aggregate='mean' is not one of"),
    (dict(aggregate='constant'), 'max_completion_length=None: give the longest'),
    (dict(clip_low=1.5), r'clip_low=1.5 must be in \[0, 1\]'),
    (dict(clip_high=-0.1), 'clip_high=-0.1 must not be negative'),
    (dict(dual_clip=1.0), 'dual_clip=1.0 must be greater than 1'),
    (
      dict(dual_clip=3.0, objective='sapo'),
      "dual_clip=3.0 belongs to objective='clip'",
    ),
    (
      dict(objective='reinforce', importance='sequence'),
      "importance='sequence': objective='reinforce' has no ratio",
    ),
    (dict(tau_neg=0.0), 'tau_neg=0.0 must be positive'),
    (dict(kl_coef=-1.0), 'kl_coef=-1.0 must not be negative'),
    (dict(correction_min=3.0), 'correction_min=3.0 and correction_max=2.0'),
    (dict(entropy_coef=float('nan')), 'entropy_coef=nan must be finite'),
  ],
)
def test_bad_settings_are_one_clear_line(setting, message):
  logp, entropy, arrays = draw()
  with pytest.raises(ValueError, match=message):
    evaluate(logp, entropy, arrays, **setting)


@pytest.mark.parametrize(
  ('absent', 'setting', 'message'),
  [
    ('ref_logp', dict(kl_coef=0.1), 'kl_coef=0.1 needs log-probs of a reference'),
    ('sampler_logp', dict(sampler_correction='token_mask'), "needs the sampler's"),
    ('advantages', {}, 'batch.advantages is None'),
  ],
)
def test_a_batch_without_what_a_setting_needs_is_refused(absent, setting, message):
  logp, entropy, arrays = draw()
  with pytest.raises(ValueError, match=message):
    evaluate(logp, entropy, {**arrays, absent: None}, **setting)


def test_packed_rows_are_refused():
  logp, entropy, arrays = draw()
  with pytest.raises(ValueError, match='one sequence a row'):
    evaluate(logp, entropy, {**arrays, 'segments': np.ones_like(logp)})
