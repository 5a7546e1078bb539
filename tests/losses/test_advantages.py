"""Advantages against float64 loops, and the cases where peers divided by a residue."""

import itertools
import math
import statistics

import numpy as np
import pytest

from educe.losses import advantages as adv

R = np.array([1.0, 0.0, 0.5, 0.25, 2.0, 2.0, -1.0, 0.0])  # two groups of four
NAN = np.nan


def groups_of(values, group):
  return [list(values[i : i + group]) for i in range(0, len(values), group)]


@pytest.mark.parametrize('ddof', [0, 1])
def test_group_relative_equals_the_loop(ddof):
  want = []
  for g in groups_of(R, 4):
    s = statistics.stdev(g) if ddof else statistics.pstdev(g)
    want += [(r - statistics.fmean(g)) / (s + 1e-6) for r in g]
  np.testing.assert_allclose(adv.group_relative(R, 4, ddof=ddof), want, rtol=1e-12)


def test_the_default_divisor_is_n_minus_1():
  np.testing.assert_array_equal(
    adv.group_relative(R, 4), adv.group_relative(R, 4, ddof=1)
  )
  assert not np.allclose(adv.group_relative(R, 4), adv.group_relative(R, 4, ddof=0))


def test_without_std_it_is_dr_grpo():
  want = [r - statistics.fmean(g) for g in groups_of(R, 4) for r in g]
  np.testing.assert_allclose(adv.group_relative(R, 4, std=False), want, rtol=1e-12)


def test_rloo_is_against_the_mean_of_the_others():
  want = []
  for g in groups_of(R, 4):
    for i, r in enumerate(g):
      want.append(r - statistics.fmean(g[:i] + g[i + 1 :]))
  np.testing.assert_allclose(adv.rloo(R, 4), want, rtol=1e-12)


def test_batch_whitening_looks_past_groups():
  s, m = statistics.stdev(R), statistics.fmean(R)
  want = [(r - m) / (s + 1e-6) for r in R]
  np.testing.assert_allclose(adv.batch_whitened(R, 4), want, rtol=1e-12)
  np.testing.assert_allclose(adv.reinforce_plus_plus(R, 4), want, rtol=1e-12)
  assert not np.allclose(adv.batch_whitened(R, 4), adv.group_relative(R, 4))


def test_reinforce_plus_plus_whitens_the_returns_of_tokens():
  rng = np.random.default_rng(0)
  mask = np.float32([[0, 1, 1, 0, 1], [0, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0] * 5])
  kl = rng.normal(size=(4, 5))
  kl[mask == 0] = np.inf  # what stands at masked tokens is never read
  r = np.array([1.0, 0.0, 0.5, 9.0])
  returns = {}
  for b, t in zip(*np.nonzero(mask), strict=True):
    future = [kl[b, s] for s in range(t, 5) if mask[b, s]]
    returns[b, t] = r[b] - 0.1 * math.fsum(future)
  m, s = statistics.fmean(returns.values()), statistics.stdev(returns.values())
  want = np.zeros((4, 5))
  for place, value in returns.items():
    want[place] = (value - m) / (s + 1e-6)
  got = adv.reinforce_plus_plus(r, mask=mask, kl=kl, kl_coef=0.1)
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_reinforce_plus_plus_baseline_scales_by_the_batch_but_shifts_by_the_group():
  centred = [r - statistics.fmean(g) for g in groups_of(R, 4) for r in g]
  want = np.array(centred) / (statistics.stdev(centred) + 1e-6)
  got = adv.reinforce_plus_plus(R, 4, baseline=True)
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_solved_group_stays_at_zero_whatever_its_lengths():
  r = np.array([0.7, 0.7, 1.0, 0.0])
  mask = np.float32([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0]])
  got = adv.reinforce_plus_plus(r, 2, mask=mask, baseline=True)
  assert not got[:2].any()
  assert (got[2] > 0).all()


def test_remax_is_against_the_greedy_completion():
  got = adv.remax(R, 4, greedy=np.array([0.5, NAN]))
  np.testing.assert_array_equal(got, [0.5, -0.5, 0.0, -0.25, 0, 0, 0, 0])


@pytest.mark.parametrize('k', [2, 3, 4])
def test_pass_at_k_is_the_mean_gain_over_every_subset(k):
  want = []
  for g in groups_of(R, 4):
    for i, r in enumerate(g):
      rest = itertools.combinations(g[:i] + g[i + 1 :], k - 1)
      want.append(k * statistics.fmean(max(r, *s) - max(s) for s in rest))
  np.testing.assert_allclose(adv.pass_at_k(R, 4, k=k), want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('k', [2, 3])
def test_pass_at_k_is_an_unbiased_gradient(k):
  """E over all groups of three from a softmax, summed exactly, of (1/n) Σ A_i ∇log π."""
  reward = np.array([0.0, 0.3, 1.0, 0.3])
  theta = np.array([0.4, -0.2, -1.0, 0.1])

  def best_of_k(x):
    p = np.exp(x) / np.exp(x).sum()
    draws = itertools.product(range(4), repeat=k)
    return sum(p[list(ys)].prod() * reward[list(ys)].max() for ys in draws)

  p = np.exp(theta) / np.exp(theta).sum()
  got = np.zeros(4)
  for ys in itertools.product(range(4), repeat=3):
    a = adv.pass_at_k(reward[list(ys)], 3, k=k)
    for y, a_i in zip(ys, a, strict=True):
      got += p[list(ys)].prod() / 3 * a_i * (np.eye(4)[y] - p)
  eps = 1e-5 * np.eye(4)
  want = [(best_of_k(theta + e) - best_of_k(theta - e)) / 2e-5 for e in eps]
  np.testing.assert_allclose(got, want, atol=1e-9)


RELATIVE = {
  'grpo': lambda r, g: adv.group_relative(r, g),
  'dr_grpo': lambda r, g: adv.group_relative(r, g, std=False),
  'rloo': adv.rloo,
  'reinforce_plus_plus_baseline': lambda r, g: adv.reinforce_plus_plus(
    r, g, baseline=True
  ),
  'pass_at_k': lambda r, g: adv.pass_at_k(r, g, k=2),
}
WHITENED = {
  'batch_whitened': adv.batch_whitened,
  'reinforce_plus_plus': adv.reinforce_plus_plus,
}


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('value', [0.35, 0.7, 0.1, 1e9 / 3])
@pytest.mark.parametrize('name', [*RELATIVE, *WHITENED])
def test_seven_equal_rewards_give_exactly_zero(name, value, dtype):
  """Seven times 0.35, summed and divided by seven, is not 0.35."""
  rewards = np.full(7, value, dtype)
  if name in RELATIVE:  # beside a group with a signal
    rewards = np.concatenate([rewards, np.arange(7, dtype=dtype)])
  got = {**RELATIVE, **WHITENED}[name](rewards, 7)
  assert not got[:7].any()
  assert got[7:].any() == (name in RELATIVE)


@pytest.mark.parametrize('name', RELATIVE)
def test_a_constant_added_to_a_group_changes_nothing(name):
  shifted = R + np.repeat([8.0, -4.0], 4)  # powers of two: exact in float64
  f = RELATIVE[name]
  np.testing.assert_allclose(f(shifted, 4), f(R, 4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', [*RELATIVE, *WHITENED])
def test_what_was_not_scored_is_as_if_it_were_not_there(name):
  f = {**RELATIVE, **WHITENED}[name]
  holed = np.array([1.0, NAN, 0.0, 0.5, 0.5, 2.0, NAN, 0.25])
  got = f(holed, 4)
  dense = f(holed[np.isfinite(holed)], 3)
  np.testing.assert_allclose(got[np.isfinite(holed)], dense, rtol=1e-12)
  assert (got[np.isnan(holed)] == 0).all()


@pytest.mark.parametrize('name', [*RELATIVE, *WHITENED])
def test_groups_with_one_scored_row_or_none_give_zero_without_a_warning(name):
  f = {**RELATIVE, **WHITENED}[name]
  assert not f(np.array([NAN, 0.3, NAN, NAN]), 2).any()
  assert not f(np.full(4, NAN), 2).any()


@pytest.mark.parametrize('name', RELATIVE)
def test_a_group_of_one_has_nothing_to_compare_with(name):
  with pytest.raises(ValueError, match='group=1 must be 2 or more'):
    RELATIVE[name](R, 1)


def test_bad_input_is_one_clear_line():
  with pytest.raises(
    ValueError, match=r'\(8,\) are not rows of whole groups of group=3'
  ):
    adv.group_relative(R, 3)
  with pytest.raises(ValueError, match=r'\(2, 4\) are not rows'):
    adv.rloo(R.reshape(2, 4), 4)
  with pytest.raises(ValueError, match=r'rewards\[2\] is infinite'):
    adv.batch_whitened([0.0, NAN, np.inf])
  with pytest.raises(ValueError, match='k=5 must be between 2 and group=4'):
    adv.pass_at_k(R, 4, k=5)
  with pytest.raises(ValueError, match='k=1 must be'):
    adv.pass_at_k(R, 4, k=1)
  with pytest.raises(ValueError, match=r'greedy has shape \(8,\); 2 prompts'):
    adv.remax(R, 4, greedy=R)
  with pytest.raises(ValueError, match=r'kl_coef=0\.1 needs kl and mask'):
    adv.reinforce_plus_plus(R, kl_coef=0.1)
  one = np.ones((8, 1))
  with pytest.raises(ValueError, match=r'baseline=True with kl_coef=0\.1: put the KL'):
    adv.reinforce_plus_plus(R, 4, mask=one, kl=one, kl_coef=0.1, baseline=True)


def sequences_of(mask, segments):
  """The places drawn, sequence by sequence: [(row, [t, …]), …]."""
  out = []
  for b in range(len(mask)):
    for s in sorted({*segments[b]}):
      places = [t for t in range(mask.shape[1]) if mask[b, t] and segments[b, t] == s]
      if places:
        out.append((b, places))
  return out


def gae_by_loop(r, v, mask, gamma, lam, ahead, segments):
  """Σ_l (γλ)^l δ_{i+l} written out, over the drawn tokens of each sequence."""
  advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
  for b, places in sequences_of(mask, segments):
    after = [*(v[b, t] for t in places[1:]), ahead[b, places[-1]]]
    delta = [r[b, t] + gamma * nxt - v[b, t]
             for t, nxt in zip(places, after, strict=True)]  # fmt: skip
    for i, t in enumerate(places):
      terms = [(gamma * lam) ** k * d for k, d in enumerate(delta[i:])]
      advantages[b, t] = math.fsum(terms)
      returns[b, t] = advantages[b, t] + v[b, t]
  return advantages, returns


def episodes(rows=6, length=13, seed=0):
  """Rewards, values, a mask with observations inside, bootstraps and packed segments."""
  rng = np.random.default_rng(seed)
  r, v, ahead = rng.normal(size=(3, rows, length))
  mask = (rng.random((rows, length)) < 0.6) * 1.0
  mask[:, 0], mask[1], mask[2], mask[3, 1:] = 0, 0, 1, 1
  segments = np.sort(rng.integers(1, 4, (rows, length)), -1)
  segments[:, -1] = 0  # padding
  mask[:, -1] = 0
  for x in (r, v, ahead):
    x[mask == 0] = rng.choice([np.nan, np.inf, -np.inf], (mask == 0).sum())
  return r, v, mask, ahead, segments


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize(
  ('gamma', 'lam'), [(1.0, 0.95), (0.9, 0.7), (0.97, 1.0), (1.0, 0.0)]
)
def test_gae_equals_the_loop(gamma, lam, cut, packed):
  r, v, mask, ahead, segments = episodes()
  one = np.zeros(mask.shape, int)
  want = gae_by_loop(
    r, v, mask, gamma, lam, ahead if cut else 0 * np.nan_to_num(ahead),
    segments if packed else one,
  )  # fmt: skip
  got = adv.gae(
    r, v, mask, gamma=gamma, lam=lam, bootstrap=ahead if cut else None,
    segments=segments if packed else None,
  )  # fmt: skip
  for a, b in zip(got, want, strict=True):
    assert a.dtype == np.float64
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
  assert not got[0][mask == 0].any()
  assert not got[1][mask == 0].any()


@pytest.mark.parametrize('name', [None, 'reference', 'pallas'])
def test_gae_on_the_device_is_that_of_the_host(name):
  r, v, mask, ahead, segments = episodes()
  how = dict(gamma=0.97, lam=0.9, bootstrap=ahead, segments=segments)
  got = adv.gae(r, v, mask, implementation=name, **how)
  for a, b in zip(got, adv.gae(r, v, mask, **how), strict=True):
    assert a.dtype == np.float64
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not np.array_equal(a, b)  # float32, so it was not the host again


def test_gae_steps_over_observations():
  """As if what the environment said between two turns were not there."""
  r, v, mask = np.array([[0.0, 1, 2, 3]]), np.array([[0.5, 0.1, -0.2, 0.3]]), np.ones(4)
  short = adv.gae(r, v, mask[None], gamma=0.9, lam=0.8)
  at = [1, 2, 5, 9]
  wide = [np.full((1, 11), np.nan) for _ in range(2)]
  for x, y in zip(wide, (r, v), strict=True):
    x[0, at] = y
  drawn = np.isfinite(wide[0]) * 1.0
  long = adv.gae(*wide, drawn, gamma=0.9, lam=0.8)
  for a, b in zip(long, short, strict=True):
    np.testing.assert_array_equal(a[0, at], b[0])


def test_gae_at_its_ends():
  """λ = 1: return minus value. λ = 0: one step ahead. A right critic: advantage 0."""
  rng = np.random.default_rng(1)
  r, v = rng.normal(size=(2, 3, 6))
  mask = np.ones((3, 6))
  future = np.cumsum(r[:, ::-1], -1)[:, ::-1]
  a, returns = adv.gae(r, v, mask, lam=1.0)
  np.testing.assert_allclose(a, future - v, atol=1e-12)
  np.testing.assert_allclose(returns, future, atol=1e-12)
  one_step = r + np.pad(v[:, 1:], ((0, 0), (0, 1))) - v
  np.testing.assert_allclose(adv.gae(r, v, mask, lam=0.0)[0], one_step, atol=1e-12)
  np.testing.assert_allclose(adv.gae(r, future, mask, lam=0.5)[0], 0, atol=1e-12)


def test_a_cut_off_sequence_counts_on_what_would_have_come():
  r, v, mask = np.zeros((2, 3)), np.zeros((2, 3)), np.array([[0, 1, 1.0], [0, 1, 0]])
  ahead = np.array([[9, 9, 2.0], [9, 3, 9]])  # 9: not the last drawn, never read
  a, _ = adv.gae(r, v, mask, gamma=0.5, lam=0.5, bootstrap=ahead)
  np.testing.assert_allclose(a, [[0, 0.25, 1], [0, 1.5, 0]])


@pytest.mark.parametrize('centre', [True, False])
@pytest.mark.parametrize('ddof', [0, 1])
def test_whitening_is_over_the_trained_tokens(centre, ddof):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 7)) * 3 + 5
  mask = (rng.random((4, 7)) < 0.5) * 1.0
  x[mask == 0] = np.nan
  flat = list(x[mask > 0])
  m = statistics.fmean(flat)
  s = statistics.stdev(flat) if ddof else statistics.pstdev(flat)
  want = np.where(mask > 0, (x - m) / (s + 1e-6) + (0 if centre else m), 0)
  got = adv.whitened(x, mask, centre=centre, ddof=ddof)
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_whitening_what_is_equal_or_not_there_gives_nothing():
  x, mask = np.full((2, 3), 0.35), np.array([[0, 1, 1.0], [1, 1, 0]])
  assert not adv.whitened(x, mask).any()
  np.testing.assert_allclose(adv.whitened(x, mask, centre=False), 0.35 * mask)
  assert not adv.whitened(x, 0 * mask).any()
  assert not adv.whitened(x, 0 * mask, centre=False).any()
  assert not adv.whitened([[1.0, 2.0]], [[1.0, 0.0]]).any()  # one token has no spread


def test_gae_refuses_what_cannot_be():
  ones = np.ones((2, 3))
  for options in (dict(gamma=1.1), dict(lam=-0.1), dict(gamma=float('nan'))):
    with pytest.raises(ValueError, match=r'gamma=.* and lam=.* must be in \[0, 1\]'):
      adv.gae(ones, ones, ones, **options)
  with pytest.raises(ValueError, match=r'values has shape \(2, 4\), mask \(2, 3\)'):
    adv.gae(ones, np.ones((2, 4)), ones)
  with pytest.raises(ValueError, match=r'bootstrap has shape \(2,\), mask'):
    adv.gae(ones, ones, ones, bootstrap=np.ones(2))
  with pytest.raises(ValueError, match=r"implementation='jnp' does not exist; choose"):
    adv.gae(ones, ones, ones, implementation='jnp')
