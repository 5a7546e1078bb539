"""Tabular arms: a logit for every outcome of every prompt, so that nothing is shared.

They start at p0, the transformer's own, and go through the same loss functions.

**Exact** (`exact`): a batch whose rows are all outputs, one token each, and whose mask is
π(y), detached, has E_π[…] for its token mean (tests/environments/test_tabular.py); one
whose mask is a target has its cross-entropy; and preferences are of every output with
`PARTNERS` others, both ways, each way weighted by how often a Bradley–Terry judge of the
reward prefers it. With rewards of 0 and 1 any connected graph of pairs has one optimum,
which for DPO is Gibbs and for IPO p0·exp(E[P(y ≻ y')]/β).

The steps are preconditioned, and only that makes them few: the gradient of the logits is
divided by π (the natural gradient), of a cross-entropy by max(π, target), of preferences
by a constant. It is why a policy without a KL ends at q_C, p0 among the correct outputs:
the plain gradient would collapse onto the likeliest of them.

**Sampled** (`sampled`): groups of draws from the table, advantages of losses/advantages.py,
and the plain gradient of the logits.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from educe.environments import tabular
from educe.losses import advantages, dpo, grpo, sft
from educe.types import Batch, Scores

PARTNERS = 8
BRADLEY_TERRY = float(1 / (1 + np.exp(-1)))  # how often a reward of 1 beats one of 0
KL_IN_LOSS = dict(kl_gradient='naive')


class Fixed(NamedTuple):
  name: str
  predicted: np.ndarray  # [P, Y]
  reached: np.ndarray  # [P, Y]


class Sampled(NamedTuple):
  early: np.ndarray  # [R, P, Y] π after `early` visits, R copies of the table
  final: np.ndarray  # [R, P, Y]
  first: np.ndarray  # [R, P] the visit of the first success, from 1; 0: never
  half: np.ndarray  # [R, P] the visit after which π(C) was first ½ or more; 0: never


def exact(p0: np.ndarray, correct: np.ndarray, beta: float) -> list[Fixed]:
  """Every arm whose fixed point theory knows. p0, correct: `[P, Y]`."""
  reward = correct.astype(np.float64)
  gibbs = tabular.gibbs(p0, reward, beta)
  k3 = tabular.k3_fixed_point(p0, reward, beta)

  def verified(policy):
    """What expert iteration imitates: the correct ones of a policy's own samples."""
    return policy * correct / (policy * correct).sum(-1, keepdims=True)

  among = verified(p0)
  # P(y ≻ y') of a partner drawn evenly, up to what is the same for all y.
  preferred = tabular.gibbs(p0, (BRADLEY_TERRY - 0.5) * reward, beta)
  climb = functools.partial(ascended, p0, reward)
  ipo = functools.partial(preferring, p0, correct, variant='ipo', beta=beta)
  return [
    Fixed('k1 in the reward', gibbs, climb(in_reward=beta)),
    Fixed(
      'k2 in the loss', gibbs, climb(kl_coef=beta, kl_estimator='k2', **KL_IN_LOSS)
    ),
    Fixed('k3 in the loss', k3, climb(kl_coef=beta, kl_estimator='k3', **KL_IN_LOSS)),
    Fixed(
      'k1 in the loss', among, climb(kl_coef=beta, kl_estimator='k1', **KL_IN_LOSS)
    ),
    Fixed('no KL', among, climb()),
    Fixed('DPO, Bradley–Terry', gibbs, preferring(p0, correct, beta=beta)),
    Fixed('IPO', preferred, ipo()),
    Fixed('SFT on verified', among, imitated(p0, lambda _: among)),
    Fixed('expert iteration', among, imitated(p0, verified)),
  ]


def ascended(p0, reward, *, in_reward=0.0, steps=400, rate=0.25, **setting):
  """π `[P, Y]` after so many natural steps of grpo.loss under exact expectations.

  in_reward: β of k1 in the reward
  """
  with jax.enable_x64():
    log_p0, pay = jnp.log(p0), jnp.asarray(reward)

    def loss(theta):
      log_pi = jax.nn.log_softmax(theta)
      held = jax.lax.stop_gradient(log_pi)
      batch = Batch(
        jnp.zeros((theta.size, 2), jnp.int32),
        after_blank(jnp.exp(held)),
        advantages=after_blank(pay - in_reward * (held - log_p0)),
        ref_logp=after_blank(log_p0),
      )
      return grpo.loss(told(log_pi), batch, **setting)[0].value * len(theta)

    def step(theta, _):
      return theta - rate * jax.grad(loss)(theta) / jax.nn.softmax(theta), None

    return descended(step, log_p0, steps)


def imitated(p0, target, *, steps=200, rate=0.5):
  """π `[P, Y]` after so many steps of maximum likelihood on samples of target(π), by
  sft.loss. target: of the π `[P, Y]` that is being trained, looked at before every step"""
  with jax.enable_x64():

    def loss(theta, goal):
      tokens = jnp.zeros((theta.size, 2), jnp.int32)
      return sft.loss(
        told(jax.nn.log_softmax(theta)), Batch(tokens, after_blank(goal))
      )[0].value * len(theta)

    def step(theta, _):
      policy = jax.nn.softmax(theta)
      goal = jnp.asarray(target(policy))
      slope = jax.grad(loss)(theta, goal)
      return theta - rate * slope / jnp.maximum(policy, goal), None

    return descended(step, jnp.log(p0), steps)


def preferring(p0, correct, *, steps=60, **setting):
  """π `[P, Y]` at the minimum of dpo.loss under Bradley–Terry labels, from p0."""
  size, rng = p0.shape[-1], np.random.default_rng(0)
  orders = np.concatenate([rng.permutation(size) for _ in range(PARTNERS // 2)])
  one, other = np.tile(np.arange(size), PARTNERS // 2), orders
  ways = jnp.asarray(
    np.concatenate([np.stack([one, other], 1), np.stack([other, one], 1)])
  )
  blank = jnp.zeros((2, 2), jnp.int32)
  mask = jnp.array([[0.0, 1.0], [0.0, 1.0]])
  # The curvature of a pair at h = 0; a graph's is at most twice its degree times that.
  curvature = 2.0 if setting.get('variant') == 'ipo' else setting['beta'] ** 2 / 4
  rate = 1 / (curvature * PARTNERS)

  def of_prompt(log_p0, right):
    beats = right[ways[:, 0]] - right[ways[:, 1]]
    often = 0.5 + (BRADLEY_TERRY - 0.5) * beats

    def of_pair(theta, pair):
      batch = Batch(blank, mask, ref_logp=column(log_p0[pair]))
      scores = Scores(column(theta[pair]), jnp.zeros((2, 2)))
      return dpo.loss(scores, batch, **setting)[0].value

    def loss(theta):
      return (often * jax.vmap(of_pair, (None, 0))(theta, ways)).sum()

    def step(theta, _):
      return theta - rate * jax.grad(loss)(theta), None

    return jax.lax.scan(step, log_p0, length=steps)[0]

  with jax.enable_x64():
    run = jax.jit(lambda *x: jax.lax.map(lambda row: of_prompt(*row), x))
    theta = run(jnp.log(p0), jnp.asarray(correct, jnp.float64))
    return np.asarray(jax.nn.softmax(theta))


def sampled(
  p0, correct, *, visits, early, group, rate, copies, seed, beta=0.0, advantage='rloo'
) -> Sampled:
  """Groups drawn from the table, and the plain gradient of grpo.loss, visit by visit.

  p0, correct: `[P, Y]` · early: at most `visits` · beta: of k1 in the reward · rate: of the
  logits of a prompt
  """
  prompts = np.tile(np.arange(len(p0)), copies)
  right = correct[prompts]
  log_p0 = np.log(p0).astype(np.float32)
  theta = jnp.asarray(log_p0[prompts])
  key, rows = jax.random.key(seed), np.repeat(np.arange(len(prompts)), group)
  assign = getattr(advantages, advantage)
  members = jnp.asarray(right)
  first, half = np.zeros(len(prompts)), np.zeros(len(prompts))
  for visit in range(1, visits + 1):
    with jax.enable_x64():
      drawn, logp = draw(theta, jax.random.fold_in(key, visit), group)
    taken = np.asarray(drawn).ravel()
    wins = right[rows, taken]
    shaped = wins - beta * (np.asarray(logp).ravel() - log_p0[prompts[rows], taken])
    gains = assign(shaped, group).astype(np.float32)
    theta, mass = update(theta, drawn, gains.reshape(-1, group), members, rate)
    won = wins.reshape(-1, group).any(-1)
    first = np.where((first == 0) & won, visit, first)
    half = np.where((half == 0) & (np.asarray(mass) >= 0.5), visit, half)
    if visit == early:
      early_policy = policy(theta)
  shape = (copies, *p0.shape)
  return Sampled(
    early_policy.reshape(shape),
    policy(theta).reshape(shape),
    first.reshape(copies, -1).astype(int),
    half.reshape(copies, -1).astype(int),
  )


@functools.partial(jax.jit, static_argnames='group')
def draw(theta, key, group):
  """Outcomes and their log-probs, `[B, G]`, by the inverse of the distribution.

  In float64: a float32 uniform has steps of 1e-7, and chances of 1e-6 are waited for.
  theta: `[B, Y]`
  """
  log_pi = jax.nn.log_softmax(theta.astype(jnp.float64))
  upto = jnp.cumsum(jnp.exp(log_pi), -1)
  height = jax.random.uniform(key, (len(theta), group), upto.dtype) * upto[:, -1:]
  taken = jax.vmap(functools.partial(jnp.searchsorted, side='right'))(upto, height)
  taken = jnp.minimum(taken, theta.shape[-1] - 1).astype(jnp.int32)
  return taken, jnp.take_along_axis(log_pi, taken, -1)


@jax.jit
def update(theta, drawn, gains, members, rate):
  """(the next logits `[B, Y]`, π(C) `[B]` after it). drawn, gains: `[B, G]`"""

  def loss(theta):
    logp = jnp.take_along_axis(jax.nn.log_softmax(theta), drawn, -1)
    batch = Batch(
      jnp.zeros((drawn.size, 2), jnp.int32),
      after_blank(jnp.ones_like(logp)),
      advantages=after_blank(gains),
    )
    how = dict(objective='reinforce', aggregate='sequence_sum')
    return grpo.loss(told(logp), batch, **how)[0].value * len(theta)

  theta = theta - rate * jax.grad(loss)(theta)
  return theta, (jax.nn.softmax(theta) * members).sum(-1)


def descended(step, start, steps):
  run = jax.jit(lambda theta: jax.lax.scan(step, theta, length=steps)[0])
  return np.asarray(jax.nn.softmax(run(start)))


def policy(theta):
  return np.exp(np.asarray(jax.nn.log_softmax(theta), np.float64))


def told(logp) -> Scores:
  """Of one token a row, after a blank."""
  return Scores(after_blank(logp), jnp.zeros((logp.size, 2)))


def after_blank(x):
  return column(x.ravel())


def column(x):
  return jnp.stack([jnp.zeros_like(x), x], 1)
