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
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from educe.spelling import near, siblings

# section → the function that it calls. {name} is the section's own `name`.
PLACES = {
  'model': 'educe.models.{name}:load',
  'teacher': 'educe.models.{name}:load',
  'adapter': 'educe.models.lora:attach',
  'value': 'educe.models.value_head:attach',
  'tokenizer': 'educe.data.tokenizer:load',
  'source': 'educe.data.sources:{name}',
  'data': 'educe.data.pipeline:make',
  'algorithm': 'educe.algorithms.{name}:make',
  'loss': 'educe.losses.{name}:loss',
  'optimizer': 'educe.training.optimizer:make',
  'environment': 'educe.environments.{name}:make',
  'rollouts': 'educe.rollouts.rounds:make',
  'server': 'educe.rollouts.server:connect',
  'judge': 'educe.rollouts.judges:{name}',
  'advantage': 'educe.losses.advantages:{name}',
  'evaluation': 'educe.measurement.{name}:evaluate',
  'mesh': 'educe.sharding:make_mesh',
}


class ConfigError(ValueError):
  """The config names something that does not exist, or a value that cannot be."""


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
        "pip install -e '.[demo]' in the clone, or that package"
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
      mend = f'; add {path}.{key} = dict(…)' if key in PLACES else ''
      raise ConfigError(f'{path}.{key} is missing: {where} requires it{mend}')
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
    text, own = one_line(error), (f'{section}.', f'{section}:')
    if not text.startswith('config.'):
      # A section inside another one says so: rollouts.server.url
      named = text.startswith(own) or text.partition('.')[2].startswith(own)
      text = f'config.{text}' if named else f'config.{section}: {text}'
    raise ConfigError(text) from error


def describing(section: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
  """The section that names `describe` of the same module, where it has one: a model without
  its weights, for whom its shapes are enough."""
  module = inspect.getmodule(resolve(section, values.get('name')))
  if not hasattr(module, 'describe'):
    return values
  assert module is not None
  return {**values, 'name': f'{module.__name__}:describe'}


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
    if name == 'source' and 'data' in used and 'data' not in sections:
      raise ConfigError(
        'config.source is given without config.data, which says how it is read: add '
        'config.data = dict(batch_size=4, max_length=512)'
      )
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


def one_line(error: BaseException) -> str:
  """What an error says, without its line breaks; of one that says nothing its type."""
  # A KeyError's own text is the repr of its message.
  words = error.args[0] if isinstance(error, KeyError) and error.args else error
  return ' '.join(str(words).split()) or type(error).__name__


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
  several = {typing.get_origin(option) or option for option in options}
  mend = ''
  if several & {tuple, Sequence} and not isinstance(value, Mapping | set | type(None)):
    mend = f'; write {(value,)!r}'
  raise ConfigError(f'{path}={value!r} should be {wanted or hint}{mend}')


def _is_union(hint: Any) -> bool:
  return typing.get_origin(hint) in (typing.Union, types.UnionType)
