"""What a wrong name was probably meant to be."""

from __future__ import annotations

import difflib
import importlib
import pathlib
from collections.abc import Iterable


def near(word: str, names: Iterable[str]) -> str:
  """The end of a message: '; did you mean x?', or what there is to choose from.

  Of more than two dozen names only those next in the alphabet are given.
  """
  names = sorted(set(names))
  close = difflib.get_close_matches(word, names, n=1)
  if close:
    return f'; did you mean {close[0]!r}?'
  if len(names) <= 24:
    return f'; choose one of {names}' if names else ''
  at = sum(name < word for name in names)
  some = names[max(0, at - 3) : at + 3]
  return f'; there are {len(names)}, such as {", ".join(some)}'


def siblings(module: str, function: str) -> list[str]:
  """The files beside a module, which may not exist, that have such a function."""
  try:
    package = importlib.import_module(module.rpartition('.')[0] or 'educe')
  except ModuleNotFoundError:
    return []
  folders = getattr(package, '__path__', [])
  files = [f for folder in folders for f in pathlib.Path(folder).glob('*.py')]
  return [
    f.stem for f in files if f'\ndef {function}(' in f.read_text(encoding='utf-8')
  ]
