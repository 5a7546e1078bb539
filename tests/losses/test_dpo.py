"""dpo.loss against a float64 loop written from the equations, value and gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe import config
from educe.losses import dpo
from educe.types import Batch, Scores

PRESETS = {
  'sigmoid': dict(),
  'cdpo': dict(label_smoothing=0.1),
  'odpo': dict(margin_coef=0.4, beta=0.3),
  'js': dict(f_divergence='js', beta=0.7),
  'forward_kl': dict(f_divergence='forward_kl', beta=0.2),
  'alpha': dict(f_divergence='alpha', f_alpha=0.3, beta=0.2),
  'ld': dict(ld_alpha=0.4),
  'ld_js': dict(ld_alpha=0.0, f_divergence='js'),
  'wpo': dict(use_weighting=True),
  'hinge': dict(variant='hinge'),
  'hinge_margin': dict(variant='hinge', margin_coef=0.5, f_divergence='js'),
  'ipo': dict(variant='ipo', beta=0.4),
  'ipo_normalised': dict(variant='ipo', length_normalised=True),
  'robust': dict(variant='robust', label_smoothing=0.2),
  'exo_pair': dict(variant='exo_pair', label_smoothing=0.01),
  'nca_pair': dict(variant='nca_pair'),
  'bco_pair': dict(variant='bco_pair', beta=0.8),
  'sppo_hard': dict(variant='sppo_hard', beta=0.5),
  'aot': dict(variant='aot', label_smoothing=0.1, beta=0.6),
  'aot_unpaired': dict(variant='aot_unpaired', beta=0.6),
  'apo_zero': dict(variant='apo_zero', ld_alpha=0.5),
  'apo_down': dict(variant='apo_down', length_normalised=True, beta=2.0),
  'discopop': dict(variant='discopop', beta=0.05),
  'discopop_tau': dict(variant='discopop', discopop_tau=0.7, f_divergence='forward_kl'),
  'sigmoid_norm': dict(variant='sigmoid_norm', beta=5.0, margin_coef=0.2),
  'orpo': dict(variant='orpo', use_weighting=True),
  'simpo': dict(variant='simpo', beta=2.5, gamma=1.375, label_smoothing=0.05),
  'cpo': dict(variant='cpo', nll_coef=0.7, ld_alpha=0.3),
  'slic': dict(variant='slic', gamma=3.0, nll_coef=0.5),
  'sft': dict(variant='sft'),
  'mpo': dict(variant={'sigmoid': 0.8, 'bco_pair': 0.2, 'sft': 1.0}),
  'mixed': dict(
    # Each setting is read by one of them alone, and must not reach the others.
    variant={'sft': 0.1, 'aot': 0.3, 'ipo': 0.2, 'aot_unpaired': 0.5, 'sigmoid': 2.0},
    f_divergence='js',
    label_smoothing=0.1,
    ld_alpha=0.5,
    margin_coef=0.3,
    use_weighting=True,
  ),
  'mixed_normalised': dict(
    variant={'sigmoid_norm': 1.0, 'ipo': 0.01, 'aot': 1.0}, length_normalised=True
  ),
  'kto': dict(variant='kto', desirable_weight=1.3, undesirable_weight=0.6, beta=0.5),
  'apo_zero_unpaired': dict(variant='apo_zero_unpaired', undesirable_weight=2.0),
  'kto_apo': dict(variant={'kto': 0.7, 'apo_zero_unpaired': 0.5}),
}
UNPAIRED = ('kto', 'apo_zero_unpaired', 'kto_apo')
COUPLED = ('aot', 'aot_unpaired', 'bco_pair', 'mpo', 'mixed', 'mixed_normalised')
UNCOUPLED = [n for n in PRESETS if n not in (*COUPLED, 'kto', 'kto_apo')]


def draw(preset, pairs=6, length=7, seed=0):
  """Pairs of unlike lengths. Pair 3 is empty, and pair 4 has an empty rejected one."""
  rng = np.random.default_rng(seed)
  rows = 2 * pairs
  mask = (np.arange(length) < rng.integers(2, length + 1, (rows, 1))) * 1.0
  mask[0, 2] = 0.0  # what a tool said, in the middle of a completion
  mask[:, 0], mask[6:8], mask[9] = 0, 0, 0
  logp = -rng.gamma(2.0, 0.7, (rows, length))
  labels = rng.integers(1, 6, rows) * 1.0
  if preset in UNPAIRED:
    labels[::2], labels[1::2] = [1, 0, 0, 1, 1, 0], np.nan
  ref_logp = logp - 0.3 + 0.8 * rng.normal(size=logp.shape)
  if preset in ('orpo', 'simpo', 'cpo', 'slic', 'sft'):
    ref_logp = None
  entropy = rng.gamma(2.0, 0.5, logp.shape)
  return logp, entropy, dict(mask=mask, labels=labels, ref_logp=ref_logp)


def batch_of(arrays, dtype=jnp.float64):
  tokens = jnp.zeros(arrays['mask'].shape, jnp.int32)
  made = {k: None if v is None else jnp.asarray(v, dtype) for k, v in arrays.items()}
  return Batch(tokens, **made)


DEFAULTS = dict(
  variant='sigmoid', beta=0.1, label_smoothing=0.0, f_divergence='reverse_kl',
  f_alpha=0.5, length_normalised=False, ld_alpha=1.0, margin_coef=0.0,
  use_weighting=False, gamma=0.0, nll_coef=1.0, discopop_tau=0.05, desirable_weight=1.0,
  undesirable_weight=1.0,
)  # fmt: skip


def sigma(z):
  return 1 / (1 + math.exp(-z))


def smooth(z, e=0.0):
  return -(1 - e) * math.log(sigma(z)) - e * math.log(sigma(-z))


def by_loop(x, entropy, arrays, fixed, **setting):
  """The loss. `fixed` stands for x wherever the equation has a stop-gradient."""
  s = DEFAULTS | setting
  beta, e = s['beta'], s['label_smoothing']
  mixture = s['variant'] if isinstance(s['variant'], dict) else {s['variant']: 1.0}
  mask, ref, labels = arrays['mask'], arrays['ref_logp'], arrays['labels']
  if ref is None:
    ref = np.full_like(x, np.nan)  # whatever reads it shows
  tokens = [[t for t in range(x.shape[1]) if row[t]] for row in mask]

  def added(lp, b, tail=1.0):
    """Σ_t of a row; what lies past the shorter one of its pair counts `tail` times."""
    shorter = min(len(tokens[b]), len(tokens[b ^ 1]))
    return sum(lp[b, t] * (1 if i < shorter else tail) for i, t in enumerate(tokens[b]))

  if mixture.keys() & {'kto', 'apo_zero_unpaired'}:
    terms = []
    other = [b for b in range(1, len(x), 2) if tokens[b]]
    z0 = max(0.0, np.mean([added(fixed, b) - added(ref, b) for b in other]))
    for b in range(0, len(x), 2):
      if not tokens[b]:
        continue
      h, term = added(x, b) - added(ref, b), 0.0
      for name, weight in mixture.items():
        base = z0 if name == 'kto' else 0.0
        if labels[b] == 1:
          term += weight * s['desirable_weight'] * (1 - sigma(beta * (h - base)))
        else:
          term += weight * s['undesirable_weight'] * (1 - sigma(beta * (base - h)))
      terms.append(term)
    return np.mean(terms)

  pairs = [b for b in range(0, len(x), 2) if tokens[b] and tokens[b + 1]]
  on_sums = set(dpo.REFERENCE) - {'sigmoid_norm', 'aot', 'aot_unpaired'}

  def h_of(lp, b, name):
    tail = s['ld_alpha'] if name in on_sums else 1.0
    h = added(lp, b, tail) - added(ref, b, tail)
    if name == 'sigmoid_norm' or (s['length_normalised'] and name in on_sums):
      h /= len(tokens[b])
    if name in ('sigmoid', 'hinge', 'robust', 'exo_pair', 'discopop'):
      u, a = math.exp(h), s['f_alpha']
      return {
        'reverse_kl': math.log(u),
        'forward_kl': -1 / u,
        'js': math.log(2 * u / (1 + u)),
        'alpha': (1 - u**-a) / a,
      }[s['f_divergence']]
    return h

  def weight_of(b):
    n = len(tokens[b])
    return math.exp(sum(fixed[b, t] + entropy[b, t] for t in tokens[b]) / n)

  total = 0.0
  for name, weight in mixture.items():
    delta = np.mean([beta * h_of(fixed, b + i, 'ipo') for b in pairs for i in (0, 1)])
    ranked = {
      'aot': sorted(added(ref, b) - added(ref, b + 1) for b in pairs),
      'aot_unpaired': sorted(pairs, key=lambda b: h_of(fixed, b + 1, 'aot')),
    }
    for b in pairs:
      w, l = b, b + 1  # noqa: E741
      h_w, h_l = h_of(x, w, name), h_of(x, l, name)
      z = beta * (h_w - h_l)
      offset = s['margin_coef'] * (labels[w] - labels[l])
      mean_w, mean_l = (added(x, r) / len(tokens[r]) for r in (w, l))
      ld_margin = added(x, w, s['ld_alpha']) - added(x, l, s['ld_alpha'])
      if name in ('sigmoid', 'sigmoid_norm'):
        value = smooth(z - offset, e)
      elif name == 'hinge':
        value = max(0.0, 1 + offset - z)
      elif name == 'ipo':
        value = (h_w - h_l - 1 / (2 * beta)) ** 2
      elif name == 'robust':
        value = ((1 - e) * smooth(z) - e * smooth(-z)) / (1 - 2 * e)
      elif name == 'exo_pair':
        q = sigma(z)
        value = q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)
      elif name == 'discopop':
        m = sigma(z / s['discopop_tau'])
        value = (1 - m) * smooth(z) + m * math.exp(-z)
      elif name == 'sppo_hard':
        value = (h_w - 0.5 / beta) ** 2 + (h_l + 0.5 / beta) ** 2
      elif name == 'nca_pair':
        a, b_ = beta * h_w, beta * h_l
        value = smooth(a) + 0.5 * smooth(-a) + 0.5 * smooth(-b_)
      elif name == 'bco_pair':
        value = smooth(beta * h_w - delta) + smooth(-(beta * h_l - delta))
      elif name == 'apo_zero':
        value = 1 - sigma(beta * h_w) + sigma(beta * h_l)
      elif name == 'apo_down':
        value = sigma(beta * h_w) + 1 - sigma(z)
      elif name == 'aot':
        order = sorted(pairs, key=lambda p: added(fixed, p) - added(fixed, p + 1))
        u = added(x, w) - added(x, l)
        value = smooth(beta * (u - ranked[name][order.index(b)]), e)
      elif name == 'aot_unpaired':
        order = sorted(pairs, key=lambda p: h_of(fixed, p, 'aot'))
        v = h_of(x, ranked[name][order.index(b)] + 1, 'aot')
        value = smooth(beta * (h_w - v), e)
      elif name == 'orpo':
        odds_w, odds_l = (math.exp(m) / (1 - math.exp(m)) for m in (mean_w, mean_l))
        value = -mean_w + beta * smooth(math.log(odds_w / odds_l))
      elif name == 'simpo':
        value = smooth(beta * (mean_w - mean_l) - s['gamma'], e)
      elif name == 'cpo':
        value = smooth(beta * ld_margin, e) - s['nll_coef'] * mean_w
      elif name == 'slic':
        value = max(0.0, s['gamma'] - ld_margin) - s['nll_coef'] * mean_w
      elif name == 'sft':
        value = -mean_w
      if s['use_weighting'] and name not in ('aot', 'aot_unpaired', 'sft'):
        value *= weight_of(w) * weight_of(l)
      total += weight * value / len(pairs)
  return total


def frozen(setting):
  mixture = setting.get('variant')
  if isinstance(mixture, dict):
    setting = setting | {'variant': tuple(mixture.items())}
  return tuple(setting.items())


@functools.cache
def compiled(setting):
  """One function for every test that asks for the same thing."""
  setting = dict(setting)
  if isinstance(setting.get('variant'), tuple):
    setting['variant'] = dict(setting['variant'])

  def value(x, h, batch):
    mean, metrics = dpo.loss(Scores(x, h), batch, **setting)
    return mean.value, {k: m.value for k, m in metrics.items()}

  return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)


def evaluate(logp, entropy, arrays, dtype=jnp.float64, **setting):
  """(value, gradient of log-probs, gradient of entropy, metrics) as NumPy."""
  with jax.enable_x64(dtype == jnp.float64):
    x, h = jnp.asarray(logp, dtype), jnp.asarray(entropy, dtype)
    out = compiled(frozen(setting))(x, h, batch_of(arrays, dtype))
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


def test_every_variant_is_here():
  named = [PRESETS[n].get('variant', 'sigmoid') for n in PRESETS]
  assert {n for n in named if isinstance(n, str)} == set(dpo.VARIANTS)
  assert len(dpo.VARIANTS) == 21
  assert {*dpo.COUPLED} < {*dpo.VARIANTS}


@pytest.mark.parametrize('name', PRESETS)
def test_value_and_gradient_equal_the_loop(name):
  logp, entropy, arrays = draw(name)
  setting = PRESETS[name]
  value, by_logp, by_entropy, _ = evaluate(logp, entropy, arrays, **setting)
  want = by_loop(logp, entropy, arrays, logp, **setting)
  np.testing.assert_allclose(value, want, rtol=1e-12)
  want = slopes(lambda x: by_loop(x, entropy, arrays, logp, **setting), logp)
  assert np.abs(want).max() > 1e-3
  # Differences of 1e-6: 1e-16 of the value / 1e-6, and of the third derivative × 1e-12.
  np.testing.assert_allclose(by_logp, want, rtol=1e-8, atol=1e-8)
  assert (by_entropy == 0).all()  # a weight is held constant


@pytest.mark.parametrize('name', PRESETS)
def test_float32_is_float64_rounded(name):
  logp, entropy, arrays = draw(name)
  wide = evaluate(logp, entropy, arrays, **PRESETS[name])
  narrow = evaluate(logp, entropy, arrays, jnp.float32, **PRESETS[name])
  assert narrow[0].dtype == narrow[1].dtype == np.float32
  # 6e-8 of a number, times the few dozen roundings of sums and an exponential.
  np.testing.assert_allclose(narrow[0], wide[0], rtol=5e-6)
  np.testing.assert_allclose(narrow[1], wide[1], rtol=1e-5, atol=2e-6)
  for key, value in wide[3].items():
    np.testing.assert_allclose(narrow[3][key], value, rtol=5e-6, atol=2e-6, err_msg=key)


LN2 = np.float32(np.log(2))
AT_THE_REFERENCE = {
  'sigmoid': (LN2, {}),
  'hinge': (1, {}),
  'ipo': (25, {}),  # 1/(2β)², β = 0.1
  'robust': (LN2, dict(label_smoothing=0.2)),
  'exo_pair': (
    np.log(0.5 / 0.9) / 2 + np.log(0.5 / 0.1) / 2,
    dict(label_smoothing=0.1),
  ),
  'nca_pair': (2 * LN2, {}),
  'bco_pair': (2 * LN2, {}),
  'sppo_hard': (50, {}),  # 2·1/(2β)²
  'aot': (LN2, {}),
  'aot_unpaired': (LN2, {}),
  'apo_zero': (1, {}),
  'apo_down': (1, {}),
  'discopop': (LN2 / 2 + 0.5, {}),
  'sigmoid_norm': (LN2, {}),
  'kto': (0.5, {}),
  'apo_zero_unpaired': (0.5, {}),
}


@pytest.mark.parametrize('variant', AT_THE_REFERENCE)
def test_a_policy_that_is_its_reference_costs_a_known_constant(variant):
  logp, entropy, arrays = draw('kto' if variant in UNPAIRED else 'sigmoid')
  arrays['ref_logp'] = logp
  want, setting = AT_THE_REFERENCE[variant]
  value, _, _, metrics = evaluate(
    logp, entropy, arrays, jnp.float32, variant=variant, **setting
  )
  # Four pairs: sums of equal numbers are exact, and so is the division.
  # What is left are two roundings inside a pair's own formula.
  assert abs(value - np.float32(want)) <= 2 * np.spacing(np.float32(want))
  assert metrics['rewards/chosen'] == metrics['rewards/rejected'] == 0
  if variant in UNPAIRED:
    assert metrics.get('kl', 0) == 0
  else:
    assert metrics['rewards/margins'] == metrics['rewards/accuracies'] == 0


@pytest.mark.parametrize('f_divergence', ['reverse_kl', 'forward_kl', 'js', 'alpha'])
def test_dpo_at_step_0_is_ln_2_exactly(f_divergence):
  logp, entropy, arrays = draw('sigmoid')
  arrays['ref_logp'] = logp
  setting = dict(f_divergence=f_divergence)
  value, _, _, metrics = evaluate(logp, entropy, arrays, jnp.float32, **setting)
  assert value == LN2
  assert metrics['rewards/margins'] == 0


def swapped(x):
  pairs = x.reshape(-1, 2, *x.shape[1:])
  return pairs[:, ::-1].reshape(x.shape)


@pytest.mark.parametrize('name', [n for n in PRESETS if n not in (*UNPAIRED, 'sft')])
def test_swapping_the_pairs_flips_the_margins(name):
  logp, entropy, arrays = draw(name)
  before = evaluate(logp, entropy, arrays, **PRESETS[name])[3]
  arrays = {k: v if v is None else swapped(v) for k, v in arrays.items()}
  after = evaluate(swapped(logp), swapped(entropy), arrays, **PRESETS[name])[3]
  np.testing.assert_allclose(after['rewards/margins'], -before['rewards/margins'])
  np.testing.assert_allclose(
    after['rewards/accuracies'], 1 - before['rewards/accuracies']
  )
  for one, other in (('chosen', 'rejected'), ('rejected', 'chosen')):
    for kind in ('rewards', 'logps'):
      np.testing.assert_allclose(after[f'{kind}/{one}'], before[f'{kind}/{other}'])


def test_metrics_are_those_of_the_pairs():
  logp, entropy, arrays = draw('ld')
  arrays['labels'] = None
  metrics = evaluate(logp, entropy, arrays, **PRESETS['ld'])[3]
  mask, pairs = arrays['mask'], [0, 1, 2, 5]
  sums = (logp * mask).sum(-1).reshape(-1, 2)[pairs]
  np.testing.assert_allclose(metrics['logps/chosen'], sums[:, 0].mean())
  np.testing.assert_allclose(metrics['logps/rejected'], sums[:, 1].mean())
  shorter = mask.sum(-1).reshape(-1, 2).min(-1).repeat(2)[:, None]
  share = mask * np.where(mask.cumsum(-1) <= shorter, 1, 0.4)
  r = 0.1 * ((logp - arrays['ref_logp']) * share).sum(-1).reshape(-1, 2)[pairs]
  assert (share == 0.4).any()
  np.testing.assert_allclose(metrics['rewards/chosen'], r[:, 0].mean())
  np.testing.assert_allclose(metrics['rewards/margins'], (r[:, 0] - r[:, 1]).mean())
  accuracy = (r[:, 0] > r[:, 1]).mean()
  assert 0 < accuracy < 1
  assert metrics['rewards/accuracies'] == accuracy
  np.testing.assert_allclose(metrics['entropy'], entropy[mask > 0].mean())


def test_kto_reports_its_baseline_and_its_two_kinds_of_completions():
  logp, entropy, arrays = draw('kto')
  metrics = evaluate(logp, entropy, arrays, **PRESETS['kto'])[3]
  h = ((logp - arrays['ref_logp']) * arrays['mask']).sum(-1)
  assert np.mean(h[[1, 3, 5, 11]]) > 0  # rows 7 and 9 are empty
  np.testing.assert_allclose(metrics['kl'], np.mean(h[[1, 3, 5, 11]]))
  np.testing.assert_allclose(metrics['rewards/chosen'], 0.5 * np.mean(h[[0, 8]]))
  np.testing.assert_allclose(metrics['rewards/rejected'], 0.5 * np.mean(h[[2, 4, 10]]))
  arrays['ref_logp'] = arrays['ref_logp'] + 20.0
  assert evaluate(logp, entropy, arrays, **PRESETS['kto'])[3]['kl'] == 0


def test_a_mixture_reports_its_parts_and_its_nll():
  logp, entropy, arrays = draw('mpo')
  value, _, _, metrics = evaluate(logp, entropy, arrays, **PRESETS['mpo'])
  parts = {v: metrics[f'loss/{v}'] for v in ('sigmoid', 'bco_pair', 'sft')}
  for variant, part in parts.items():
    alone = evaluate(logp, entropy, arrays, variant=variant)[0]
    np.testing.assert_allclose(part, alone, rtol=1e-12)
  whole = 0.8 * parts['sigmoid'] + 0.2 * parts['bco_pair'] + parts['sft']
  np.testing.assert_allclose(value, whole, rtol=1e-12)
  assert metrics['nll_loss'] == parts['sft']


def test_text_that_the_policy_drew_weighs_about_one():
  """WPO: with log p equal to −H token by token every weight is 1, however sharp."""
  logp, entropy, arrays = draw('wpo')
  arrays['ref_logp'] = logp + 0.1 * entropy
  weighted = evaluate(logp, -logp, arrays, use_weighting=True)
  np.testing.assert_allclose(weighted[3]['weighting'], 1)
  np.testing.assert_allclose(weighted[0], evaluate(logp, -logp, arrays)[0])
  rarer = evaluate(logp - 1.0, -logp, arrays, use_weighting=True)[3]['weighting']
  np.testing.assert_allclose(rarer, np.exp(-2.0))  # one nat a token, of both


def test_length_settings_meet_their_limits():
  logp, entropy, arrays = draw('sigmoid')
  plain = evaluate(logp, entropy, arrays)
  norm = evaluate(logp, entropy, arrays, length_normalised=True)
  named = evaluate(logp, entropy, arrays, variant='sigmoid_norm')
  np.testing.assert_array_equal(norm[1], named[1])
  assert abs(norm[0] - plain[0]) > 1e-3
  cut = evaluate(logp, entropy, arrays, ld_alpha=0.0)[1]
  n = arrays['mask'].sum(-1).reshape(-1, 2).min(-1).repeat(2)[:, None]
  past = (arrays['mask'] > 0) & (arrays['mask'].cumsum(-1) > n)
  assert past.any()
  assert (cut[past] == 0).all()
  assert (plain[1][past & (n > 0)] != 0).all()


@pytest.mark.parametrize('name', UNCOUPLED)
def test_any_split_of_the_pairs_gives_the_same_sums_and_counts(name):
  logp, entropy, arrays = draw(name)

  def part(rows):
    cut = {k: v if v is None else v[rows] for k, v in arrays.items()}
    scores = Scores(jnp.asarray(logp[rows]), jnp.asarray(entropy[rows]))
    mean, metrics = dpo.loss(scores, batch_of(cut), **PRESETS[name])
    return {'loss': mean, **metrics}

  with jax.enable_x64():
    whole = part(slice(None))
    parts = [part(slice(0, 2)), part(slice(2, 8)), part(slice(8, 12))]
    for key, mean in whole.items():
      total = parts[0][key] + parts[1][key] + parts[2][key]
      np.testing.assert_allclose(total, mean, rtol=1e-12, atol=1e-14, err_msg=key)


@pytest.mark.parametrize('variant', sorted(dpo.COUPLED))
def test_what_is_said_to_couple_the_rows_does(variant):
  logp, entropy, arrays = draw('kto' if variant == 'kto' else 'sigmoid')

  def part(rows):
    cut = {k: v[rows] for k, v in arrays.items()}
    scores = Scores(jnp.asarray(logp[rows]), jnp.asarray(entropy[rows]))
    return dpo.loss(scores, batch_of(cut), variant=variant, beta=0.5)[0]

  with jax.enable_x64():
    halves = part(slice(0, 4)) + part(slice(4, 12))
    whole = part(slice(None))
    assert halves.count == whole.count
    assert abs(halves.value - whole.value) > 1e-5


WILD = [np.nan, np.inf, -np.inf, 200.0, -200.0, 3e38]


@pytest.mark.parametrize('name', PRESETS)
def test_nothing_at_a_masked_token_reaches_value_or_gradient(name):
  """Right padding and prompt columns, filled with what overflows an exp."""
  logp, entropy, arrays = draw(name)
  tame = evaluate(logp, entropy, arrays, jnp.float32, **PRESETS[name])
  wide = lambda v: np.pad(v, ((0, 0), (0, 5))) if v.ndim == 2 else v  # noqa: E731
  arrays = {k: v if v is None else wide(v) for k, v in arrays.items()}
  logp, entropy = wide(logp), wide(entropy)
  off = arrays['mask'] == 0
  rng = np.random.default_rng(1)
  for x in (logp, entropy, arrays['ref_logp']):
    if x is not None:
      x[off] = rng.choice(WILD, off.sum())
  wild = evaluate(logp, entropy, arrays, jnp.float32, **PRESETS[name])
  assert (wild[1][off] == 0).all()
  # Longer rows are summed in another order: a few roundings of 6e-8 of sums of up to 20.
  np.testing.assert_allclose(wild[1][:, :7], tame[1], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(wild[0], tame[0], rtol=2e-6)
  for key, value in tame[3].items():
    np.testing.assert_allclose(wild[3][key], value, rtol=2e-6, atol=1e-6, err_msg=key)


@pytest.mark.parametrize('name', PRESETS)
@pytest.mark.parametrize('d', [-2000.0, 200.0])
def test_extreme_log_ratios_stay_finite(name, d):
  logp, entropy, arrays = draw(name)
  logp[0], logp[1], logp[4], logp[5] = -abs(d), -1e-9, -1e-9, -abs(d)
  if arrays['ref_logp'] is not None:
    arrays['ref_logp'][0] = logp[0] - d
    arrays['ref_logp'][3] = logp[3] + d
  out = evaluate(logp, entropy, arrays, jnp.float32, **PRESETS[name])
  for x in (out[0], out[1], *out[3].values()):
    assert np.isfinite(x).all()


@pytest.mark.parametrize('variant', ['sigmoid', 'hinge', 'discopop', 'robust'])
def test_a_pair_that_is_very_wrong_still_has_a_gradient(variant):
  """Every divergence: the chosen one, which the policy has all but lost, comes back."""
  logp, entropy, arrays = draw('sigmoid')
  arrays['ref_logp'][0] = logp[0] + 100.0
  for f in ('reverse_kl', 'forward_kl', 'alpha', 'js'):
    setting = dict(variant=variant, f_divergence=f)
    gradient = evaluate(logp, entropy, arrays, jnp.float32, **setting)[1][0]
    trained = arrays['mask'][0] > 0
    assert (gradient[trained] < -1e-3).all(), f


def test_pairs_without_a_trained_token_count_for_nothing():
  for name in ('ld', 'wpo', 'aot', 'aot_unpaired', 'mpo', 'orpo', 'kto'):
    logp, entropy, arrays = draw(name)
    keep = [b for b in range(12) if b not in (6, 7, 8, 9)]
    if name in UNPAIRED:
      keep = [b for b in range(12) if b not in (6, 7)]
    cut = {k: v if v is None else v[keep] for k, v in arrays.items()}
    whole = evaluate(logp, entropy, arrays, **PRESETS[name])
    without = evaluate(logp[keep], entropy[keep], cut, **PRESETS[name])
    np.testing.assert_allclose(whole[0], without[0], rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(whole[1][keep], without[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
  ('setting', 'message'),
  [
    (dict(variant='dpo'), "no variant 'dpo'"),
    (dict(variant={'sigmoid': 0.0}), "variant has 'sigmoid': 0.0; a weight"),
    (dict(variant={}), 'is a mixture of nothing'),
    (dict(variant={'sigmoid': 1.0, 'kto': 1.0}), 'mixes pairs with single'),
    (dict(beta=0.0), 'beta=0.0 must be positive'),
    (dict(label_smoothing=0.5), r'label_smoothing=0.5 must be in \[0, 0.5\)'),
    (dict(variant='exo_pair'), "'exo_pair' is infinite at label_smoothing=0"),
    (dict(f_divergence='kl'), "f_divergence='kl' is not one of"),
    (dict(f_divergence='alpha', f_alpha=1.0), 'f_alpha=1.0 must be in'),
    (dict(f_alpha=0.3), "f_alpha=0.3 belongs to f_divergence='alpha'"),
    (dict(ld_alpha=1.5), r'ld_alpha=1.5 must be in \[0, 1\]'),
    (dict(length_normalised=True, ld_alpha=0.5), 'both correct for length'),
    (dict(length_normalised=True, f_divergence='js'), 'is of the whole completion'),
    (dict(variant='simpo', gamma=-1.0), 'gamma=-1.0 must not be negative'),
    (dict(variant='slic'), "'slic' has no margin at gamma=0"),
    (dict(variant='cpo', nll_coef=-1.0), 'nll_coef=-1.0 must not be negative'),
    (dict(variant='discopop', discopop_tau=1.0), r'discopop_tau=1.0 must be in \(0, 1'),
    (dict(variant='kto', desirable_weight=-1.0), 'desirable_weight=-1.0 and'),
    (dict(margin_coef=-1.0), 'margin_coef=-1.0 must not be negative'),
  ],
)
def test_bad_settings_are_one_clear_line(setting, message):
  logp, entropy, arrays = draw('sigmoid')
  with pytest.raises(ValueError, match=message):
    evaluate(logp, entropy, arrays, **setting)


OTHER = dict(
  beta=0.2, label_smoothing=0.1, f_divergence='js', f_alpha=0.3, length_normalised=True,
  ld_alpha=0.5, margin_coef=0.5, use_weighting=True, gamma=2.0, nll_coef=0.5,
  discopop_tau=0.2, desirable_weight=2.0, undesirable_weight=2.0,
)  # fmt: skip
NEEDED = {
  'exo_pair': dict(label_smoothing=0.2),
  'slic': dict(gamma=1.0),
  'f_alpha': dict(f_divergence='alpha'),
}


@pytest.mark.parametrize('knob', OTHER)
@pytest.mark.parametrize('variant', dpo.VARIANTS)
def test_a_setting_changes_the_loss_or_is_refused(knob, variant):
  logp, entropy, arrays = draw('kto' if variant in UNPAIRED else 'sigmoid')
  needed = NEEDED.get(variant, {})
  if variant in dpo.READS[knob]:
    needed = needed | NEEDED.get(knob, {})
    without = evaluate(logp, entropy, arrays, variant=variant, **needed)
    given = evaluate(
      logp, entropy, arrays, **{'variant': variant, **needed, knob: OTHER[knob]}
    )
    moved = max(abs(given[0] - without[0]), np.abs(given[1] - without[1]).max())
    assert moved > 1e-6
  else:
    setting = {'variant': variant, **needed, knob: OTHER[knob]}
    with pytest.raises(ValueError, match=f'{knob}=.* is not read by variant'):
      evaluate(logp, entropy, arrays, **setting)


def test_a_setting_that_one_of_a_mixture_reads_is_taken():
  logp, entropy, arrays = draw('sigmoid')
  mixture = {'sft': 1.0, 'simpo': 1.0}
  evaluate(logp, entropy, arrays, variant=mixture, gamma=0.5)
  with pytest.raises(ValueError, match=r'gamma=0\.5 is not read'):
    evaluate(logp, entropy, arrays, variant={'sft': 1.0, 'cpo': 1.0}, gamma=0.5)


@pytest.mark.parametrize('variant', dpo.VARIANTS)
def test_only_those_with_a_reference_ask_for_one(variant):
  logp, entropy, arrays = draw('kto' if variant in UNPAIRED else 'sigmoid')
  arrays['ref_logp'] = None
  setting = dict(variant=variant, **NEEDED.get(variant, {}))
  if variant in dpo.REFERENCE_FREE:
    evaluate(logp, entropy, arrays, **setting)
  else:
    with pytest.raises(ValueError, match='needs log-probs of a reference'):
      evaluate(logp, entropy, arrays, **setting)


@pytest.mark.parametrize(
  ('change', 'setting', 'message'),
  [
    (dict(labels=None), dict(variant='kto'), "variant='kto' needs batch.labels"),
    (dict(labels=None), dict(margin_coef=0.1), 'margin_coef=0.1 needs batch.labels'),
    (dict(segments=np.ones((12, 7))), {}, 'one sequence a row'),
  ],
)
def test_a_batch_that_a_setting_cannot_use_is_refused(change, setting, message):
  logp, entropy, arrays = draw('sigmoid')
  with pytest.raises(ValueError, match=message):
    evaluate(logp, entropy, {**arrays, **change}, **setting)


@pytest.mark.parametrize('name', ['sigmoid', 'ld', 'aot', 'bco_pair', 'kto'])
def test_pairs_shared_out_over_devices_give_the_same_loss(name, mesh_of):
  """Three pairs a device; ranks and baselines are still those of the whole batch."""
  logp, entropy, arrays = draw(name)
  want = evaluate(logp, entropy, arrays, jnp.float32, **PRESETS[name])
  rows = jax.sharding.NamedSharding(mesh_of(2), jax.sharding.PartitionSpec('data'))

  def value(x, batch):
    scores = Scores(x, jnp.asarray(entropy, jnp.float32))
    mean, metrics = dpo.loss(scores, batch, **PRESETS[name])
    return mean.value, {k: m.value for k, m in metrics.items()}

  put = lambda x: jax.device_put(x, rows)  # noqa: E731
  batch = jax.tree.map(put, batch_of(arrays, jnp.float32))
  step = jax.jit(jax.value_and_grad(value, has_aux=True))
  (loss, metrics), gradient = step(put(jnp.asarray(logp, jnp.float32)), batch)
  # Sums in another order: a few roundings of 6e-8 of sums of up to 20.
  np.testing.assert_allclose(loss, want[0], rtol=2e-6)
  np.testing.assert_allclose(gradient, want[1], rtol=1e-5, atol=1e-6)
  for key, x in metrics.items():
    np.testing.assert_allclose(x, want[3][key], rtol=2e-6, atol=1e-6, err_msg=key)


def test_a_config_holds_a_mixture_and_its_defaults():
  section = dict(name='dpo', variant={'sigmoid': 1, 'sft': 0.2}, beta=1)
  full = config.expand_section('loss', section, 'config.loss')
  assert full['variant'] == {'sigmoid': 1, 'sft': 0.2}
  assert {k: v for k, v in full.items() if k not in section} == {
    k: v for k, v in DEFAULTS.items() if k not in section
  }


def test_an_odd_number_of_rows_is_refused():
  logp, entropy, arrays = draw('sigmoid')
  cut = {k: v[:5] for k, v in arrays.items()}
  with pytest.raises(ValueError, match='5 rows are not pairs'):
    evaluate(logp[:5], entropy[:5], cut)
