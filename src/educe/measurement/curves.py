"""One picture of a run: what was logged at every step, accuracy where it was measured.

A run that logged `reward` gets a small panel for each of what reinforcement learning is
watched by, one that logged `rewards/chosen` of what learning from preferences is; any
other gets its loss and accuracy, larger.
"""

from __future__ import annotations

import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from educe.training import metrics

# Blue and orange stay apart for every kind of colour vision, and in grey by lightness.
INK, BLUE, ORANGE, GRID, AXIS = '#263238', '#1565c0', '#c2410c', '#e3e8eb', '#90a4ae'
SOLVED = {'all': BLUE, 'some': '#9cc4ee', 'none': '#f2b48c'}

# What an evaluation measures, and its panel.
EXAMS = {'accuracy': 'held-out accuracy', 'win_rate': 'preferred to its start'}

# The panels of reinforcement learning after reward, accuracy and groups: (title, {metric:
# legend}, what its axis means). Titles carry the unit.
LINES = (
  ('completion length (tokens)', {'completions/mean_length': ''}, 'number'),
  ('completions cut off', {'completions/clipped_ratio': ''}, 'share'),
  ('KL (nats per token)', {'kl': ''}, 'number'),
  ('entropy (nats per token)', {'entropy': ''}, 'number'),
  ('clipped', {'clip_ratio/low': 'low', 'clip_ratio/high': 'high'}, 'share'),
  ('value error (squared)', {'value_error': ''}, 'number'),
  ('loss', {'loss': ''}, 'number'),
)

# And those of preferences, after held-out accuracy.
PREFERENCES = (
  ('rewards', {'rewards/chosen': 'chosen', 'rewards/rejected': 'rejected'}, 'number'),
  ('reward margin', {'rewards/margins': ''}, 'number'),
  ('pairs the right way round', {'rewards/accuracies': ''}, 'share'),
  (
    'log-probs (nats)',
    {'logps/chosen': 'chosen', 'logps/rejected': 'rejected'},
    'number',
  ),
)

Row = Mapping[str, Any]
Panel = tuple[str, Callable[[Any], None]]  # a title, and what draws on the axes


def draw(run_dir: str | os.PathLike, *, title: str = '') -> pathlib.Path:
  """Reads run_dir/metrics.jsonl, writes run_dir/curves.png and returns its path.

  A metric is shown as logged (light) and smoothed (bold); the reward in a band of
  ± `reward_std`; `accuracy` and `win_rate` (0..1) as points, with `…/low` and `…/high` as
  their interval; `groups/solved_{none,some,all}` (0..1) as smoothed shares on top of each
  other. What was not logged has no panel.

  Raises ValueError if no record has a loss or a reward that is a finite number.
  """
  run_dir = pathlib.Path(run_dir)
  path = run_dir / 'metrics.jsonl'
  rows = sorted(metrics.read(path), key=lambda row: row['step'])
  if _has(rows, 'reward'):
    panels = _reinforcement(rows)
  elif _has(rows, 'rewards/chosen'):
    panels = _preferences(rows)
  elif _has(rows, 'loss'):
    panels = _supervised(rows)
  else:
    raise ValueError(
      f'{path} holds no loss and no reward that is a finite number: the run took no step,'
      ' or its numbers were not finite from the first'
    )
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
  except ModuleNotFoundError as error:
    raise ValueError(
      'curves.png needs the package matplotlib; `pip install matplotlib` brings it'
    ) from error
  picture = figure(panels, [row['step'] for row in rows], title=title)
  path = run_dir / 'curves.png'
  FigureCanvasAgg(picture).print_png(path)
  return path


def figure(panels: Sequence[Panel], steps: Sequence[int], *, title: str = ''):
  """The panels as a Matplotlib figure over the same steps: a column, or two of more.

  An odd number of them in two columns leaves the first one the whole width.
  """
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  # The object API: no global state, no display, nothing left open. Six inches wide and
  # type of 10 points and more can be read on a phone.
  columns = 2 if len(panels) > 2 else 1
  lines = math.ceil(len(panels) / columns)
  height = 0.8 + (1.8 if columns == 2 else 2.8) * lines
  layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
  picture = Figure(figsize=(6, height), dpi=180, layout=layout)
  if title:
    picture.suptitle(title, size=14, color=INK, x=0.02, ha='left')
  grid = picture.add_gridspec(lines, columns)
  missing = lines * columns - len(panels)
  for index, (name, paint) in enumerate(panels):
    wide = columns == 1 or (index == 0 and missing > 0)
    line, column = divmod(index + missing if index else 0, columns)
    axes = picture.add_subplot(grid[line, :] if wide else grid[line, column])
    paint(axes)
    _style(axes, name, steps, wide=wide, last=line == lines - 1)
  return picture


def smooth(values: np.ndarray, width: float) -> np.ndarray:
  """Gaussian mean over neighbours; `width` is its standard deviation in samples.

  Centred, so that it does not lag behind a falling loss; the weights sum to 1 at the
  ends too; values that are not finite count for nothing. Where no neighbour within four
  widths is finite, so is the mean.
  """
  radius = min(math.ceil(4 * width), len(values) - 1)
  offsets = np.arange(-radius, radius + 1)
  kernel = np.exp(-0.5 * (offsets / max(width, 1e-6)) ** 2)
  finite = np.isfinite(values)

  def around(x):
    return np.convolve(x, kernel)[radius : radius + len(x)]

  total = around(finite.astype(float))
  mean = around(np.where(finite, values, 0.0))
  return np.divide(mean, total, out=np.full(len(values), np.nan), where=total > 0)


def _supervised(rows: Sequence[Row]) -> list[Panel]:
  loss = functools.partial(_lines, rows=rows, names={'loss': ''})
  panels: list[Panel] = [('loss (nats per token)', loss)]
  return panels + _exams(rows)


def _reinforcement(rows: Sequence[Row]) -> list[Panel]:
  has_std = _has(rows, 'reward_std')
  title = 'reward (band: ± reward_std)' if has_std else 'reward'
  panels: list[Panel] = [(title, functools.partial(_reward, rows=rows))]
  panels += _exams(rows)
  if all(_has(rows, f'groups/solved_{name}') for name in SOLVED):
    panels.append(('solved', functools.partial(_solved, rows=rows)))
  return panels + _of(rows, LINES)


def _preferences(rows: Sequence[Row]) -> list[Panel]:
  unit = ' (nats per pair)' if _has(rows, 'rewards/margins') else ''
  panels = _of(rows, [(f'loss{unit}', {'loss': ''}, 'number')])
  return panels + _exams(rows) + _of(rows, PREFERENCES)


def _exams(rows: Sequence[Row]) -> list[Panel]:
  """A panel for each share that was measured on something held out."""
  return [
    (title, functools.partial(_accuracy, points=points))
    for key, title in EXAMS.items()
    if (points := _points(rows, key))
  ]


def _of(rows: Sequence[Row], lines) -> list[Panel]:
  """The panels of what was logged."""
  panels: list[Panel] = []
  for title, names, kind in lines:
    there = {k: v for k, v in names.items() if _has(rows, k)}
    if there:
      options = dict(share=kind == 'share', inside=len(title) > 8)
      paint = functools.partial(_lines, rows=rows, names=there, **options)
      panels.append((title, paint))
  return panels


def _lines(axes, *, rows, names, share: bool = False, inside: bool = False) -> None:
  """Each metric as logged and smoothed; told apart by colour, dashes and a legend, which
  stands beside the title or, where that leaves no room, `inside`."""
  everything, bolds = [], []
  styles = zip((BLUE, ORANGE), ('-', (0, (3, 1.2))), strict=True)
  for (name, label), (color, dashes) in zip(names.items(), styles, strict=False):
    steps, values = _series(rows, name)
    bold = smooth(values, width=len(values) / 40)
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=1.2)
    axes.plot(
      steps, bold, color=color, lw=2.4, ls=dashes, label=label, marker=_dot(values)
    )
    everything.append(values)
    bolds.append(bold)
  if any(names.values()):
    _legend(axes, inside)
  if share:
    _percent(axes)
  _limits(axes, np.concatenate(everything), np.concatenate(bolds))


def _reward(axes, *, rows) -> None:
  steps, values = _series(rows, 'reward')
  bold = smooth(values, width=len(values) / 40)
  shown = bold
  if _has(rows, 'reward_std'):
    std = np.array([row.get('reward_std') for row in rows if 'reward' in row], float)
    std = smooth(std, width=len(values) / 40)
    axes.fill_between(steps, bold - std, bold + std, color=BLUE, alpha=0.13, lw=0)
    shown = np.concatenate([bold - std, bold + std])
  axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1.2)
  axes.plot(steps, bold, color=BLUE, linewidth=2.4, marker=_dot(values))
  _limits(axes, values, shown)


def _dot(values) -> str:
  """A line of one point is not seen."""
  return 'o' if len(values) == 1 else ''


def _solved(axes, *, rows) -> None:
  """Shares of groups on top of each other: all solved, some (these teach), none."""
  shares = []
  for name in SOLVED:
    steps, values = _series(rows, f'groups/solved_{name}')
    shares.append(smooth(values, width=len(values) / 40))
  if len(steps) == 1:  # an area needs two
    steps, shares = steps + np.array([-0.5, 0.5]), [np.repeat(x, 2) for x in shares]
  axes.stackplot(
    steps, *shares, colors=list(SOLVED.values()), labels=list(SOLVED), linewidth=0
  )
  axes.set_ylim(0, 1)
  _percent(axes)
  _legend(axes)


def _accuracy(axes, *, points) -> None:
  at, rates, low, high = np.array(points, float).T
  axes.errorbar(
    at,
    rates,
    yerr=np.maximum([rates - low, high - rates], 0),
    color=ORANGE,
    linewidth=2.4,
    marker='o',
    markersize=8 if len(points) < 8 else 5,
    elinewidth=1.6,
    capsize=5 if len(points) < 8 else 3,
    clip_on=False,
    zorder=3,
  )
  ends = {0, len(points) - 1}
  for index in sorted(ends if len(points) > 4 else range(len(points))):
    # Beside the axis, where the next point leaves room.
    on_the_axis = index == 0 and 1 < len(points) < 8
    axes.annotate(
      f'{rates[index]:.0%}',
      (at[index], high[index]),
      xytext=(4 if on_the_axis else 0, 7),
      textcoords='offset points',
      ha='left' if on_the_axis else 'center',
      color=ORANGE,
      weight='bold',
      size=13,
    )
  axes.set_ylim(0, 1.2)  # room for a label above 100 %
  axes.set_yticks(np.linspace(0, 1, 5))
  _percent(axes)


def _style(axes, title: str, steps: Sequence[int], *, wide: bool, last: bool) -> None:
  from matplotlib.ticker import MaxNLocator

  # Room for the labels of the first and the last point, wide as the text is.
  margin = (0.05 if wide else 0.1) * max(steps[-1] - steps[0], 1)
  axes.set_xlim(steps[0] - margin, steps[-1] + margin)
  axes.set_title(title, size=12, color=INK, loc='left', pad=6)
  axes.grid(color=GRID, linewidth=1)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[['left', 'bottom']].set_color(AXIS)
  axes.tick_params(labelsize=11, colors=INK, length=0, labelbottom=last)
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  if last:
    axes.set_xlabel('optimizer step', size=12, color=INK)


def _legend(axes, inside: bool = False) -> None:
  where = dict(loc='best') if inside else dict(loc='lower right', bbox_to_anchor=(1, 1))
  axes.legend(
    **where,
    ncols=3,
    frameon=False,
    fontsize=10,
    handlelength=0.8,
    handletextpad=0.3,
    columnspacing=0.6,
    borderpad=0.3,
    borderaxespad=0,
    labelcolor=INK,
  )


def _limits(axes, values: np.ndarray, shown: np.ndarray) -> None:
  """From zero, so that heights compare; one early spike must not flatten the rest."""
  from matplotlib.ticker import MaxNLocator

  axes.yaxis.set_major_locator(MaxNLocator(4))
  finite = values[np.isfinite(values)]
  bottom = min(np.nanmin(shown), np.quantile(finite, 0.02), 0)
  top = max(np.nanmax(shown), np.quantile(finite, 0.98), 0)
  if top > bottom:
    axes.set_ylim(1.1 * bottom, 1.1 * top)


def _percent(axes) -> None:
  from matplotlib.ticker import FuncFormatter

  axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{100 * x:.3g}%'))


def _has(rows: Sequence[Row], name: str) -> bool:
  """Whether any record has it as a finite number."""
  return any(row.get(name) is not None for row in rows)


def _series(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
  """(steps, values) of the records that have it.

  A number that was not finite is null in the file, NaN here, and a gap in the line.
  """
  pairs = [(row['step'], row[name]) for row in rows if name in row]
  steps, values = np.array(pairs, float).T
  return steps, values


def _points(rows: Sequence[Row], key: str) -> list[tuple[int, float, float, float]]:
  """[(step, rate, low, high)]; without an interval all three are the rate."""
  points = []
  for row in rows:
    if (rate := row.get(key)) is not None:
      bounds = row.get(f'{key}/low', rate), row.get(f'{key}/high', rate)
      points.append((row['step'], rate, *bounds))
  return points
