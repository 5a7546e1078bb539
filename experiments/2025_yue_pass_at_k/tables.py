"""results/<name>.json → the tables of README.md; of several seeds in a cell, 0 · 1 · 2.

python experiments/2025_yue_pass_at_k/tables.py cpu2
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import analysis
import judge
import numpy as np
from analysis import BUDGETS, KS, SETS, Run, logp

from educe.measurement import pass_at_k, support
from educe.measurement import support_dynamics as moves

SHOWN = (1, 16, 256, 4096, 65536)


def main(results: dict[str, Any]) -> None:
  runs = analysis.by_exposure(results)
  head('ρ', 'prompts', 'p0(C)', 'π(C)', 'lost a factor of 10', 'k*')
  for rho, some in runs.items():
    for part in SETS:
      row(
        f'{rho:g}',
        part,
        seeds(f'{judge.rate(run, "base", part):.2g}' for run in some),
        seeds(f'{judge.rate(run, "rl", part):.2g}' for run in some),
        seeds(f'{analysis.lost(run, 10, part):.1%}' for run in some),
        seeds(crossing(run, part) for run in some),
      )
  runs = {rho: some for rho, some in runs.items() if rho}  # else no set has anything
  head('ρ', 'prompts', 'k', 'P, E, S, O', 'SRR', 'NDR', 'SDS', 'NSCR', 'sign test')
  for rho, some in runs.items():
    for part in ('trained', 'heldout'):
      for k in BUDGETS:
        found = [analysis.sets(run, k, part) for run in some]
        row(
          f'{rho:g}',
          part,
          k,
          seeds(', '.join(f'{x:.0f}' for x in d[:4]) for d in found),
          *(seeds(f'{d[i].value:.2f}' for d in found) for i in range(4, 8)),
          seeds(f'{d.p_value:.1g}' for d in found),
        )
  head('ρ', 'k', 'SRR', 'base twice', 'SRR less that', 'NDR less that')
  for rho, some in runs.items():
    for k in BUDGETS:
      both = [analysis.seen_sets(run, k) for run in some]
      over = [moves.above_noise(*pair) for pair in both]
      srr = [[f'{moves.dynamics(x).srr.value:.2f}' for x in pair] for pair in both]
      columns = map(seeds, zip(*srr, strict=True))
      row(f'{rho:g}', k, *columns, *(seeds(str(x[i]) for x in over) for i in (0, 1)))
  head('ρ', 'prompts', *(f'k = {k}' for k in BUDGETS), 'the rollouts of RL')
  for rho, some in runs.items():
    for part in SETS[:3]:
      shares = [
        [created(run, support.sampling(k), part) for k in BUDGETS]
        + [created(run, analysis.training_budget(run), part)]
        for run in some
      ]
      row(f'{rho:g}', part, *map(seeds, zip(*shares, strict=True)))
  head('ρ', 'policy', *(f'pass@{k}' for k in SHOWN))
  for rho, some in runs.items():
    policies = zip(*map(columns_of, some), strict=True)
    for name, found in zip(curves(some[0]), policies, strict=True):
      row(f'{rho:g}', name, *(seeds(x) for x in zip(*found, strict=True)))
    at = some[0]['majority']['k'].index(SHOWN[1])
    voted = [[f'{run["majority"]["rate"][i]:.3f}' for i in (0, at)] for run in some]
    row(f'{rho:g}', 'base, majority', *map(seeds, zip(*voted, strict=True)), '', '', '')
  head('ρ', 'best of n of the base, n the rollouts of RL', 'n worth one sample of RL')
  for rho, some in runs.items():
    each = seeds(f'{spent(run):.3f} (n = {rollouts(run):.0f})' for run in some)
    row(f'{rho:g}', each, seeds(worth(run) for run in some))
  if 'smollm2' in results:
    language_model(results['smollm2'])


def language_model(table: dict[str, Any]) -> None:
  ks = pass_at_k.ladder(min(min(table[side]['samples']) for side in judge.SIDES))
  head('SmolLM2', *(f'pass@{k}' for k in ks), 'majority of 1, 4, 16')
  for side in judge.SIDES:
    found = pass_at_k.curve(judge.rates(table[side], ks), ks)
    each = zip(found.rate, found.low, found.high, strict=True)
    voted = ', '.join(f'{x:.1%}' for x in table[side]['majority']['rate'])
    row(side, *(f'{x:.1%} ({low:.1%} to {high:.1%})' for x, low, high in each), voted)
  power = table['power']
  row(f'base, power {power["alpha"]:.2g}', *(f'{x:.1%}' for x in power['rate']), '')


def rollouts(run: Run) -> float:
  """What RL drew of a trained pair, on average."""
  return run['group'] * run['visits']


def spent(run: Run) -> float:
  """Best of that many samples of the base, by the verifier."""
  n = round(rollouts(run))
  return float(pass_at_k.exact(np.exp(logp(run, 'base')), n).mean())


def worth(run: Run) -> str:
  """The n at which the best of n of the base is right as often as one sample of RL."""
  curve, one = analysis.values(logp(run, 'base')).mean(0), judge.rate(run, 'rl')
  if one > curve[-1]:
    return f'> {KS[-1]:,}'
  return f'{np.exp(np.interp(one, curve, np.log(KS))):,.0f}'


def crossing(run: Run, part: str) -> str:
  found = analysis.compare(run, part)
  if found.crossing is None:
    return '–'
  low, high = (f'{KS[-1]:,}+' if x is None else f'{x:,.0f}' for x in found[5:7])
  once = '' if analysis.crosses_once(found.difference) else ', not once'
  return f'{found.crossing:,.0f} ({low} to {high}){once}'


def created(run: Run, log_eps: float, part: str) -> str:
  found = analysis.creation(run, log_eps, part)
  return '–' if math.isnan(found.created.value) else f'{found.created.value:.2f}'


def columns_of(run: Run) -> list[list[str]]:
  shown = np.isin(KS, SHOWN)
  return [[f'{x:.3f}' for x in curve[shown]] for curve in curves(run).values()]


def curves(run: Run) -> dict[str, np.ndarray]:
  """Mean pass@k `[K]` over the trained pairs on which no exponent was chosen."""
  others = run['others']

  def mean(log_p):
    return analysis.values(log_p[others]).mean(0)

  out = {
    name: mean(logp(run, stage))
    for stage, name in (('base', 'base'), ('rl', 'RL'), ('imitated', 'imitation'))
    if stage in run['logp']['trained']
  }
  tilted = analysis.tilt(logp(run, 'base'), judge.rate(run, 'rl'))
  out['Gibbs tilt'] = mean(tilted)
  out['base, best power'] = np.array(run['power']['rate'])
  out['base, best temperature'] = np.array(run['tempered']['rate'])
  return out


def seeds(said: Iterable[str]) -> str:
  return ' · '.join(said)


def head(*cells) -> None:
  print()
  row(*cells)
  row(*['---'] * len(cells))


def row(*cells) -> None:
  print('| ' + ' | '.join(str(cell) for cell in cells) + ' |')


if __name__ == '__main__':
  main(analysis.load(sys.argv[1] if len(sys.argv) > 1 else 'cpu2'))
