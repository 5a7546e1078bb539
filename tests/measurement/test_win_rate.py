import numpy as np
import pytest
from scipy import optimize

from educe.measurement.accuracy import wilson
from educe.measurement.win_rate import length_controlled, win_rate

RNG = np.random.default_rng(0)


def by_loop(ours, theirs):
  """(mean share won with ties one half, mean share tied, prompts), pair by pair."""
  won, tied = [], []
  for a, b in zip(ours, theirs, strict=True):
    pairs = [(x, y) for x in a for y in b if x == x and y == y]  # NaN ≠ itself
    if pairs:
      won.append(sum((x > y) + 0.5 * (x == y) for x, y in pairs) / len(pairs))
      tied.append(sum(x == y for x, y in pairs) / len(pairs))
  return np.mean(won), np.mean(tied), len(won)


def test_wins_count_one_and_ties_a_half():
  got = win_rate([3, 1, 2, 5], [1, 1, 4, 5])
  assert (got.rate, got.ties, got.prompts, got.unjudged) == (0.5, 0.5, 4, 0)
  assert (got.low, got.high) == wilson(2, 4)
  assert str(got).startswith('50.0% of 4 prompts (95 % interval 15.0% to 85.0%; 50.0%')


def test_several_completions_and_what_was_not_judged():
  ours = RNG.integers(-2, 3, (50, 3)).astype(float)
  theirs = RNG.integers(-2, 3, (50, 2)).astype(float)
  ours[RNG.random(ours.shape) < 0.3] = np.nan
  theirs[:4] = np.nan
  got = win_rate(ours, theirs)
  rate, ties, prompts = by_loop(ours, theirs)
  np.testing.assert_allclose([got.rate, got.ties], [rate, ties], atol=1e-15)
  assert (got.prompts, got.unjudged) == (prompts, 50 - prompts)
  assert got.unjudged >= 4
  assert f'; {got.unjudged} not judged)' in str(got)


def test_swapping_the_policies_mirrors_everything():
  ours, theirs = RNG.integers(0, 3, (2, 40)).astype(float)
  lengths = RNG.integers(1, 90, (2, 40)).astype(float)
  one, other = win_rate(ours, theirs), win_rate(theirs, ours)
  np.testing.assert_allclose(one.rate, 1 - other.rate)
  np.testing.assert_allclose([one.low, one.high], [1 - other.high, 1 - other.low])
  one = length_controlled(ours, theirs, *lengths)
  other = length_controlled(theirs, ours, *lengths[::-1])
  np.testing.assert_allclose(one.rate, 1 - other.rate, atol=1e-12)
  np.testing.assert_allclose([one.low, one.high], [1 - other.high, 1 - other.low])
  np.testing.assert_allclose(one.length_effect, other.length_effect, atol=1e-12)


@pytest.mark.parametrize('tied', [0.0, 0.5])
def test_the_interval_covers(tied):
  """At least about 95 % of 2,000 experiments; more with ties, as said."""
  won, hits = 0.7, 0
  for _ in range(2000):
    draw = RNG.random(60)
    score = np.where(draw < tied, 0.0, np.where(RNG.random(60) < won, 1.0, -1.0))
    got = win_rate(score, np.zeros(60))
    hits += got.low <= tied / 2 + (1 - tied) * won <= got.high
  assert hits / 2000 > (0.935 if not tied else 0.97)  # Wilson's, at 60, is 94 to 96 %


def world(prompts, theta, phi, seed=0):
  """Scores in which a win has log-odds θ + φ·tanh(Δ/std Δ), and ours are longer."""
  rng = np.random.default_rng(seed)
  ours, theirs = rng.integers(50, 400, prompts), rng.integers(20, 250, prompts)
  longer = (ours - theirs) / (ours - theirs).std()
  p = 1 / (1 + np.exp(-(theta + phi * np.tanh(longer))))
  return (rng.random(prompts) < p) * 1.0, np.full(prompts, 0.5), ours, theirs


def test_the_length_of_an_answer_is_taken_out():
  data = world(20_000, theta=-0.4, phi=2.0)
  raw, got = win_rate(*data[:2]), length_controlled(*data)
  assert raw.low > 0.57  # the judge is charmed: 0.40 at equal length
  want = 1 / (1 + np.exp(0.4))
  assert got.low < want < got.high
  assert got.high - got.low < 0.03
  assert abs(got.length_effect - 2) < 0.15


def test_the_regression_is_the_optimum():
  ours, theirs, our_lengths, their_lengths = world(30, theta=0.3, phi=-1.0)
  ours[:5] = 0.5  # ties
  got = length_controlled(ours, theirs, our_lengths, their_lengths)
  longer = our_lengths - their_lengths
  term = np.tanh(longer / longer.std())

  def loss(theta):
    total = 0.0
    for score, t in zip(ours, term, strict=True):
      z = theta[0] + theta[1] * t
      won = 0.5 if score == 0.5 else score
      total += won * np.log1p(np.exp(-z)) + (1 - won) * np.log1p(np.exp(z))
    for t in (1, -1):
      z = theta[0] + theta[1] * t
      total += 0.25 * np.log1p(np.exp(-z)) + 0.25 * np.log1p(np.exp(z))
    return total

  best = optimize.minimize(loss, [0.0, 0.0], method='Nelder-Mead', tol=1e-12).x
  sigma = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
  # A minimum without derivatives is known to about the root of its tolerance.
  np.testing.assert_allclose([got.rate, got.length_effect], [sigma(best[0]), best[1]],
                             atol=1e-5)  # fmt: skip
  h = 1e-3
  corner = lambda i, j: loss(best + h * np.array([i, j]))  # noqa: E731
  curvature = np.array(
    [
      [corner(1, 0) - 2 * corner(0, 0) + corner(-1, 0), 0],
      [0, corner(0, 1) - 2 * corner(0, 0) + corner(0, -1)],
    ]
  )
  across = (corner(1, 1) - corner(1, -1) - corner(-1, 1) + corner(-1, -1)) / 4
  curvature[0, 1] = curvature[1, 0] = across
  error = np.sqrt(np.linalg.inv(curvature / h**2)[0, 0])
  want = [sigma(best[0] - 1.959964 * error), sigma(best[0] + 1.959964 * error)]
  np.testing.assert_allclose([got.low, got.high], want, atol=1e-4)


def test_equal_lengths_and_only_wins():
  lengths = np.full(9, 30.0)
  got = length_controlled(np.ones(9), np.zeros(9), lengths, lengths)
  # Nine won prompts and one tied.
  np.testing.assert_allclose(got.rate, 0.95, atol=1e-12)
  assert abs(got.length_effect) < 1e-12
  assert win_rate(np.ones(9), np.zeros(9)).rate == 1
  longer = length_controlled(np.ones(9), np.zeros(9), lengths + np.arange(9), lengths)
  assert 0 < longer.low < 0.8 < longer.rate < 1  # all were longer: little is known


def test_what_was_not_judged_is_left_out_of_the_regression_too():
  data = [np.array(x, float) for x in world(40, 0.3, 1.0)]
  want = length_controlled(*(x[3:] for x in data))
  data[0][0], data[1][1], data[1][2] = np.nan, np.nan, np.nan
  data[2][0] = np.nan  # nor is its length asked for
  assert length_controlled(*data) == want
  assert want.prompts == 37


def test_bad_input_is_one_clear_line():
  with pytest.raises(ValueError, match='3 prompts of ours and 2 of theirs'):
    win_rate(np.zeros(3), np.zeros(2))
  with pytest.raises(ValueError, match='no prompt has a score of both'):
    win_rate([np.nan, 1.0], [1.0, np.nan])
  with pytest.raises(ValueError, match='a score of theirs is infinite'):
    win_rate([1.0], [np.inf])
  with pytest.raises(ValueError, match=r'ours must be \[P\] or \[P, N\]'):
    win_rate(1.0, [1.0])
  with pytest.raises(ValueError, match='no prompt has a score of both'):
    length_controlled([np.nan], [1.0], [1.0], [1.0])
  for scores, whose in (([np.inf], [1.0]), 'ours'), (([1.0], [-np.inf]), 'theirs'):
    with pytest.raises(ValueError, match=f'a score of {whose} is infinite'):
      length_controlled(*scores, [1.0], [1.0])
  with pytest.raises(ValueError, match='a length is not finite'):
    length_controlled([0.0], [1.0], [np.nan], [1.0])
  with pytest.raises(ValueError, match=r'must all be \[P\], not \[\[1\], \[1\], \[2\]'):
    length_controlled([0.0], [1.0], [1.0, 2.0], [1.0])
