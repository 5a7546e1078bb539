"""Distillation's loss against float64 NumPy written from its equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.kernels.divergence import divergence
from educe.losses import distillation, sft
from educe.losses.dry_run import dry_run
from educe.types import Batch, Head, Scores

MASK = np.float32([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


def draw(old=True):
  rng = np.random.default_rng(0)

  def logp():
    return -rng.exponential(1.5, MASK.shape).astype(np.float32)

  tokens = rng.integers(0, 9, MASK.shape).astype(np.int32)
  batch = Batch(tokens, MASK, old_logp=logp() if old else None, ref_logp=logp())
  scores = Scores(logp(), -logp(), divergence=-logp())
  return jax.tree.map(jnp.asarray, (scores, batch))


def gradient(loss, scores, batch, field):
  def total(x):
    mean = loss(scores._replace(**{field: x}), batch)[0]
    return mean.total / mean.count

  return jax.grad(total)(getattr(scores, field))


@pytest.mark.parametrize('old', [True, False])
def test_reverse_kl_is_the_ratio_times_the_log_ratio_in_value_and_gradient(old):
  scores, batch = draw(old)
  loss = functools.partial(distillation.loss, objective='reverse_kl')
  d = np.float64(scores.logp) - batch.ref_logp
  ratio = np.exp(np.float64(scores.logp) - batch.old_logp) if old else np.ones(d.shape)
  tokens = MASK.sum()
  mean, metrics = loss(scores, batch)
  # float32 rounds at 6e-8; five terms of a few nats each.
  np.testing.assert_allclose(mean.value, (MASK * ratio * d).sum() / tokens, rtol=1e-6)
  # Of k1 itself the gradient would be 1/tokens: what a loss that forgot the
  # log-derivative has. Through the ratio as well it would be ρ·(1 + d).
  want = MASK * ratio * d / tokens
  got = gradient(loss, scores, batch, 'logp')
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(metrics['kl'].value, (MASK * d).sum() / tokens, rtol=1e-6)
  k3 = np.exp(-d) + d - 1
  np.testing.assert_allclose(
    metrics['kl/k3'].value, (MASK * k3).sum() / tokens, rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics['importance_ratio'].value, (MASK * ratio).sum() / tokens, rtol=1e-6
  )


def test_in_expectation_the_gradient_is_that_of_the_exact_reverse_kl():
  """Over all tokens that could be drawn, weighted as they are drawn: no sampling noise."""
  rng = np.random.default_rng(1)
  vocab = 7
  z, teacher, old = (rng.normal(size=vocab) for _ in range(3))

  def log_softmax(x):
    return x - np.log(np.exp(x).sum())

  log_q, log_p, log_old = map(log_softmax, (z, teacher, old))
  for behaviour in (log_q, log_old):  # on policy, and from an older policy
    expected = np.zeros(vocab)
    for y in range(vocab):  # one token a row, drawn with probability e^behaviour
      batch = Batch(
        jnp.full((1, 2), y),
        jnp.float32([[0, 1]]),
        old_logp=jnp.full((1, 2), np.float32(behaviour[y])),
        ref_logp=jnp.full((1, 2), np.float32(log_p[y])),
      )

      def total(z, batch=batch, y=y):
        logp = jnp.full((1, 2), jax.nn.log_softmax(z)[y])
        scores = Scores(logp, jnp.zeros((1, 2)))
        return distillation.loss(scores, batch, objective='reverse_kl')[0].total

      expected += np.exp(behaviour[y]) * np.float64(jax.grad(total)(jnp.float32(z)))
    q = np.exp(log_q)
    exact = q * (log_q - log_p - (q * (log_q - log_p)).sum())  # ∇_z KL(π‖p_T)
    np.testing.assert_allclose(expected, exact, atol=2e-6)  # seven float32 terms
  # … and it is the gradient of the whole distributions' divergence at β = 1.
  eye = Head(jnp.eye(vocab))
  full = jax.grad(
    lambda z: divergence(z[None], eye, jnp.float32(teacher)[None], eye, beta=1.0)[0]
  )(jnp.float32(z))
  np.testing.assert_allclose(full, exact, atol=1e-6)


@pytest.mark.parametrize('aggregate', ['token_mean', 'sequence_mean', 'sequence_sum'])
def test_jsd_averages_the_divergence_and_nothing_else(aggregate):
  scores, batch = draw()
  loss = functools.partial(distillation.loss, objective='jsd', aggregate=aggregate)
  mean, metrics = loss(scores, batch)
  x, lengths = np.float64(scores.divergence) * MASK, MASK.sum(-1)
  weights = {
    'token_mean': MASK / MASK.sum(),
    'sequence_mean': MASK / np.maximum(lengths, 1)[:, None] / 2,
    'sequence_sum': MASK / 2,
  }[aggregate]
  np.testing.assert_allclose(mean.value, (weights * x).sum(), rtol=1e-6)
  np.testing.assert_allclose(
    metrics['divergence'].value, x.sum() / MASK.sum(), rtol=1e-6
  )
  np.testing.assert_allclose(
    gradient(loss, scores, batch, 'divergence'), weights, rtol=1e-6
  )
  assert not np.any(gradient(loss, scores, batch, 'logp'))


def test_supervised_is_sft():
  scores, batch = draw()
  loss = functools.partial(distillation.loss, objective='supervised')
  got, metrics = loss(scores, batch)
  want, wanted = sft.loss(scores, batch)
  np.testing.assert_array_equal(got.value, want.value)
  assert metrics.keys() == wanted.keys() == {'nll', 'entropy'}
  np.testing.assert_array_equal(
    gradient(loss, scores, batch, 'logp'), gradient(sft.loss, scores, batch, 'logp')
  )


@pytest.mark.parametrize('objective', distillation.OBJECTIVES)
@pytest.mark.parametrize('poison', [np.nan, np.inf, -np.inf])
def test_what_is_masked_touches_neither_value_nor_gradient(objective, poison):
  scores, batch = draw()
  loss = functools.partial(distillation.loss, objective=objective)
  masked = MASK == 0

  def spoil(x):
    return jnp.where(masked, jnp.float32(poison), x)

  dirty = Scores(*(None if x is None else spoil(x) for x in scores))
  rotten = batch._replace(
    old_logp=spoil(batch.old_logp), ref_logp=spoil(batch.ref_logp)
  )
  np.testing.assert_array_equal(
    loss(dirty, rotten)[0].value, loss(scores, batch)[0].value
  )
  for field in ('logp', 'divergence'):
    got = gradient(loss, dirty, rotten, field)
    np.testing.assert_array_equal(got, gradient(loss, scores, batch, field))
    assert not np.any(got[masked])


@pytest.mark.parametrize(
  ('settings', 'fields', 'message'),
  [
    (dict(objective='forward'), [], "objective='forward' is not one of"),
    (dict(beta=-0.1), ['divergence'], r'beta=-0.1 must be in \[0, 1\]'),
    (dict(objective='jsd'), ['ref_logp'], r'scores\.divergence'),
    (dict(objective='reverse_kl'), ['divergence'], r'batch\.ref_logp'),
    (dict(objective='jsd', aggregate='constant'), ['divergence'], 'aggregate'),
    (
      dict(objective='reverse_kl', beta=0.0),
      ['ref_logp'],
      "belongs to objective='jsd'",
    ),
  ],
)
def test_bad_settings_are_one_line_before_anything_is_loaded(settings, fields, message):
  with pytest.raises(ValueError, match=message):
    dry_run(functools.partial(distillation.loss, **settings), *fields)
