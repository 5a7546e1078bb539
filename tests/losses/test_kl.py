"""k1, k2, k3 and their gradients against exact sums over a small distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.losses import kl

N = 6


def softmax(theta):
  e = np.exp(theta - theta.max())
  return e / e.sum()


def two_policies(seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=N), rng.normal(size=N)


def kl_by_loop(p, q):
  return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))


def differences(f, x, h=1e-6):
  """Central differences: the error is about h² = 1e-12, and 1e-16/h = 1e-10."""
  out = np.zeros_like(x)
  for i in range(len(x)):
    step = np.zeros_like(x)
    step[i] = h
    out[i] = (f(x + step) - f(x - step)) / (2 * h)
  return out


def test_values_equal_the_formulas():
  d = [-3.0, -0.1, 0.0, 1e-4, 0.7, 12.0]
  with jax.enable_x64():
    logp, ref = jnp.asarray(np.asarray(d) - 1.5), jnp.full(len(d), -1.5)
    got = [np.asarray(f(logp, ref)) for f in (kl.k1, kl.k2, kl.k3)]
  want = [[x, 0.5 * x * x, 1 / np.exp(x) - np.log(1 / np.exp(x)) - 1] for x in d]
  # e^{−d} + d − 1 of the loop loses 1e-16 absolutely; at d = 1e-4, 1e-8 relatively.
  np.testing.assert_allclose(np.transpose(got), want, rtol=1e-12, atol=1e-15)


def test_k3_keeps_its_digits_near_the_reference_in_float32():
  d = np.float32(1e-3)
  k3 = kl.k3(jnp.full(1, d), jnp.zeros(1))[0]
  # Plain exp(−d) + d − 1 has an absolute error of 6e-8 here, a tenth of the value;
  # expm1(−d) + d one of a few ulps of d, 1e-10.
  np.testing.assert_allclose(k3, d * d / 2 - d**3 / 6, rtol=1e-3)


def test_k1_and_k3_average_to_the_kl():
  a, b = two_policies()
  p, q = softmax(a), softmax(b)
  with jax.enable_x64():
    lp, lq = jnp.log(p), jnp.log(q)
    k1, k3 = (float((p * f(lp, lq)).sum()) for f in (kl.k1, kl.k3))
    exact = float(kl.exact(lp, lq))
  np.testing.assert_allclose([k1, k3, exact], [kl_by_loop(p, q)] * 3, rtol=1e-12)


def test_exact_over_several_positions_and_zero_probabilities():
  with jax.enable_x64():
    p = jnp.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    q = jnp.array([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
    both = kl.exact(jnp.log(p), jnp.log(q))
    np.testing.assert_allclose(both, [np.log(2), 0], atol=1e-15)
    # 0·log 0 on both sides, in value and in gradient.
    same = kl.exact(jnp.log(p[0]), jnp.log(p[0]))
    gradient = jax.grad(lambda x: kl.exact(x, jnp.log(p[0])))(jnp.log(p[0]))
    assert same == 0
    assert np.isfinite(gradient).all()
    assert kl.exact(jnp.log(q[0]), jnp.log(p[0])) == np.inf


def expected_gradient(theta, ref, estimator, gradient, old=None):
  """∇θ of Σ_y π_old(y) · penalty(y), with π_old the sampler: what a batch estimates."""
  old = theta if old is None else old
  p_old, lq = softmax(old), np.log(softmax(ref))
  with jax.enable_x64():

    def total(x):
      logp = jax.nn.log_softmax(x)
      ratio = logp - jnp.log(p_old)
      penalty = kl.penalty(
        logp, jnp.asarray(lq), ratio, estimator=estimator, gradient=gradient
      )
      return (p_old * penalty).sum()

    return np.asarray(jax.grad(total)(jnp.asarray(theta)))


@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3'])
@pytest.mark.parametrize('steps_behind', [0.0, 0.3])
def test_unbiased_is_the_gradient_of_the_kl_on_and_off_policy(estimator, steps_behind):
  theta, ref = two_policies()
  old = theta + steps_behind * np.random.default_rng(1).normal(size=N)
  got = expected_gradient(theta, ref, estimator, 'unbiased', old)
  want = differences(lambda x: kl_by_loop(softmax(x), softmax(ref)), theta)
  np.testing.assert_allclose(got, want, atol=1e-9)


def test_what_the_naive_gradients_really_are():
  theta, ref = two_policies()
  q = softmax(ref)
  reverse = differences(lambda x: kl_by_loop(softmax(x), q), theta)
  forward = differences(lambda x: kl_by_loop(q, softmax(x)), theta)
  assert np.abs(reverse - forward).max() > 0.05  # the three are told apart
  naive = {k: expected_gradient(theta, ref, k, 'naive') for k in ('k1', 'k2', 'k3')}
  np.testing.assert_allclose(naive['k1'], np.zeros(N), atol=1e-12)
  np.testing.assert_allclose(naive['k2'], reverse, atol=1e-9)
  np.testing.assert_allclose(naive['k3'], forward, atol=1e-9)


@pytest.mark.parametrize('gradient', ['naive', 'unbiased'])
@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3'])
def test_the_value_is_the_estimator_whatever_the_gradient(estimator, gradient):
  rng = np.random.default_rng(0)
  logp, ref = (jnp.float32(rng.normal(size=(2, 3))) for _ in range(2))
  got = kl.penalty(logp, ref, jnp.zeros((2, 3)), estimator=estimator, gradient=gradient)
  np.testing.assert_array_equal(got, kl.ESTIMATORS[estimator](logp, ref))


@pytest.mark.parametrize('gradient', ['naive', 'unbiased'])
@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3'])
@pytest.mark.parametrize('d', [-1e29, -200.0, -89.0, 89.0, 200.0, 1e29])
def test_no_log_ratio_overflows_a_gradient(d, estimator, gradient):
  """Nor a value, except that k2 is the square of what it is given."""

  def total(x):
    ref, ratio = jnp.full(1, -d), jnp.full(1, d)
    return kl.penalty(x, ref, ratio, estimator=estimator, gradient=gradient)[0]

  value, slope = jax.value_and_grad(total)(jnp.zeros(1))
  assert np.isfinite(slope).all()
  if not (estimator == 'k2' and abs(d) > 1e19):
    assert np.isfinite(value)


def test_beyond_the_clamp_the_unbiased_gradient_still_pulls_back():
  def slope(gradient, d):
    def total(x):
      penalty = kl.penalty(
        x, jnp.zeros(1), jnp.zeros(1), estimator='k3', gradient=gradient
      )
      return penalty[0]

    return jax.grad(total)(jnp.full(1, d))[0]

  assert slope('unbiased', -200.0) == -20  # minimising raises log π
  assert slope('unbiased', 200.0) == 20
  assert slope('naive', -200.0) == slope('naive', 200.0) == 0


def test_unknown_names_list_the_known():
  x = jnp.zeros(1)
  with pytest.raises(ValueError, match=r"kl_estimator='k4' is not one of \['k1'"):
    kl.penalty(x, x, x, estimator='k4', gradient='naive')
  with pytest.raises(ValueError, match=r"kl_gradient='exact' is not one of \['naive'"):
    kl.penalty(x, x, x, estimator='k1', gradient='exact')
