"""results/seed*.json → what no theory determined: creation by sharing, where arms ended.

python experiments/2026_li_free_energy/summary.py
"""

from __future__ import annotations

import judge
import numpy as np

from educe.measurement import support, support_dynamics
from educe.measurement.intervals import mean_interval


def sharing(results, arm: str = 'rloo', part: str = 'train') -> str:
  """Creation by sharing: mean π(C) where p0 < ε_train, transformer less table."""
  gaps, there, index = [], 0, []
  for r in results:
    start, end = (np.array(x['solved']) for x in (r['base'], r['arms'][arm]))
    eps = support.training(r['group'], r['rounds'])
    rows = (np.log(start) < eps) & (np.array(r['train']) == (part == 'train'))
    table = start  # of a prompt that is never drawn a table says what it said
    if part == 'train':
      table = np.mean([x['solved'] for x in r['sampled']['rloo']['early']], 0)
    gaps.append((end - table)[rows])
    there += rows.sum()
    mask = np.array(r['train']) == (part == 'train')
    both = start[mask], np.clip(end[mask], 0, 1)
    index.append(support_dynamics.creation(*both, np.log(start[mask]) >= eps).created)
  if not there:
    return 'no prompt begins below ε_train'
  joined = np.concatenate(gaps)
  low, high = mean_interval(joined, least=-1.0)
  said = ', '.join('no gain' if np.isnan(x.value) else str(x) for x in index)
  return (
    f'{joined.mean():+.4f} (95 % {float(low):+.4f} to {float(high):+.4f}; median '
    f'{np.median(joined):+.1e}; {there} prompts); creation index by seed {said}'
  )


def ends(results) -> str:
  """A Markdown row for each transformer arm: means over seeds, of trained prompts."""
  rows = [
    '| arm | β | reward | never trained | KL | price | collapse | drift | η | '
    'TV to Gibbs | lose | most π/p0 |',
    '|---|---|---|---|---|---|---|---|---|---|---|---|',
  ]
  for name in results[0]['arms']:
    arms = [r['arms'][name] for r in results]

    def mean(what, part='train', arms=arms):
      return f'{np.mean([arm["curve"][-1][part][what] for arm in arms]):.2f}'

    change = [
      judge.gains(np.array(r['base']['solved']), np.array(arm['solved']))
      for r, arm in zip(results, arms, strict=True)
    ]
    cells = [
      name,
      f'{arms[0]["beta"]:g}',
      mean('reward'),
      mean('reward', 'heldout'),
      *(mean(what) for what in ('total', 'price', 'collapse', 'drift', 'eta')),
      mean('gibbs') if arms[0]['beta'] else '',
      f'{(np.min(change, -1) < -judge.LOST).mean():.0%}',
      f'e^{max(max(arm["log_ratio"]) for arm in arms):.0f}',
    ]
    rows.append(f'| {" | ".join(cells)} |')
  return '\n'.join(rows)


if __name__ == '__main__':
  seeds = judge.load()
  print(f'creation by sharing, trained prompts: {sharing(seeds)}')
  print(f'creation by sharing, held-out prompts: {sharing(seeds, part="heldout")}')
  print(ends(seeds))
