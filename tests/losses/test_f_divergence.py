"""φ against a numerical derivative of f itself, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.losses.f_divergence import DIVERGENCES, implicit_reward
from educe.losses.kl import LIMIT

ALPHA = 0.3
F = {
  'reverse_kl': lambda u: u * np.log(u),
  'forward_kl': lambda u: -np.log(u),
  'js': lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
  'alpha': lambda u: (u ** (1 - ALPHA) - (1 - ALPHA) * u - ALPHA) / ALPHA / (ALPHA - 1),
}


def phi(h, divergence, alpha=ALPHA, dtype=jnp.float64):
  with jax.enable_x64(dtype == jnp.float64):
    return np.asarray(implicit_reward(jnp.asarray(h, dtype), divergence, alpha))


def test_every_divergence_has_its_f_here():
  assert set(F) == set(DIVERGENCES)


@pytest.mark.parametrize('divergence', DIVERGENCES)
def test_it_is_the_slope_of_f_less_that_at_the_reference(divergence):
  f, h = F[divergence], np.linspace(-3, 3, 25)
  slope = lambda u: (f(u * (1 + 1e-6)) - f(u * (1 - 1e-6))) / (2e-6 * u)  # noqa: E731
  # Central differences: 1e-16 of values up to 60, over 1e-6 of arguments from 0.05.
  np.testing.assert_allclose(
    phi(h, divergence), slope(np.exp(h)) - slope(1.0), atol=2e-7
  )
  assert phi([0.0], divergence) == 0
  assert abs(f(1.0)) < 1e-15  # a divergence is 0 at the reference


def test_alpha_lies_between_the_two_kls():
  h = np.linspace(-2, 2, 9)
  # The next term of the expansion in α, h²/2·α.
  np.testing.assert_allclose(phi(h, 'alpha', 1e-6), h, atol=3e-6)
  np.testing.assert_allclose(phi(h, 'alpha', 1 - 1e-6), phi(h, 'forward_kl'), atol=1e-4)


@pytest.mark.parametrize('divergence', DIVERGENCES)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
def test_far_away_it_is_finite_smooth_and_still_rising(divergence, dtype):
  h = np.concatenate([-np.geomspace(1e4, 1, 60), np.linspace(-0.9, 3, 20)])
  values = phi(h, divergence, dtype=dtype)
  assert np.isfinite(values).all()
  assert (np.diff(values) > 0).all()
  scale = {'forward_kl': 1.0, 'alpha': ALPHA}.get(divergence)
  if scale and dtype == jnp.float64:  # once differentiable where it turns straight
    edge = -LIMIT / scale
    below, above = (
      (phi([edge + d], divergence) - phi([edge], divergence)) / d for d in (-1e-6, 1e-6)
    )
    np.testing.assert_allclose(below, above, rtol=1e-5)
    np.testing.assert_allclose(above, np.exp(LIMIT), rtol=1e-5)


@pytest.mark.parametrize('divergence', DIVERGENCES)
def test_the_gradient_keeps_its_digits_in_float32(divergence):
  h = np.linspace(-3, 3, 13)
  slope = jax.vmap(jax.grad(lambda x: implicit_reward(x, divergence, ALPHA)))
  with jax.enable_x64():
    want = np.asarray(slope(jnp.asarray(h)))
  np.testing.assert_allclose(slope(jnp.asarray(h, jnp.float32)), want, rtol=1e-6)


def test_the_gradient_is_finite_far_away():
  for divergence in DIVERGENCES:
    slope = jax.grad(lambda h, d=divergence: implicit_reward(h, d, ALPHA).sum())
    got = slope(jnp.array([-1e4, -50.0, 50.0, 1e4]))
    assert np.isfinite(got).all()
    assert (got[:2] >= 1).all(), (
      divergence
    )  # lost text is pulled back at least as by KL


@pytest.mark.parametrize(
  ('divergence', 'alpha', 'message'),
  [
    ('kl', 0.5, "f_divergence='kl' is not one of"),
    ('alpha', 0.0, 'f_alpha=0.0 must be in'),
    ('alpha', 1.0, 'f_alpha=1.0 must be in'),
  ],
)
def test_bad_settings_are_one_clear_line(divergence, alpha, message):
  with pytest.raises(ValueError, match=message):
    implicit_reward(jnp.zeros(2), divergence, alpha)
