"""results/seed*.json → figure.png: fixed points, tables, the frontier, who gained and lost.

python experiments/2026_li_free_energy/figure.py
"""

import sys

import judge
import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from educe.environments import tabular
from educe.measurement import pass_at_k

COLOURS = {
  'rloo': '#c4410c',
  'grpo': '#d99a1c',
  'gspo': '#8a6d3b',
  'ppo': '#7b3f9b',
  'rloo_k1_reward': '#1261c4',
  'grpo_k1_reward': '#2a8fd0',
  'grpo_k2_loss': '#3f8f5b',
  'grpo_k3_loss': '#7fb069',
  'sft': '#444444',
  'expert_iteration': '#888888',
  'dpo': '#b0307a',
  'ipo': '#d070a8',
  'kto': '#e0a8c8',
}
STRENGTHS = np.linspace(0, 20, 100)  # 1/β of the exact tilts
MARKS = {'basin': 'o', 'tail': 's', 'deep_tail': 'D', 'barrier': '^', 'singular': 'v'}


def main() -> int:
  plt.rcParams.update(
    {'font.size': 12, 'axes.spines.top': False, 'axes.spines.right': False}
  )
  results = judge.load()
  figure, axes = plt.subplots(2, 2, figsize=(13, 10), layout='constrained')
  tables(axes[0, 0], results)
  frontier(axes[0, 1], results)
  prompts(axes[1, 0], results)
  curves(axes[1, 1], results)
  figure.savefig(judge.HERE / 'figure.png', dpi=130)
  return 0


def tables(axis, results):
  """Visits to the first success and to one half, by p0."""
  for r in results:
    start = np.array(r['base']['solved'])
    arm = r['sampled']['rloo']
    for name, colour in (('first', '#1261c4'), ('half', '#c4410c')):
      for row in np.array(arm[name]):
        axis.plot(start[: len(row)][row > 0], row[row > 0], '.', color=colour, ms=5)
  p, group = np.logspace(-6, -0.3, 200), results[0]['group']
  axis.plot(p, 1 / -np.expm1(group * np.log1p(-p)), color='#222', lw=1)
  axis.plot([], [], '.', color='#1261c4', label='first success')
  axis.plot([], [], '.', color='#c4410c', label='π(C) = ½')
  axis.plot([], [], color='#222', lw=1, label=f'1/(1 − (1 − p0)^{group})')
  axis.set(
    xscale='log',
    yscale='log',
    xlabel='p0(C) of the prompt',
    ylabel='visits',
    title='Tabular RLOO, β = 0',
  )
  axis.legend(frameon=False)


def frontier(axis, results):
  """Reward against KL, of the trained prompts; a line is an arm of a seed.

  Dotted: what the exact tilt p0·e^{r/β}/Z pays for its reward, over all β.
  """
  for r in results:
    start = np.array(r['base']['solved'])[np.array(r['train'])]
    base = np.stack([1 - start, start], -1)  # a 0/1 reward sees no more of an output
    tilts = [tabular.gibbs(base, b * np.array([0.0, 1.0]), 1) for b in STRENGTHS]
    cost = [tabular.kl(tilt, base).mean() for tilt in tilts]
    axis.plot(cost, [x[:, 1].mean() for x in tilts], ':', color='#222', lw=1.4)
  axis.plot([], [], ':', color='#222', lw=1.4, label='Gibbs, every β')
  for name, colour in COLOURS.items():
    for index, r in enumerate(results):
      if name in r['arms']:
        rows = [row['train'] for row in r['arms'][name]['curve']]
        axis.plot(
          [row['total'] for row in rows],
          [row['reward'] for row in rows],
          color=colour,
          lw=1.4,
          label=name if index == 0 else None,
        )
  axis.set(
    xlim=(-0.1, 8.5),
    ylim=(0, 0.7),
    xlabel='KL(π‖p0), nats an output',
    ylabel='mean π(C), trained prompts',
    title='Transformer arms: reward bought with KL',
  )
  axis.legend(frameon=False, fontsize=9, ncols=2)


def prompts(axis, results):
  """π(C) against p0(C), of transformer RLOO: held-out prompts are hollow."""
  for r in results:
    start, end = (np.array(x['solved']) for x in (r['base'], r['arms']['rloo']))
    for name, mark in MARKS.items():
      for part, fill in ((True, '#c4410c'), (False, 'none')):
        rows = (np.array(r['regimes']) == name) & (np.array(r['train']) == part)
        axis.plot(start[rows], end[rows], mark, mfc=fill, mec='#c4410c', ms=6)
  for name, mark in MARKS.items():
    axis.plot([], [], mark, mfc='#c4410c', mec='#c4410c', label=name)
  ends = [1e-9, 1]
  axis.plot(ends, ends, color='#999', lw=0.8)
  axis.set(
    xscale='log',
    yscale='log',
    xlabel='p0(C)',
    ylabel='π(C) after RLOO, β = 0',
    title='Who gained, who lost (hollow: never trained on)',
  )
  axis.legend(frameon=False, fontsize=9)


def curves(axis, results):
  """pass@k over all prompts, mean over seeds."""
  for name, colour in {'base': '#000000', **COLOURS}.items():
    ends = [
      (r['base'] if name == 'base' else r['arms'][name])['solved'] for r in results
    ]
    rate = pass_at_k.exact(np.array(ends).reshape(-1, 1), judge.KS).mean(0)
    axis.plot(judge.KS, rate, color=colour, lw=2.5 if name == 'base' else 1.2)
  axis.set(
    xscale='log',
    xlabel='k',
    ylabel='pass@k, all 64 prompts',
    ylim=(0, 1),
    title='pass@k, mean over seeds; black: the base',
  )


if __name__ == '__main__':
  sys.exit(main())
