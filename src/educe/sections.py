"""What a run, and a plan of it, make alike of a config's sections."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from educe import config as config_lib
from educe import hosts, sharding
from educe.data import pipeline
from educe.data.shards import Shards
from educe.data.sharing import GRAIN
from educe.models import lora
from educe.training.optimizer import Optimizer
from educe.training.step import Step, make_step
from educe.types import Algorithm, Model

OFFLOADED = ('opt_state', 'reference')


def check_offload(offload: Sequence[str]) -> None:
  """Raises ConfigError for what is no part of a state that may lie on the host."""
  if unknown := [name for name in offload if name not in OFFLOADED]:
    raise config_lib.ConfigError(
      f'config.offload={offload}: {unknown[0]!r} is none of {OFFLOADED}'
    )


def check_context(mesh: Any, data: Mapping[str, Any] | None, longer: int = 0) -> None:
  """Raises ConfigError for rows that do not divide as config.mesh.context says.

  longer: tokens that an algorithm adds to those of the data
  """
  parts = sharding.in_parts(mesh)
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
  return Shards(open_shard, sharding.parts_of_rows(grid), mine)


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
