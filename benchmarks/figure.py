"""results/*.json → <benchmark>.png beside this file, in the notebooks' style.

  python benchmarks/figure.py [logprob_cpu shared_prompts_cpu rollout_cpu peers_cpu pods]

Each is drawn as what it says that it is (its `benchmark`).
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from educe.measurement.curves import BLUE, INK, ORANGE
from educe.topology import CHIPS

HERE = pathlib.Path(__file__).resolve().parent
DRAWN = ('logprob_cpu', 'shared_prompts_cpu', 'rollout_cpu', 'peers_cpu', 'pods')
PALE, GREY = '#9cc4ee', '#90a4ae'


def bars(axes, values: Mapping[str, float], colours: Sequence[str], form: str) -> None:
  """One bar a name, the first on top, its number at its end."""
  drawn = axes.barh(list(values), list(values.values()), color=colours, height=0.62)
  label(axes, drawn, [format(x, form) for x in values.values()])


def label(axes, drawn, numbers: Sequence[str]) -> None:
  for text in axes.bar_label(drawn, numbers, padding=4):  # in front of any line
    text.set_bbox(dict(facecolor='white', edgecolor='none', pad=1))
  if not axes.yaxis_inverted():
    axes.invert_yaxis()
  axes.grid(False, axis='y')
  axes.margins(x=0.16)


def logprob(found: dict[str, Any]):
  """How much of the bare products' rate each way reaches, and what it holds for it."""
  ways = {name: row for name, row in found['ways'].items() if name != 'matmul'}
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
  colours = [BLUE if name == 'one_pass' else PALE for name in ways]
  bars(left, {name: row['fraction_of_matmul'] for name, row in ways.items()}, colours,
       '.2f')  # fmt: skip
  left.set(xlim=(0, 1.12), xlabel='share of the rate of the bare products')
  left.axvline(1, color=INK, linewidth=1, linestyle=':')
  left.axvline(0.75, color=ORANGE, linewidth=1, linestyle=':')
  left.set_title('speed; orange: the most with logits made twice', loc='left')
  bars(right, {name: row['temp_mb'] for name, row in ways.items()}, colours, ',.4g')
  right.set(xscale='log', xlabel='temporaries (MB)')
  right.set_xlim(1, right.get_xlim()[1] * 3)
  logits = 4 * found['tokens'] * found['vocab'] / 1e6
  right.axvline(logits, color=INK, linewidth=1, linestyle=':')
  right.set_title('memory; dotted: all logits, once', loc='left')
  sizes = (
    f'{found["tokens"]:,} tokens, width {found["width"]}, {found["vocab"]:,} entries'
  )
  return figure, f'log-prob and its gradients: {sizes}'


def shared_prompts(found: dict[str, Any]):
  figure, axes = plt.subplots(figsize=(7, 2.2))
  rates = {name: row['tokens_per_second'] for name, row in found['ways'].items()}
  bars(axes, rates, [PALE, BLUE], ',d')
  axes.set_xlabel('tokens per second')
  return figure, (
    f'groups of {found["group"]}: prompt {found["prompt"]:,}, completions '
    f'{found["completion"]:,}: {found["speedup"]:.2f} times as fast'
  )


def rollout(found: dict[str, Any]):
  """Where a decode step's time goes against the longer of its two floors."""
  models = {name: row for name, row in found.items() if name in ('10M', 'smollm2_135m')}
  figure, several = plt.subplots(1, len(models), figsize=(10, 2.6), sharey=True)
  for axes, (name, row) in zip(several, models.items(), strict=True):
    times = {
      'a step': row['step_seconds'],
      'its products': row['matmul_bound_seconds'],
      'weights and cache, read': row['memory_bound_seconds'],
    }
    scaled = {key: 1e3 * each for key, each in times.items()}
    bars(axes, scaled, [BLUE, PALE, GREY], '.3g')
    axes.set_xlabel('ms')
    speed = f'{row["tokens_per_second"]:,.0f} tokens/s'
    axes.set_title(f'{name}: {speed}', loc='left')
  reached = ' and '.join(f'{row["fraction_of_bound"]:.2f}' for row in models.values())
  return figure, (
    f'decoding {found["rows"]} rows, float32: {reached} of the speed of the longer floor'
  )


def peers(found: dict[str, Any]):
  """Tokens per CPU second, educe's over each peer's."""
  figure, several = plt.subplots(1, len(found['ratios']), figsize=(10, 4), sharey=True)
  for axes, (vocabulary, cases) in zip(several, found['ratios'].items(), strict=True):
    for shift, peer, colour in ((-0.2, 'TRL', PALE), (0.2, 'Tunix', BLUE)):
      ratios = [case[f'vs_{peer.lower()}'] for case in cases.values()]
      places = [place + shift for place in range(len(ratios))]
      drawn = axes.barh(places, ratios, height=0.36, color=colour, label=f'over {peer}')
      label(axes, drawn, [f'{x:.2f}' for x in ratios])
    axes.set_yticks(range(len(cases)), [case.replace('_', ', ') for case in cases])
    axes.axvline(1, color=INK, linewidth=1, linestyle=':')
    axes.set_title(f'V {int(vocabulary):,}', loc='left')
    axes.set_xlabel('tokens per CPU second, ours over theirs')
  several[-1].legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2)
  return figure, 'the same steps and sampling beside TRL and Tunix'


def pods(found: dict[str, Any]):
  """What a chip holds of each compiled program, beside how much it has room for."""
  presets: dict[str, list[dict[str, Any]]] = {}
  for run in found['runs']:
    for name, program in run['programs'].items():
      if 'reason' not in program:  # what does not fit has no sizes
        what = f'{run["recipe"]} {name}, {run["topology"]}'
        what += f'\n{run["rows"]} × {run["length"]} tokens'
        presets.setdefault(run['preset'], []).append({'what': what, **program})
  heights = [len(programs) + 0.8 for programs in presets.values()]
  figure, several = plt.subplots(
    len(presets),
    figsize=(9, 0.6 + 0.62 * sum(heights)),
    height_ratios=heights,
    squeeze=False,
  )
  parts = ('arguments', BLUE), ('temporaries', ORANGE), ('beside', PALE)
  for axes, (preset, programs) in zip(several[:, 0], presets.items(), strict=True):
    names = [program['what'] for program in programs]
    start = [0.0] * len(programs)
    for part, colour in parts:
      held = [program[f'{part}_gb'] for program in programs]
      drawn = axes.barh(names, held, left=start, color=colour, label=part, height=0.55)
      start = [a + b for a, b in zip(start, held, strict=True)]
    label(axes, drawn, [f'{x:,.1f}' for x in start])
    room = [CHIPS[program['device']].memory / 1e9 for program in programs]
    axes.plot(room, names, '|', color=INK, markersize=18, mew=2, label='there is')
    axes.set_xlim(0, 1.1 * max(*room, *start))
    axes.set_title(preset)
    axes.set_xlabel('GB a device')
  several[0, 0].legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=4)
  return figure, 'programs compiled for TPUs that were not there'


PICTURES: dict[str, Callable[[dict[str, Any]], tuple[Any, str]]] = {
  'logprob': logprob,
  'shared_prompts': shared_prompts,
  'rollout': rollout,
  'peers': peers,
  'pods': pods,
}


def draw(name: str, folder: pathlib.Path = HERE) -> pathlib.Path:
  """Reads results/<name>.json and returns the picture that it wrote."""
  found = json.loads((HERE / 'results' / f'{name}.json').read_text())
  with plt.style.context('educe.measurement.pictures'):
    figure, title = PICTURES[found['benchmark']](found)
    where = [str(found[key]) for key in ('machine', 'device') if key in found]
    at = ', '.join([*where, f'jax {found["jax"]}'])
    figure.suptitle(title, x=0.01, ha='left', size=13)
    figure.supxlabel(at, x=0.01, ha='left', size=9, color=GREY)
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.09)
    path = folder / f'{found["benchmark"]}.png'
    figure.savefig(path)
    plt.close(figure)
  return path


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('names', nargs='*', default=DRAWN)
  for name in parser.parse_args().names:
    print(draw(name))
