"""Recipes: what a config file and flags say, as one nested dict.

  python -m educe train --config=configs/sft.py:demo,debug --config.seed=7

The word after the colon goes to the file's get_config, `debug` shrinks what comes back,
and a flag sets any key of it. Which function a section then calls, and what that takes,
is config.py's.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pathlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from educe.config import PLACES, ConfigError, one_line, resolve
from educe.spelling import near

# What `:debug` makes of a recipe: two steps of a tiny random model, in seconds. It shrinks
# the sections that a recipe has, and adds none. A file's own DEBUG goes before this one.
DEBUG = {
  'steps': 2,
  'save_every': 2,
  'model': {'name': 'scratch', 'preset': 'debug'},
  'tokenizer': {'path': 'byte'},
  'data.batch_size': 2,
  'data.max_length': 512,
  'data.overlong': 'truncate',
  'data.workers': 0,
  'optimizer.warmup_steps': 0,
  'evaluation.environment.size': 2,
  'environment.size': 4,
  'evaluation.repeats': 1,
  'evaluation.size': 8,
  'source.size': 64,
  'source.environment.size': 64,
  'rollouts.prompts': 2,
  'rollouts.group': 4,
  'rollouts.max_new_tokens': 4,
  'rollouts.workers': 0,
  'algorithm.minibatches': 2,
  'algorithm.keep': 'best',  # nothing that a random model says is right
  'algorithm.teacher': {'name': 'scratch', 'preset': 'debug', 'seed': 1},
  'judge': {'name': 'length', 'target': 20},  # of one behind a server
  'evaluation.max_new_tokens': 4,
}


def load(argv: Sequence[str]) -> dict[str, Any]:
  """`--config=file.py:arg` and any `--config.section.key=value` as one nested dict.

  `arg` goes to the file's get_config; the word `debug` in it shrinks the recipe.
  Raises ConfigError.
  """
  file, _, words = _spec(argv).partition(':')
  module = _import_file(file)
  arg = [word for word in words.split(',') if word and word != 'debug']
  overrides = [a for a in argv if not a.startswith('--config=')]
  values = flags.FlagValues()
  try:
    config = module.get_config(','.join(arg)) if arg else module.get_config()
    _check_sections(config, overrides)
    before = config.to_dict()
    config_flags.DEFINE_config_dict(
      'config',
      config,
      flag_values=values,
      lock_config=False,
      accept_new_attributes=True,
      sys_argv=['educe', *overrides],
    )
    values(['educe', *overrides])
    config = values.config
    _check_renamed(before, config.to_dict(), overrides)
  except ConfigError:
    raise
  except (flags.Error, TypeError, ValueError, KeyError, AttributeError) as error:
    raise ConfigError(f'--config={_spec(argv)}: {one_line(error)}') from error
  for stage in config.get('stages', ()):
    if stage not in config:
      raise ConfigError(
        f'config.stages={config.stages}: there is no section {stage!r}'
        + near(stage, [key for key in config if key != 'stages'])
      )
  if 'debug' in words.split(','):
    chosen = set(config_flags.get_override_values(values['config']))
    small = {**DEBUG, **getattr(module, 'DEBUG', {})}
    for stage in config.get('stages', ()):
      own = f'{stage}.'
      mine = {k.removeprefix(own) for k in chosen if k.startswith(own)}
      _shrink(config[stage], small, mine)
    if 'stages' not in config:
      _shrink(config, small, chosen)
  return config.to_dict()


def sweep(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
  """(name, override flags) for each point of the config file's `sweep()`."""
  file = _spec(argv).partition(':')[0]
  module = _import_file(file)
  if not hasattr(module, 'sweep'):
    raise ConfigError(f'{file}: no function sweep(), to yield dicts of overrides')
  for point in module.sweep():
    name = ','.join(f'{key.split(".")[-1]}={value}' for key, value in point.items())
    yield name, [f'--config.{key}={value}' for key, value in point.items()]


def _spec(argv: Sequence[str]) -> str:
  for arg in argv:
    if arg.startswith('--config='):
      return arg.partition('=')[2]
  raise ConfigError('--config is missing: name a file, as --config=configs/sft.py:demo')


def _shrink(config: ConfigDict, small: dict[str, Any], keep: set[str]) -> None:
  for path, value in small.items():
    *parents, leaf = path.split('.')
    section: Any = config
    for parent in parents:
      section = section.get(parent) if section is not None else None
    if section is None or path in keep:
      continue
    whole = isinstance(value, dict)  # a section, which is never added
    # Flags of a section stay what they are where the small one has a place for them.
    own = {k.removeprefix(path + '.') for k in keep if k.startswith(path + '.')}
    if any(not whole or k in value or not _takes([leaf], value, k) for k in own):
      continue
    if leaf == 'minibatches' and section.get(leaf, 1) <= value:
      continue
    if leaf == 'judge' and (section.get(leaf) or {}).get('name') != 'endpoint':
      continue
    if leaf in section or (not whole and _takes(parents, section, leaf)):
      with section.unlocked():
        kept = {k: section[leaf][k] for k in own}
        section[leaf] = ConfigDict({**value, **kept}) if whole else value


def _takes(parents: Sequence[str], section: Mapping, key: str) -> bool:
  """Whether a section's function has this keyword by name; the run itself has all."""
  if not parents:
    return True
  return key in inspect.signature(resolve(parents[-1], section.get('name'))).parameters


def _check_sections(config: Any, overrides: Sequence[str]) -> None:
  """Raises ConfigError for --config.section.key=value of a section that is not there."""
  for override in overrides:
    flag, _, value = override.partition('=')
    *parents, leaf = flag.removeprefix('--config.').split('.')
    section: Any = config
    for depth, parent in enumerate(parents, 1):
      there = [k for k, v in section.items() if isinstance(v, ConfigDict)]
      if parent not in there:
        mend = near(parent, there)
        if parent in PLACES and depth == len(parents):  # one that it could have
          name = 'name=…, ' if '{name}' in PLACES[parent] and leaf != 'name' else ''
          mend = (
            f', which flags do not add; write it in the file: '
            f'config.{".".join(parents)} = dict({name}{leaf}={_literal(value)})'
          )
        raise ConfigError(f'{override}: the config has no section {parent!r}{mend}')
      section = section[parent]


def _literal(text: str) -> str:
  """A flag's value as a config file would write it."""
  try:
    return repr(ast.literal_eval(text))
  except (ValueError, SyntaxError):
    return repr(text)


def _check_renamed(before: Any, after: Any, overrides: Sequence[str]) -> None:
  """Raises ConfigError where another `name` on the command line meets the file's keys."""
  flags_given = {x.partition('=')[0].removeprefix('--config.') for x in overrides}
  for flag in flags_given:
    *parents, leaf = flag.split('.')
    if leaf != 'name' or not parents or parents[-1] not in PLACES:
      continue
    path = '.'.join(parents)
    old, new = before, after
    for parent in parents:
      old, new = old[parent], new[parent]
    parameters = inspect.signature(resolve(parents[-1], new['name'])).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
      continue
    for key in old:
      if key not in (*parameters, 'name') and f'{path}.{key}' not in flags_given:
        raise ConfigError(
          f'config.{path}.{key}={old[key]!r} is still there from '
          f'{path}.name={old.get("name")!r}, and {new["name"]!r} takes no {key!r}; '
          'write the whole section in a config file of your own (CONTRIBUTING.md): '
          f'config.{path} = dict(name={new["name"]!r}, …)'
        )


def _import_file(path: str) -> types.ModuleType:
  if not pathlib.Path(path).is_file():
    raise ConfigError(f'--config={path}: no such file')
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:  # whatever the user's own file raises
    outside = getattr(error, 'name', '') in ('configs', 'experiments')
    mend = "; run from the repository's root" if outside else ''
    raise ConfigError(f'--config={path}: {one_line(error)}{mend}') from error
  if not hasattr(module, 'get_config'):
    raise ConfigError(f'--config={path}: no function get_config()')
  return module
