"""results/<name>.json → figure.png: proxy and gold against √KL, and who wins.

python experiments/2022_ouyang_instructgpt/figure.py cpu2
"""

import json
import sys

import judge
import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt

COLOURS = {'proxy': '#1261c4', 'gold': '#c4410c'}
MARKS = {'ppo': 'o-', 'dpo': 's--'}


def main(name):
  found = json.loads((judge.HERE / 'results' / f'{name}.json').read_text())
  plt.rcParams.update({'font.size': 13, 'axes.spines.top': False})
  plt.rcParams.update({'axes.spines.right': False})
  figure, (above, below) = plt.subplots(
    2, 1, figsize=(6, 7.2), layout='constrained', sharex=True
  )
  for stage, mark in MARKS.items():
    curve = judge.moved(found, stage)
    at = [x['root_kl'] for x in curve]
    for scorer, colour in COLOURS.items():
      mean, error = np.array([x[scorer] for x in curve]).T
      above.errorbar(
        at,
        mean,
        yerr=judge.Z * error,
        fmt=mark,
        color=colour,
        ms=5,
        elinewidth=0.8,
        capsize=2,
        alpha=1.0 if stage == 'ppo' else 0.6,
        label=f'{stage}, {scorer}',
      )
    rate, low, high = np.array([x['win_rate'] for x in found['policies'][stage]]).T
    below.errorbar(
      at,
      rate,
      yerr=[rate - low, high - rate],
      fmt=mark,
      color=COLOURS['gold'],
      alpha=1.0 if stage == 'ppo' else 0.6,
      capsize=3,
      label=stage,
    )
  above.axhline(0, color='#555', ls=':', lw=1.2)
  above.set(ylabel="score, in σ of SFT's answers")
  above.legend(frameon=False, loc='upper left', fontsize=11)
  below.axhline(0.5, color='#555', ls=':', lw=1.2)
  below.set(
    xlabel='√KL(policy ‖ SFT), √nats a completion',
    ylabel='gold prefers it to SFT',
    ylim=(0.3, 1),
  )
  below.legend(frameon=False, loc='upper left', fontsize=11)
  figure.savefig(judge.HERE / 'figure.png', dpi=160)


if __name__ == '__main__':
  main(*sys.argv[1:])
