"""Which prompts come next. A resumed run asks exactly the questions it would have asked."""

from __future__ import annotations

from typing import Any

import numpy as np

FLOOR = 0.1  # weight of a prompt that nobody, or everybody, solves; 1 at one half
MEMORY = 0.8  # of what a prompt's earlier visits count, each time it is visited


class Pool:
  """Indices of prompts.

  adaptive=False: each once an epoch, in an order of that epoch's own.
  adaptive=True: by how much there is to learn from. A group of completions that all
  succeed or all fail has no gradient; the others' grows with p(1 − p), so prompts are
  drawn, without repetition in a draw, in proportion to FLOOR + (1 − FLOOR)·4·p(1 − p),
  p the solved share of recent visits, (solved + 1) / (tried + 2) at first.
  """

  def __init__(self, size: int, *, seed: int, adaptive: bool):
    self.size, self.seed, self.adaptive = size, seed, adaptive
    self.drawn = 0
    self.tried, self.solved = np.zeros(size), np.zeros(size)

  def draw(self, count: int) -> list[int]:
    start, self.drawn = self.drawn, self.drawn + count
    if not self.adaptive:
      return self._in_order(start, self.drawn)
    if count > self.size:
      raise ValueError(
        f'rollouts.prompts={count} of {self.size} prompts: an adaptive pool repeats none '
        'in a round; lower it, or give the environment more'
      )
    p = (self.solved + 1) / (self.tried + 2)
    weights = FLOOR + (1 - FLOOR) * 4 * p * (1 - p)
    rng = np.random.default_rng([self.seed, start])
    return rng.choice(self.size, count, False, weights / weights.sum()).tolist()

  def _in_order(self, start: int, stop: int) -> list[int]:
    """Positions start..stop−1 of the epochs' orders, one after another."""
    epochs = range(start // self.size, (stop - 1) // self.size + 1)
    orders = [
      np.random.default_rng([self.seed, e]).permutation(self.size) for e in epochs
    ]
    first = epochs.start * self.size
    return np.concatenate(orders)[start - first : stop - first].tolist()

  def report(self, indices: list[int], tried: int, solved: np.ndarray) -> None:
    """`solved[i]` of `tried` completions of prompt indices[i] were verified."""
    for index, count in zip(indices, solved, strict=True):
      self.tried[index] = MEMORY * self.tried[index] + tried
      self.solved[index] = MEMORY * self.solved[index] + count

  def get_state(self) -> dict[str, Any]:
    state: dict[str, Any] = {'drawn': self.drawn}
    if self.adaptive:
      state |= {'tried': self.tried.tolist(), 'solved': self.solved.tolist()}
    return state

  def set_state(self, state: dict[str, Any]) -> None:
    self.drawn = state['drawn']
    if self.adaptive and 'tried' in state:  # or it was uniform until now
      self.tried, self.solved = np.array(state['tried']), np.array(state['solved'])
