"""What sets of problems have in common: files, parts that never mix, chats."""

from __future__ import annotations

import gzip
import hashlib
import json
from typing import Any

from educe import paths

HELD_OUT = 0.2  # the share of all problems that part='heldout' draws from
PARTS = ('all', 'train', 'heldout')


def digest(text: str) -> str:
  """A name for a problem that white space does not change."""
  return hashlib.sha256(' '.join(text.split()).encode()).hexdigest()


def in_part(name: str, part: str) -> bool:
  """Whether the problem of this `digest` belongs to a part.

  Decided by the problem alone: 'train' and 'heldout' share none, whatever seeds, sizes
  and orders they are drawn with. Raises ValueError for an unknown part.
  """
  if part not in PARTS:
    raise ValueError(f"part must be 'all', 'train' or 'heldout', got {part!r}")
  held_out = int(name[:8], 16) < HELD_OUT * 2**32
  return part == 'all' or held_out == (part == 'heldout')


def at_least_one(size: int) -> None:
  if size < 1:
    raise ValueError(f'size must be at least 1, got {size}')


def chat(question: str, instruction: str, system: str | None) -> list[dict[str, str]]:
  """The question, an instruction after a blank line, a system message before them."""
  content = f'{question}\n\n{instruction}' if instruction else question
  messages = [{'role': 'user', 'content': content}]
  if system is not None:
    messages.insert(0, {'role': 'system', 'content': system})
  return messages


def read(path: str) -> list[tuple[str, dict[str, Any]]]:
  """(place for error messages, row) of each JSON object in a .jsonl or .jsonl.gz file.

  Raises FileNotFoundError, and ValueError naming file and line.
  """
  file = paths.resolve(path)
  opened = gzip.open if file.suffix == '.gz' else open
  rows = []
  with opened(file, 'rt', encoding='utf-8') as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        where = f'{path} line {number}'
        try:
          row = json.loads(line)
        except ValueError as error:
          raise ValueError(f'{where}: not JSON ({error})') from None
        if not isinstance(row, dict):
          raise ValueError(f'{where}: expected an object, got {row!r:.60}')
        rows.append((where, row))
  if not rows:
    raise ValueError(f'{path}: data set is empty')
  return rows


def column(row: dict[str, Any], name: str, where: str) -> Any:
  """row[name]. Raises ValueError naming the columns that there are."""
  if name not in row:
    raise ValueError(f'{where}: no column {name!r} (it has {", ".join(row)})')
  return row[name]
