"""What a run, and a plan of it, make alike of a config's sections."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from educe import config as config_lib
from educe import hosts, mesh_checks, roofline, sharding
from educe.data import pipeline
from educe.data.shards import Shards
from educe.data.sharing import GRAIN, share
from educe.data.tokenizer import Tokenizer
from educe.losses.dry_run import reads
from educe.models import lora, value_head
from educe.policies import check_vocabulary, started_from
from educe.training.optimizer import Optimizer
from educe.training.step import Step, init_state, make_step
from educe.types import Algorithm, Batch, LossFn, Model, Params, TrainState

OFFLOADED = ('opt_state', 'reference')
LOWEST = dict(
  steps=1, microbatches=1, save_every=1, keep=1, abort_after=1, evaluate_every=0
)


def check(config: Mapping[str, Any]) -> None:
  """Raises ConfigError for what is wrong with a run whatever its model is."""
  for name, low in LOWEST.items():
    if config[name] < low:
      raise config_lib.ConfigError(
        f'config.{name}={config[name]} must be at least {low}'
      )
  if unknown := [name for name in config['offload'] if name not in OFFLOADED]:
    raise config_lib.ConfigError(
      f'config.offload={config["offload"]}: {unknown[0]!r} is none of {OFFLOADED}'
    )
  for section in ('evaluation', 'adapter', 'value'):
    if config[section]:
      config_lib.check(section, config[section])
  for name in ('init_from', 'value_from'):
    folder = config[name]
    if folder is not None and not (pathlib.Path(folder) / 'checkpoints').is_dir():
      raise config_lib.ConfigError(
        f'config.{name}={folder!r} is not the folder of a run'
      )
  if config['value_from'] is not None and not config['value']:
    raise config_lib.ConfigError(
      f'config.value_from={config["value_from"]!r} without a section value: add '
      "value=dict(trunk='shared')"
    )


def check_rows(
  config: Mapping[str, Any], method: Algorithm, mesh: Any, rows: int | None = None
) -> None:
  """Raises ValueError for rows that the mesh or the microbatches cannot divide.

  rows: of the global batch; None: the algorithm's
  """
  check_context(mesh, config['data'], method.longer)
  parts = config['microbatches']
  rows = rows or method.rows
  mesh_checks.check_batch(
    rows, parts, mesh, method.group, method.couples, name=_rows_from(config)
  )


def _rows_from(config: Mapping[str, Any]) -> str:
  """The fields that say how many rows a batch has."""
  if config['data']:
    return 'config.data.batch_size'
  if 'batch_size' in config['algorithm']:
    return 'config.algorithm.batch_size'
  parts = (
    ' / config.algorithm.minibatches' if 'minibatches' in config['algorithm'] else ''
  )
  return f'config.rollouts.prompts × group{parts}'


def check_context(mesh: Any, data: Mapping[str, Any] | None, longer: int = 0) -> None:
  """Raises ConfigError for rows that do not divide as config.mesh.context says.

  longer: tokens that an algorithm adds to those of the data
  """
  parts = sharding.token_parts(mesh)
  if data and (data['max_length'] + longer) % parts:
    and_more = f' and {longer} more' if longer else ''
    raise config_lib.ConfigError(
      f'config.data.max_length={data["max_length"]}{and_more} does not divide into '
      f'config.mesh.context={parts} parts; make the sum a multiple of {parts}'
    )
  if not data and GRAIN % parts:
    raise config_lib.ConfigError(
      f'config.mesh.context={parts} must divide {GRAIN}, of which the widths of rollouts '
      'are multiples'
    )


def optimizer_of(config: Mapping[str, Any]) -> Optimizer:
  """The section `optimizer`; beside an adapter it trains that, and a value head."""
  section = config['optimizer']
  frozen = (*section.get('freeze', ()), *([lora.FROZEN] if config['adapter'] else []))
  return config_lib.call(
    'optimizer', {**section, 'freeze': frozen}, steps=config['steps']
  )


def tokenizer_of(config: Mapping[str, Any]) -> Tokenizer:
  """The section `tokenizer`."""
  section = config['tokenizer']
  try:
    return config_lib.call('tokenizer', section)
  except config_lib.ConfigError as error:
    same = section.get('path') == config['model'].get('path')
    hint = ' (it is config.model.path, which config.tokenizer.path follows)'
    raise config_lib.ConfigError(f'{error}{hint if same else ""}') from error


def to_come(folder: str | None) -> bool:
  """Whether that is of a stage of a sequence, which may not have run yet."""
  return folder is not None and folder.startswith('stage://')


def policy_of(config: Mapping[str, Any], words: Tokenizer) -> tuple[Model, Params]:
  """The sections `model`, `adapter` and `value`, and the runs that they start from.

  What a stage that is to come trains has the architecture of this one, and no adapter.
  """
  call = config_lib.call
  net, params = call('model', config['model'])
  check_vocabulary(net, params, words)
  if config['init_from'] is not None and not to_come(config['init_from']):
    params = jax.eval_shape(lambda x: x, params)  # lets go of what is replaced
    net, params = started_from(config['init_from'], net, params)
  if config['adapter']:
    net, params = call('adapter', config['adapter'], model=net, params=params)
  else:
    net, params = net._replace(axes=lora.plain_axes(net.axes)), lora.merged(params)
  if config['value']:
    start = None
    if to_come(config['value_from']):
      start = value_head.taken(value_head.attach(net, params)[1])
    elif config['value_from'] is not None:
      _, theirs = started_from(config['value_from'], net, params, values=True)
      start = value_head.taken(theirs)
    net, params = call('value', config['value'], model=net, params=params, start=start)
  return net, params


def loss_of(config: Mapping[str, Any]) -> LossFn:
  """The section `loss`. Raises ConfigError for a value head that it has no use for."""
  loss = config_lib.bound('loss', config['loss'])
  if config['value'] and not reads(loss, 'values'):
    raise config_lib.ConfigError(
      f'config.value={config["value"]}: config.loss reads no values, and algorithm '
      f'{config["algorithm"]["name"]!r} trains none; delete it'
    )
  return loss


def algorithm_of(
  section: Mapping[str, Any], advantage: Mapping[str, Any] | None, **supply: Any
) -> Algorithm:
  """The section `algorithm`, with the section `advantage`.

  supply: what else it takes from the run
  """
  return config_lib.call(
    'algorithm',
    section,
    **supply,
    advantage=advantage and config_lib.bound('advantage', advantage),
  )


def copies(method: Algorithm) -> bool:
  """Whether the state's reference starts as a copy of the policy."""
  return method.reference_every is not None and method.reference is None


def state_of(
  config: Mapping[str, Any], method: Algorithm, params: Params, tx: Optimizer, key: Any
) -> TrainState:
  """Step 0, the reference included. Raises ConfigError for one that is not there, and is
  to lie on the host."""
  state = init_state(params, tx, key, reference=copies(method))
  if method.reference is not None:
    state = state._replace(reference=method.reference)
  if 'reference' in config['offload'] and state.reference is None:
    raise config_lib.ConfigError(
      f'config.offload={config["offload"]}: this run keeps no reference; leave it out'
    )
  return state


def offloaded(config: Mapping[str, Any], state: TrainState) -> TrainState:
  """The state, or what describes it, with what is to lie on the host there."""
  moved = {name: sharding.to_host(getattr(state, name)) for name in config['offload']}
  return state._replace(**moved)


def shared(
  config: Mapping[str, Any], batch: Batch, shares: int, mesh: Any, whole: bool
) -> Batch:
  """A batch of which rows next to each other read the prompt that they share once.

  whole: whether all of its rows are here
  """
  # Of a part each process would choose widths of its own; and who goes on from a shared
  # prompt reads it on the same device.
  if not whole or sharding.token_parts(mesh) > 1:
    return batch
  return share(batch, shares, sharding.row_parts(mesh) * config['microbatches'])


def opened(data: dict[str, Any], grid: Any, **supply: Any) -> Shards:
  """The section `data`, dealt out to the processes that have rows of their own."""

  def open_shard(shard: int, of: int, looks: bool) -> pipeline.Batches:
    size = data['batch_size']
    cut = data if of == 1 else {**data, 'batch_size': size // of}
    place = dict(process_index=shard, process_count=of, looks=looks)
    return config_lib.call('data', cut, **supply, **place)

  if hosts.count() == 1:
    return Shards(open_shard)
  mine = functools.partial(sharding.process_rows, grid)
  return Shards(open_shard, sharding.distinct_row_parts(grid), mine)


def step_of(
  net: Model,
  method: Algorithm,
  tx: Optimizer,
  microbatches: int,
  state_shardings: Any,
) -> Step:
  """The update of an algorithm's batches."""
  return make_step(
    net,
    method.loss,
    tx,
    microbatches=microbatches,
    temperature=method.temperature,
    reference_every=method.reference_every,
    scorer=method.score,
    reference_alpha=method.reference_alpha,
    state_shardings=state_shardings,
  )


def work_of(
  net: Model,
  params: Params,
  tx: Optimizer,
  method: Algorithm,
  read: roofline.Reading,
  tokens: int | None = None,
) -> roofline.Work:
  """What an update of a batch is there for. params: arrays, or what describes them

  tokens: of its rows, where some are read once for several of them
  """
  return roofline.update(
    net,
    params,
    read,
    tx.split(params)[0],
    teacher=(method.teacher, method.reference) if method.teacher else None,
    scored=reads(method.loss, 'logp', 'entropy', 'mean_logp', 'divergence'),
    tokens=tokens,
  )
