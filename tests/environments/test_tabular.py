"""The closed forms against brute force, and grpo.loss against the closed forms.

Exact expectations through the real loss: a batch whose rows are all N outcomes, one token
each, and whose mask holds π_θ(y) instead of 1 (detached). A token mean is then
Σ_y π(y)·x(y) / Σ_y π(y) = E_π[x], and its gradient is what an infinite on-policy batch
would give.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.environments import chain, tabular
from educe.losses import advantages, grpo, ppo
from educe.types import Batch, Scores

BETA, N = 0.3, 12
RNG = np.random.default_rng(0)
P0 = RNG.dirichlet(np.full(N, 2.0))
REWARD = RNG.permutation(np.linspace(0, 1, N))


def ascend(steps, in_reward=0.0, **setting):
  """π after gradient descent on the logits, from p0; in_reward: β of k1 in the reward."""
  with jax.enable_x64():
    log_p0, reward = jnp.log(P0), jnp.asarray(REWARD)
    tokens = jnp.zeros((N, 2), jnp.int32)
    after_blank = lambda x: jnp.stack([jnp.zeros(N), x], 1)  # noqa: E731

    def loss(theta):
      log_pi = jax.nn.log_softmax(theta)
      pi = jax.lax.stop_gradient(jnp.exp(log_pi))
      shaped = reward - in_reward * (jax.lax.stop_gradient(log_pi) - log_p0)
      batch = Batch(
        tokens,
        after_blank(pi),
        advantages=after_blank(shaped),
        ref_logp=after_blank(log_p0),
      )
      scores = Scores(after_blank(log_pi), jnp.zeros((N, 2)))
      return grpo.loss(scores, batch, **setting)[0].value

    step = lambda theta, _: (theta - jax.grad(loss)(theta), None)  # noqa: E731
    run = jax.jit(lambda theta: jax.lax.scan(step, theta, length=steps)[0])
    return np.asarray(jax.nn.softmax(run(log_p0)))


GIBBS = tabular.gibbs(P0, REWARD, BETA)
K3 = tabular.k3_fixed_point(P0, REWARD, BETA)
IN_LOSS = {'kl_coef': BETA, 'kl_gradient': 'naive'}


def test_k1_in_the_reward_reaches_gibbs():
  assert tabular.total_variation(ascend(4000, in_reward=BETA), GIBBS) < 1e-3


def test_k2_in_the_loss_reaches_gibbs():
  pi = ascend(4000, kl_estimator='k2', **IN_LOSS)
  assert tabular.total_variation(pi, GIBBS) < 1e-3


def test_k3_in_the_loss_reaches_another_policy():
  pi = ascend(4000, kl_estimator='k3', **IN_LOSS)
  assert tabular.total_variation(pi, K3) < 1e-3
  assert tabular.total_variation(pi, GIBBS) > 0.1  # a hundred tolerances away


def test_k1_in_the_loss_does_not_hold_the_policy():
  pi = ascend(40_000, kl_estimator='k1', **IN_LOSS)
  assert pi[REWARD.argmax()] > 0.99
  assert tabular.total_variation(pi, GIBBS) > 0.3
  path = [ascend(300, **kl) for kl in ({'kl_estimator': 'k1', **IN_LOSS}, {})]
  np.testing.assert_allclose(*path, atol=1e-12)  # as if there were no KL


@pytest.mark.parametrize('estimator', ['k1', 'k2', 'k3'])
@pytest.mark.parametrize('objective', ['clip', 'reinforce'])
def test_the_unbiased_gradient_reaches_gibbs_with_every_estimator(estimator, objective):
  pi = ascend(4000, kl_coef=BETA, kl_estimator=estimator, objective=objective)
  assert tabular.total_variation(pi, GIBBS) < 1e-3


def test_the_loss_gives_the_exact_policy_gradient():
  theta = np.log(P0)
  one = np.log(ascend(1)) - theta
  want = tabular.policy_gradient(P0, REWARD)
  # softmax knows θ up to a constant.
  np.testing.assert_allclose(one - one[0], want - want[0], atol=1e-12)


class World(NamedTuple):
  """Completions of two tokens: outcome y is written y // second, y % second."""

  p0: np.ndarray  # [N]
  reward: np.ndarray  # [N]
  first: int
  second: int


SMALL = World(P0, REWARD, 3, 4)


def chain_world():
  """A prompt of depth 2: its verifier pays for one trace of 64, and the base, as the
  corpus has it, nearly always writes the shortcut."""
  (record,), respond = chain.make(depth=2, size=1)
  traces = [a + b for a in chain.SYMBOLS for b in chain.SYMBOLS]
  reward = np.array([respond(record, [trace]).reward for trace in traces], np.float64)
  p0 = np.full(64, 0.05 / 62)
  p0[reward > 0] = 0.05  # ρ
  p0[traces.index(2 * record['prompt'][2])] = 0.9
  return World(p0, reward, 8, 8)


def as_tokens(first, second):
  """Numbers of the first token [F] and of the second after each first [F, S], on the
  tokens of all completions, `[N, 3]`; column 0 is blank."""
  columns = jnp.repeat(first, second.shape[1]), second.reshape(-1)
  return jnp.stack([jnp.zeros(second.size), *columns], 1)


def start(world):
  """(logits of p0, a critic that knows nothing)."""
  both = world.p0.reshape(world.first, world.second)
  logits = {'first': np.log(both.sum(1)), 'second': np.log(both)}
  return logits, {'first': 0.0, 'second': np.zeros(world.first)}


def log_probs(theta):
  log_pi = {name: jax.nn.log_softmax(x, -1) for name, x in theta.items()}
  return as_tokens(log_pi['first'], log_pi['second'])


def learn(update, theta, rounds, rate):
  """The policy over completions after `rounds` of theta − rate·update(theta)."""
  for _ in range(rounds):
    theta = jax.tree.map(lambda x, g: x - rate * g, theta, update(theta))
  return np.exp(
    np.asarray(log_probs(theta[0] if isinstance(theta, tuple) else theta)).sum(-1)
  )


def ppo_policy(world, lam, rounds=3000, **setting):
  """PPO with a learned critic, exact expectations: each round GAE on the host, then two
  updates of the policy and the critic from where the round began."""
  size = len(world.p0)

  def scores(theta):
    logits, critic = theta
    log_pi = log_probs(logits)
    ones = jnp.ones((world.first, world.second))
    values = as_tokens(ones[:, 0] * critic['first'], ones * critic['second'][:, None])
    return Scores(log_pi, jnp.zeros_like(log_pi), values)

  with jax.enable_x64():
    log_p0 = np.asarray(log_probs(start(world)[0]))
    read = jax.jit(scores)
    slope = jax.jit(jax.grad(lambda t, b: ppo.loss(scores(t), b, **setting)[0].value))

    def updates(theta):
      seen = read(theta)
      log_pi, values = seen.logp, seen.values
      pi = np.exp(np.asarray(log_pi).sum(-1, keepdims=True)) * np.ones((1, 3))
      pi[:, 0] = 0
      rewards = -BETA * (np.asarray(log_pi) - log_p0)
      rewards[:, 2] += world.reward
      a, returns = advantages.gae(rewards, values, pi, gamma=1.0, lam=lam)
      tokens = jnp.zeros((size, 3), jnp.int32)
      batch = Batch(
        tokens, jnp.asarray(pi), old_logp=log_pi, advantages=jnp.asarray(a),
        returns=jnp.asarray(returns), old_values=values,
      )  # fmt: skip
      once = slope(theta, batch)
      moved = jax.tree.map(lambda x, g: x - RATE * g, theta, once)
      return jax.tree.map(jnp.add, once, slope(moved, batch))

    return learn(updates, jax.tree.map(jnp.asarray, start(world)), rounds, RATE)


RATE = 2.0  # the loss is a mean over two tokens a completion


def rloo_policy(world, rounds=5000):
  """RLOO with k1 in the reward and groups without end, whose baseline is the mean."""
  with jax.enable_x64():
    log_p0 = log_probs(start(world)[0]).sum(-1)
    size = len(world.p0)

    def loss(theta):
      log_pi = log_probs(theta)
      pi = jax.lax.stop_gradient(jnp.exp(log_pi.sum(-1)))
      reward = jnp.asarray(world.reward) - BETA * (jnp.log(pi) - log_p0)
      mask = jnp.stack([jnp.zeros(size), pi, pi], 1)
      centred = (reward - (pi * reward).sum())[:, None] * jnp.ones((1, 3))
      batch = Batch(jnp.zeros((size, 3), jnp.int32), mask, advantages=centred)
      scores = Scores(log_pi, jnp.zeros_like(log_pi))
      kind = dict(objective='reinforce', aggregate='sequence_sum')
      return grpo.loss(scores, batch, **kind)[0].total

    return learn(jax.jit(jax.grad(loss)), start(world)[0], rounds, 1.0)


@pytest.mark.parametrize(
  ('world', 'lam'),
  [(SMALL, 0.0), (SMALL, 0.95), (SMALL, 1.0), (chain_world(), 0.95)],
  ids=['small-0', 'small-0.95', 'small-1', 'chain'],
)
def test_ppo_with_a_critic_reaches_gibbs_as_rloo_does(world, lam):
  """TV ≤ 1e-4 to the optimum, and so to each other ≤ 2e-4: whatever λ, once the critic has
  learned what is to come (KL included)."""
  want = tabular.gibbs(world.p0, world.reward, BETA)
  ours, theirs = ppo_policy(world, lam), rloo_policy(world)
  assert tabular.total_variation(world.p0, want) > 0.2
  assert tabular.total_variation(theirs, want) <= 1e-4
  assert tabular.total_variation(ours, want) <= 1e-4
  assert tabular.total_variation(ours, theirs) <= 2e-4


def brute_force(objective):
  """The best softmax policy by plain ascent with numerical gradients, from p0."""
  theta = np.log(P0)
  softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()  # noqa: E731
  for _ in range(1500):
    steps = 1e-5 * np.eye(N)
    slope = [
      (objective(softmax(theta + e)) - objective(softmax(theta - e))) for e in steps
    ]
    theta = theta + np.array(slope) / 2e-5 / softmax(theta) * 0.5  # natural gradient
  return softmax(theta)


def kl_by_loop(p, q):
  return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


def test_gibbs_is_the_optimum_and_the_gap_is_a_kl():
  best = brute_force(lambda p: p @ REWARD - BETA * kl_by_loop(p, P0))
  np.testing.assert_allclose(GIBBS, best, atol=1e-6)  # the step of the differences
  free = tabular.free_energy(P0, REWARD, BETA)
  for pi in (P0, GIBBS, RNG.dirichlet(np.ones(N))):
    gap = -tabular.objective(pi, P0, REWARD, BETA) - free
    np.testing.assert_allclose(gap, BETA * kl_by_loop(pi, GIBBS), atol=1e-14)


def test_the_k3_fixed_point_is_the_optimum_under_the_other_kl():
  best = brute_force(lambda p: p @ REWARD - BETA * kl_by_loop(P0, p))
  np.testing.assert_allclose(K3, best, atol=1e-6)
  lam = BETA * P0 / K3 + REWARD
  np.testing.assert_allclose(lam, lam[0], rtol=1e-12)
  assert lam[0] > REWARD.max()


def test_closed_forms_take_many_prompts_and_outcomes_without_mass():
  p0 = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
  reward = np.array([[1.0, 0.0, 9.0], [0.0, 1.0, 1.0]])
  for f in (tabular.gibbs, tabular.free_energy):
    both = f(p0, reward, 0.5)
    np.testing.assert_allclose(both, [f(p0[i], reward[i], 0.5) for i in range(2)])
  tilted = tabular.gibbs(p0, reward, 0.5)
  assert tilted[0, 2] == 0
  np.testing.assert_allclose(tilted[0, 0] / tilted[0, 1], np.exp(2))
  np.testing.assert_allclose(tabular.kl(p0[0], [0.25, 0.5, 0.25]), np.log(2) / 2)
  assert tabular.kl([0.5, 0.5], [1.0, 0.0]) == np.inf
  assert tabular.total_variation([1.0, 0.0], [0.25, 0.75]) == 0.75


@pytest.mark.parametrize('group', [4, 16])
@pytest.mark.parametrize('p', [0.05, 0.3, 0.5])
@pytest.mark.parametrize('ddof', [0, 1])
def test_the_group_weight_of_grpo_matches_monte_carlo(p, group, ddof):
  """E[(1/G) Σ A_i ∇log π(y_i)] = c·∇p; for one logit ∇log π(y) = y − p, ∇p = p(1−p)."""
  wins = np.random.default_rng(group).random(200_000 * group) < p
  score = wins - p

  def weight(a):
    return (a * score).mean() / (p * (1 - p))

  got = weight(advantages.group_relative(wins * 1.0, group, ddof=ddof))
  # 200,000 groups: a standard error of at most 0.4 %.
  np.testing.assert_allclose(got, tabular.group_weight(p, group, ddof=ddof), rtol=0.01)
  dr_grpo = weight(advantages.group_relative(wins * 1.0, group, std=False))
  np.testing.assert_allclose(dr_grpo, (group - 1) / group, rtol=0.01)
  np.testing.assert_allclose(weight(advantages.rloo(wins * 1.0, group)), 1, rtol=0.01)


def test_the_group_weight_at_its_ends():
  np.testing.assert_allclose(tabular.group_weight(0.5, 16), 1.934, atol=5e-4)
  np.testing.assert_allclose(tabular.group_weight(1e-9, 16), np.sqrt(15))
  np.testing.assert_allclose(tabular.group_weight(1e-9, 16, ddof=1), 15 / 4)
  for p, group in ((0.0, 4), (1.0, 4), (0.5, 1)):
    with pytest.raises(ValueError, match=f'p={p} must be in .* group={group}'):
      tabular.group_weight(p, group)


def test_a_completion_is_paid_the_reward_of_the_outcome_it_names():
  prompts, respond = tabular.make(size=3, outcomes=5, seed=7)
  assert len({record['id'] for record in prompts}) == 3
  for record in prompts:
    assert '0 to 4' in record['prompt'][0]['content']
    assert min(record['rewards']) == 0
    assert max(record['rewards']) == record['rewards'][int(record['answer'])] == 1
    for y, reward in enumerate(record['rewards']):
      turn = respond(record, [f' {y}\n'])
      assert (turn.reward, turn.done, turn.observation) == (reward, True, None)
      assert turn.info['outcome'] == ('verified' if reward == 1 else 'wrong')
  assert prompts[0]['rewards'] != prompts[1]['rewards']
  assert prompts == tabular.make(size=3, outcomes=5, seed=7).prompts
  assert prompts != tabular.make(size=3, outcomes=5, seed=8).prompts


@pytest.mark.parametrize('text', ['', '5', '-1', '1 2', 'two', '1.0', '٣', '9' * 5000])
def test_what_names_no_outcome_is_unparsable_and_earns_nothing(text):
  prompts, respond = tabular.make(size=1, outcomes=5)
  turn = respond(prompts[0], [text])
  assert (turn.reward, turn.info['outcome']) == (0.0, 'unparsable')


def test_so_many_outcomes_are_correct():
  for record in tabular.make(size=4, outcomes=6, correct=2).prompts:
    assert sorted(record['rewards']) == [0, 0, 0, 0, 1, 1]


def test_bad_input_is_one_clear_line():
  with pytest.raises(ValueError, match=r'size=0 must be 1'):
    tabular.make(size=0)
  with pytest.raises(ValueError, match=r'outcomes=1 2 or more'):
    tabular.make(size=1, outcomes=1)
  with pytest.raises(ValueError, match=r'correct=12 must be between 1 and outcomes'):
    tabular.make(size=1, correct=12)
  for f in (tabular.gibbs, tabular.free_energy, tabular.k3_fixed_point):
    with pytest.raises(ValueError, match=r'beta=0\.0 must be positive'):
      f(P0, REWARD, 0.0)
