"""Distillation: text of the teacher, of the student, or both, scored by the teacher.

  on_policy  0        the data's text, written by a teacher or anyone
             1        the student's own rollouts, sampled now
             between  either, a coin for each step: λ of GKD (Rishabh Agarwal et al., 2023,
                      Algorithm 1, arXiv:2306.13649)

What is minimised on them is losses/distillation.py. The teacher is the state's reference:
a model of any architecture over the same vocabulary, an argument of the step like params,
and part of a checkpoint.

Differs from the paper: its coin is flipped for each batch as here, but rollouts of several
minibatches are used up before the next are sampled.
"""

from __future__ import annotations

import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from educe import sharding
from educe.algorithms import on_policy as own
from educe.algorithms.sft import extra_fields, read
from educe.data.pipeline import Batches
from educe.losses import distillation
from educe.losses.dry_run import dry_run
from educe.losses.logprobs import score
from educe.rollouts import transcripts
from educe.rollouts.position import Position
from educe.rollouts.rounds import Round, Rounds
from educe.rollouts.sampler import vocabulary_size
from educe.types import (
  Algorithm,
  Batch,
  LossFn,
  Model,
  Params,
  StateMismatch,
  TrainState,
)


def make(
  model: Model,
  loss: LossFn,
  place: Callable[..., Batch],
  mesh: jax.sharding.Mesh,
  run_dir: pathlib.Path,
  seed: int,
  rollouts: Rounds | None = None,
  data: Batches | None = None,
  *,
  teacher: tuple[Model, Params] | None = None,
  on_policy: float = 1.0,
  epochs: int = 1,
  minibatches: int = 1,
) -> Algorithm:
  """Algorithm whose step is a batch of the data, or a minibatch of rollouts.

  Both are scored at the temperature of the rollouts (1 without any). Writes
  rollouts/<round>.jsonl, every completion that was sampled.

  Args:
    teacher: a section like `model`; loss.objective='supervised' needs none.
    on_policy: λ in [0, 1]: the share of steps on the student's own samples.
    epochs, minibatches: passes over a round's rollouts, and parts of a pass.

  Raises ValueError, before anything is sampled, for what cannot be: a share without its
  section, an objective that cannot use that text, a teacher of another vocabulary, batches
  of two sizes.
  """
  # Of a partial, what it was given are the defaults.
  signatures = (inspect.signature(f).parameters for f in (distillation.loss, loss))
  known = {name: x for parameters in signatures for name, x in parameters.items()}
  objective, beta = (known[name].default for name in ('objective', 'beta'))
  _check(objective, on_policy, teacher, rollouts, data, epochs, minibatches)
  extra = () if data is None else extra_fields(data)
  sizes = set() if data is None else {data.batch_size}
  if rollouts is not None:
    sizes.add(rollouts.prompts // minibatches * rollouts.group)
  if len(sizes) > 1:
    raise ValueError(
      f'algorithm: steps of {sorted(sizes)} rows; make data.batch_size rollouts.prompts'
      ' / minibatches × rollouts.group'
    )
  (size,) = sizes
  temperature = 1.0 if rollouts is None else rollouts.temperature
  by_token = objective == 'reverse_kl'
  later = epochs * minibatches > 1 or bool(rollouts and rollouts.behind)
  fields = {
    'divergence': objective == 'jsd',
    'ref_logp': by_token,
    'old_logp': by_token and later,
  }
  given = (*extra, *(name for name, there in fields.items() if there))
  dry_run(loss, *given)

  other = scorer = frozen = None
  if teacher is not None:
    other, params = teacher
    _same_vocabulary(model, other, params)
    frozen = sharding.place(params, other.axes, mesh)
    if objective == 'jsd':

      def scorer(params, reference, batch):
        to = (other, reference)
        return score(
          model, params, batch, temperature=temperature, teacher=to, beta=beta
        )

  def prepare(state: TrainState, current: Round) -> tuple[Batch, dict[str, Any]]:
    """The whole round as one batch."""
    r, info = current.rollouts, dict(current.info)
    mask = np.asarray(r.mask)

    def logp(read, params):
      return read(params, r.tokens, r.mask)[0]

    stale = by_token and (later or current.step != int(state.step))
    transcripts.save_round(run_dir, current.number, int(state.step), r.transcripts)
    arrays: dict[str, Any] = dict(
      tokens=np.asarray(r.tokens),
      mask=mask,
      old_logp=logp(student_logp, state.params) if stale else None,
      ref_logp=logp(teacher_logp, state.reference) if by_token else None,
    )
    return Batch(**arrays), info

  texts = Texts(data, None if rollouts is None else Position(rollouts))
  if rollouts is not None:
    assert texts.sampled is not None
    student_logp = own.reader(model, rollouts, place, size)
    teacher_logp = teacher and own.reader(teacher[0], rollouts, place, size)
    sampled = own.walk(texts.sampled, prepare, epochs, minibatches)

  def next_batch(state: TrainState) -> tuple[Batch, dict[str, Any]]:
    if on_policy == 1:
      return sampled(state)
    assert data is not None
    coin = np.random.default_rng([seed, int(state.step)]).random() if on_policy else 1.0
    batch, info = sampled(state) if coin < on_policy else read(data)
    return batch, info | ({'on_policy': float(coin < on_policy)} if on_policy else {})

  return Algorithm(
    next_batch,
    loss,
    texts,
    size,
    temperature=temperature,
    asks_policy=on_policy > 0,
    reference=frozen,
    score=scorer,
    teacher=None if scorer is None else other,
    fields=tuple(name for name in given if name != 'divergence'),
  )


class Texts:
  """Where both kinds of text stand: what must survive a restart."""

  def __init__(self, data: Batches | None, sampled: Position | None):
    self.data, self.sampled = data, sampled

  def get_state(self) -> dict[str, Any]:
    return {
      'data': None if self.data is None else self.data.get_state(),
      'sampled': None if self.sampled is None else self.sampled.get_state(),
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Raises StateMismatch for the state of other data, or of text of another kind."""
    for name in ('data', 'sampled'):
      ours, saved = getattr(self, name), state[name]
      if (ours is None) != (saved is None):
        without = 'without' if saved is None else 'with'
        raise StateMismatch(
          f'the run was saved {without} {name} text: it cannot continue exactly; restore '
          'algorithm.on_policy or start a new run'
        )
    if self.data is not None:
      self.data.set_state(state['data'])
    if self.sampled is not None:
      self.sampled.set_state(state['sampled'])

  def close(self) -> None:
    for part in (self.data, self.sampled):
      if part is not None:
        part.close()


def _same_vocabulary(model: Model, teacher: Model, params: Params) -> None:
  student = jax.eval_shape(lambda key: model.head(model.init(key)), jax.random.key(0))
  ours, theirs = student.matrix.shape[-1], vocabulary_size(teacher, params)
  if ours != theirs:
    raise ValueError(
      f'algorithm.teacher knows {theirs} tokens and the student {ours}: a teacher must '
      "share the student's vocabulary; or learn from its text, with loss.objective="
      "'supervised' and on_policy=0"
    )


def _check(objective, on_policy, teacher, rollouts, data, epochs, minibatches) -> None:
  """One clear line for what cannot be."""
  wrong = None
  if not 0 <= on_policy <= 1:
    wrong = f'.on_policy={on_policy} must be in [0, 1]'
  elif on_policy and rollouts is None:
    wrong = f'.on_policy={on_policy} needs config.rollouts; or set on_policy=0'
  elif on_policy < 1 and data is None:
    wrong = f'.on_policy={on_policy} needs config.data; or set on_policy=1'
  elif not on_policy and rollouts is not None:
    wrong = '.on_policy=0 samples nothing: delete config.rollouts, or raise it'
  elif on_policy == 1 and data is not None:
    wrong = '.on_policy=1 reads no data: delete config.data, or lower it'
  elif objective == 'supervised' and on_policy:
    wrong = (
      f".on_policy={on_policy}: loss.objective='supervised' learns from data; set 0"
    )
  elif objective == 'reverse_kl' and on_policy < 1:
    wrong = (
      f".on_policy={on_policy}: loss.objective='reverse_kl' is right on the student's own "
      "samples alone; set 1, or objective='jsd' with beta=1"
    )
  elif (teacher is None) != (objective == 'supervised'):
    said = 'is missing' if teacher is None else 'is given'
    wrong = f'.teacher {said}, with loss.objective={objective!r}'
    mend = 'name one, as dict(name=…, path=…)' if teacher is None else 'delete it'
    wrong = f'{wrong}: {mend}'
  elif epochs < 1 or minibatches < 1:
    wrong = f': {epochs=} and {minibatches=} must be at least 1'
  elif rollouts is None and epochs * minibatches > 1:
    wrong = f': {epochs=} and {minibatches=} are of rollouts, and on_policy=0'
  elif rollouts is not None and rollouts.prompts % minibatches:
    wrong = (
      f': rollouts.prompts={rollouts.prompts} must be a multiple of {minibatches=}'
    )
  if wrong:
    raise ValueError(f'algorithm{wrong}')
