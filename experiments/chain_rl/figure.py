"""results/<name>.json → figure.png: how fast RL finds what the base rarely shows.

python experiments/chain_rl/figure.py cpu2
"""

import itertools
import json
import pathlib
import sys

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent


def main(name):
  plt.rcParams.update({'font.size': 13, 'axes.spines.top': False})
  figure, axis = plt.subplots(figsize=(6, 4.2), layout='constrained')
  colours = ('#1261c4', '#c4410c', '#3f8f5b')
  runs = json.loads((HERE / 'results' / f'{name}.json').read_text())
  for run, colour in zip(runs, itertools.cycle(colours), strict=False):
    step, rate, low, high = zip(*run['grpo']['accuracy'], strict=True)
    axis.plot(step, rate, 'o-', color=colour, ms=4, label=f'seed {run["seed"]}')
    axis.fill_between(step, low, high, color=colour, alpha=0.2, lw=0)
  axis.axhline(run['exposure'], color='#555', ls=':', lw=1.5)
  axis.annotate(
    'ρ, how often the base saw a composition',
    (axis.get_xlim()[1], run['exposure']),
    (-6, 4),
    textcoords='offset points',
    ha='right',
    color='#555',
    fontsize=11,
  )
  axis.set(
    xlabel='GRPO update (256 completions each)',
    ylabel='p(right trace), held-out compositions',
    ylim=(0, 1.03),
  )
  axis.spines['right'].set_visible(False)
  axis.legend(frameon=False, loc='center right')
  figure.savefig(HERE / 'figure.png', dpi=160)


if __name__ == '__main__':
  main(*sys.argv[1:])
