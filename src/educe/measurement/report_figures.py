"""The pictures of a report, and all of them in one."""

from __future__ import annotations

import importlib.util
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from educe.measurement.accuracy import Z
from educe.measurement.curves import AXIS, BLUE, GRID, INK, ORANGE
from educe.measurement.findings import LADDER, Findings

GREY = '#78909c'
Painter = Callable[[Any, Findings], None]


def check() -> None:
  """Raises ValueError where no picture can be drawn."""
  if importlib.util.find_spec('matplotlib') is None:
    raise ValueError(
      'a report needs the package matplotlib; `pip install matplotlib` brings it'
    )


def draw(found: Findings, folder: pathlib.Path, *, title: str = '') -> pathlib.Path:
  """Writes `<name>.png` for each of PANELS and `verdict.png`, all six; returns that."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in PANELS:
    _save(_figure([name], found, columns=1), folder / f'{name}.png')
  whole = folder / 'verdict.png'
  _save(_figure(list(PANELS), found, columns=2, title=title), whole)
  return whole


def _figure(names: Sequence[str], found: Findings, *, columns: int, title: str = ''):
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  lines = math.ceil(len(names) / columns)
  layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
  picture = Figure(figsize=(6 * columns, 3.6 * lines), dpi=160, layout=layout)
  if title:
    picture.suptitle(title, size=14, color=INK, x=0.01, ha='left')
  for index, name in enumerate(names):
    axes = picture.add_subplot(lines, columns, index + 1)
    heading, paint = PANELS[name]
    axes.set_title(heading, size=12, color=INK, loc='left', pad=8)
    axes.grid(color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.spines[['left', 'bottom']].set_color(AXIS)
    axes.tick_params(labelsize=10, colors=INK, length=0)
    paint(axes, found)
  return picture


def _save(picture: Any, path: pathlib.Path) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  FigureCanvasAgg(picture).print_png(path)


def _pass_at_k(axes, found: Findings) -> None:
  for curve, colour, name in (
    (found.base, GREY, 'base'),
    (found.policy, BLUE, 'policy'),
  ):
    axes.plot(curve.k, curve.rate, color=colour, lw=2.2, label=name)
    axes.fill_between(curve.k, curve.low, curve.high, color=colour, alpha=0.15, lw=0)
  if found.nulls is not None:
    power = found.nulls.power
    label = f'base sharpened, p^{power.alpha:.3g}, half of the prompts'
    axes.plot(power.curve.k, power.curve.rate, color=GREY, lw=1.5, ls='--', label=label)
    if (votes := found.nulls.majority) is not None:
      axes.plot(
        votes.k, votes.rate, color=ORANGE, lw=1.5, ls=':', label='base, majority'
      )
  if (at := found.comparison.crossing) is not None:
    axes.axvline(at, color=ORANGE, lw=1, label=f'crossing, k* = {at:.3g}')
  _budgets(axes, found.base.k)
  axes.set_ylim(0, 1.03)
  _percent(axes.yaxis)
  _legend(axes, loc='lower right')


def _gains(axes, found: Findings) -> None:
  """Shares may pass 1 where other prompts lost: cut, for they are stacked."""
  shares = np.array(
    [[x.elicited.value, x.undecided, x.created.value] for x in found.gains]
  )
  if np.isnan(shares).all():
    axes.text(0.5, 0.5, 'no gain to share out', ha='center', transform=axes.transAxes)
  else:
    stacked = np.clip(shares.T, 0, None)
    stacked = stacked / np.maximum(stacked.sum(0), 1e-12)
    names = ('elicited', 'undecided', 'created')
    axes.stackplot(LADDER, stacked, colors=(BLUE, GRID, ORANGE), labels=names, lw=0)
    for at, high, name in (
      (found.denied, 0.94, 'created beyond'),
      (found.budget, 0.86, 'elicited within'),
    ):
      axes.axvline(at, color=INK, lw=1, ls='--')
      box = dict(fc='white', ec='none', alpha=0.9, pad=1)
      axes.annotate(f' {name} {at:,} ', (at, high), color=INK, size=9, bbox=box)
  _budgets(axes, LADDER)
  axes.set_ylim(0, 1)
  _percent(axes.yaxis)
  _legend(axes, loc='lower right', solid=True)


def _ledger(axes, found: Findings) -> None:
  spent, start = found.spending, 0.0
  names = ('right more often', 'fewer right answers', 'drift elsewhere')
  for name, term, colour in zip(names, spent[1:4], (BLUE, ORANGE, GREY), strict=True):
    size = max(term.mean, 0.0) if math.isfinite(term.mean) else 0.0
    axes.barh(
      [0], [size], left=start, color=colour, height=0.5, label=_line(name, term)
    )
    start += size
  axes.set_xlim(0, 1.05 * max(start, 1e-3))
  axes.set_yticks([])
  axes.set_ylim(-0.6, 1.6)
  axes.set_xlabel('KL to the base, nats per sequence', color=INK, size=10)
  _legend(axes, loc='upper left')


def _line(name: str, term) -> str:
  if not math.isfinite(term.mean):
    return f'{name}: ∞'
  error = '' if math.isnan(term.error) else f' ± {Z * term.error:.3f}'
  return f'{name}: {abs(term.mean):.3f}{error}'


def _frontier(axes, found: Findings) -> None:
  spent = found.spending
  run = spent.efficiency
  far = not math.isfinite(run.kl)
  most = 1.3 * max(spent.frontier[-1, 0] if far else run.kl, 0.1)
  axes.plot(*spent.frontier.T, color=GREY, lw=2, label='most reward a KL can buy')
  axes.plot(
    *spent.best_of.T, 'o', ms=4, color=ORANGE, label='best of 2, 4, 8 … of base'
  )
  axes.plot([0], [run.start], 's', ms=6, color=GREY, label='base')
  if far:  # it writes what its base never does: off every scale
    axes.plot(
      [0.97 * most], [run.reward], '>', ms=9, color=BLUE, label='policy: KL = ∞'
    )
  else:
    label = f'policy: {run.eta.mean:.0%} of what could be bought'
    axes.plot([run.kl], [run.reward], 'D', ms=8, color=BLUE, label=label)
  axes.set_xlim(-0.03 * most, most)
  axes.set_ylim(0, 1.03)
  axes.set_xlabel('KL to the base, nats per sequence', color=INK, size=10)
  _percent(axes.yaxis)
  _legend(axes, loc='lower right')


def _prompts(axes, found: Findings) -> None:
  base, policy = found.rates.T
  axes.plot([0, 1], [0, 1], color=AXIS, lw=1)
  for status, colour, name in (
    (1, BLUE, f'within {found.budget:,} samples of the base'),
    (0, GREY, 'undecided'),
    (-1, ORANGE, f'beyond {found.denied:,} samples of the base'),
  ):
    where = found.status == status
    axes.plot(
      base[where], policy[where], 'o', ms=5, alpha=0.6, color=colour, label=name
    )
  axes.set_xlabel('share right, base', color=INK, size=10)
  axes.set_ylabel('share right, policy', color=INK, size=10)
  for axis in (axes.xaxis, axes.yaxis):
    _percent(axis)
  axes.set_xlim(-0.03, 1.03)
  axes.set_ylim(-0.03, 1.03)
  _legend(axes, loc='lower right')


def _support(axes, found: Findings) -> None:
  k = found.base.k
  kept = np.array([x.srr for x in found.dynamics])
  new = np.array([x.ndr for x in found.dynamics])
  for values, colour, name in (
    (kept, BLUE, 'kept, of prompts the base solves'),
    (new, ORANGE, 'new, of prompts the policy solves'),
  ):
    axes.plot(k, values[:, 0], color=colour, lw=2.2, label=name)
    axes.fill_between(k, values[:, 1], values[:, 2], color=colour, alpha=0.15, lw=0)
  floor = np.array([(x.srr.value, x.ndr.value) for x in found.twice])
  for column, colour in ((0, BLUE), (1, ORANGE)):
    label = 'the base sampled twice' if column == 0 else None
    axes.plot(
      k[: len(floor)], floor[:, column], color=colour, lw=1, ls='--', label=label
    )
  _budgets(axes, k)
  axes.set_ylim(0, 1.03)
  _percent(axes.yaxis)
  _legend(axes, loc='center right')


def _budgets(axes, k) -> None:
  from matplotlib.ticker import FuncFormatter

  axes.set_xscale('log', base=2)
  axes.set_xlim(k[0], max(k[-1], 2))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:,.0f}'))
  axes.minorticks_off()
  axes.set_xlabel('samples k', color=INK, size=10)


def _percent(axis) -> None:
  from matplotlib.ticker import FuncFormatter

  axis.set_major_formatter(FuncFormatter(lambda x, _: f'{100 * x:.3g}%'))


def _legend(axes, *, loc: str, solid: bool = False) -> None:
  if axes.get_legend_handles_labels()[0]:
    axes.legend(
      loc=loc,
      fontsize=9,
      frameon=solid,
      framealpha=0.9,
      edgecolor='none',
      labelcolor=INK,
    )


# name of the file → (title, what paints it)
PANELS: dict[str, tuple[str, Painter]] = {
  'pass_at_k': ('pass@k: right at least once in k samples', _pass_at_k),
  'gains': ('where the gain came from, by budget', _gains),
  'prompts': ('prompt by prompt', _prompts),
  'support': ('prompts solved in k samples', _support),
  'ledger': ('what the KL was spent on', _ledger),
  'frontier': ('what it bought', _frontier),
}
