"""What was asked, said and judged: one JSON object a line, and a few of them for people."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from educe import hosts, paths


def save(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
  """One JSON object a line; the file appears whole or not at all."""
  path = pathlib.Path(path)
  line = json.JSONEncoder(ensure_ascii=False, default=str).encode
  paths.write(path, ''.join(f'{line(row)}\n' for row in rows))


def save_round(
  run_dir: pathlib.Path, number: int, step: int, rows: Sequence[Mapping[str, Any]]
) -> None:
  """rollouts/<number>.jsonl: the rows, each with the step that it was trained at. All
  processes must call it; the first writes."""
  file = run_dir / 'rollouts' / f'{number:06}.jsonl'
  hosts.by_first(lambda: save([{**row, 'step': step} for row in rows], file))


def load(path: str | os.PathLike, limit: int | None = None) -> list[dict[str, Any]]:
  """The rows that `save` wrote, or the first `limit` of them."""
  with pathlib.Path(path).open(encoding='utf-8') as lines:
    # Not str.splitlines: it also breaks at the U+2028 or U+0085 of a completion.
    return [json.loads(line) for line in itertools.islice(lines, limit)]


def show(rows: Sequence[Mapping[str, Any]], limit: int = 5) -> str:
  """The first few, as text for a terminal."""
  parts = []
  for row in rows[:limit]:
    prompt = row['prompt'] if isinstance(row['prompt'], str) else row['prompt'][-1]
    question = prompt if isinstance(prompt, str) else prompt['content']
    cut = '' if row['stopped'] else ' … (cut off)'
    said = f'right is {row["answer"]}'
    if row['answer'] is None:  # a judge knows none either
      said = f'reward {row.get("reward")}'
    parts.append(
      f'? {question}\n> {row["completion"].strip()}{cut}\n'
      f'  {row["outcome"]}; {said}; {row["length"]} tokens'
    )
  return '\n\n'.join(parts)
