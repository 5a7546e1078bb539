"""AI feedback: samples and a judge make preference data.

  rows = label(transcripts.load('runs/sft/rollouts/000000.jsonl'), judge)[0]
  transcripts.save(rows, 'pairs.jsonl')

The best and the worst completion of each prompt become a record of `prompt`, `chosen` and
`rejected` (Harrison Lee et al., "RLAIF", 2023, arXiv:2309.00267, with any judge).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from educe.environments import verifiers
from educe.rollouts.judges import Judge


def label(
  rows: Sequence[Mapping[str, Any]], judge: Judge | None = None, *, margin: float = 0.0
) -> tuple[list[dict[str, Any]], dict[str, int]]:
  """(records, counts) from completions of prompts.

  Args:
    rows: with `prompt` and `completion` (text), as `transcripts.load` reads them; equal
      prompts may lie apart
    judge: None takes each row's own `reward`, the environment's
    margin: by how much the best must be better than the worst, in the judge's units

  A record has `prompt`, `chosen` and `rejected` (text, or a message where the prompt is
  messages), `chosen_rating` and `rejected_rating`. counts: `pairs`, `ties` (prompts whose
  best is not better by more than margin, or says the same), `unscored` (prompts with fewer
  than two scores).

  Raises ValueError for no rows, a row without those columns, a negative margin, scores
  that are no finite numbers, and a judge that gives more or fewer than there are rows.
  """
  if not margin >= 0:
    raise ValueError(f'label: margin={margin} must not be negative')
  if not rows:
    raise ValueError('label: there are no completions')
  needed = ('prompt', 'completion') if judge else ('prompt', 'completion', 'reward')
  for index, row in enumerate(rows):
    for name in needed:
      if name not in row:
        raise ValueError(f'label: row {index} has no {name!r}, only {sorted(row)}')
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    groups.setdefault(json.dumps(row['prompt'], sort_keys=True), []).append(row)
  together = [row for group in groups.values() for row in group]
  scores = (
    judge(together, [row['completion'] for row in together])
    if judge
    else [row['reward'] for row in together]
  )
  if len(scores) != len(together):
    raise ValueError(
      f'label: the judge scored {len(scores)} rows, {len(together)} were asked'
    )
  left = iter([verifiers.real(score, 'label: a score') for score in scores])
  counts = {'pairs': 0, 'ties': 0, 'unscored': 0}
  records = []
  for group in groups.values():
    scored = [(score, row) for row in group if (score := next(left)) is not None]
    if len(scored) < 2:
      counts['unscored'] += 1
      continue
    high, chosen = max(scored, key=lambda x: x[0])  # the first of equals
    low, rejected = min(scored, key=lambda x: x[0])
    if high - low <= margin or chosen['completion'] == rejected['completion']:
      counts['ties'] += 1
      continue
    counts['pairs'] += 1
    records.append(
      {
        'prompt': chosen['prompt'],
        'chosen': _said(chosen),
        'rejected': _said(rejected),
        'chosen_rating': float(high),
        'rejected_rating': float(low),
      }
    )
  return records, counts


def _said(row: Mapping[str, Any]) -> Any:
  if isinstance(row['prompt'], str):
    return row['completion']
  return [{'role': 'assistant', 'content': row['completion']}]
