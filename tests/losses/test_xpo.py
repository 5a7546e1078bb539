"""The bonus against float64 NumPy, and that it touches nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.losses import dpo, xpo
from educe.types import Batch, Scores

MASK = np.float32(
  [[0, 1, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]] + [[0] * 4] * 2
)
THEIRS = np.array([0, 1, 1, 0, 0, 0])  # ỹ is rejected, chosen, and there is a filler


def draw(alpha):
  rng = np.random.default_rng(0)
  logp, ref = (jnp.float32(-rng.exponential(1.0, MASK.shape)) for _ in range(2))
  batch = Batch(jnp.zeros(MASK.shape, int), jnp.asarray(MASK), ref_logp=ref)
  marks = jnp.float32(-alpha * THEIRS[:, None] * MASK)
  return Scores(logp, -logp), batch._replace(advantages=marks)


@pytest.mark.parametrize('alpha', [0.0, 0.2])
def test_value_and_gradient_are_the_losss_and_alpha_log_pi(alpha):
  scores, batch = draw(alpha)
  optimistic = xpo.with_bonus(dpo.loss)
  mean, metrics = optimistic(scores, batch)
  plain, others = dpo.loss(scores, batch)
  bonus = alpha * (np.float64(scores.logp) * MASK * THEIRS[:, None]).sum() / 2  # pairs
  np.testing.assert_allclose(mean.value, plain.value + bonus, rtol=1e-6)
  np.testing.assert_allclose(metrics['xpo/bonus'].value, bonus, rtol=1e-6)
  assert metrics.keys() == {*others, 'xpo/bonus'}

  def gradient(loss):
    def total(logp):
      mean = loss(scores._replace(logp=logp), batch)[0]
      return mean.total / mean.count

    return np.float64(jax.grad(total)(scores.logp))

  want = alpha * MASK * THEIRS[:, None] / 2
  np.testing.assert_allclose(gradient(optimistic) - gradient(dpo.loss), want, atol=1e-7)


@pytest.mark.parametrize('poison', [np.nan, np.inf])
def test_what_is_masked_touches_neither_value_nor_gradient(poison):
  scores, batch = draw(0.2)
  dirty = scores._replace(logp=jnp.where(MASK > 0, scores.logp, poison))
  optimistic = xpo.with_bonus(dpo.loss)
  np.testing.assert_array_equal(
    optimistic(dirty, batch)[0].value, optimistic(scores, batch)[0].value
  )
  gradient = jax.grad(
    lambda logp: optimistic(scores._replace(logp=logp), batch)[0].total
  )(dirty.logp)
  assert np.isfinite(gradient).all()


def test_unmarked_batches_are_refused():
  scores, batch = draw(0.2)
  with pytest.raises(ValueError, match='advantages is None'):
    xpo.with_bonus(dpo.loss)(scores, batch._replace(advantages=None))
