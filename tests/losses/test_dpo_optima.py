"""Where the real dpo.loss leads, in a world whose optimum is known exactly.

Exact expectations: every ordered pair (chosen i, rejected j) of N one-token completions
is a batch of its own, whose loss is weighted by how often that pair and that label occur.
Minimised in float64 over the logits of a tabular policy, from the reference.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.environments import tabular
from educe.losses import dpo
from educe.types import Batch, Scores

BETA, N = 0.3, 8
RNG = np.random.default_rng(0)
P0 = RNG.dirichlet(np.full(N, 2.0))
REWARD = RNG.permutation(np.linspace(0, 1, N))
GIBBS = tabular.gibbs(P0, REWARD, BETA)
CHOSEN, REJECTED = np.nonzero(~np.eye(N, dtype=bool))

# Bradley–Terry: P(i ≻ j) = σ(r_i − r_j). A pair is drawn as two draws from μ.
BRADLEY_TERRY = 1 / (1 + np.exp(REWARD - REWARD[:, None]))
DETERMINISTIC = (REWARD[:, None] > REWARD) * 1.0
MU = RNG.dirichlet(np.ones(N))
PRODUCT = np.outer(MU, MU)


def expected(preference, drawn, **setting):
  """θ → E[loss]: a pair {i, j} comes up with `drawn`, and i wins with `preference`."""
  log_p0 = jnp.log(P0)
  weight = jnp.asarray((drawn * preference)[CHOSEN, REJECTED])
  weight = weight / weight.sum()
  after_blank = lambda x: jnp.stack([jnp.zeros(2), x], 1)  # noqa: E731
  mask = after_blank(jnp.ones(2))

  def of_pair(log_pi, pair):
    batch = Batch(
      jnp.zeros((2, 2), jnp.int32), mask, ref_logp=after_blank(log_p0[pair])
    )
    scores = Scores(after_blank(log_pi[pair]), jnp.zeros((2, 2)))
    return dpo.loss(scores, batch, **setting)[0].value

  pairs = jnp.stack([CHOSEN, REJECTED], 1)
  return lambda theta: (
    weight * jax.vmap(of_pair, (None, 0))(jax.nn.log_softmax(theta), pairs)
  ).sum()


def newton(loss, theta, steps=50):
  """Down along every direction that the loss can see, none that it cannot."""

  def step(theta, _):
    curvature, axes = jnp.linalg.eigh(jax.hessian(loss)(theta))
    seen = jnp.abs(curvature) > 1e-9
    along = axes.T @ jax.grad(loss)(theta)
    along = jnp.where(seen, along / jnp.where(seen, jnp.abs(curvature), 1), 0)
    far = jnp.maximum(jnp.linalg.norm(along), 1.0)  # not all of these are convex
    return theta - axes @ along / far, None

  return jax.jit(lambda t: jax.lax.scan(step, t, length=steps)[0])(theta)


def optimum(preference, drawn, start=P0, **setting):
  """π at the minimum, from `start`."""
  with jax.enable_x64():
    loss = expected(preference, drawn, **setting)
    theta = newton(loss, jnp.log(start))
    assert np.abs(jax.grad(loss)(theta)).max() < 1e-10
    return np.asarray(jax.nn.softmax(theta))


@pytest.mark.parametrize(
  'drawn', [np.ones((N, N)), PRODUCT], ids=['uniform', 'product']
)
def test_dpo_on_bradley_terry_labels_reaches_gibbs(drawn):
  pi = optimum(BRADLEY_TERRY, drawn, beta=BETA)
  assert tabular.total_variation(pi, GIBBS) < 1e-8
  assert tabular.total_variation(P0, GIBBS) > 0.1  # it had to move


def test_with_any_pair_distribution_of_full_support_the_optimum_is_gibbs():
  drawn = RNG.random((N, N))
  pi = optimum(BRADLEY_TERRY, drawn + drawn.T, beta=BETA)
  assert tabular.total_variation(pi, GIBBS) < 1e-8


def test_pairs_on_a_subset_fix_its_ratios_but_not_its_mass():
  """What no pair compares, DPO does not learn: coverage is needed, not only pairs."""
  inside = np.arange(N) >= 3
  drawn = np.outer(inside, inside) * 1.0
  pi = optimum(BRADLEY_TERRY, drawn, beta=BETA)
  np.testing.assert_allclose(
    pi[inside] / pi[inside].sum(), GIBBS[inside] / GIBBS[inside].sum(), atol=1e-8
  )
  assert abs(pi[inside].sum() - GIBBS[inside].sum()) > 0.3
  # Outside, what the reference said is what is left, whatever the reward.
  rest = lambda p: p[~inside] / p[~inside].sum()  # noqa: E731
  np.testing.assert_allclose(rest(pi), rest(P0), atol=1e-12)
  assert np.abs(rest(pi) - rest(GIBBS)).max() > 0.02
  # Another start has the same loss and another mass: the data do not say which.
  other = np.where(inside, 3.0, 1.0) * P0
  far = optimum(BRADLEY_TERRY, drawn, start=other / other.sum(), beta=BETA)
  with jax.enable_x64():
    loss = expected(BRADLEY_TERRY, drawn, beta=BETA)
    np.testing.assert_allclose(loss(jnp.log(pi)), loss(jnp.log(far)), rtol=1e-12)
  assert abs(far[inside].sum() - pi[inside].sum()) > 0.1


def test_deterministic_labels_send_dpo_off_without_bound():
  best = REWARD.argmax()
  with jax.enable_x64():
    loss = expected(DETERMINISTIC, np.ones((N, N)), beta=BETA)
    step = lambda theta, _: (theta - 100 * jax.grad(loss)(theta), None)  # noqa: E731
    run = jax.jit(lambda t, n: jax.lax.fori_loop(0, n, lambda i, t: step(t, i)[0], t))
    theta, margins, losses, top = jnp.log(P0), [], [], []
    for steps in (100, 900, 9000):
      theta = run(theta, steps)
      order = np.asarray(theta - jnp.log(P0))[np.argsort(REWARD)]
      margins.append(BETA * np.diff(order).min())
      losses.append(float(loss(theta)))
      top.append(float(jax.nn.softmax(theta)[best]))
  # A separable logistic loss falls as 1/steps, and its margin grows as log(steps).
  assert np.diff(margins).min() > 0.75 * np.log(10)
  assert losses[2] < losses[1] / 5 < losses[0] / 25
  assert GIBBS[best] < top[0] < top[1] < top[2]
  assert top[2] > 0.999


@pytest.mark.parametrize('beta', [0.2, 1.0])
@pytest.mark.parametrize(
  'preference', [BRADLEY_TERRY, DETERMINISTIC], ids=['bradley_terry', 'deterministic']
)
def test_ipo_stays_at_its_closed_form(preference, beta):
  """π ∝ π_ref·exp(E_{y'~μ}[P(y ≻ y')]/τ), even where one answer always wins."""
  preference = np.where(np.eye(N, dtype=bool), 0.5, preference)
  closed = tabular.gibbs(P0, preference @ MU, beta)
  pi = optimum(preference, PRODUCT, variant='ipo', beta=beta)
  assert tabular.total_variation(pi, closed) < 1e-8
  assert tabular.total_variation(P0, closed) > 0.02


def test_robust_undoes_a_known_share_of_wrong_labels_and_dpo_does_not():
  flipped = 0.8 * BRADLEY_TERRY + 0.2 * BRADLEY_TERRY.T
  drawn = np.ones((N, N))
  robust = optimum(flipped, drawn, variant='robust', label_smoothing=0.2, beta=BETA)
  assert tabular.total_variation(robust, GIBBS) < 1e-8
  assert tabular.total_variation(optimum(flipped, drawn, beta=BETA), GIBBS) > 0.02


# f'(u) = (r − λ)/β at the optimum of E r − β·D_f(π‖π_ref), so u = (f')⁻¹.
ALPHA = 0.4
INVERSE = {
  'forward_kl': lambda x: -1 / x,
  'js': lambda x: np.exp(x) / (2 - np.exp(x)),
  'alpha': lambda x: (1 - ALPHA * x) ** (-1 / ALPHA),
}
CEILING = {'forward_kl': 0.0, 'js': np.log(2), 'alpha': 1 / ALPHA}  # x stays below it


def f_optimum(divergence):
  """Σ π_ref·u((r − λ)/β) falls in λ: halvings find where it is 1."""
  mass = lambda lam: P0 * INVERSE[divergence]((REWARD - lam) / BETA)  # noqa: E731
  low = REWARD.max() - BETA * CEILING[divergence] + 1e-12
  high = low + 50.0
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if mass(middle).sum() > 1 else (low, middle)
  return mass(high)


@pytest.mark.parametrize('divergence', INVERSE)
def test_an_f_divergence_leads_to_the_optimum_of_its_own_penalty(divergence):
  want = f_optimum(divergence)
  np.testing.assert_allclose(want.sum(), 1, atol=1e-9)
  setting = {'f_alpha': ALPHA} if divergence == 'alpha' else {}
  pi = optimum(
    BRADLEY_TERRY, np.ones((N, N)), f_divergence=divergence, beta=BETA, **setting
  )
  assert tabular.total_variation(pi, want) < 1e-8
  assert tabular.total_variation(want, GIBBS) > 0.01


def test_the_forward_kl_optimum_is_where_a_naive_k3_leads():
  want = tabular.k3_fixed_point(P0, REWARD, BETA)
  np.testing.assert_allclose(f_optimum('forward_kl'), want, atol=1e-9)
