import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.rollouts import draw as draw_lib
from educe.rollouts.draw import Settings, draw, standing

# χ² with k degrees of freedom exceeds k + 4·sqrt(2k) with probability about 1e-4.


def chi_square(counts, probabilities):
  expected = counts.sum() * probabilities
  assert not counts[probabilities == 0].any()
  used = probabilities > 0
  statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
  freedom = used.sum() - 1
  return statistic, freedom + 4 * np.sqrt(2 * freedom)


def truncated(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  """Float64, by sorting: an independent statement of the three truncations."""
  p = np.exp((logits - logits.max()) / temperature)
  p /= p.sum()
  keep = np.ones(len(p), bool)
  order = np.argsort(-p, kind='stable')
  if top_k:
    keep[order[top_k:]] = False
  if top_p < 1:
    mass, left = 0.0, p[keep].sum()
    for token in order[keep[order]]:
      if mass >= top_p * left:
        keep[token] = False
      mass += p[token]
  if min_p:
    keep &= p >= min_p * p.max()
  return keep, p


OPTIONS = [
  dict(top_k=1),
  dict(top_k=7),
  dict(top_k=10_000),
  dict(top_p=0.9),
  dict(top_p=0.05),
  dict(min_p=0.1),
  dict(min_p=1.0),
  dict(top_k=20, top_p=0.8, min_p=0.02),
  dict(top_k=5, top_p=0.5, temperature=2.0),
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_truncation_keeps_what_a_sort_keeps(options):
  logits = np.random.default_rng(1).normal(size=(16, 300)).astype(np.float32) * 3
  settings = Settings(
    options.get('temperature', 1.0),
    options.get('top_k'),
    options.get('top_p'),
    options.get('min_p'),
  )
  scaled = logits / settings.temperature
  weights = np.exp(scaled - scaled.max(-1, keepdims=True))
  ours = np.asarray(standing(jnp.asarray(weights), settings))
  uniforms = jax.random.uniform(jax.random.key(0), (16, 2))
  drawn = draw(jnp.asarray(logits), uniforms, settings)
  for row in range(16):
    keep, p = truncated(logits[row].astype(np.float64), **options)
    np.testing.assert_array_equal(ours[row], keep)
    np.testing.assert_allclose(drawn.kept[row], p[keep].sum(), rtol=1e-5)
    assert keep[drawn.token[row]]
    np.testing.assert_allclose(drawn.logp[row], np.log(p[drawn.token[row]]), atol=1e-5)


def test_tied_tokens_stand_or_fall_together():
  weights = jnp.asarray([[1.0, 0.5, 0.5, 0.5, 0.25]])
  assert standing(weights, Settings(top_k=2)).tolist() == [[1, 1, 1, 1, 0]]
  assert standing(weights, Settings(top_p=0.5)).tolist() == [[1, 1, 1, 1, 0]]


@pytest.mark.parametrize(
  'options',
  [
    dict(),
    dict(temperature=0.5),
    dict(temperature=3.0),
    dict(top_k=3),
    dict(min_p=0.3),
  ],
  ids=str,
)
@pytest.mark.parametrize('numbers', [2, 300])  # inverse CDF, Gumbel noise
def test_frequencies_follow_the_distribution(options, numbers):
  logits = np.random.default_rng(2).normal(size=300)
  logits[::7] = -np.inf  # never to be drawn
  draws = 20_000
  keep, p = truncated(logits, **options)
  p = np.where(keep, p, 0) / p[keep].sum()
  settings = Settings(
    options.get('temperature', 1.0), options.get('top_k'), None, options.get('min_p')
  )
  draw_noise = jax.random.uniform if numbers == 2 else jax.random.gumbel
  noise = draw_noise(jax.random.key(3), (draws, numbers))
  rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, 300))
  tokens = np.asarray(draw(rows, noise, settings).token)
  # Pool what is expected fewer than 20 times: the χ² law needs full cells.
  rare = (p * draws < 20) & (p > 0)
  counts = np.bincount(tokens, minlength=300).astype(float)
  counts = np.append(np.where(rare, 0, counts), counts[rare].sum())
  cells = np.append(np.where(rare, 0, p), p[rare].sum())
  statistic, bound = chi_square(counts, cells)
  assert statistic < bound
  # … and the same draws refute a temperature applied twice or a top-k off by one.
  wrong = dict(options, temperature=options.get('temperature', 1.0) * 1.4)
  if 'top_k' in options:
    wrong = dict(options, top_k=4)
  keep, q = truncated(logits, **wrong)
  q = np.where(keep, q, 0) / q[keep].sum()
  cells = np.append(np.where(rare, 0, q), q[rare].sum())
  statistic, bound = chi_square(counts, cells)
  assert statistic > bound


def test_extreme_uniforms_never_draw_a_weightless_token():
  # The first and last tokens, a whole block and the padding all have weight 0, and the
  # tail is far below the resolution of a float32 cumulative sum.
  logits = np.full((4, 400), -np.inf, np.float32)
  logits[:, 5] = 0
  logits[:, 300:390] = -25
  almost_one = np.nextafter(np.float32(1), np.float32(0))
  uniforms = np.array(
    [[0, 0], [almost_one, almost_one], [0, almost_one], [almost_one, 0]], np.float32
  )
  tokens = np.asarray(
    draw(jnp.asarray(logits), jnp.asarray(uniforms), Settings()).token
  )
  assert np.isfinite(logits[range(4), tokens]).all()


def test_gumbel_noise_is_fine_where_it_is_large(monkeypatch):
  """Of 23 random bits e^−g would be a whole multiple of 2^-23, and what is less likely
  than a few of those would hardly be drawn: a token of 2e-7 two times of three."""
  monkeypatch.setattr(draw_lib, 'device_kind', lambda: 'TPU v5')
  noise = jax.jit(lambda key: draw_lib.noise(key, 1 << 20))(jax.random.key(0))
  rarest = np.exp(-np.sort(np.float64(noise))[-64:]) * 2**23
  assert rarest.max() < 2000
  assert (np.abs(rarest - rarest.round()) > 0.1).sum() > 32
  # … and it is Gumbel's: P(g < x) = exp(−e^−x).
  for x in (-1.0, 0.0, 2.0):
    share = np.exp(-np.exp(-x))
    assert abs((noise < x).mean() - share) < 4 * (share * (1 - share) / 2**20) ** 0.5


def test_greedy_takes_the_lowest_id_of_a_tie_and_reports_temperature_one():
  logits = jnp.asarray([[0.0, 2.0, 2.0, -1.0]])
  drawn = draw(logits, jnp.zeros((1, 2)), Settings(temperature=None))
  assert drawn.token.tolist() == [1]
  expected = 2 - np.log(np.exp([0, 2, 2, -1]).sum())
  np.testing.assert_allclose(drawn.logp, [expected], rtol=1e-6)
  assert drawn.kept.tolist() == [1]


def test_bfloat16_logits_are_lifted_to_float32():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 500)), jnp.bfloat16)
  drawn = draw(logits, jnp.full((2, 2), 0.5), Settings(0.7))
  exact = np.asarray(logits, np.float64) / 0.7
  exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
  assert drawn.logp.dtype == jnp.float32
  np.testing.assert_allclose(drawn.logp, exact[range(2), drawn.token], atol=1e-5)
