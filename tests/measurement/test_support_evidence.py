"""Against enumeration: every output of a small language, every sample of a small N."""

import itertools
import math

import numpy as np
import pytest

from educe.measurement import support_evidence
from educe.measurement.accuracy import Z
from educe.measurement.support import clopper_pearson
from educe.measurement.support_evidence import certify, missing_mass

V, L, P = 3, 3, 4
RNG = np.random.default_rng(0)
# Three symbols, three steps: the first given the prompt, the next given the last one.
FIRST = RNG.dirichlet(np.ones(V), P)
NEXT = RNG.dirichlet(np.ones(V), (P, V))
OUTPUTS = np.array(list(itertools.product(range(V), repeat=L)))
CORRECT = RNG.random((P, len(OUTPUTS))) < 0.3


def steps_of(x, y):
  return [FIRST[x, y[0]], NEXT[x, y[0], y[1]], NEXT[x, y[1], y[2]]]


def world(chosen):
  """Traces of the outputs `chosen` `[P, 27]`, behind a prompt position of no meaning."""
  rows = [(x, y) for x in range(P) for y in OUTPUTS[chosen[x]]]
  logp = np.array([[np.nan, *np.log(steps_of(x, y))] for x, y in rows])
  mask = np.array([[0, 1, 1, 1]] * len(rows))
  tokens = np.array([[7 + i, *y] for i, (_, y) in enumerate(rows)])
  return logp, mask, tokens, np.array([x for x, _ in rows])


def test_all_traces_are_the_mass_and_fewer_a_lower_bound():
  got = certify(*world(CORRECT), prompts=P)
  for x in range(P):
    steps = np.array([steps_of(x, y) for y in OUTPUTS[CORRECT[x]]])
    np.testing.assert_allclose(np.exp(got.log_p[x]), steps.prod(1).sum(), rtol=1e-13)
    np.testing.assert_allclose(np.exp(got.log_step[x]), steps.min(1).max(), rtol=1e-13)
    search = (1 / steps).sum(1).min()
    np.testing.assert_allclose(np.exp(got.log_search[x]), search, rtol=1e-13)
  np.testing.assert_array_equal(got.traces, CORRECT.sum(1))
  some = CORRECT & (np.cumsum(CORRECT, 1) <= 2)
  fewer = certify(*world(some), prompts=P)
  assert (fewer.log_p < got.log_p).all()
  assert (fewer.log_step <= got.log_step).all()
  assert (fewer.log_search >= got.log_search).all()
  whole = certify(*world(np.ones_like(CORRECT)), prompts=P)
  np.testing.assert_allclose(whole.log_p, 0, atol=1e-13)
  assert (whole.log_p <= 0).all()


def test_a_trace_given_twice_counts_once():
  """Sampled traces repeat, and two of the same would claim twice the mass."""
  data = world(CORRECT)
  twice = [np.concatenate([x, x]) for x in data]
  for a, b in zip(certify(*data, prompts=P), certify(*twice, prompts=P), strict=True):
    np.testing.assert_array_equal(a, b)


def test_prompts_without_a_trace_certify_nothing():
  data = world(CORRECT & (np.arange(P) != 2)[:, None])
  got = certify(*data, prompts=P + 1)
  np.testing.assert_array_equal(got.traces == 0, [0, 0, 1, 0, 1])
  for x in (2, 4):
    assert (got.log_p[x], got.log_step[x], got.log_search[x]) == (
      -np.inf,
      -np.inf,
      np.inf,
    )
  median = np.median(np.log([np.exp(got.log_p[x]) for x in (0, 1, 3)]))
  assert str(got) == (
    f'3 of 5 prompts have a trace; median log p0 of these ≥ {median:.2f} nats'
  )


def test_a_long_trace_does_not_vanish():
  """e^−2000 is 0 in float64; what search pays for it is 1,000·e² draws of a step."""
  steps = np.full((1, 1000), -2.0)
  got = certify(steps, np.ones((1, 1000)), np.zeros((1, 1000), int), [0], prompts=1)
  np.testing.assert_allclose(got.log_p, -2000, rtol=1e-14)
  np.testing.assert_allclose(np.exp(got.log_search), 1000 * math.e**2, rtol=1e-12)
  cut = np.array([[-1.0, -np.inf]])  # a step that the decoder's top-p has cut off
  got = certify(cut, np.ones((1, 2)), [[1, 2]], [0], prompts=1)
  assert (got.log_p[0], got.log_step[0], got.log_search[0]) == (
    -np.inf,
    -np.inf,
    np.inf,
  )


def test_good_turing_by_hand():
  rows = ['a' * 8 + 'b' * 5 + 'cc' + 'defgh', 'a' * 12 + 'bbccdd' + 'ef', 'a' * 20]
  once, twice = np.array([5, 2, 0]), np.array([1, 3, 0])
  got = missing_mass(rows)
  np.testing.assert_allclose(got.per_prompt, once / 20)
  half = Z * np.sqrt(once * (1 - once / 20) + 2 * twice) / 20
  exact_low, exact_high = clopper_pearson(once, 20)
  # Where it lies further out it is Esty's, and else the exact one.
  assert exact_low[0] > once[0] / 20 - half[0] > 0 > once[1] / 20 - half[1]
  np.testing.assert_allclose(got.per_prompt_low, [once[0] / 20 - half[0], 0, 0])
  assert exact_high[0] > once[0] / 20 + half[0]
  assert exact_high[1] < once[1] / 20 + half[1]
  want = [exact_high[0], once[1] / 20 + half[1], exact_high[2]]
  np.testing.assert_allclose(got.per_prompt_high, want)
  assert (got.rate, got.samples) == (pytest.approx(7 / 60), 20)
  assert str(got).startswith('11.7% of the mass not seen in 20 samples of each of 3')
  alone = missing_mass(rows[:1])
  assert (alone.low, alone.high) == (alone.per_prompt_low[0], alone.per_prompt_high[0])


def test_the_estimate_is_unbiased():
  """Over every sample of N = 4 its mean is the expected missing mass of 3, exactly."""
  p = np.array([0.6, 0.3, 0.1])
  estimate, missing = 0.0, 0.0
  for draw in itertools.product(range(3), repeat=4):
    chance = p[[*draw]].prod()
    estimate += chance * missing_mass([draw]).rate
    missing += chance * sum(p[y] for y in range(3) if y not in draw)
  expected = support_evidence.expected_missing_mass
  np.testing.assert_allclose(estimate, expected(p, 3), atol=1e-15)
  np.testing.assert_allclose(missing, expected(p, 4), atol=1e-15)


ZIPF = 1 / np.arange(1.0, 400)
WORLDS = {
  'uniform': np.full(200, 1 / 200),
  'zipf': ZIPF / ZIPF.sum(),
  'few': np.array([0.5, 0.3, 0.15, 0.05]),
  'rare': np.array([0.99, *[1e-4] * 100]),
}


@pytest.mark.parametrize('p', WORLDS.values(), ids=WORLDS)
def test_the_interval_of_a_prompt_covers_what_was_missed(p):
  """200 seeds; what is to be covered is the mass that this very sample has not seen."""
  rng, covered = np.random.default_rng(2), 0
  for _ in range(200):
    draw = rng.choice(len(p), 100, p=p)
    got = missing_mass([draw.tolist()])
    missing = p.sum() - p[np.unique(draw)].sum()
    covered += got.low - 1e-12 <= missing <= got.high
  assert covered / 200 > 0.91  # 95 % and more of 2,000, less 2.5 errors of 1.5 %


def test_the_interval_over_prompts_covers():
  """200 seeds of 30 prompts, each with its own number of labels, and N = 40."""
  rng, covered, rates = np.random.default_rng(3), 0, []
  sizes = np.arange(1, 60)
  truth = np.mean([(1 - 1 / s) ** 39 for s in sizes])  # Σ p(1−p)³⁹, equal p
  for _ in range(200):
    size = rng.choice(sizes, 30)
    labels = [rng.integers(0, s, 40).tolist() for s in size]
    got = missing_mass(labels, resamples=200)
    covered += got.low <= truth <= got.high
    rates.append(got.rate)
  assert covered / 200 > 0.89  # of 1,000 seeds 93 %: 30 prompts are few to resample
  error = np.std(rates) / math.sqrt(200)
  np.testing.assert_allclose(np.mean(rates), truth, atol=4 * error)


def test_nothing_seen_once_is_not_nothing_missing():
  got = missing_mass([[0, 0, 1, 1]] * 20)
  assert got.rate == 0
  assert got.low == 0
  np.testing.assert_allclose(got.high, clopper_pearson(0, 80)[1])
  assert 0.03 < got.high < 0.05


def test_resampling_is_seeded():
  labels = [RNG.integers(0, size, 37).tolist() for size in range(1, 61)]
  one, same = missing_mass(labels), missing_mass(labels, seed=0)
  other, few = missing_mass(labels, seed=1), missing_mass(labels, resamples=100)
  assert (one.low, one.high) == (same.low, same.high)
  assert (one.low, one.high) != (other.low, other.high)
  assert (one.low, one.high) != (few.low, few.high)


def test_bad_input_is_one_clear_line():
  logp, mask, tokens, prompt = world(CORRECT)
  for message, args in [
    (r'must be \[R, T\] and prompt \[R\]', (logp[:, 1:], mask, tokens, prompt)),
    (r'must be \[R, T\] and prompt \[R\]', (logp, mask, tokens, prompt[1:])),
    ('trace 0 has no step', (logp, mask * 0, tokens, prompt)),
    ('is of prompt 3, and there are 3', (logp, mask, tokens, prompt)),
    ('is of prompt -1, and', (logp, mask, tokens, prompt - 1)),
    ('nan is no log-probability', (logp, mask * 0 + 1, tokens, prompt)),
  ]:
    with pytest.raises(ValueError, match=message):
      certify(*args, prompts=3)
  step, beginning = np.zeros((3, 3)) - 1, np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
  traces = np.array([[5, 2, 3], [4, 0, 0], [5, 2, 0]])
  with pytest.raises(
    ValueError, match='one trace of 2 steps is the beginning of anoth'
  ):
    certify(step, beginning, traces, [0, 0, 0], prompts=1)
  certify(step, beginning, traces, [0, 0, 1], prompts=2)  # of another prompt it may be
  for labels in ([], [[]], [[1, 2], [1]]):
    with pytest.raises(ValueError, match=r'labels must be \[P, N\], not rows of'):
      missing_mass(labels)
  with pytest.raises(ValueError, match='n=-1 must be 0 or more'):
    support_evidence.expected_missing_mass(np.ones(1), -1)
