"""The proxy optimised by educe's own loss: exactly, and from samples.

`natural` moves the logits of all completions by the natural gradient of grpo.loss under
exact expectations (a mask of π(y) in place of 1, see tests/environments/test_tabular.py);
`rloo` trains a table of conditionals, one for each prompt, from sampled completions, by
its plain or its (damped) natural gradient. Both have k1 of the whole completion, times β,
in the reward.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import world as worlds

from educe.losses import advantages, grpo
from educe.types import Batch, Scores


def natural(log_p0, proxy, beta: float, *, steps: int, rate: float) -> np.ndarray:
  """π after each step, `[steps, P, N]`.

  The gradient of E_π[A] in the logits is π·(A − E_π[A]); divided by π it is natural.
  """
  with jax.enable_x64():
    start = jnp.asarray(log_p0, jnp.float64)
    reward = jnp.asarray(proxy, jnp.float64)
    tokens = jnp.zeros((start.size, 2), jnp.int32)

    def after_blank(x):
      return jnp.stack([jnp.zeros(start.size), x.ravel()], 1)

    def loss(theta):
      log_pi = jax.nn.log_softmax(theta)
      held = jax.lax.stop_gradient(log_pi)
      shaped = reward - beta * (held - start)
      batch = Batch(tokens, after_blank(jnp.exp(held)), advantages=after_blank(shaped))
      scores = Scores(after_blank(log_pi), jnp.zeros(tokens.shape))
      return grpo.loss(scores, batch, objective='reinforce')[0].value

    def step(theta, _):
      slope = jax.grad(loss)(theta) * len(start)  # the loss is a mean over prompts
      theta = theta - rate * slope / jax.nn.softmax(theta)
      return theta, jax.nn.softmax(theta)

    run = jax.jit(lambda theta: jax.lax.scan(step, theta, length=steps)[1])
    return np.asarray(run(start))


def rloo(world, proxy, beta: float, *, steps, group, rate, damping, every, seed=0):
  """log π `[P, N]` before the first and after every so many steps, from samples.

  group: completions of each prompt in a step
  damping: None: the plain gradient of the logits. Else it is divided, as the exact
    natural gradient would be, by the chance that a completion has that token there, plus
    damping, so that one rare sample is no leap.
  """
  tables = jnp.asarray(world.tables, jnp.float32)
  reference = tables
  key = jax.random.key(seed)
  index = worlds.TOKENS ** np.arange(worlds.LENGTH - 1, -1, -1)
  prompt = np.repeat(np.arange(worlds.PROMPTS), group)
  policies = [_enumerated(tables)]
  for step in range(1, steps + 1):
    drawn = _sample(tables, reference, prompt, jax.random.fold_in(key, step))
    tokens, logp, ref_logp = (np.asarray(x) for x in drawn)
    rewards = proxy[prompt, tokens[:, 1:] @ index]
    shaped = rewards - beta * (logp - ref_logp).sum(-1)
    mask = np.ones(tokens.shape, np.float32)
    mask[:, 0] = 0
    advantage = (advantages.rloo(shaped, group)[:, None] * mask).astype(np.float32)
    batch = Batch(tokens, mask, advantages=advantage)
    tables = _update(tables, prompt, batch, rate, damping)
    if step % every == 0:
      policies.append(_enumerated(tables))
  return policies


def _enumerated(tables):
  tables = np.asarray(tables, np.float64)
  tables = tables - np.logaddexp.reduce(tables, -1, keepdims=True)
  return worlds.log_probs(tables)


def _log_conditionals(tables, prompt, tokens):
  """`[B, T + 1]`: of each token given the one before; column 0 is 0."""
  at = jnp.arange(tokens.shape[1] - 1)
  rows = jax.nn.log_softmax(tables)[prompt[:, None], at, tokens[:, :-1]]
  chosen = jnp.take_along_axis(rows, tokens[:, 1:, None], -1)[..., 0]
  return jnp.pad(chosen, ((0, 0), (1, 0)))


@jax.jit
def _sample(tables, reference, prompt, key):
  """tokens, log π and log p0 of them, each `[B, T + 1]`; token 0 begins."""
  tokens = [jnp.zeros(len(prompt), jnp.int32)]
  for at in range(tables.shape[1]):
    logits = tables[prompt, at, tokens[-1]]
    tokens.append(jax.random.categorical(jax.random.fold_in(key, at), logits))
  tokens = jnp.stack(tokens, 1)
  return (
    tokens,
    _log_conditionals(tables, prompt, tokens),
    _log_conditionals(reference, prompt, tokens),
  )


@functools.partial(jax.jit, static_argnames='damping')
def _update(tables, prompt, batch, rate, damping):
  def loss(tables):
    logp = _log_conditionals(tables, prompt, batch.tokens)
    scores = Scores(logp, jnp.zeros_like(logp))
    how = {'objective': 'reinforce', 'aggregate': 'sequence_sum'}
    return grpo.loss(scores, batch, **how)[0].value

  slope = jax.grad(loss)(tables) * len(tables)  # the loss is a mean over prompts
  if damping is not None:
    slope = slope / (_visits(tables) + damping)
  return tables - rate * slope


def _visits(tables):
  """`[P, T, V, V]`: the chance of a completion with this token after that one, here."""
  chance = jax.nn.softmax(tables)
  here = jnp.zeros((len(tables), tables.shape[2])).at[:, 0].set(1.0)
  out = []
  for at in range(tables.shape[1]):
    out.append(here[:, :, None] * chance[:, at])
    here = out[-1].sum(1)
  return jnp.stack(out, 1)
