"""Checkpoints: everything a run needs to go on as if nothing had happened.

One folder a step, written by Orbax in the background and committed atomically: the
TrainState, the data iterator, and the config that made them. A folder without its commit
mark is never read; older ones are deleted only after a newer one is committed.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import pathlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from educe.models import lora, policy, quantized, value_head
from educe.models.parts import WEIGHTS, path_text
from educe.types import Model, Params, StateMismatch, TrainState

VALUE = f'params/{value_head.KEY}/'  # what a critic or reward model adds to a policy
# What a checkpoint is compared by before it is read, and what each says it belongs to.
KINDS = {'params': 'model', 'opt_state': 'optimizer', 'reference': 'kind of run'}


class CheckpointError(RuntimeError):
  """A checkpoint could not be written or read; the message says which and what to do."""


def quiet() -> None:
  """Keeps Orbax's threads from printing what `save`, `wait` and `restore` also raise.

  After one write has failed the others find their event loop closed, nobody who waits
  for them, or never begin; the garbage collector comes upon each at a time of its own.
  """
  shown = sys.unraisablehook

  def hook(unraisable):
    abandoned = inspect.iscoroutine(unraisable.object)
    if not abandoned and 'Event loop is closed' not in str(unraisable.exc_value):
      shown(unraisable)

  sys.unraisablehook = hook
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)


def open_manager(folder: pathlib.Path, *, keep: int = 2) -> ocp.CheckpointManager:
  """A manager of `folder`, which it makes; the newest `keep` checkpoints stay."""
  if keep < 1:
    raise ValueError(f'keep={keep}: at least one checkpoint has to stay')
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
  )
  return ocp.CheckpointManager(folder.resolve(), options=options)


def save(manager, state: TrainState, data: Any, config: dict[str, Any]) -> None:
  """Starts writing the state at its own step; returns once it is safe to go on.

  Raises CheckpointError if this save, or the one before it, could not be written.
  """
  step = int(state.step)
  if step in manager.all_steps():
    return
  wait(manager)
  position = data.get_state()
  args = ocp.args.Composite(
    state=ocp.args.StandardSave(state),
    data=ocp.args.JsonSave(position),
    config=ocp.args.JsonSave(config),
  )
  with _writing(manager, step):
    manager.save(step, args=args)


def wait(manager) -> None:
  """Returns once the write in flight is committed. Raises CheckpointError."""
  with _writing(manager, manager.latest_step()):
    manager.wait_until_finished()


def restore(manager, like: TrainState, data: Any) -> TrainState | None:
  """The newest checkpoint as a TrainState placed like `like`, or None if there is none.

  `data` is set to where it stood; iterate it only afterwards.
  Raises CheckpointError when the checkpoint is of another model, or damaged, and
  StateMismatch when `data` is of another data set.
  """
  step = manager.latest_step()
  if step is None:
    return None
  folder = manager.directory / str(step)
  others = [s for s in manager.all_steps() if s != step]
  mend = 'move it away to ' + (
    f'resume from step {max(others)}' if others else 'start afresh'
  )
  abstract = abstract_of(like)
  with _reading(folder, mend):
    _same_model(folder, _saved_shapes(folder / 'state'), _shapes(abstract))
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
    )
    found = manager.restore(step, args=args)
    _same_scale(folder, found.state.params, like.params)
    data.set_state(found.data)
    return found.state


def abstract_of(tree: Any) -> Any:
  """Shapes, dtypes and places of arrays; what has no place goes to where arrays are
  made now (a process's first device, or `sharding.on_host`)."""
  default = jnp.zeros(()).sharding

  def describe(x):
    where = getattr(x, 'sharding', None) or default
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(describe, tree)


def saved_params(folder: pathlib.Path, like: Any, step: int | None = None) -> Any:
  """Only the params of a run's newest checkpoint (or of `step`), placed like `like`.

  Of a run with a value head, the policy alone, unless `like` has one too. Under
  jax.eval_shape shapes are compared, and nothing is read.
  """
  where = _state_of(folder, step)
  with _reading(where, 'sample an older step'):
    if isinstance(jnp.zeros(()), jax.core.Tracer):
      _compare(where, _shapes({'params': like}))
      return jax.tree.map(_made, like)
    return _read_params(where, abstract_of(like))


def saved_with_value(
  folder: pathlib.Path, model: Model, params: Params
) -> tuple[Model, Params]:
  """(model, params) of a run that trained a value head, both with it.

  model, params: of that run without it, as its config.model and config.adapter say

  Raises CheckpointError if the run has none, and as `saved_params` does.
  """
  where = _state_of(folder, None)
  with _reading(where, 'train it again'):
    found = _saved_shapes(where)
  parts = {n.split('/')[2] for n in found if n.startswith(VALUE)}
  if not parts:
    raise CheckpointError(
      f'{folder} is of a run without a value head; name one whose config has a section '
      'value, such as a reward model'
    )
  trunk = 'separate' if 'trunk' in parts else 'shared'

  def with_head(params):
    # A trunk beside an adapter is another one, unless it came whole from elsewhere.
    start = None
    if trunk == 'separate' and f'{VALUE}trunk/{lora.KEY}/scale' not in found:
      start = value_head.taken(value_head.attach(model, lora.without(params))[1])
    return value_head.attach(model, params, start, trunk=trunk)

  whole, like = policy.described(with_head, params)
  return whole, saved_params(folder, like)


def _state_of(folder: pathlib.Path, step: int | None) -> pathlib.Path:
  with ocp.CheckpointManager(folder.resolve()) as manager:
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
      raise CheckpointError(
        f'{folder}: no finished checkpoint'
        + ('' if step is None else f' of step {step}')
      )
  return folder / str(step) / 'state'


def _made(x: Any) -> Any:
  """An array that is only described, as one that is traced."""
  return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


def _compare(where: pathlib.Path, wanted: dict[str, tuple]) -> None:
  """The shapes of a checkpoint's params with these; without its value head, if they have
  none."""
  whole = any(n.startswith(VALUE) for n in wanted)
  found = {
    n: x
    for n, x in _saved_shapes(where).items()
    if _is_param(n) and (whole or not n.startswith(VALUE))
  }
  _same_model(where, found, wanted)


def _read_params(where: pathlib.Path, abstract: Any) -> Any:
  _compare(where, _shapes({'params': abstract}))
  with ocp.PyTreeCheckpointer() as reader:
    args = ocp.args.PyTreeRestore(
      {'params': abstract},
      restore_args=ocp.checkpoint_utils.construct_restore_args({'params': abstract}),
      partial_restore=True,
    )
    return reader.restore(where.resolve(), args=args)['params']


def _saved_shapes(folder: pathlib.Path) -> dict[str, tuple]:
  """path → shape of every array in a checkpoint; reads no array."""
  with ocp.PyTreeCheckpointer() as reader:
    return _shapes(reader.metadata(folder.resolve()).item_metadata.tree)


def _is_param(path: str) -> bool:
  return path.startswith('params/')


def _shapes(tree: Any) -> dict[str, tuple]:
  """path → shape of every array of KINDS, whatever the containers are."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  shapes = {
    path_text(path): tuple(x.shape) for path, x in leaves if hasattr(x, 'shape')
  }
  return {n: shape for n, shape in shapes.items() if n.split('/')[0] in KINDS}


def _same_model(folder, found: dict[str, tuple], wanted: dict[str, tuple]) -> None:
  names = sorted(found.keys() | wanted.keys(), key=lambda n: (not _is_param(n), n))
  for name in names:
    there, here = found.get(name), wanted.get(name)
    if there != here:
      what = KINDS[name.split('/')[0]]
      a, b = ('absent' if x is None else x for x in (there, here))
      tensor = f'{name} is {a} there and {b} here'
      if told := _other_adapter(found, wanted):
        tensor = f'{told} ({tensor})'
      raise CheckpointError(
        f'{folder} belongs to another {what}: {tensor}; use its own config, or another '
        '--run_dir'
      )


def _other_adapter(found: dict[str, tuple], wanted: dict[str, tuple]) -> str:
  """What tells the adapters of two sets of params apart, as config.adapter names it; ''
  where nothing does."""
  there, here = _adapter(found), _adapter(wanted)
  if there and not here:
    return 'it was trained with config.adapter; this config has none'
  if here and not there:
    return 'it was trained without config.adapter; this config has one'
  for key, own in there.items():
    if own != here[key]:
      had, has = f'{key}={own!r}', f'{key}={here[key]!r}'
      return f'it was trained with config.adapter.{had}; this config has {has}'
  return ''


def _same_scale(folder, found: Params, wanted: Params) -> None:
  """Raises CheckpointError for an adapter that weighs more or less: no shape tells."""
  there, here = (
    float(x[lora.KEY]['scale']) if isinstance(x, Mapping) and lora.KEY in x else None
    for x in (found, wanted)
  )
  if there != here:
    raise CheckpointError(
      f'{folder}: its adapter weighs alpha/rank = {there:g}; this config says {here:g}: '
      'restore config.adapter.alpha, or start another run from it (init_from)'
    )


def _adapter(shapes: dict[str, tuple]) -> dict[str, Any]:
  """The settings of an adapter, as far as shapes tell them; empty where there is none."""
  start = f'params/{lora.KEY}/layers/'
  own = {n.removeprefix(start): x for n, x in shapes.items() if n.startswith(start)}
  if not own:
    return {}
  name = min(n for n in own if n.endswith('/a'))
  codes = shapes.get(f'params/{quantized.KEY}/layers/{name[:-1]}codes')
  # The inputs of A are those of its weight; nf4 stores two of them in a byte.
  few = 'int8' if codes and codes[: len(own[name]) - 1] == own[name][:-1] else 'nf4'
  return {
    'kind': 'dora' if any(n.endswith('/magnitude') for n in own) else 'lora',
    'rank': own[name][-1],
    'targets': tuple(x for x in WEIGHTS if any(n.split('/')[1] == x for n in own)),
    'base': few if codes else None,
  }


@contextlib.contextmanager
def _writing(manager, step: int | None) -> Iterator[None]:
  """Turns what a storage layer throws into one line that says what to do."""
  try:
    yield
  except Exception as error:
    good = max(manager.all_steps(read=True), default=None)
    raise CheckpointError(
      f'checkpoint {step} could not be written ({_reason(error)}); free some space '
      f'under {manager.directory} and run the same command: '
      + (f'step {good} is intact' if good is not None else 'no checkpoint exists yet')
    ) from error


@contextlib.contextmanager
def _reading(folder: pathlib.Path, mend: str) -> Iterator[None]:
  try:
    yield
  except (CheckpointError, StateMismatch):  # these say themselves what is wrong
    raise
  except Exception as error:
    raise CheckpointError(f'{folder} is damaged; {mend} ({_reason(error)})') from error


def _reason(error: Exception) -> str:
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:200]}'
