"""What holds of a tilt, exactly: on 200 random problems at once, to 1e-9 in float64.

Base q, reward r, temperature β, b = 1/β, g ∝ q·e^{b·r}, Z = Σ q·e^{b·r}; C the outputs of
reward 1. A derivative is checked by its integral, which loses no digits.

   1  F = −β·log Z = min_π {−E_π r + β·KL(π‖q)}, at g            here; by brute force in
   2  what π lacks of it is β·KL(π‖g)                            environments/test_tabular
   3  β·log g/q = r − β·log Z                                    here
   4  d log Z/db = E_g r, its derivative Var_g r, d KL/db = b·Var_g r
                                                                 here
   5  E_g r − E_q r → σ·√(2 KL) for small b                      here
   6  the ledger of the KL                                       test_free_energy
      Pythagoras: KL(π‖q) = KL(π‖g_ρ) + KL(g_ρ‖q)                here
   7  KL of the best of n, its bound, its pmf                    test_best_of_n
      it is no better than the tilt at its KL                    test_frontier, and here
   8  H(g), dH/db                                                here
   9  a tilt of 0/1 rewards loses no right answer and no pass@k  here
  10  data processing; g/q ≤ e^{b·(r_max − r_min)}               here, test_free_energy
  11  fixed points by KL estimator and placement                 environments/test_tabular
      k3 in the reward has none                                  here
  12  what remains of C without a KL                             here
  13  c_G(p) by Monte Carlo                                      environments/test_tabular
      c_G(p) by enumeration, its limit                           here
  14  groups without a signal, visits until the first            here
  15  the odds law of expert iteration                           here
  16  population optima of DPO and IPO                           losses/test_dpo_optima
  17  d E_b[gold]/db = Cov_b(gold, proxy); 0 at the peak         experiments/test_2022_gao_
                                                                 overoptimization
  18  SFT is the forward-KL projection                           here, with the real loss
  19  the optimal twist samples g token by token                 here
  20  pass@k of Beta-distributed prompts                         here
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from educe.environments import tabular
from educe.losses import advantages, sft
from educe.measurement import best_of_n, free_energy, frontier
from educe.types import Batch, Scores

SEEDS, Y = 200, 12
RNG = np.random.default_rng(5)
Q = RNG.dirichlet(np.ones(Y), SEEDS) + 1e-9
Q /= Q.sum(-1, keepdims=True)
R = RNG.uniform(-1, 1, (SEEDS, Y))
RIGHT = RNG.random((SEEDS, Y)) < 0.3
RIGHT[:, :2] = True, False
PI = RNG.dirichlet(np.ones(Y), SEEDS)
TIGHT = {'rtol': 0, 'atol': 1e-9}


def tilt(b, reward=R, base=Q):
  """g at b, a number or `[SEEDS]`."""
  return tabular.gibbs(base, np.reshape(b, (-1, 1)) * reward, 1.0)


def mean(policy, x):
  return (policy * x).sum(-1)


def variance(policy, x):
  return mean(policy, x**2) - mean(policy, x) ** 2


def log_z(b):
  return -b * tabular.free_energy(Q, R, 1 / b)


def integral(f, low, high):
  """Gauss–Legendre: exact for what is as smooth as a tilt over so short a way."""
  nodes, weights = np.polynomial.legendre.leggauss(40)
  at = (high - low) / 2 * nodes + (high + low) / 2
  return (high - low) / 2 * sum(w * f(b) for w, b in zip(weights, at, strict=True))


def pair(x):
  return np.stack([x, 1 - x], -1)


def binary_kl(a, c):
  """kl(a‖c)."""
  return tabular.kl(pair(np.asarray(a)), pair(np.asarray(c)))


def pass_at(p, k):
  return -np.expm1(k * np.log1p(-p))


@pytest.mark.parametrize('beta', [0.1, 1.0])
def test_1_2_the_free_energy_is_a_minimum_and_the_gap_a_kl(beta):
  free, g = tabular.free_energy(Q, R, beta), tilt(1 / beta)
  z = np.array([(q * np.exp(r / beta)).sum() for q, r in zip(Q, R, strict=True)])
  np.testing.assert_allclose(free, -beta * np.log(z), **TIGHT)
  for policy in (PI, g, Q):
    gap = -mean(policy, R) + beta * mean(policy, np.log(policy / Q)) - free
    np.testing.assert_allclose(gap, beta * mean(policy, np.log(policy / g)), **TIGHT)
    assert gap.min() > (1e-3 if policy is PI else -1e-12)


def test_3_the_reward_is_in_the_ratio():
  for beta in (0.1, 1.0):
    implicit = beta * np.log(tilt(1 / beta) / Q)
    want = R + tabular.free_energy(Q, R, beta)[:, None]
    np.testing.assert_allclose(implicit, want, **TIGHT)


def test_4_derivatives_along_the_tilt():
  low, high = 0.3, 2.3
  ends = [tilt(b) for b in (low, high)]
  for total, slope in (
    (log_z, lambda b: mean(tilt(b), R)),
    (lambda b: mean(tilt(b), R), lambda b: variance(tilt(b), R)),
    (lambda b: tabular.kl(tilt(b), Q), lambda b: b * variance(tilt(b), R)),
  ):
    rise = total(high) - total(low)
    np.testing.assert_allclose(rise, integral(slope, low, high), **TIGHT)
    assert np.abs(rise).max() > 0.1
  for b, g in zip((low, high), ends, strict=True):
    np.testing.assert_allclose(tabular.kl(g, Q), b * mean(g, R) - log_z(b), **TIGHT)


def test_5_a_little_reward_costs_its_square():
  """The error is of the order of b; and with rewards in [−1, 1] never more, at any b."""
  gain, law = [], []
  for b in (3e-3, 3e-4):
    gain.append(mean(tilt(b), R) - mean(Q, R))
    law.append(np.sqrt(2 * variance(Q, R) * tabular.kl(tilt(b), Q)))
  off = [np.abs(g / w - 1).max() for g, w in zip(gain, law, strict=True)]
  assert off[0] < 3e-3
  np.testing.assert_allclose(off[1] / off[0], 0.1, rtol=0.03)
  for b in (0.1, 1.0, 10.0):
    bound = np.sqrt(2 * tabular.kl(tilt(b), Q))  # Hoeffding: σ at most half the span
    assert (mean(tilt(b), R) - mean(Q, R) <= bound + 1e-12).all()


def test_6_what_is_beyond_the_tilt_adds_up():
  rho, rho0 = mean(PI, RIGHT), mean(Q, RIGHT)
  g = tilt(np.log(rho / (1 - rho)) - np.log(rho0 / (1 - rho0)), RIGHT * 1.0)
  np.testing.assert_allclose(mean(g, RIGHT), rho, **TIGHT)
  np.testing.assert_allclose(
    tabular.kl(PI, Q), tabular.kl(PI, g) + tabular.kl(g, Q), **TIGHT
  )
  got = free_energy.ledger(PI, Q, RIGHT)
  np.testing.assert_allclose(got.price, tabular.kl(g, Q), **TIGHT)
  np.testing.assert_allclose(got.collapse + got.drift, tabular.kl(PI, g), **TIGHT)


def test_7_best_of_n():
  rho0 = mean(Q, RIGHT)
  for n in (2, 16, 256):
    kept = best_of_n.policy(Q, R, n)
    below = np.array([[q[r < x].sum() for x in r] for q, r in zip(Q, R, strict=True)])
    np.testing.assert_allclose(kept, (below + Q) ** n - below**n, **TIGHT)
    kl = tabular.kl(kept, Q)
    assert (kl <= best_of_n.kl_bound(n)).all()
    assert (frontier.frontier(Q, R, kl)[0] >= mean(kept, R) - 1e-9).all()
    kept = best_of_n.policy(Q, RIGHT * 1.0, n)  # of right and wrong: a tilt
    np.testing.assert_allclose(mean(kept, RIGHT), pass_at(rho0, n), **TIGHT)
    ratio = kept / Q
    np.testing.assert_allclose(
      tabular.kl(kept, Q), binary_kl(pass_at(rho0, n), rho0), **TIGHT
    )
    for row, right in zip(ratio, RIGHT, strict=True):
      np.testing.assert_allclose(row[right], row[right][0], rtol=1e-9)
  for n, kl, bound in ((4, 0.2606, 0.636), (64, 2.0772, 3.175)):
    kept = best_of_n.policy(np.array([0.875, 0.125]), np.array([0.0, 1.0]), n)
    np.testing.assert_allclose(tabular.kl(kept, [0.875, 0.125]), kl, atol=5e-5)
    np.testing.assert_allclose(best_of_n.kl_bound(n), bound, atol=5e-4)


def test_8_entropy_along_the_tilt_may_rise():
  entropy = lambda p: -special.xlogy(p, p).sum(-1)  # noqa: E731
  g = tilt(1.7)
  want = -mean(g, np.log(Q)) - tabular.kl(g, Q)
  np.testing.assert_allclose(entropy(g), want, **TIGHT)

  def slope(b):
    g = tilt(b)
    both = mean(g, R * np.log(Q)) - mean(g, R) * mean(g, np.log(Q))
    return -both - b * variance(g, R)

  rise = entropy(tilt(2.3)) - entropy(tilt(0.3))
  np.testing.assert_allclose(rise, integral(slope, 0.3, 2.3), **TIGHT)
  assert rise.max() > 0.1  # not H(q) − KL, which only falls
  q, r = np.array([0.9, 0.05, 0.05]), np.array([0.0, 1.0, 1.0])
  for b, h in ((1e-12, 0.394), (1, 0.702), (3, 1.097), (1e3, 0.693)):
    np.testing.assert_allclose(entropy(tabular.gibbs(q, r, 1 / b)), h, atol=5e-4)
  g = tabular.gibbs(q, r, 1.0)
  np.testing.assert_allclose(entropy(q) - tabular.kl(g, q), 0.321, atol=5e-4)


def test_9_a_tilt_of_right_and_wrong_loses_nothing():
  rho, factor = mean(Q, RIGHT), np.ones(SEEDS)
  for b in (0.01, 0.3, 3.0, 30.0):
    g = tilt(b, RIGHT * 1.0)
    z = (Q * np.exp(b * RIGHT)).sum(-1)
    np.testing.assert_allclose(g / Q / np.exp(b * RIGHT) * z[:, None], 1, **TIGHT)
    assert (np.exp(b) / z >= factor).all()  # of every right answer, and it grows
    higher = mean(g, RIGHT)
    assert (higher > rho).all()
    for k in (1, 8, 1024):
      below, above = (pass_at(np.minimum(p, 1 - 1e-16), k) for p in (rho, higher))
      assert (above >= below).all()
    for threshold in (1e-4, 1e-2):  # SRR = 1, NSCR ≥ 0: what was in reach still is
      assert not (RIGHT & (threshold < Q) & (g <= threshold)).any()
    rho, factor = higher, np.exp(b) / z
  graded = tabular.gibbs([0.98 - 1e-6, 0.02, 1e-6], [0.0, 0.9, 1.0], 1 / 30)
  np.testing.assert_allclose(graded[1:], [0.999, 0.001], atol=5e-4)  # it can trap


def test_10_a_divergence_budget_binds_every_event():
  event = RNG.random((SEEDS, Y)) < 0.5
  seen = [np.stack([mean(x, event), mean(x, ~event)], -1) for x in (PI, Q)]
  assert (tabular.kl(*seen) <= tabular.kl(PI, Q) + 1e-12).all()
  for b in (0.5, 5.0):
    span = R.max(-1) - R.min(-1)
    assert (np.log(tilt(b) / Q).max(-1) <= b * span).all()
  for mass, costs in (
    (0.5, (1.61, 3.91, 8.52, 17.73)),
    (0.9, (3.82, 7.96, 16.25, 32.83)),
  ):
    for base, cost in zip((1e-2, 1e-4, 1e-8, 1e-16), costs, strict=True):
      # As [1 − x, x]: 1 − 1e-16 has no digits left for the other.
      price = tabular.kl([1 - mass, mass], [1 - base, base])
      np.testing.assert_allclose(price, cost, atol=6e-3)


def test_11_k3_in_the_reward_leads_away():
  """u = q/π. What falls below q is pushed the harder: θ falls by β·q a step, for ever."""
  beta, q, r = 0.3, Q[0] / 2 + 0.5 / Y, R[0]

  def step(pi):
    u = q / pi
    return tabular.policy_gradient(pi, r - beta * (u - 1 - np.log(u)))

  g = tabular.gibbs(q, r, beta)
  assert np.abs(step(g)).max() > 1e-3  # the tilt is not where it stops
  theta, path = np.log(q), []
  for _ in range(2):
    for _ in range(600):
      theta = theta + step(np.exp(theta - np.logaddexp.reduce(theta)))
    path.append(theta)
  end = np.exp(theta - np.logaddexp.reduce(theta))
  lost = end < 1e-9
  assert lost.sum() > 2
  assert g[lost].max() > 1e-3
  fall = (path[0] - path[1])[lost]
  np.testing.assert_allclose(fall, 600 * beta * q[lost], rtol=1e-6)
  assert tabular.total_variation(end, g) > 0.1


def flow(theta, steps):
  """Along ∇ρ = π·(1_C − ρ), over 1 − ρ so that its pace does not fade."""
  for _ in range(steps):
    pi = np.exp(theta - np.logaddexp.reduce(theta, -1)[:, None])
    wrong = mean(pi, ~RIGHT)[:, None]
    theta = theta + 0.2 * np.where(RIGHT, pi, -pi * (1 - wrong) / wrong)
    theta = theta - theta.max(-1, keepdims=True)
    theta = np.maximum(theta, -300)  # what is gone is gone
  return np.exp(theta - np.logaddexp.reduce(theta, -1)[:, None])


def test_12_without_a_kl_a_softmax_gradient_leaves_one_answer_and_a_projection_all():
  rho = mean(Q, RIGHT)[:, None]
  inside = np.where(RIGHT, Q / rho, 0)
  # One direction: of ρ, of GRPO's, and of a small step of SFT on what was right.
  slope = tabular.policy_gradient(Q, RIGHT * 1.0)
  np.testing.assert_allclose((inside - Q) * rho, slope, **TIGHT)
  end = flow(np.log(Q), 4000)
  np.testing.assert_allclose(mean(end, RIGHT), 1, **TIGHT)
  top = np.where(RIGHT, Q, 0).argmax(-1)
  second = np.sort(inside, -1)[:, -2] / inside.max(-1)
  clear = second < 0.95  # near ties take longer
  assert clear.mean() > 0.9
  np.testing.assert_allclose(end[np.arange(SEEDS), top][clear], 1, **TIGHT)
  # Mirror descent, b·r at a time, and expert iteration to the end: q_C.
  policy = Q
  for _ in range(40):
    policy = tabular.gibbs(policy, RIGHT * 1.0, 1.0)
  np.testing.assert_allclose(policy, inside, **TIGHT)
  np.testing.assert_allclose(
    np.where(RIGHT, policy, 0) / mean(policy, RIGHT)[:, None], inside, **TIGHT
  )


def by_groups(advantage, p, group):
  """c: E[(1/G) Σ A_i ∇log π(y_i)]/∇p over all 2^G groups, for one logit (∇p = p(1−p))."""
  total = np.zeros_like(p)
  for wins in itertools.product((0.0, 1.0), repeat=group):
    wins = np.array(wins)
    chance = p ** wins.sum() * (1 - p) ** (group - wins.sum())
    score = (advantage(wins) * (wins - p[:, None])).mean(-1)
    total += chance * score
  return total / (p * (1 - p))


def test_13_the_weight_of_a_group_by_enumeration():
  p, group = RNG.uniform(0.02, 0.98, SEEDS), 5
  for ddof in (0, 1):
    grpo = lambda r: advantages.group_relative(r, group, ddof=ddof, eps=1e-300)  # noqa: B023, E731
    want = [tabular.group_weight(x, group, ddof=ddof) for x in p]
    np.testing.assert_allclose(by_groups(grpo, p, group), want, **TIGHT)
  rloo = lambda r: advantages.rloo(r, group)  # noqa: E731
  dr_grpo = lambda r: advantages.group_relative(r, group, std=False)  # noqa: E731
  np.testing.assert_allclose(by_groups(rloo, p, group), 1, **TIGHT)
  np.testing.assert_allclose(by_groups(dr_grpo, p, group), 4 / 5, **TIGHT)
  # G → ∞: 1/√(p(1−p)), the slope of 2·arcsin √p; what is missing falls as 1/G.
  for x in (0.2, 0.5):
    off = [tabular.group_weight(x, g) * math.sqrt(x * (1 - x)) - 1 for g in (100, 200)]
    assert -0.02 < off[0] < 0
    np.testing.assert_allclose(off[1] / off[0], 0.5, rtol=0.05)
  rise = 2 * np.arcsin(np.sqrt([0.2, 0.6]))
  slope = integral(lambda x: 1 / np.sqrt(x * (1 - x)), 0.2, 0.6)
  np.testing.assert_allclose(np.diff(rise), slope, **TIGHT)


def test_14_groups_that_teach_nothing_and_visits_until_one_does():
  p, group = np.exp(RNG.uniform(-9, -0.1, SEEDS)), 4
  silent = np.zeros(SEEDS)
  for wins in itertools.product((0.0, 1.0), repeat=group):
    if not advantages.group_relative(np.array(wins), group).any():
      silent += p ** sum(wins) * (1 - p) ** (group - sum(wins))
  np.testing.assert_allclose(silent, p**group + (1 - p) ** group, **TIGHT)
  seen = pass_at(p, group)  # at least one success in a visit
  often, rare = p > 0.01, p < 1e-3
  none = (1 - p[often, None]) ** (group * np.arange(1000))  # in so many visits
  np.testing.assert_allclose(none.sum(-1), 1 / seen[often], **TIGHT)
  np.testing.assert_allclose((1 / seen)[rare] * group * p[rare], 1, rtol=2e-3)
  # In reach of T visits with certainty 1 − ζ: p ≥ 1 − ζ^{1/(G·T)}.
  zeta, total = 0.05, group * 100
  edge = -np.expm1(np.log(zeta) / total)
  np.testing.assert_allclose(1 - pass_at(edge, total), zeta, **TIGHT)
  np.testing.assert_allclose(edge, -np.log(zeta) / total, rtol=5e-3)


def test_15_expert_iteration_divides_the_odds_by_chance():
  """Ways of answering, the right one always verified, the other by chance c."""
  p, chance = RNG.uniform(1e-6, 1, SEEDS), RNG.uniform(0.05, 0.95, SEEDS)
  joint = np.stack([p, 0 * p, (1 - p) * chance, (1 - p) * (1 - chance)], -1)
  verified = np.array([1, 0, 1, 0]) * np.ones((SEEDS, 1))
  kept = tabular.gibbs(joint, verified, 1 / 60)  # b = 60: e^−60 of the others is left
  after = kept[:, 0] + kept[:, 1]
  np.testing.assert_allclose(after, p / (p + (1 - p) * chance), **TIGHT)
  odds = lambda x: x / (1 - x)  # noqa: E731
  np.testing.assert_allclose(odds(after) * chance / odds(p), 1, rtol=1e-8)
  x, path = 0.01, []
  for _ in range(7):
    x = x / (x + (1 - x) / 2)
    path.append(x)
  np.testing.assert_allclose(
    path, [0.0198, 0.0388, 0.0748, 0.139, 0.244, 0.393, 0.564], atol=5e-4
  )
  for p0, rounds in ((1e-2, 6.6), (1e-4, 13.3), (1e-8, 26.6)):
    np.testing.assert_allclose(math.log2((1 - p0) / p0), rounds, atol=0.05)
    half = odds(p0) * 2.0 ** math.log2((1 - p0) / p0)
    np.testing.assert_allclose(half, 1, **TIGHT)


def test_18_sft_is_a_projection():
  """The real loss, in expectation: where its gradient is 0, and it is convex in θ."""
  with jax.enable_x64():
    mask_of = lambda weight: jnp.stack([jnp.zeros(Y), weight], 1)  # noqa: E731

    def loss(theta, weight):
      logp = mask_of(jax.nn.log_softmax(theta))
      tokens = jnp.zeros((Y, 2), jnp.int32)
      batch = Batch(tokens, mask_of(weight))
      return sft.loss(Scores(logp, jnp.zeros((Y, 2))), batch)[0].value

    slope = jax.jit(jax.vmap(jax.grad(loss)))
    inside = np.where(RIGHT, Q, 0) / mean(Q, RIGHT)[:, None]
    for weight, optimum in (
      (PI, PI),  # any data
      (Q * RIGHT, inside),  # what was verified: q_C
      (Q * np.exp(R / 0.3), tabular.gibbs(Q, R, 0.3)),  # weighted by e^{r/β}: the tilt
    ):
      theta = np.log(np.maximum(optimum, 1e-300))
      np.testing.assert_allclose(slope(theta, weight), 0, **TIGHT)
      assert np.abs(slope(np.log(Q), weight)).max(-1).min() > 1e-6


def test_19_the_optimal_twist_samples_the_tilt_token_by_token():
  """ψ_t = E_q[e^{r/β}|y_≤t] by backward recursion; q·ψ_t/ψ_{t−1} a step is g."""
  beta, v, length = 0.3, 3, 3
  tables = [RNG.dirichlet(np.ones(v), (SEEDS, v**t)) for t in range(length)]
  base = np.ones((SEEDS, 1))
  for table in tables:
    base = (base[:, :, None] * table).reshape(SEEDS, -1)
  reward = RNG.uniform(-1, 1, base.shape)
  psi = [np.exp(reward / beta)]
  for table in reversed(tables):
    children = psi[0].reshape(SEEDS, -1, v)
    psi.insert(0, (table * children).sum(-1))
  np.testing.assert_allclose(
    beta * np.log(psi[0][:, 0]), -tabular.free_energy(base, reward, beta), **TIGHT
  )
  policy, advantage = np.ones((SEEDS, 1)), np.zeros((SEEDS, 1))
  for t, table in enumerate(tables):
    ratio = psi[t + 1].reshape(SEEDS, -1, v) / psi[t][:, :, None]
    step = table * ratio
    np.testing.assert_allclose(step.sum(-1), 1, **TIGHT)
    policy = (policy[:, :, None] * step).reshape(SEEDS, -1)
    token = beta * np.log(ratio)  # V_t − V_{t−1}
    advantage = (advantage[:, :, None] + token).reshape(SEEDS, -1)
  gibbs = tabular.gibbs(base, reward, beta)
  np.testing.assert_allclose(policy, gibbs, **TIGHT)
  np.testing.assert_allclose(advantage, beta * np.log(gibbs / base), **TIGHT)


BUDGETS = (1, 4, 16, 64, 256, 1024)


def test_20_pass_at_k_of_beta_distributed_prompts():
  """A Gauss–Jacobi rule of 520 nodes is exact for (1 − p)^k, k ≤ 1024."""
  for a, b in ((0.25, 1.5), (1.0, 3.0)):
    x, w = special.roots_jacobi(520, b - 1, a - 1)
    w = w / w.sum()
    for k in BUDGETS:
      closed = -np.expm1(special.betaln(a, b + k) - special.betaln(a, b))
      np.testing.assert_allclose((w * pass_at((1 + x) / 2, k)).sum(), closed, **TIGHT)


def test_20_a_tilt_never_crosses_its_base_and_interference_does():
  """Beta(0.25, 1.5) prompts by their quantiles; the tilt multiplies all odds by e³."""
  p = special.betaincinv(0.25, 1.5, (np.arange(100_000) + 0.5) / 100_000)
  tilted = p * math.exp(3) / (1 - p + p * math.exp(3))
  pushed = np.where(p < 0.02, 0.35, 0.0)  # so many of the hard prompts fall to p/1000
  curves = []
  for k in BUDGETS:
    lost = pushed * pass_at(p * 1e-3, k) + (1 - pushed) * pass_at(tilted, k)
    curves.append([pass_at(p, k).mean(), pass_at(tilted, k).mean(), lost.mean()])
  base, gibbs, interfered = np.transpose(curves)
  # The numbers are of a simulation: ±0.002.
  near = {'atol': 0.002}
  np.testing.assert_allclose(base, [0.143, 0.311, 0.490, 0.634, 0.740, 0.816], **near)
  np.testing.assert_allclose(gibbs, [0.450, 0.641, 0.752, 0.825, 0.877, 0.913], **near)
  np.testing.assert_allclose(
    interfered, [0.440, 0.610, 0.689, 0.737, 0.770, 0.794], **near
  )
  assert (gibbs > base).all()
  assert (interfered > base)[:-1].all()
  assert interfered[-1] < base[-1]
