"""Stages: what a config file asks for, run after run, each in a folder of its own."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from educe import config as config_lib
from educe import hosts, recipes
from educe.measurement import story
from educe.policies import read_config
from educe.progress import say
from educe.runs import READ, changes, train
from educe.spelling import near
from educe.training import metrics

# What may change without changing the result (`init_from` is filled in for a stage).
BESIDE = ('init_from', 'mesh', 'microbatches', 'save_every', 'keep', 'tensorboard')


def run_all(argv: Sequence[str], run_dir: pathlib.Path, *, sweep: bool) -> None:
  """What a config file asks for: one run; or every point of its sweep(), or its
  `stages` one after another, each in its own folder.

  A stage starts from the weights that the stage before it ended with, unless it has an
  init_from of its own; 'stage://sft', anywhere in it, is the folder of the stage sft. The
  keys and types of all are checked before the first is run, their values when each starts.

  Raises ConfigError where a finished stage was another's.
  """
  points = recipes.sweep(argv) if sweep else [('', [])]
  for name, point in points:
    values = recipes.load([*argv, *point])
    stages = values.pop('stages', None)
    if stages is None:
      runs = {run_dir / name: config_lib.expand(values, train)}
    else:
      if left_out := sorted(values.keys() - set(stages)):
        raise config_lib.ConfigError(
          f'config.stages={stages} leaves out the section {left_out[0]!r}: delete it, or '
          'name it there'
        )
      runs = {
        run_dir / name / stage: config_lib.expand(
          values[stage], train, f'config.{stage}'
        )
        for stage in stages
      }
    before: dict[str, pathlib.Path] = {}
    for folder, config in runs.items():
      config_lib.check_used(config, READ)
      where = f'config.{folder.name}' if stages else 'config'
      runs[folder] = with_stages(config, before, where)
      before[folder.name] = folder
    previous = None
    for folder, config in runs.items():
      if stages and hosts.agreed(is_done(folder, config)):
        check_same(folder, config, runs)
        say(f'{folder} is already done')
      else:
        if previous is not None and config['init_from'] is None:
          config['init_from'] = str(previous)
        try:
          finished = train(folder, **config)
        except config_lib.ConfigError as error:
          if not stages:
            raise
          inside = re.sub(r'\bconfig\.(?!json\b)', f'config.{folder.name}.', str(error))
          raise config_lib.ConfigError(inside) from error
        if not finished:
          return
      previous = folder
    if stages:
      say(story.table(list(runs)))


def with_stages(
  values: Any, folders: dict[str, pathlib.Path], where: str = 'config'
) -> Any:
  """A config in which 'stage://sft' is the folder of the stage of that name.

  folders: of the stages before it. Raises ConfigError for any other, at its key `where`.
  """
  if isinstance(values, dict):
    return {k: with_stages(x, folders, f'{where}.{k}') for k, x in values.items()}
  if not isinstance(values, str) or not values.startswith('stage://'):
    return values
  name = values.removeprefix('stage://')
  if name not in folders:
    hint = near(name, folders)
    raise config_lib.ConfigError(f'{where}={values}: no such stage before it{hint}')
  return str(folders[name])


def is_done(folder: pathlib.Path, config: dict[str, Any]) -> bool:
  """Its last step is saved and, where there is an evaluation, evaluated."""
  last = config['steps']
  saved = (folder / 'checkpoints' / str(last)).is_dir()
  if not saved or config['evaluation'] is None:
    return saved
  return last in metrics.evaluated(metrics.read(folder / 'metrics.jsonl'))


def check_same(
  folder: pathlib.Path, config: dict[str, Any], stages: Iterable[pathlib.Path]
) -> None:
  """Raises ConfigError if a finished run was asked for something else.

  stages: the folders of the sequence, which may have been moved as a whole since.
  """
  names = {str(stage): stage.name for stage in stages}
  for key, before, after in changes(read_config(folder / 'config.json'), config):
    moved = names.get(str(after)) == pathlib.Path(str(before)).name
    if key.split('.')[0] not in BESIDE and not moved:
      raise config_lib.ConfigError(
        f'{folder} is done with {key}={before}, and the config now says {after}: restore '
        'it, or give a new --run_dir'
      )
