"""A language small enough to list, a gold reward, and reward models of ever more pairs.

16 prompts, each with its own base policy over the 4,096 completions of 4 tokens out of 8
(a Markov chain; tokens have Zipf frequencies, as words do). Gold is one half quality, that
is weights for every pair of neighbours (the same for all prompts) and for every token
under every prompt, and one half fluency: the log-frequency of the tokens, for what a base
model hardly ever says is mostly bad. Gold has mean 0 for every prompt and variance 1.

A reward model is linear in exactly the features that gold is linear in, so that nothing
but its data keep it from gold: n pairs drawn from the base, each labelled once by
Bradley–Terry on gold. What the base hardly ever says is in few pairs.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
from scipy import sparse

TOKENS, LENGTH, PROMPTS = 8, 4, 16
ZIPF, SPREAD = 2.0, 0.7
RIDGE = 0.03  # in units of one pair's log-likelihood: keeps unseen features finite

COMPLETIONS = np.array(list(itertools.product(range(TOKENS), repeat=LENGTH)))
COUNT = len(COMPLETIONS)


class World(NamedTuple):
  tables: np.ndarray  # [P, T, V, V], log p0(token | the one before, 0 at the start)
  log_p0: np.ndarray  # [P, N] (nats)
  gold: np.ndarray  # [P, N]


def log_probs(tables):
  """`[P, N]`, of all completions, from log-conditionals `[P, T, V, V]`."""
  before = np.concatenate([np.zeros((COUNT, 1), int), COMPLETIONS[:, :-1]], 1)
  return tables[:, np.arange(LENGTH), before, COMPLETIONS].sum(-1)


def world(seed: int) -> World:
  rng = np.random.default_rng(seed)
  frequency = -ZIPF * np.log(np.arange(1, TOKENS + 1))
  shape = (PROMPTS, LENGTH, TOKENS, TOKENS)
  tables = frequency + SPREAD * rng.standard_normal(shape)
  tables -= np.log(np.exp(tables).sum(-1, keepdims=True))
  log_p0 = log_probs(tables)
  p0 = np.exp(log_p0)

  def standard(reward):
    reward = reward - (p0 * reward).sum(-1, keepdims=True)
    return reward / np.sqrt((p0 * reward**2).sum(-1).mean())

  neighbours = rng.standard_normal(TOKENS**2) / np.sqrt(2 * (LENGTH - 1))
  own = rng.standard_normal(PROMPTS * TOKENS) / np.sqrt(2 * LENGTH)
  quality = features() @ np.concatenate([neighbours, own])
  fluency = np.tile(frequency[COMPLETIONS].sum(-1), (PROMPTS, 1))
  gold = standard(quality.reshape(PROMPTS, COUNT)) + standard(fluency)
  return World(tables, log_p0, standard(gold))


@functools.cache
def features() -> sparse.csr_matrix:
  """`[P·N, F]`: how often a completion has each pair of neighbours, and each token
  (of that prompt)."""
  pairs = COMPLETIONS[:, :-1] * TOKENS + COMPLETIONS[:, 1:]
  rows = []
  for prompt in range(PROMPTS):
    tokens = TOKENS**2 + prompt * TOKENS + COMPLETIONS
    rows.append(np.concatenate([pairs, tokens], 1))
  column = np.concatenate(rows)
  row = np.repeat(np.arange(len(column)), column.shape[1])
  shape = (len(column), TOKENS**2 + PROMPTS * TOKENS)
  return sparse.csr_matrix((np.ones(column.size), (row, column.ravel())), shape)


def preferences(world: World, pairs: int, seed) -> tuple[np.ndarray, np.ndarray]:
  """(chosen, rejected), rows of `features()`: two draws of the base, one label each."""
  rng = np.random.default_rng(seed)
  prompt = rng.integers(PROMPTS, size=pairs)
  drawn = np.empty((pairs, 2), int)
  for x in range(PROMPTS):
    p0 = np.exp(world.log_p0[x])
    here = prompt == x
    drawn[here] = rng.choice(COUNT, (here.sum(), 2), p=p0 / p0.sum())
  drawn += prompt[:, None] * COUNT
  gold = world.gold.ravel()[drawn]
  first = rng.random(pairs) < 1 / (1 + np.exp(gold[:, 1] - gold[:, 0]))
  chosen = np.where(first, drawn[:, 0], drawn[:, 1])
  return chosen, drawn.sum(1) - chosen


def reward_model(world: World, pairs: int, seed) -> np.ndarray:
  """The proxy `[P, N]`, mean 0 under the base: the minimum of
  −Σ log σ(r_chosen − r_rejected) + RIDGE/2·‖w‖², by Newton's method."""
  chosen, rejected = preferences(world, pairs, seed)
  x = features()[chosen] - features()[rejected]
  w = np.zeros(x.shape[1])
  for _ in range(50):
    wrong = 1 / (1 + np.exp(x @ w))  # the probability that the label was the other one
    slope = x.T @ wrong - RIDGE * w
    bend = (x.T @ x.multiply((wrong * (1 - wrong))[:, None])).toarray()
    step = np.linalg.solve(bend + RIDGE * np.eye(len(w)), slope)
    w += step
    if np.abs(step).max() < 1e-10:
      break
  else:
    raise RuntimeError(f'the reward model of {pairs} pairs did not converge')
  proxy = (features() @ w).reshape(PROMPTS, COUNT)
  return proxy - (np.exp(world.log_p0) * proxy).sum(-1, keepdims=True)
