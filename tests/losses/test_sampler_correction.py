"""Weights against loops; what the sampler did not report; no gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.losses.sampler_correction import CORRECTIONS, weights

MASK = np.float32([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])
D = np.array(
  [[0, 0.5, -0.9, 0.1], [0, 0.9, 0.2, 0], [0, 0, 0, 0]]
)  # log π_old/π_sampler
BOUNDS = {'low': 0.5, 'high': 2.0}


def given(difference=D):
  sampler = np.float32(np.linspace(-2, -1, 12).reshape(3, 4))
  return jnp.asarray(sampler + difference, jnp.float32), jnp.asarray(sampler)


def by_loop(how):
  out = np.ones_like(D)
  raw, outside = [], []
  for b in range(3):
    tokens = [t for t in range(4) if MASK[b, t]]
    ratios = {t: math.exp(D[b, t]) for t in tokens}
    if how.startswith('sequence'):
      product = math.prod(ratios.values())
      ratios = dict.fromkeys(tokens, product)
      raw += [product] if tokens else []
    else:
      raw += ratios.values()
    for t, ratio in ratios.items():
      outside.append(not 0.5 <= ratio <= 2)
      if how.endswith('truncate'):
        out[b, t] = min(max(ratio, 0.5), 2.0)
      elif how.endswith('mask'):
        out[b, t] = 0.0 if outside[-1] else ratio
  return out, np.mean(raw), np.mean(outside)


@pytest.mark.parametrize('how', CORRECTIONS)
def test_weights_and_metrics_equal_the_loop(how):
  old, sampler = given()
  got, metrics = weights(old, sampler, jnp.asarray(MASK), how=how, **BOUNDS)
  want, raw, outside = by_loop(how)
  # float32: the log-probs have an ulp of 2e-7, and a product adds three of them.
  np.testing.assert_allclose(got[MASK > 0], want[MASK > 0], rtol=2e-6)
  np.testing.assert_allclose(metrics['sampling/importance_ratio'].value, raw, rtol=2e-6)
  difference = metrics['sampling/logp_difference/mean'].value
  np.testing.assert_allclose(difference, np.abs(D[MASK > 0]).mean(), rtol=2e-6)
  if how == 'none':
    assert 'sampling/corrected' not in metrics
  else:
    assert 0 < outside < 1
    np.testing.assert_allclose(metrics['sampling/corrected'].value, outside, rtol=1e-6)


@pytest.mark.parametrize('sign', [1, -1])
def test_the_largest_difference_is_of_either_sign(sign):
  """A sampler that is too sure of itself is as wrong as one that is not sure enough."""
  old, sampler = given(sign * np.abs(D))
  _, metrics = weights(old, sampler, jnp.asarray(MASK), how='none', **BOUNDS)
  largest = metrics['sampling/logp_difference/max'].value
  np.testing.assert_allclose(largest, 0.9, rtol=2e-6)


@pytest.mark.parametrize('how', CORRECTIONS)
def test_what_the_sampler_did_not_report_has_ratio_one(how):
  old, sampler = given()
  holed = sampler.at[0, 2].set(jnp.nan)
  got, metrics = weights(old, holed, jnp.asarray(MASK), how=how, low=0.0, high=9.0)
  filled, _ = weights(
    old.at[0, 2].set(sampler[0, 2]), sampler, jnp.asarray(MASK), how=how, low=0.0,
    high=9.0,
  )  # fmt: skip
  np.testing.assert_array_equal(got, filled)
  assert metrics['sampling/logp_difference/mean'].count == 4


@pytest.mark.parametrize('how', CORRECTIONS)
def test_weights_are_constants(how):
  old, sampler = given()
  gradient = jax.grad(
    lambda x: weights(x, sampler, jnp.asarray(MASK), how=how, **BOUNDS)[0].sum()
  )(old)
  assert not gradient.any()


@pytest.mark.parametrize('how', CORRECTIONS)
@pytest.mark.parametrize('d', [-np.inf, -200.0, 200.0, np.inf])
def test_ratios_beyond_float32_stay_finite(how, d):
  wild = D.copy()
  wild[0, 1:3] = d, -d
  old, sampler = given(wild)
  got, metrics = weights(old, sampler, jnp.asarray(MASK), how=how, **BOUNDS)
  assert np.isfinite(got).all()
  assert np.isfinite(metrics['sampling/importance_ratio'].value)
