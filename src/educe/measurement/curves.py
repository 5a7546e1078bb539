"""One picture of a run: loss at every step, held-out accuracy where it was measured."""

from __future__ import annotations

import os
import pathlib

import numpy as np

from educe.training import metrics

INK, LOSS, ACCURACY, GRID, AXIS = '#263238', '#1565c0', '#c2410c', '#e3e8eb', '#90a4ae'


def draw(run_dir: str | os.PathLike, *, title: str = '') -> pathlib.Path:
  """Reads run_dir/metrics.jsonl, writes run_dir/curves.png and returns its path.

  The loss is shown as logged (light) and smoothed (bold). A record with `accuracy`
  (0..1) is a point of the lower panel, with its interval if `accuracy/low` and
  `accuracy/high` are there. Without any, that panel is left out.

  Raises ValueError if there is no such file or no loss in it.
  """
  run_dir = pathlib.Path(run_dir)
  steps, losses, points = _read(run_dir / 'metrics.jsonl')
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
  except ModuleNotFoundError as error:
    raise ValueError(
      'curves.png needs the package matplotlib; `pip install matplotlib` brings it'
    ) from error
  # The object API: no global state, no display, nothing left open. Six inches wide and
  # type of 12 points and more can be read on a phone.
  panels = 2 if points else 1
  figure = Figure(figsize=(6, 0.8 + 2.8 * panels), dpi=180, layout='constrained')
  canvas = FigureCanvasAgg(figure)
  axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
  _draw_loss(axes[0], steps, losses)
  if points:
    _draw_accuracy(axes[1], points)
  for each in axes:
    each.grid(color=GRID, linewidth=1)
    each.set_axisbelow(True)
    each.spines[['top', 'right']].set_visible(False)
    each.spines[['left', 'bottom']].set_color(AXIS)
    each.tick_params(labelsize=12, colors=INK, length=0)
    each.yaxis.label.set(size=13, color=INK)
  axes[-1].set_xlabel('optimizer step', size=13, color=INK)
  axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
  if title:
    axes[0].set_title(title, size=14, color=INK, loc='left', pad=10)
  path = run_dir / 'curves.png'
  canvas.print_png(path)
  return path


def smooth(values: np.ndarray, width: float) -> np.ndarray:
  """Gaussian mean over neighbours; `width` is its standard deviation in samples.

  Centred, so that it does not lag behind a falling loss; the weights sum to 1 at the
  ends too; values that are not finite count for nothing.
  """
  index = np.arange(len(values))
  weights = np.exp(-0.5 * ((index[:, None] - index[None]) / max(width, 1e-6)) ** 2)
  weights = weights * np.isfinite(values)[None]
  total = weights.sum(-1)
  mean = weights @ np.nan_to_num(values, posinf=0, neginf=0)
  return np.divide(mean, total, out=np.full(len(values), np.nan), where=total > 0)


def _draw_loss(axes, steps, losses) -> None:
  bold = smooth(losses, width=len(losses) / 40)
  axes.plot(steps, losses, color=LOSS, alpha=0.3, linewidth=1.2)
  axes.plot(steps, bold, color=LOSS, linewidth=2.4)
  axes.set_ylabel('loss (nats per token)')
  # From zero, so that heights compare; one early spike must not flatten the rest.
  top = 1.1 * max(np.nanmax(bold), np.nanquantile(losses, 0.98))
  if np.nanmin(losses) >= 0 and top > 0:
    axes.set_ylim(0, top)


def _draw_accuracy(axes, points) -> None:
  from matplotlib.ticker import PercentFormatter

  at, rates, low, high = np.array(points, float).T
  axes.errorbar(
    at,
    rates,
    yerr=np.maximum([rates - low, high - rates], 0),
    color=ACCURACY,
    linewidth=2.4,
    marker='o',
    markersize=8,
    elinewidth=1.6,
    capsize=5,
    clip_on=False,
    zorder=3,
  )
  ends = {0, len(points) - 1}
  for index in sorted(ends if len(points) > 5 else range(len(points))):
    axes.annotate(
      f'{rates[index]:.0%}',
      (at[index], high[index]),
      xytext=(0, 7),
      textcoords='offset points',
      ha='center',
      color=ACCURACY,
      weight='bold',
      size=14,
    )
  axes.set_ylim(0, 1.15)  # room for a label above 100 %
  axes.set_yticks(np.linspace(0, 1, 6))
  axes.yaxis.set_major_formatter(PercentFormatter(1.0))
  axes.set_ylabel('held-out accuracy')


def _read(path: pathlib.Path):
  """(steps, losses, [(step, accuracy, low, high)]) in order of steps."""
  rows = sorted(metrics.read(path), key=lambda row: row['step'])
  # A loss that was not finite is null in the file: a gap in the line.
  losses = [(row['step'], row['loss']) for row in rows if 'loss' in row]
  if not any(loss is not None for _, loss in losses):
    raise ValueError(f'{path} holds no loss')
  points = []
  for row in rows:
    if (rate := row.get('accuracy')) is not None:
      bounds = row.get('accuracy/low', rate), row.get('accuracy/high', rate)
      points.append((row['step'], rate, *bounds))
  steps, values = np.array(losses, float).T
  return steps, values, points
