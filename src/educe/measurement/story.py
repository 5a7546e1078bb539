"""What a sequence of runs did, told by their evaluations."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from educe.training import metrics

# What an evaluation says first, and what is said of it.
SHARES = {'accuracy': '', 'win_rate': '  preferred to where it started'}
OF_PAIRS = '  of held-out judgements agreed with'


def table(folders: Sequence[pathlib.Path]) -> str:
  """The share before the first of these runs and after each, as a table of lines."""
  lines: list[str] = []
  for folder in folders:
    rows = metrics.read(folder / 'metrics.jsonl')
    for key, note in SHARES.items():
      exams = [x for x in rows if key in x]
      for label, exam in [('before', exams[:1]), (folder.name, exams[-1:])]:
        if exam and (label != 'before' or not lines):
          low, high = exam[0][f'{key}/low'], exam[0][f'{key}/high']
          interval = f'[{low:.1%}, {high:.1%}]'
          what = OF_PAIRS if 'preferences/margin' in exam[0] else note
          lines.append(f'{label:>12}  {exam[0][key]:6.1%}  95 % {interval}{what}')
  return '\n'.join(['before and after each stage', *lines])
