"""results/<name>.json → the tables of README.md.

python experiments/2025_yue_pass_at_k/tables.py cpu2
"""

from __future__ import annotations

import math
import sys
from typing import Any

import analysis
import numpy as np
from analysis import BUDGETS, KS, SETS, Run, logp

from educe.measurement import support
from educe.measurement import support_dynamics as moves

SHOWN = (1, 16, 256, 4096, 65536)


def main(results: dict[str, Any]) -> None:
  runs = results['chain']
  head('ρ, seed', 'prompts', 'p0(C) → π(C)', 'median', 'lost', 'by > 10', 'k* (95 %)')
  for run in runs:
    for part in SETS:
      row(named(run), part, *change(run, part))
  print('\nk of the crossing against where it is measured; – : RL ahead at every k\n')
  head('ρ, seed', 'prompts', 'k', 'P, E, S, O', 'SRR', 'NDR', 'NSCR', 'sign test')
  for run in runs:
    for part in ('trained', 'heldout'):
      for k in BUDGETS:
        d = analysis.sets(run, k, part)
        kept = ', '.join(f'{x:.0f}' for x in d[:4])
        row(named(run), part, k, kept, d.srr, d.ndr, d.nscr, f'{d.p_value:.1g}')
  head('ρ, seed', 'k', 'SRR', 'base twice', 'SRR less that', 'NDR less that')
  for run in runs:
    for k in BUDGETS:
      table, null = analysis.seen_sets(run, k)
      over = moves.above_noise(table, null)
      srr = [f'{moves.dynamics(x).srr.value:.3f}' for x in (table, null)]
      row(named(run), k, *srr, over.srr, over.ndr)
  head('ρ, seed', 'prompts', *(f'created, k = {k}' for k in BUDGETS), 'RL’s own budget')
  for run in runs:
    for part in ('trained', 'heldout', 'deeper'):
      budgets = [*map(support.sampling, BUDGETS), analysis.training_budget(run)]
      made = [analysis.creation(run, eps, part) for eps in budgets]
      row(named(run), part, *(f'{x.index} of {x.gain.value:.2g}' for x in made))
  head('ρ, seed', 'policy', *(f'pass@{k}' for k in SHOWN))
  for run in runs:
    for name, curve in curves(run).items():
      shown = curve[np.isin(KS, SHOWN)]
      row(named(run), name, *(f'{x:.3f}' for x in shown))
    vote = run['majority']
    at = dict(zip(vote['k'], vote['rate'], strict=True))
    voted = (f'{at[k]:.2g}' if k in at else '' for k in SHOWN)
    row(named(run), 'majority of k', *voted)


def change(run: Run, part: str) -> list[str]:
  p0, pi = logp(run, 'base', part), logp(run, 'rl', part)
  found = analysis.compare(run, part)
  star = [f'> {KS[-1]}' if x is None else f'{x:.0f}' for x in found[4:7]]
  crossing = '–'
  if found.crossing is not None:
    crossing = f'{star[0]} ({star[1]} to {star[2]})'
    crossing += '' if analysis.crosses_once(found.difference) else ', not once'
  return [
    f'{np.exp(p0).mean():.2g} → {np.exp(pi).mean():.2g}',
    f'{math.exp(np.median(p0)):.2g} → {math.exp(np.median(pi)):.2g}',
    f'{analysis.lost(run, 1, part):.1%}',
    f'{analysis.lost(run, 10, part):.1%}',
    crossing,
  ]


def curves(run: Run) -> dict[str, np.ndarray]:
  """Mean pass@k `[K]` over the trained pairs on which no exponent was chosen."""
  others = run['others']
  out = {
    stage: analysis.values(logp(run, stage)[others]).mean(0)
    for stage in ('base', 'rl', 'imitated')
    if stage in run['logp']['trained']
  }
  mean = float(np.exp(logp(run, 'rl')).mean())
  out['Gibbs tilt'] = analysis.values(analysis.tilt(logp(run, 'base'), mean)[others])
  out['Gibbs tilt'] = out['Gibbs tilt'].mean(0)
  power, tempered = run['power'], run['tempered']
  out[f'base, power {power["alpha"]:.2g}'] = np.array(power['rate'])
  out[f'base, T = {tempered["temperature"]:.2g}'] = np.array(tempered['rate'])
  return out


def named(run: Run) -> str:
  return f'{run["exposure"]:g}, {run["seed"]}'


def head(*cells) -> None:
  print()
  row(*cells)
  row(*['---'] * len(cells))


def row(*cells) -> None:
  print('| ' + ' | '.join(str(cell) for cell in cells) + ' |')


if __name__ == '__main__':
  main(analysis.load(sys.argv[1] if len(sys.argv) > 1 else 'cpu2'))
