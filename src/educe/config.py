"""Configs: a file of sections, each section the call of one function.

  config.loss = dict(name='sft', label_smoothing=0.1)

means educe/losses/sft.py:loss(…, label_smoothing=0.1). The function's keyword-only
arguments are the schema, their defaults the defaults, their annotations the types; what
comes before the * is supplied by the program. A dotted name is an import path, so an
experiment brings its own function. All of it is checked before any device is touched.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from educe.spelling import near, siblings

# section → the function that it calls. {name} is the section's own `name`.
PLACES = {
  'model': 'educe.models.{name}:load',
  'teacher': 'educe.models.{name}:load',
  'value': 'educe.models.value_head:attach',
  'tokenizer': 'educe.data.tokenizer:load',
  'source': 'educe.data.sources:{name}',
  'data': 'educe.data.pipeline:make',
  'algorithm': 'educe.algorithms.{name}:make',
  'loss': 'educe.losses.{name}:loss',
  'optimizer': 'educe.training.optimizer:make',
  'environment': 'educe.environments.{name}:make',
  'rollouts': 'educe.rollouts.rounds:make',
  'judge': 'educe.rollouts.judges:{name}',
  'advantage': 'educe.losses.advantages:{name}',
  'evaluation': 'educe.measurement.{name}:evaluate',
  'mesh': 'educe.sharding:make_mesh',
}

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
  'judge': {'name': 'length', 'target': 20},
  'evaluation.max_new_tokens': 4,
}


class ConfigError(ValueError):
  """The config names something that does not exist, or a value that cannot be."""


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
    raise ConfigError(f'--config={_spec(argv)}: {_one_line(error)}') from error
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


def resolve(section: str, name: str | None = None) -> Callable[..., Any]:
  """The function that a section calls. Raises ConfigError."""
  place = PLACES[section]
  module_name, entry = place.split(':')
  if '{name}' in place:
    if not name:
      raise ConfigError(f'config.{section}.name is missing: it says which {section}')
    if '.' in name or ':' in name:
      module_name, _, chosen = name.partition(':')
      entry = chosen or (entry if entry != '{name}' else '')
    else:
      module_name, entry = module_name.format(name=name), entry.format(name=name)
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    if error.name and not module_name.startswith(error.name):
      raise ConfigError(
        f'config.{section}.name={name!r} needs the Python package {error.name!r}: '
        "pip install 'educe[demo]' or that package"
      ) from error
    raise ConfigError(
      f'config.{section}.name={name!r}: there is no {module_name.replace(".", "/")}.py'
      + near(name or '', siblings(module_name, entry))
      + f" (a file of your own is named as 'my_file:{entry}')"
    ) from error
  if not callable(getattr(module, entry, None)):
    public = [n for n, f in vars(module).items() if inspect.isfunction(f)]
    what = f'{module_name} has no function {entry!r}{near(entry, public)}'
    if not entry:
      what = f'a file holds several; name the function too, as {name}:{public[0]}'
    raise ConfigError(f'config.{section}.name={name!r}: {what}')
  return getattr(module, entry)


def expand(values: Mapping[str, Any], function: Callable, path='config') -> dict:
  """`values` with every default of `function` filled in, checked, sections included.

  Raises ConfigError naming the key, the value and the mend.
  """
  where = f'{function.__module__}.{function.__name__}'
  parameters = inspect.signature(function).parameters
  schema = {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
  is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  hints = typing.get_type_hints(function)
  for key, value in values.items():
    if key not in schema and not is_open:
      raise ConfigError(
        f'{path}.{key}={value!r}: {where} takes no {key!r}' + near(key, schema)
      )
  full = {}
  for key, parameter in schema.items():
    if key not in values and parameter.default is parameter.empty:
      raise ConfigError(f'{path}.{key} is missing: {where} requires it')
    value = values.get(key, parameter.default)
    if key in PLACES and isinstance(value, Mapping):
      full[key] = expand_section(key, value, f'{path}.{key}')
    else:
      full[key] = _checked(value, hints.get(key, Any), f'{path}.{key}')
  full.update({key: value for key, value in values.items() if key not in schema})
  for key, value in full.items():
    if callable(value):
      raise ConfigError(
        f'{path}.{key}={value!r:.60}: a config holds plain values; name a file of your '
        'own that holds the function (CONTRIBUTING.md)'
      )
  return full


def expand_section(section: str, values: Mapping[str, Any], path: str) -> dict:
  """One section, expanded; its `name` is kept."""
  if '{name}' not in PLACES[section]:
    return expand(values, resolve(section), path)
  function = resolve(section, values.get('name'))
  rest = {key: value for key, value in values.items() if key != 'name'}
  return {'name': values['name'], **expand(rest, function, path)}


def call(section: str, values: Mapping[str, Any], **supply: Any) -> Any:
  """Calls a section's function: its config, and by name what it takes before the *.

  Raises ConfigError when it takes something that this program does not have, unless that
  has a default, and names the section before what the function itself does not take.
  """
  function = bound(section, values)
  wanted = _supplied(function.func)
  for name, parameter in wanted.items():
    if supply.get(name) is None and parameter.default is parameter.empty:
      raise ConfigError(f'config.{section} needs a section config.{name}')
  try:
    given = {n: x for n, x in supply.items() if x is not None}
    return function(*(given.get(n, p.default) for n, p in wanted.items()))
  except ConfigError:
    raise
  except (ValueError, OSError) as error:
    text, own = _one_line(error), (f'{section}.', f'{section}:')
    if not text.startswith('config.'):
      text = f'config.{text}' if text.startswith(own) else f'config.{section}: {text}'
    raise ConfigError(text) from error


def check(section: str, values: Mapping[str, Any]) -> None:
  """Calls `check` of the section's module, where it has one, with the section's numbers and
  texts: what is refused without a model should not wait for one. Raises ConfigError."""
  function = resolve(section, values.get('name'))
  checks = getattr(inspect.getmodule(function), 'check', None)
  if checks is None:
    return
  known = inspect.signature(checks).parameters
  try:
    checks(**{key: value for key, value in values.items() if key in known})
  except ValueError as error:
    raise ConfigError(f'config.{section}.{error}') from error


def check_used(config: Mapping[str, Any], read: Sequence[str]) -> None:
  """Raises ConfigError for a section that is given but that no other section reads.

  read: sections that the program itself reads
  """
  sections = {n: x for n, x in config.items() if n in PLACES and x is not None}
  used = set(read)
  for section, values in sections.items():
    used |= set(_supplied(resolve(section, values.get('name'))))
  for name in sections:
    if name not in used:
      raise ConfigError(
        f'config.{name} is given, but config.algorithm.name='
        f'{sections["algorithm"].get("name")!r} has no use for it; delete it'
      )


def bound(section: str, values: Mapping[str, Any], **supply: Any) -> functools.partial:
  """A section's function with its config already given; sections inside it are called."""
  values = {
    key: call(key, x, **supply) if key in PLACES and isinstance(x, Mapping) else x
    for key, x in values.items()
  }
  named = '{name}' in PLACES[section]
  function = resolve(section, values.pop('name') if named else None)
  return functools.partial(function, **values)


def _supplied(function: Callable) -> dict[str, inspect.Parameter]:
  """What a section's function takes from the program: all before the *."""
  parameters = inspect.signature(function).parameters
  return {n: p for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}


def _checked(value: Any, hint: Any, path: str) -> Any:
  """`value` as the annotated type; ints pass for floats, lists for tuples."""
  options = typing.get_args(hint) if _is_union(hint) else (hint,)
  for option in options:
    kind = typing.get_origin(option) or option
    if kind is Any:
      return value
    if kind is type(None):
      if value is None:
        return None
    elif kind is float and isinstance(value, int | float) and type(value) is not bool:
      return float(value)
    elif kind is int and isinstance(value, int) and not isinstance(value, bool):
      return value
    elif kind in (tuple, Sequence) and isinstance(value, list | tuple):
      return tuple(value)
    elif (
      isinstance(kind, type) and kind not in (int, float) and isinstance(value, kind)
    ):
      return value
  wanted = getattr(hint, '__name__', None) if not _is_union(hint) else None
  raise ConfigError(f'{path}={value!r} should be {wanted or hint}')


def _is_union(hint: Any) -> bool:
  return typing.get_origin(hint) in (typing.Union, types.UnionType)


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
    if section is None or any(k == path or k.startswith(path + '.') for k in keep):
      continue
    if leaf == 'minibatches' and section.get(leaf, 1) <= value:
      continue
    whole = isinstance(value, dict)  # a section, which is never added
    if leaf in section or (not whole and _takes(parents, section, leaf)):
      with section.unlocked():
        section[leaf] = ConfigDict(value) if whole else value


def _takes(parents: Sequence[str], section: Mapping, key: str) -> bool:
  """Whether a section's function has this keyword by name; the run itself has all."""
  if not parents:
    return True
  return key in inspect.signature(resolve(parents[-1], section.get('name'))).parameters


def _check_sections(config: Any, overrides: Sequence[str]) -> None:
  """Raises ConfigError for --config.section.key=value of a section that is not there."""
  for override in overrides:
    *parents, _ = override.partition('=')[0].removeprefix('--config.').split('.')
    section: Any = config
    for parent in parents:
      there = [k for k, v in section.items() if isinstance(v, ConfigDict)]
      if parent not in there:
        raise ConfigError(
          f'{override}: the config has no section {parent!r}' + near(parent, there)
        )
      section = section[parent]


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
    raise ConfigError(f'--config={path}: {_one_line(error)}{mend}') from error
  if not hasattr(module, 'get_config'):
    raise ConfigError(f'--config={path}: no function get_config()')
  return module


def _one_line(error: BaseException) -> str:
  # A KeyError's own text is the repr of its message.
  words = error.args[0] if isinstance(error, KeyError) and error.args else error
  return ' '.join(str(words).split()) or type(error).__name__
