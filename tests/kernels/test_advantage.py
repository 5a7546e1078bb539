"""GAE on the device against the host's float64 loop (losses/advantages.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.kernels import advantage
from educe.kernels.advantage import pallas
from educe.losses import advantages as host

WAYS = {
  **{
    name: functools.partial(advantage.gae, implementation=name)
    for name in advantage.IMPLEMENTATIONS
  },
  # Tiles that end within rows and time, so that numbers are handed from tile to tile.
  'small tiles': lambda r, v, mask, bootstrap=None, segments=None, **how: pallas.gae(
    r, v, mask, bootstrap, segments, tile=(8, 128), **how
  ),
}


def episodes(rows, length, seed=0):
  """Rewards, values, mask, bootstraps, segments; at tokens not drawn NaN or infinite."""
  rng = np.random.default_rng(seed)
  r, v, ahead = rng.normal(size=(3, rows, length)).astype(np.float32)
  mask = np.float32(rng.random((rows, length)) < 0.5)
  mask[0], mask[1 % rows] = 0, 1
  mask[2 % rows, length // 3 :] = 0  # a long silence at the end
  mask[3 % rows, : -length // 2] = 0  # … and at the beginning
  segments = np.sort(rng.integers(1, 5, (rows, length)), -1)
  for x in (r, v, ahead):
    x[mask == 0] = rng.choice([np.nan, np.inf, -np.inf], int((mask == 0).sum()))
  return r, v, mask, ahead, segments


def close(got, want):
  """Within float32's rounding of sums about as long as 1/(1 − γλ) tokens."""
  for a, b in zip(got, want, strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('rows', 'length', 'given'),
  [
    (9, 130, ()),  # a column and more beyond a tile, and a row
    (9, 130, ('bootstrap',)),
    (9, 130, ('segments',)),
    (9, 130, ('bootstrap', 'segments')),
    (1, 1, ('bootstrap', 'segments')),
    (5, 33, ('bootstrap', 'segments')),
    (8, 256, ('bootstrap', 'segments')),  # tiles that fit
    (70, 600, ('bootstrap', 'segments')),  # nothing divides, by any tile
  ],
)
@pytest.mark.parametrize('way', WAYS)
def test_it_is_the_hosts(way, rows, length, given):
  r, v, mask, ahead, segments = episodes(rows, length)
  more = {'bootstrap': ahead, 'segments': segments}
  how = dict(gamma=0.99, lam=0.95, **{name: more[name] for name in given})
  got = WAYS[way](r, v, mask, **how)
  close(got, host.gae(r, v, mask, **how))
  assert not np.asarray(got)[:, mask == 0].any()


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize(('gamma', 'lam'), [(1.0, 0.0), (0.0, 0.9)])
def test_the_ends_of_gamma_and_lambda(way, gamma, lam):
  r, v, mask, ahead, segments = episodes(6, 40)
  how = dict(gamma=gamma, lam=lam, bootstrap=ahead, segments=segments)
  got = WAYS[way](r, v, mask, **how)
  close(got, host.gae(r, v, mask, **how))


@pytest.mark.parametrize('way', WAYS)
def test_without_values_returns_are_discounted_sums(way):
  r = np.random.default_rng(0).normal(size=(3, 150)).astype(np.float32)
  powers = 0.9 ** np.arange(150)
  want = [[np.dot(row[t:], powers[: 150 - t]) for t in range(150)] for row in r]
  _, returns = WAYS[way](r, np.zeros_like(r), np.ones_like(r), gamma=0.9, lam=1.0)
  np.testing.assert_allclose(returns, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('way', WAYS)
def test_a_reward_that_is_nan_stays_in_its_sequence(way):
  """0 · NaN is no 0: not across packed sequences, nor around a tile's edge."""
  r, v, mask = np.zeros((2, 300)), np.zeros((2, 300)), np.ones((2, 300))
  segments = np.repeat([[1, 2, 3]], 100, -1) * np.ones((2, 1), int)
  r[0, 150] = np.nan
  got, _ = WAYS[way](*map(np.float32, (r, v, mask)), segments=segments,
                     gamma=1.0, lam=0.9)  # fmt: skip
  lost = np.isnan(np.asarray(got))
  assert lost[0, 100:151].all()
  assert lost.sum() == 51


@pytest.mark.parametrize('way', WAYS)
def test_it_runs_under_jit_and_takes_any_numbers(way):
  r, v, mask, _, segments = episodes(4, 40)
  how = dict(gamma=0.9, lam=0.8)
  want = host.gae(r, v, mask, segments=segments, **how)
  run = jax.jit(lambda r, v, mask, s: WAYS[way](r, v, mask, segments=s, **how))
  close(run(r, v, mask, segments), want)
  close(
    advantage.gae(np.float64(r), np.float64(v), mask > 0, segments=segments, **how),
    want,
  )


@pytest.mark.parametrize('name', advantage.IMPLEMENTATIONS)
def test_no_gradient_flows(name):
  r, v, mask, *_ = map(jnp.float32, episodes(3, 20))
  gradient = jax.grad(
    lambda v: advantage.gae(r, v, mask, implementation=name)[0].sum()
  )(v)
  assert not np.asarray(gradient).any()


def test_it_refuses_what_cannot_be():
  ones = np.ones((2, 3))
  with pytest.raises(ValueError, match=r"'cuda' does not exist.*'pallas', 'reference'"):
    advantage.gae(ones, ones, ones, implementation='cuda')
  with pytest.raises(ValueError, match=r'gamma=1.1 and lam=0.95 must be in'):
    advantage.gae(ones, ones, ones, gamma=1.1)
  with pytest.raises(ValueError, match=r'values has shape \(2, 1\), mask \(2, 3\)'):
    advantage.check(1.0, 0.9, ones, rewards=ones, values=ones[:, :1])
  with pytest.raises(ValueError, match=r'rewards has shape \(3,\), mask \(3,\)'):
    advantage.check(1.0, 0.9, ones[0], rewards=ones[0])


def test_the_best_that_was_measured_here():
  r, v, mask, *_ = episodes(4, 40)
  for a, b in zip(
    advantage.gae(r, v, mask),
    advantage.gae(r, v, mask, implementation='reference'),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
