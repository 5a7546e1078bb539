"""results/<name>.json → figure.png: who is ahead at which k, and by which prompts.

python experiments/2025_yue_pass_at_k/figure.py cpu2
"""

from __future__ import annotations

import math
import sys

import analysis
import judge
import matplotlib
import numpy as np
import tables
from analysis import KS, logp

from educe.measurement import pass_at_k

matplotlib.use('Agg')
import matplotlib.pyplot as plt

BASE, RL, OTHER, GREY = '#1261c4', '#c4410c', '#3f8f5b', '#555'
SHADES = {0.0: '#999', 0.01: RL, 0.03: '#d99a1c', 0.05: OTHER}
MAIN = 0.01
STYLES = {
  'base': dict(color=BASE, lw=2),
  'RL': dict(color=RL, lw=2),
  'imitation': dict(color=OTHER, lw=1.5, ls='--'),
  'Gibbs tilt': dict(color='#222', lw=1.2, ls=':'),
  'base, best power': dict(color='#8a4fbf', lw=1.2, ls='-.'),
}


def main(name: str) -> None:
  plt.rcParams.update(
    {'font.size': 12, 'axes.spines.top': False, 'axes.spines.right': False}
  )
  results = analysis.load(name)
  runs = analysis.by_exposure(results)
  figure, axes = plt.subplots(2, 3, figsize=(16, 9.4), layout='constrained')
  curves(axes[0, 0], runs[MAIN])
  differences(axes[0, 1], runs)
  prompts(axes[0, 2], runs[MAIN])
  sets(axes[1, 0], runs[MAIN])
  training(axes[1, 1], runs[MAIN])
  language_model(axes[1, 2], results.get('smollm2'))
  figure.savefig(analysis.HERE / 'figure.png', dpi=100)


def curves(axis, runs) -> None:
  for at, run in enumerate(runs):
    for name, curve in tables.curves(run).items():
      if name in STYLES:
        axis.plot(KS, curve, **STYLES[name], alpha=0.8, label=None if at else name)
  budgets(axis)
  axis.set(ylabel='pass@k', ylim=(0, 1.02), title=f'ρ = {MAIN:g}: trained pairs')
  axis.legend(frameon=False, loc='lower right')


def differences(axis, runs) -> None:
  for exposure, some in runs.items():
    for at, run in enumerate(some):
      for part, style in (('trained', '-'), ('heldout', ':')):
        axis.plot(
          KS,
          analysis.compare(run, part).difference,
          style,
          color=SHADES[exposure],
          lw=1.6,
          label=f'ρ = {exposure:g}, {part}' if at == 0 else None,
        )
  axis.axhline(0, color=GREY, lw=0.8)
  budgets(axis)
  axis.set(ylabel='pass@k, RL − base', title='below 0 the base is ahead')
  axis.set_yscale('symlog', linthresh=0.05)
  axis.set_yticks(
    [-0.1, -0.05, 0, 0.05, 0.1, 1], ['−0.1', '−0.05', '0', '0.05', '0.1', '1']
  )
  axis.minorticks_off()
  axis.legend(frameon=False, fontsize=10.5)


def prompts(axis, runs) -> None:
  ends = (-6, 0.2)
  for part, marker in (('trained', 'o'), ('heldout', 'x')):
    before, after = (
      np.concatenate([logp(run, stage, part) for run in runs]) / math.log(10)
      for stage in ('base', 'rl')
    )
    colour = {'trained': RL, 'heldout': BASE}[part]
    axis.plot(before, after, marker, color=colour, ms=4, alpha=0.5, label=part)
  axis.plot(ends, ends, color=GREY, lw=0.8)
  axis.plot(ends, [x - 1 for x in ends], color=GREY, lw=0.8, ls=':')
  axis.set(
    xlabel='log10 p0(C|x)',
    ylabel='log10 π(C|x)',
    title='each prompt; dotted: a tenth is left',
  )
  axis.legend(frameon=False)


def sets(axis, runs) -> None:
  ks = KS[2:17]
  lines = {'SRR': [], 'SRR, base twice': [], 'NSCR': []}
  for run in runs:
    both = [analysis.seen_sets(run, int(k)) for k in ks]
    p, e, s, _ = np.array([[x.sum(0) for x in pair] for pair in both]).T  # [2, K] each
    lines['SRR'].append((p / (p + s))[0])
    lines['SRR, base twice'].append((p / (p + s))[1])
    lines['NSCR'].append(((e - s) / (p + e + s))[0])
  for (name, found), colour in zip(lines.items(), (RL, BASE, OTHER), strict=True):
    for at, line in enumerate(found):
      axis.plot(ks, line, color=colour, lw=1.6, label=None if at else name)
  axis.axhline(0, color=GREY, lw=0.8)
  budgets(axis)
  axis.set(title='trained pairs seen in k samples: kept, net gain', ylim=(-0.15, 1.02))
  axis.legend(frameon=False)


def training(axis, runs) -> None:
  for k, colour in ((1, RL), (64, '#d99a1c'), (4096, OTHER), (65536, BASE)):
    for at, run in enumerate(runs):
      base = analysis.values(logp(run, 'base')).mean(0)
      steps = [[0, *base], *run['steps']]
      column = 1 + int(np.flatnonzero(k == KS)[0])
      axis.plot(
        [row[0] for row in steps],
        [row[column] for row in steps],
        '.-',
        color=colour,
        lw=1.4,
        label=None if at else f'k = {k}',
      )
  axis.set(xlabel='GRPO update (256 completions each)', ylabel='pass@k', ylim=(0, 1.02))
  axis.set_title('trained pairs, while RL goes on')
  axis.legend(frameon=False, loc='lower right')


def language_model(axis, table) -> None:
  if table is None:
    axis.set_axis_off()
    return
  ks = pass_at_k.ladder(min(table['base']['samples']))
  for side, name, colour in (('base', 'before', BASE), ('policy', 'after RL', RL)):
    found = pass_at_k.curve(judge.rates(table[side], ks), ks)
    axis.plot(ks, found.rate, 'o-', color=colour, label=name)
    axis.fill_between(ks, found.low, found.high, color=colour, alpha=0.15, lw=0)
  axis.set_xscale('log', base=2)
  axis.set(
    xlabel='k, samples',
    ylabel='pass@k',
    ylim=(0, 1.02),
    title=f'SmolLM2-135M, {len(table["base"]["samples"])} prompts',
  )
  axis.legend(frameon=False, loc='lower right')


def budgets(axis) -> None:
  axis.set_xscale('log', base=2)
  axis.set_xlabel('k, samples')


if __name__ == '__main__':
  main(sys.argv[1] if len(sys.argv) > 1 else 'cpu2')
