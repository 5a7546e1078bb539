"""How sure a reward is of held-out pairs against how often it is right, as a picture."""

from __future__ import annotations

import os
import pathlib

import numpy as np

from educe.measurement import curves
from educe.measurement.accuracy import wilson
from educe.measurement.agreement import Agreement, agreement
from educe.rollouts import transcripts


def draw(run_dir: str | os.PathLike, *, title: str = '') -> pathlib.Path | None:
  """Reads the last of run_dir/samples, writes run_dir/reliability.png, returns its path.

  None where the samples are no judgements (measurement/agreement.py). For each bin of
  confidence: the share of them that is agreed on, with its Wilson interval; on the
  diagonal a reward is calibrated. Below it lies how many pairs each bin has.
  """
  run_dir = pathlib.Path(run_dir)
  files = [p for p in (run_dir / 'samples').glob('*.jsonl') if p.stem.isdigit()]
  if not files:
    return None
  rows = transcripts.load(max(files, key=lambda p: int(p.stem)))
  what = 'pairs'
  if rows and 'rejected' in rows[0]:
    margins = [r['rewards']['chosen'] - r['rewards']['rejected'] for r in rows]
  elif rows and 'values' in rows[0]:
    what = 'judgements'
    margins = [
      value if label else -value
      for r in rows
      for value, label in zip(r['values'], r['labels'], strict=True)
    ]
  else:
    return None
  result = agreement(np.array(margins), np.zeros(len(margins)), what=what)
  picture = figure(result, title=title)
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  path = run_dir / 'reliability.png'
  FigureCanvasAgg(picture).print_png(path)
  return path


def figure(result: Agreement, *, title: str = ''):
  """The diagram as a Matplotlib figure."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import PercentFormatter

  picture = Figure(figsize=(6, 6), dpi=180, layout='constrained')
  if title:
    picture.suptitle(title, size=14, color=curves.INK, x=0.02, ha='left')
  upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=[3, 1])
  counts, confidence, right = np.array(result.bins, float).T
  bounds = [wilson(n * share, int(n)) for n, share in zip(counts, right, strict=True)]
  low, high = np.array(bounds).T
  upper.plot([0.5, 1], [0.5, 1], color=curves.AXIS, lw=1.6, ls=(0, (3, 2)))
  upper.errorbar(
    confidence,
    right,
    yerr=np.maximum([right - low, high - right], 0),
    color=curves.BLUE,
    lw=2.4,
    marker='o',
    markersize=8,
    elinewidth=1.6,
    capsize=4,
    clip_on=False,
    zorder=3,
  )
  lower.bar(confidence, counts, width=0.03, color=curves.BLUE)
  upper.set_ylim(0, 1.02)
  heading = f'{result.rate:.0%} of {result.total} {result.what}; error {result.ece:.3f}'
  for axes, name in ((upper, f'share agreed on ({heading})'), (lower, result.what)):
    axes.set_title(name, size=12, color=curves.INK, loc='left', pad=6)
    axes.grid(color=curves.GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.spines[['left', 'bottom']].set_color(curves.AXIS)
    axes.tick_params(labelsize=11, colors=curves.INK, length=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  upper.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  lower.set_xlim(0.48, 1.02)
  lower.set_xlabel('confidence', size=12, color=curves.INK)
  return picture
