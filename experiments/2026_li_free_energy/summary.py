"""results/seed*.json → what no theory determined: creation by sharing, where arms ended.

python experiments/2026_li_free_energy/summary.py
"""

from __future__ import annotations

import judge
import numpy as np

from educe.measurement import pass_at_k, support
from educe.measurement.intervals import mean_interval

HALF = 0.5


def starts(result) -> tuple[np.ndarray, np.ndarray, float]:
  """(p0(C) `[P]`, whether trained `[P]`, ε_train of the transformer arms)."""
  eps = np.exp(support.training(result['group'], result['rounds']))
  return np.array(result['base']['solved']), np.array(result['train']), float(eps)


def sharing(results) -> str:
  """Creation by sharing: mean π(C) where p0 < ε_train, transformer RLOO less its table."""
  gaps = []
  for r in results:
    start, train, eps = starts(r)
    table = np.mean([x['solved'] for x in r['sampled']['rloo']['early']], 0)
    end = np.array(r['arms']['rloo']['solved'])
    gaps.append((end - table)[train & (start < eps)])
  joined = np.concatenate(gaps)
  if not len(joined):
    return 'no trained prompt begins below ε_train'
  low, high = mean_interval(joined, least=-1.0)
  return (
    f'{joined.mean():+.4f} (95 % {float(low):+.4f} to {float(high):+.4f}; median '
    f'{np.median(joined):+.1e}; {len(joined)} prompts)'
  )


def reached(results) -> str:
  """A Markdown row for each arm and table: what came of the prompts with p0 < ε_train."""

  def cells(part, ends_of):
    """ends_of(result) -> π(C) `[R, P]` of R copies."""
    rise, near, half, count = [], 0, 0, 0
    for r in results:
      start, train, eps = starts(r)
      rows = (start < eps) & (train == (part == 'train'))
      for end in ends_of(r):
        rise.append((np.array(end) - start)[rows])
        near += (np.array(end)[rows] >= eps).sum()
        half += (np.array(end)[rows] > HALF).sum()
        count += rows.sum()
    mean = np.concatenate(rise).mean() if count else np.nan
    return [f'{mean:+.4f}', f'{near} of {count}', f'{half}']

  rows = [
    '| arm | rise of π(C) | now ≥ ε_train | > ½ | never trained: rise | ≥ ε_train | > ½ |',
    '|---|---|---|---|---|---|---|',
  ]
  for name in results[0]['arms']:

    def arm(r, name=name):
      return [r['arms'][name]['solved']]

    row = [name, *cells('train', arm), *cells('heldout', arm)]
    rows.append(f'| {" | ".join(row)} |')
  for name in results[0]['sampled']:

    def table(r, name=name):
      return [x['solved'] for x in r['sampled'][name]['early']]

    row = [f'table: {name}', *cells('train', table), '', '', '']
    rows.append(f'| {" | ".join(row)} |')
  return '\n'.join(rows)


def outputs(results) -> str:
  """Correct outputs one by one, of tables at their end: gained less lost, at worst."""
  said = []
  for name in results[0]['sampled']:
    worst = [
      min(judge.net(np.array(r['base']['right']), np.array(end['right'])))
      for r in results
      for end in r['sampled'][name]['final']
    ]
    said.append(f'{name} {min(worst)} to {max(worst)}')
  total = [len(r['base']['right']) for r in results]
  return f'{", ".join(said)}, of {min(total)} to {max(total)}'


def ends(results) -> str:
  """A Markdown row for the base and each transformer arm: means over seeds, of trained
  prompts where nothing else is said."""
  rows = [
    '| arm | β | reward | never trained | no output | KL | price | collapse | drift | η | '
    'TV to Gibbs | lose | of never trained | halved | k* | most π/p0 |',
    '|' + '---|' * 16,
  ]

  def over(values):
    return f'{np.mean(values):.2f}'

  parts = [starts(r) for r in results]
  first = [
    over([start[train == (part == 'train')].mean() for start, train, _ in parts])
    for part in ('train', 'heldout')
  ]
  lost = over([np.array(r['base']['outside'])[r['train']].mean() for r in results])
  rows.append(f'| base |  | {" | ".join(first)} | {lost} |{"  |" * 11}')
  for name in results[0]['arms']:
    arms = [r['arms'][name] for r in results]

    def mean(what, part='train', arms=arms):
      return over([arm['curve'][-1][part][what] for arm in arms])

    pairs = [
      (start, np.array(arm['solved']), train)
      for (start, train, _), arm in zip(parts, arms, strict=True)
    ]
    loses = [judge.gains(a, b).min(-1) < -judge.LOST for a, b, _ in pairs]
    trained = [train for *_, train in pairs]
    rise = np.mean([judge.gains(a, b).mean(0) for a, b, _ in pairs], 0)
    (crossing,) = pass_at_k.first_crossing(rise[None], judge.KS)
    cells = [
      name,
      f'{arms[0]["beta"]:g}',
      mean('reward'),
      mean('reward', 'heldout'),
      mean('outside'),
      *(mean(what) for what in ('total', 'price', 'collapse', 'drift', 'eta')),
      mean('gibbs') if arms[0]['beta'] else '',
      f'{np.mean([x[rows] for x, rows in zip(loses, trained, strict=True)]):.0%}',
      f'{np.mean([x[~rows] for x, rows in zip(loses, trained, strict=True)]):.0%}',
      f'{np.mean([(b < a / 2)[rows] for a, b, rows in pairs]):.0%}',
      'none' if np.isinf(crossing) else f'{crossing:,.0f}',
      f'e^{max(max(arm["log_ratio"]) for arm in arms):.0f}',
    ]
    rows.append(f'| {" | ".join(cells)} |')
  return '\n'.join(rows)


if __name__ == '__main__':
  seeds = judge.load()
  print(f'{ends(seeds)}\n\n{reached(seeds)}\n')
  print(f'creation by sharing, RLOO: {sharing(seeds)}')
  print(f'correct outputs one by one, of tables: {outputs(seeds)}')
