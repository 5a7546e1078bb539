import json
import math

import numpy as np
import pytest

from educe.measurement import description_length
from educe.measurement.description_length import course, exact, excess

TRUTH = np.array([0.7, 0.2, 0.06, 0.04])  # the labels of a world without prompts


def laplace(labels, n, classes=4):
  """Predictions `[n + 1, Y]` of the rule of succession: before each label, and at last."""
  counts = np.zeros((n + 1, classes))
  counts[1:] = np.cumsum(np.eye(classes)[labels[:n]], axis=0)
  return (counts + 1) / (np.arange(n + 1)[:, None] + classes)


def surprise(predictions, labels):
  return -np.log(predictions[np.arange(len(labels)), labels])


def test_the_definition_by_a_loop_and_the_code_length_in_closed_form():
  rng = np.random.default_rng(0)
  labels, held_out = rng.choice(4, 300, p=TRUTH), rng.choice(4, 77, p=TRUTH)
  predictions = laplace(labels, 300)
  got = excess(
    surprise(predictions, labels), np.full(300, 2), -np.log(predictions[-1][held_out])
  )
  total, test = 0.0, 0.0
  for i, label in enumerate(labels):
    total -= math.log2(predictions[i][label])
  for label in held_out:
    test -= math.log2(predictions[-1][label]) / 77
  np.testing.assert_allclose(got.codelength, total)
  np.testing.assert_allclose(got.test, test)
  np.testing.assert_allclose(got.excess, total - 300 * test)
  np.testing.assert_allclose(got.per_token, (total - 300 * test) / 600)
  assert (got.examples, got.tokens) == (300, 600)
  # Laplace's code length has a closed form: n!·(Y−1)!/(n+Y−1)! of a multinomial's.
  counts = np.bincount(labels, minlength=4)
  log_p = sum(math.lgamma(c + 1) for c in counts) + math.lgamma(4) - math.lgamma(304)
  np.testing.assert_allclose(got.codelength, -log_p / math.log(2))
  assert 'bits per label token (95 % interval' in str(got)


def test_steps_are_sums_of_examples():
  rng = np.random.default_rng(1)
  losses, tokens = rng.exponential(2, 96), rng.integers(1, 9, 96)
  test = rng.exponential(1, 20)
  one = excess(losses, tokens, test)
  many = excess(
    losses.reshape(12, 8).sum(1),
    tokens.reshape(12, 8).sum(1),
    test,
    examples=np.full(12, 8),
  )
  np.testing.assert_allclose(many[3:6], one[3:6], rtol=1e-12)
  assert many[6:] == one[6:] == (96, tokens.sum())
  np.testing.assert_allclose(many.per_token, one.per_token)


def test_the_exact_twin_is_the_expectation_of_the_estimate():
  """A learner that ignores its labels: the course is fixed, the mean over seeds exact."""
  n, seeds = 40, 4000
  fixed = np.linspace(0, 1, n + 1)[:, None]
  predictions = (1 - fixed) * 0.25 + fixed * TRUTH
  predictions[-1] = [0.6, 0.2, 0.1, 0.1]
  truth = exact(TRUTH, predictions[:-1], predictions[-1])
  cross = -(TRUTH * np.log2(predictions)).sum(1)
  np.testing.assert_allclose(truth, cross[:-1].sum() - n * cross[-1])
  rng = np.random.default_rng(2)
  draws = []
  for _ in range(seeds):
    labels, held_out = rng.choice(4, n, p=TRUTH), rng.choice(4, 30, p=TRUTH)
    losses = surprise(predictions, labels) / math.log(2)
    draws.append(losses.sum() + n * np.log2(predictions[-1][held_out]).mean())
  error = np.std(draws) / math.sqrt(seeds)
  assert abs(np.mean(draws) - truth) < 4 * error
  got = excess(
    surprise(predictions, labels), np.ones(n), -np.log(predictions[-1][held_out])
  )
  np.testing.assert_allclose(got.excess, draws[-1])


def test_the_exact_twin_over_prompts_and_impossible_labels():
  rng = np.random.default_rng(3)
  p = rng.dirichlet(np.ones(5), 3)
  p[0] = [0.5, 0.5, 0, 0, 0]
  predictions, final = rng.dirichlet(np.ones(5), (7, 3)), rng.dirichlet(np.ones(5), 3)
  predictions[:, 0, 4] = 0  # never asked for
  by_loop = 0.0
  for i in range(7):
    for x in range(3):
      for y in range(5):
        if p[x, y] > 0:
          by_loop += p[x, y] * math.log2(final[x, y] / predictions[i, x, y]) / 3
  np.testing.assert_allclose(exact(p, predictions, final), by_loop)
  predictions[0, 0, 0] = 0
  assert exact(p, predictions, final) == math.inf


@pytest.mark.parametrize('taught', [True, False])
def test_the_interval_covers_what_is_expected_on_the_course_of_training(taught):
  """200 seeds; the truth is Σ E[−log p_{θ_{i−1}}] − n·E[−log p_θ*], the labels' alone.

  Binomial(200, .95) is in 180..198 with probability .999.
  """
  covered, n = 0, 256
  for seed in range(200):
    rng = np.random.default_rng(seed)
    labels, held_out = rng.choice(4, n, p=TRUTH), rng.choice(4, 400, p=TRUTH)
    predictions = laplace(labels, n)
    if not taught:  # a steep start must not widen the interval
      predictions[:8] = [0.001, 0.009, 0.09, 0.9]
    got = excess(
      surprise(predictions[:-1], labels),
      np.ones(n),
      -np.log(predictions[-1][held_out]),
      resamples=300,
      seed=seed,
    )
    truth = exact(TRUTH, predictions[:-1], predictions[-1]) / n
    covered += got.low <= truth <= got.high
  assert 180 <= covered <= 198


def test_a_trend_does_not_widen_the_interval_and_noise_does():
  """On a ramp neighbours differ little; shuffled, the same losses are noise."""
  ramp = np.linspace(4, 0.01, 500)
  smooth = excess(ramp, np.ones(500), [0.01])
  noisy = excess(
    np.random.default_rng(0).permutation(ramp), np.ones(500), [0.01], seed=1
  )
  assert smooth.high - smooth.low < 0.01 * (noisy.high - noisy.low)
  # Normal: ±1.96 standard errors of a mean of 500, in bits; 1,000 resamples know
  # their quantiles to about 5 %.
  expected = 2 * 1.96 * ramp.std() / math.sqrt(500) / math.log(2)
  np.testing.assert_allclose(noisy.high - noisy.low, expected, rtol=0.2)


SIZES = [16, 32, 64, 128, 256, 512, 1024]


def stream(rng, known_after, n=1024, noise=0.04):
  """Losses of 3 nats until so many examples are seen, then 0.2; and the test losses."""
  losses = np.where(np.arange(n) < known_after, 3.0, 0.2) + noise * rng.normal(size=n)
  tests = np.where(np.array(SIZES)[:, None] < known_after, 3.0, 0.2)
  return losses, tests + noise * rng.normal(size=(1, 50))


@pytest.mark.parametrize(
  ('known_after', 'shape', 'peak'), [(3, 'falls', 16), (256, 'rises', 256)]
)
def test_elicited_skills_fall_and_taught_ones_rise_first(known_after, shape, peak):
  for seed in range(5):
    losses, tests = stream(np.random.default_rng(seed), known_after)
    got = course(losses, np.ones(1024), tests, sizes=SIZES, resamples=200)
    assert (got.shape, got.peak) == (shape, peak)
    assert got.support > 0.95
    for point, size, test in zip(got.points, SIZES, tests, strict=True):
      alone = excess(losses[:size], np.ones(size), test)
      np.testing.assert_allclose(point.per_token, alone.per_token, rtol=1e-10)
      assert (point.examples, point.tokens) == (size, size)
      seen = min(known_after, size)
      expected = seen * 2.8 / size if known_after <= size else 0.0
      # Standard error of a mean of 16 is 0.01 nats, of the 50 tests 0.006.
      assert abs(point.per_token * math.log(2) - expected) < 0.07
    for k, difference in enumerate(got.differences):
      change = got.points[k + 1].per_token - got.points[k].per_token
      np.testing.assert_allclose(difference.change, change)
      assert difference.low < change < difference.high
  assert f'{shape} (' in str(got)
  assert f'peak at {peak} examples' in str(got)


def test_the_shape_is_of_the_first_decades():
  """A rise that begins after a decade is none of the first decade."""
  losses, tests = stream(np.random.default_rng(0), known_after=3)
  tests[-1] = 0.0  # EDL/D is larger again at 1,024
  arguments = dict(sizes=SIZES, resamples=50)
  assert course(losses, np.ones(1024), tests, **arguments).shape == 'unclear'
  short = course(losses, np.ones(1024), tests, decades=1.0, **arguments)
  assert short.shape == 'falls'
  assert course(losses, np.ones(1024), tests, decades=1.8, **arguments).shape == 'falls'
  # What is counted is examples, whatever a row is.
  four = np.full(1024, 4)
  rows = course(losses, four, tests / 4, examples=four, decades=1.8, **arguments)
  assert (rows.shape, rows.peak) == ('falls', 64)


def test_where_there_is_nothing_to_learn_no_shape_has_support():
  supports = []
  for seed in range(20):
    rng = np.random.default_rng(seed)
    losses, tests = 1 + rng.normal(size=1024) / 5, 1 + rng.normal(size=(7, 200)) / 5
    got = course(losses, np.ones(1024), tests, sizes=SIZES, resamples=100)
    supports.append(got.support)
  assert np.median(supports) < 0.9


def test_differences_know_that_the_sizes_share_their_examples():
  """Their interval is that of shared examples, and a point's that of its size alone."""
  rng = np.random.default_rng(4)
  losses, tests = stream(rng, known_after=3, noise=0.5)
  losses, tests = losses + 2, tests + 2
  got = course(losses, np.ones(1024), tests, sizes=SIZES, resamples=2000)
  # A mean of 512 against that of 1,024 with the same held-out examples: the standard
  # deviation is .5·√(1/512 − 1/1024) nats; 511 differences know it to 4 %.
  width = 2 * 1.96 * 0.5 * math.sqrt(1 / 512 - 1 / 1024) / math.log(2)
  last = got.differences[-1]
  np.testing.assert_allclose(last.high - last.low, width, rtol=0.15)
  for point, size, test in zip(got.points, SIZES, tests, strict=True):
    alone = excess(losses[:size], np.ones(size), test, resamples=2000, seed=7)
    # Alone the last row has another neighbour, and the draws are others.
    wide = alone.high - alone.low
    np.testing.assert_allclose(point.high - point.low, wide, rtol=0.12)


def test_draws_are_of_their_seed():
  losses, tests = stream(np.random.default_rng(0), known_after=3)
  one, same, other = (
    excess(losses, np.ones(1024), tests[-1], seed=seed) for seed in (0, 0, 1)
  )
  assert one == same
  assert one.low != other.low
  assert one.per_token == other.per_token


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(losses=[1.0]), r'must all be \[N\]'),
    (dict(losses=[1.0], tokens=[1]), '1 rows have no interval'),
    (dict(losses=[1.0, np.nan]), 'losses has one'),
    (dict(losses=[1.0, -2.0]), '−log p in nats'),
    (dict(test_losses=[-0.5]), 'test_losses has one'),
    (dict(test_losses=[]), 'test_losses must be one or more'),
    (dict(tokens=[1, 0]), 'no label token'),
    (dict(examples=[1, 0]), 'no example'),
    (dict(resamples=0), 'resamples=0'),
  ],
)
def test_bad_input_of_one_run_is_one_clear_line(arguments, message):
  good = dict(losses=[1.0, 0.5], tokens=[1, 1], test_losses=[0.4])
  excess(**good)
  excess(**{**good, 'losses': [1.0, -1e-7]})  # a rounding of float32
  with pytest.raises(ValueError, match=message) as error:
    excess(**{**good, **arguments})
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(sizes=[4, 2]), 'must grow'),
    (dict(sizes=[2, 9]), r'in 1\.\.8'),
    (dict(sizes=[0, 4]), r'in 1\.\.8'),
    (dict(sizes=[]), r'in 1\.\.8'),
    (dict(sizes=[2, 4, 8]), '2 rows for 3 sizes'),
    (dict(decades=0.2), 'decades=0.2 from 2 examples'),
    (dict(test_losses=np.ones(2)), r'not \[2\]'),
  ],
)
def test_bad_input_of_a_course_is_one_clear_line(arguments, message):
  good = dict(
    losses=np.ones(8), tokens=np.ones(8), test_losses=np.ones((2, 3)), sizes=[2, 8]
  )
  course(**good)
  with pytest.raises(ValueError, match=message) as error:
    course(**{**good, **arguments})
  assert '\n' not in str(error.value)


def test_of_a_run_it_is_read_from_what_the_run_logged(tmp_path):
  nll, tokens = [2.0, 1.0, 0.5], [10, 30, 20]
  rows = [{'step': 0, 'accuracy': 0.1}] + [
    {'step': i + 1, 'nll': nll[i], 'num_tokens': tokens[i]} for i in range(3)
  ]
  log = tmp_path / 'metrics.jsonl'
  log.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  got = description_length.of_run(tmp_path, 0.25)
  mdl = (20 + 30 + 10) / math.log(2)
  np.testing.assert_allclose(got.codelength, mdl, rtol=1e-12)
  np.testing.assert_allclose(got.excess, mdl - 60 * 0.25 / math.log(2), rtol=1e-12)
  np.testing.assert_allclose(got.per_token, got.excess / 60, rtol=1e-12)
  fell = [{**row, 'learning_rate': 1e-3 / max(row['step'], 1)} for row in rows]
  log.write_text(''.join(json.dumps(row) + '\n' for row in fell))
  with pytest.raises(
    ValueError, match=r'the learning rate fell from 0\.001 to 0\.000333'
  ):
    description_length.of_run(tmp_path, 0.25)
  for missing in (rows[:2] + rows[3:], rows[:1]):
    log.write_text(''.join(json.dumps(row) + '\n' for row in missing))
    with pytest.raises(ValueError, match='needs all of a run of SFT'):
      description_length.of_run(tmp_path, 0.25)
