"""Against enumeration of subsets and outcomes; the sampled null against the exact one."""

import itertools
import math

import numpy as np
import pytest

from educe.measurement import best_of_n, pass_at_k, sharpening

RNG = np.random.default_rng(0)


def draws(p0, samples, seed):
  """(outcomes `[P, N]`, log p0 of each) of a world `[P, Y]`."""
  rng = np.random.default_rng(seed)
  top = p0.cumsum(-1)
  drawn = (rng.random((len(p0), samples))[..., None] > top[:, None, :-1]).sum(-1)
  return drawn, np.log(np.take_along_axis(p0, drawn, -1))


def world(prompts, seed=0, outcomes=6):
  """The most likely outcome is correct in most prompts, so that sharpening pays."""
  rng = np.random.default_rng(seed)
  p0 = rng.dirichlet(np.ones(outcomes), prompts)
  correct = rng.random((prompts, outcomes)) < 0.1
  rows = np.arange(prompts)
  correct[rows, p0.argmax(-1)] |= rng.random(prompts) < 0.8
  return p0, correct


def by_subsets(rewards, logp, alpha, k):
  above = below = 0.0
  for subset in itertools.combinations(range(len(rewards)), k):
    weight = math.prod(math.exp((alpha - 1) * logp[i]) for i in subset)
    below += weight
    above += weight * all(rewards[i] < 1 for i in subset)
  return 1 - above / below


@pytest.mark.parametrize('alpha', [0.3, 1.0, 4.0])
def test_the_power_base(alpha):
  p0 = RNG.dirichlet(np.ones(5), 3)
  np.testing.assert_allclose(
    sharpening.power(p0, alpha), p0**alpha / (p0**alpha).sum(-1, keepdims=True)
  )
  got = sharpening.power([0.0, 1e-300, 1.0], alpha)
  np.testing.assert_allclose(got, [0, 1e-300**alpha, 1], rtol=1e-12, atol=0)


@pytest.mark.parametrize('alpha', [0.5, 1.0, 3.0])
def test_the_estimate_weighs_every_subset(alpha):
  rewards = (RNG.random((4, 7)) < 0.4) * 1.0
  logp = RNG.normal(-5, 2, (4, 7))
  k = [1, 2, 5]
  got, effective = sharpening.power_estimates(rewards, logp, alpha, k)
  for x in range(4):
    want = [by_subsets(rewards[x], logp[x], alpha, y) for y in k]
    np.testing.assert_allclose(got[x], want, rtol=1e-11, atol=1e-14)
  w = np.exp((alpha - 1) * logp)
  np.testing.assert_allclose(effective, w.sum(-1) ** 2 / (w**2).sum(-1))
  if alpha == 1:
    np.testing.assert_allclose(got, pass_at_k.estimates(rewards, k), atol=1e-13)
    np.testing.assert_allclose(effective, 7)


def test_what_was_not_scored_is_left_out():
  rewards, logp = (RNG.random((3, 6)) < 0.5) * 1.0, RNG.normal(-3, 1, (3, 6))
  want = sharpening.power_estimates(rewards, logp, 2.0, [1, 3])
  more = np.concatenate([np.full((3, 2), np.nan), rewards], 1)
  far = np.concatenate([[[np.nan, 0.0]] * 3, logp], 1)
  got = sharpening.power_estimates(more, far, 2.0, [1, 3])
  np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-12)


def test_very_unlikely_texts_have_weights_too():
  """Long texts have log-probs of −2000, and their weights span e^600."""
  logp = np.array([[-2000.0, -2100.0, -2300.0, -2600.0]])
  got, effective = sharpening.power_estimates([[0, 1, 1, 1]], logp, 2.0, [1, 2, 4])
  # Of one draw the first is nearly sure; of two subsets that hold it, all are solved.
  np.testing.assert_allclose(got, [[math.exp(-100), 1, 1]], rtol=1e-12)
  np.testing.assert_allclose(effective, 1)


@pytest.mark.parametrize('alpha', [0.5, 2.0])
def test_over_200_seeds_estimates_centre_on_the_exact_value(alpha):
  """The bias of a ratio falls as 1/N: at 256 samples it is within the sampling error."""
  p0, correct = world(4)
  p0 = 0.9 * p0 + 0.1 / 6  # what is hardly ever drawn would have great weights at ½
  solved = (sharpening.power(p0, alpha) * correct).sum(-1)
  k = np.array([1, 4])
  want = pass_at_k.exact(solved[:, None], k)
  mean, error = [], []
  for samples in (8, 256):
    drawn, logp = draws(np.tile(p0, (200, 1)), samples, 0)
    rewards = np.take_along_axis(np.tile(correct, (200, 1)), drawn, -1)
    got, effective = sharpening.power_estimates(rewards, logp, alpha, k)
    got = got.reshape(200, 4, 2)
    mean.append(got.mean(0))
    error.append(got.std(0) / np.sqrt(200))
  assert (np.abs(mean[1] - want) < 3.5 * error[1] + 2 / 256).all()
  assert np.abs(mean[1] - want).max() < np.abs(mean[0] - want).max()
  # N·(Σ p0^α)²/Σ p0^(2α−1): what the effective samples are on average.
  per = (p0**alpha).sum(-1) ** 2 / (p0 ** (2 * alpha - 1)).sum(-1)
  np.testing.assert_allclose(effective.reshape(200, 4).mean(0) / 256, per, rtol=0.05)


def test_the_exponent_is_chosen_on_one_part_and_reported_on_the_other():
  p0, correct = world(60)
  development = np.arange(60) < 25
  k, alphas = [1, 8], (0.5, 1.0, 2.0, 8.0)
  got = sharpening.sharpened_exact(
    p0, correct, k, alphas=alphas, development=development, resamples=200
  )
  earned = {}
  for alpha in alphas:
    tilted = p0**alpha / (p0**alpha).sum(-1, keepdims=True)
    earned[alpha] = (tilted * correct).sum(-1)
  best = max(alphas, key=lambda x: earned[x][:25].mean())
  assert got.alpha == best == 8
  np.testing.assert_allclose(got.development, earned[best][:25].mean())
  values = 1 - (1 - earned[best][25:, None]) ** np.array(k)
  np.testing.assert_allclose(got.values, values)
  np.testing.assert_allclose(got.curve.rate, values.mean(0))
  assert got.curve.prompts == 35
  assert got.prompts.tolist() == list(range(25, 60))
  assert got.effective is None
  assert str(got).startswith('p0^8: pass@1 ')


def test_the_part_that_reports_has_no_say():
  """Where sharpening pays on the development prompts alone, it is chosen, and harms."""
  p0 = np.tile([0.6, 0.4], (40, 1))
  correct = np.tile([1.0, 0.0], (40, 1))
  correct[20:] = [0.0, 1.0]
  development = np.arange(40) < 20
  got = sharpening.sharpened_exact(p0, correct, [1], development=development)
  assert got.alpha == 16
  assert got.curve.rate[0] < 0.01 < 0.99 < got.development
  got = sharpening.sharpened_exact(p0, correct, [1], development=~development)
  assert got.alpha == 0.25
  # Nothing to choose from: the base itself.
  got = sharpening.sharpened_exact(p0, np.zeros((40, 2)), [1])
  assert (got.alpha, got.development) == (1, 0)


def test_the_sampled_null_is_the_exact_one():
  p0, correct = world(80)
  drawn, logp = draws(p0, 400, 1)
  rewards = np.take_along_axis(correct, drawn, -1) * 1.0
  given = dict(alphas=(0.5, 1.0, 4.0), resamples=200, seed=3)
  exact = sharpening.sharpened_exact(p0, correct, [1, 4], **given)
  got = sharpening.sharpened(rewards, logp, [1, 4], **given)
  assert got.alpha == exact.alpha == 4
  assert got.prompts.tolist() == exact.prompts.tolist()
  assert len(got.prompts) == 40
  # 400 samples with an effective 40 or more: 0.08 a prompt, a sixth of it in the mean.
  np.testing.assert_allclose(got.curve.rate, exact.curve.rate, atol=0.04)
  np.testing.assert_allclose(got.development, exact.development, atol=0.04)
  _, effective = sharpening.power_estimates(rewards, logp, 4.0, [1])
  np.testing.assert_allclose(got.effective, np.median(effective[got.prompts]))
  assert str(got).startswith(f'p0^4, {got.effective:.1f} samples: pass@1 ')
  other = sharpening.sharpened(rewards, logp, [1, 4], **(given | dict(seed=4)))
  assert other.prompts.tolist() != got.prompts.tolist()


def test_a_perfect_verifier_is_pass_at_n_and_a_fraction_lies_between():
  rewards = (RNG.random((5, 8)) < 0.4) * 1.0
  for n in (1, 3, 8):
    np.testing.assert_allclose(
      sharpening.best_of(rewards, n),
      pass_at_k.estimates(rewards, [n])[:, 0],
      atol=1e-13,
    )
  want = pass_at_k.estimates(rewards, [2, 3]) @ [0.7, 0.3]
  np.testing.assert_allclose(sharpening.best_of(rewards, 2.3), want, atol=1e-13)


def test_a_verifier_that_errs():
  rewards = (RNG.random((5, 8)) < 0.4) * 2.0  # 2 is no better than 1
  scores = RNG.normal(size=(5, 8)).round(0)
  got = sharpening.best_of(rewards, 3, scores=scores)
  want = best_of_n.expected(scores, 3, worth=(rewards >= 1) * 1.0)
  np.testing.assert_allclose(got, want)
  assert (got != sharpening.best_of(rewards, 3)).any()
  rewards[:, 0], scores[:, 0] = np.nan, np.nan
  got = sharpening.best_of(rewards, 3, scores=scores)
  want = best_of_n.expected(scores[:, 1:], 3, worth=(rewards[:, 1:] >= 1) * 1.0)
  np.testing.assert_allclose(got, want)


def test_equal_tokens():
  lengths = [[10, 20, np.nan], [30, 20, 20]]
  assert sharpening.affordable(50, lengths) == 2.5
  assert sharpening.affordable(5, lengths) == 1


def test_bad_input_is_one_clear_line():
  rewards, logp = np.zeros((4, 3)), np.full((4, 3), -1.0)
  for alpha in (0, -1, math.inf, math.nan):
    for f in (
      lambda a: sharpening.power([0.5, 0.5], a),
      lambda a: sharpening.power_estimates(rewards, logp, a, [1]),
      lambda a: sharpening.sharpened(rewards, logp, [1], alphas=[a, 1]),
    ):
      with pytest.raises(ValueError, match='must be a positive number'):
        f(alpha)
  with pytest.raises(ValueError, match='alphas is empty'):
    sharpening.sharpened(rewards, logp, [1], alphas=[])
  with pytest.raises(ValueError, match='k=4 needs as many scored samples'):
    sharpening.power_estimates(rewards, logp, 2.0, [1, 4])
  for bad in (np.zeros((4, 2)), np.where(np.eye(4, 3), np.nan, logp)):
    with pytest.raises(ValueError, match='must be finite for every scored sample'):
      sharpening.power_estimates(rewards, bad, 2.0, [1])
  for development in (np.ones(4), np.zeros(4), np.ones(3)):
    with pytest.raises(ValueError, match='some must be in it, and some not'):
      sharpening.sharpened(rewards, logp, [1], development=development)
  for n in (0.5, 3.5):
    with pytest.raises(ValueError, match=f'n={n} must be between 1 and the 3'):
      sharpening.best_of(rewards, n)
  with pytest.raises(ValueError, match=r'scores \[4, 2\] and rewards \[4, 3\]'):
    sharpening.best_of(rewards, 1, scores=np.zeros((4, 2)))
  with pytest.raises(ValueError, match='a score is not finite'):
    sharpening.best_of(rewards, 1, scores=np.full((4, 3), np.nan))
  for tokens, lengths in ((0, [[1.0]]), (5, [[0.0]]), (5, [[np.nan]])):
    with pytest.raises(ValueError, match='both must be positive'):
      sharpening.affordable(tokens, lengths)
