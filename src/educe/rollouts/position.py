"""Where an algorithm stands in its rounds: what must survive a restart."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from educe.rollouts.encoding import pack, unpack
from educe.rollouts.rounds import Rounds
from educe.types import Batch


class Position:
  """A walk over the rows of one round's batch, and on to the next round.

  A round is `epochs` passes over `whole`, each in an order of its own, `size` rows a step.
  """

  def __init__(self, rollouts: Rounds):
    self.rollouts = rollouts
    self.whole: Batch | None = None  # of the round that is being trained on
    self.number = 0  # of that round
    self.used = 0  # steps taken on it
    self.steps = 0  # that it has in all
    self.extra: dict[str, Any] = {}  # JSON-able, an algorithm's own

  @property
  def spent(self) -> bool:
    return self.whole is None or self.used >= self.steps

  def begin(self, whole: Batch, number: int, steps: int) -> None:
    self.whole, self.number, self.steps, self.used = whole, number, steps, 0

  def take(self, count: int, size: int) -> np.ndarray:
    """The next `size` of 0 … count − 1: fewer at the end of a pass, if it must be."""
    epoch, part = divmod(self.used, -(-count // size))
    self.used += 1
    rng = np.random.default_rng([self.rollouts.seed, self.number, epoch])
    return rng.permutation(count)[part * size : (part + 1) * size]

  def rows(self, which: np.ndarray) -> Batch:
    return jax.tree.map(lambda x: x[which], self.whole)

  def get_state(self) -> dict[str, Any]:
    state: dict[str, Any] = {'rollouts': self.rollouts.get_state()}
    if self.extra:
      state['extra'] = dict(self.extra)
    if self.whole is not None and not self.spent:
      arrays = {n: x for n, x in self.whole._asdict().items() if x is not None}
      state |= {n: getattr(self, n) for n in ('number', 'used', 'steps')}
      state['whole'] = pack(arrays)
    return state

  def set_state(self, state: dict[str, Any]) -> None:
    self.rollouts.set_state(state['rollouts'])
    self.whole = None
    self.extra |= state.get('extra', {})
    if 'whole' in state:
      arrays: dict[str, Any] = unpack(state['whole'])
      self.begin(Batch(**arrays), state['number'], state['steps'])
      self.used = state['used']

  def close(self) -> None:
    self.rollouts.close()
