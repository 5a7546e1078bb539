"""results/<name>.json → figure.png: gold and proxy against √KL, and where gold turns.

python experiments/2022_gao_overoptimization/figure.py cpu2
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
COLOURS = ('#c4410c', '#d99a1c', '#3f8f5b', '#1261c4')  # few pairs … many


def main(name):
  plt.rcParams.update(
    {'font.size': 12, 'axes.spines.top': False, 'axes.spines.right': False}
  )
  results = json.loads((HERE / 'results' / f'{name}.json').read_text())
  figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout='constrained')
  first = results['tilt'][0]['world']
  sizes = sorted({row['pairs'] for row in results['tilt']})
  for pairs, colour in zip(sizes, COLOURS, strict=True):
    rows = [
      row for row in results['tilt'] if row['pairs'] == pairs and row['world'] == first
    ]
    for row in rows:
      main_line = row['draw'] == 0
      axes[0].plot(
        row['d'],
        row['gold'],
        color=colour,
        lw=2.2 if main_line else 0.8,
        alpha=1 if main_line else 0.45,
        label=f'{pairs:,} pairs' if main_line else None,
      )
      # Where nearly all mass is on one completion, a correlation is of the last two.
      some = [(d, corr) for d, corr in zip(row['d'], row['corr'], strict=True)
              if d < 0.93 * row['d'][-1]]  # fmt: skip
      axes[1].plot(
        *zip(*some, strict=True),
        color=colour,
        lw=2.2 if main_line else 0.8,
        alpha=1 if main_line else 0.45,
      )
      if row['peak']['interior']:
        axes[0].plot(row['peak']['d'], row['peak']['gold'], 'o', color=colour, ms=5)
        axes[1].plot(row['peak']['d'], row['peak']['corr'], 'o', color=colour, ms=5)
    axes[0].plot(rows[0]['d'], rows[0]['proxy'], color=colour, lw=1.2, ls=(0, (4, 3)))
    for row in results['best_of_n']:
      if row['pairs'] == pairs and row['world'] == first:
        axes[0].plot(row['d'][::3], row['gold'][::3], 'x', color=colour, ms=5)
  axes[0].axhline(0, color='#999', lw=0.8)
  axes[0].set(
    ylim=(-2.5, 4),
    ylabel='mean reward (σ of gold under the base)',
    title='gold —   proxy - -   best-of-n ×   peak ●',
  )
  axes[0].legend(frameon=False, loc='lower left', fontsize=11)
  axes[1].axhline(0, color='#999', lw=0.8)
  axes[1].set(
    ylabel='corr(gold, proxy) under the policy',
    ylim=(-1, 1.02),
    title='where it is 0, gold turns',
  )
  _trained(axes[2], results)
  for axis in axes:
    axis.set(xlabel='d = √KL(policy ‖ base), √nats', xlim=(0, None))
  figure.savefig(HERE / 'figure.png', dpi=110)


def _trained(axis, results):
  runs = results['trained']
  same = ('world', 'pairs', 'draw')
  (tilt,) = [
    row for row in results['tilt'] if all(row[key] == runs[key] for key in same)
  ]
  axis.plot(tilt['d'], tilt['gold'], color='#222', lw=1.4, label='tilt (exact)')
  axis.axhline(0, color='#999', lw=0.8)
  for kind, style, shades in (
    ('rloo', '-', ('#0b3d91', '#3f7fd9', '#8fbcf2')),
    ('plain', ':', ('#8a2c06', '#d9673a', '#f2b48c')),
  ):
    how = {'rloo': 'natural', 'plain': 'plain'}[kind]
    for row, shade in zip(runs[kind], shades, strict=True):
      axis.plot(row['d'], row['gold'], style, color=shade, lw=1.6)
      axis.plot(
        row['d'][-1],
        row['gold'][-1],
        's',
        color=shade,
        ms=7,
        label=f'{how}, β = {row["beta"]:g}',
      )
  axis.set(
    ylabel='mean gold',
    title=f'RLOO from samples, {runs["pairs"]} pairs (■ its end)',
  )
  axis.legend(frameon=False, fontsize=10.5)


if __name__ == '__main__':
  main(*sys.argv[1:])
