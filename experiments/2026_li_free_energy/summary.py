"""results/seed*.json → what no theory determined: creation by sharing, where arms ended.

python experiments/2026_li_free_energy/summary.py
"""

from __future__ import annotations

import judge
import numpy as np

from educe.measurement import pass_at_k, support, support_dynamics
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
  said = ', '.join(str(x) for x in index)
  return (
    f'{joined.mean():+.4f} (95 % {float(low):+.4f} to {float(high):+.4f}; median '
    f'{np.median(joined):+.1e}; {there} prompts); creation index by seed {said}'
  )


def ends(results) -> list[str]:
  """A line for each transformer arm: means over seeds, train | held out."""
  lines = []
  for name in results[0]['arms']:
    arms = [r['arms'][name] for r in results if name in r['arms']]
    last = {p: [arm['curve'][-1][p] for arm in arms] for p in ('train', 'heldout')}

    def mean(what, last=last):
      return ' | '.join(
        f'{np.nanmean([np.nan if x[what] is None else x[what] for x in last[p]]):.3f}'
        for p in last
      )

    change = [
      pass_at_k.exact(np.array(arm['solved'])[:, None], judge.KS)
      - pass_at_k.exact(np.array(r['base']['solved'])[:, None], judge.KS)
      for r, arm in zip(results, arms, strict=True)
    ]
    lost = (np.min(change, -1) < -judge.LOST).mean()
    terms = '; '.join(
      f'{what} {mean(what)}'
      for what in ('reward', 'total', 'price', 'collapse', 'drift', 'eta')
    )
    gibbs = (
      f'; TV to Gibbs {mean("gibbs")}, to k3 {mean("k3")}' if arms[0]['beta'] else ''
    )
    ratio = max(max(arm['log_ratio']) for arm in arms)
    lines.append(
      f'{name} (β={arms[0]["beta"]}): {terms}{gibbs}; {lost:.0%} of prompts lose; '
      f'largest π/p0 e^{ratio:.1f}'
    )
  return lines


if __name__ == '__main__':
  seeds = judge.load()
  print(f'creation by sharing, trained prompts: {sharing(seeds)}')
  print(f'creation by sharing, held-out prompts: {sharing(seeds, part="heldout")}')
  print('\n'.join(ends(seeds)))
