"""Language models on TPU pods that are not here: what their programs would need of a chip.

  python benchmarks/pods.py [--only=llama3_8b,v5p] [--largest]

Compiles the points below (those whose words are all in a point's name) as `educe compile`
does, keeps what is found in results/pods.json and writes the tables of pods.md from all
that is kept. --largest also searches the most rows that fit, some four compiles more.
Minutes a program, on two cores; nothing runs. It is a config file as well:

  python -m educe compile --config=benchmarks/pods.py:grpo --preset=llama3_8b \
    --topology=v6e:16x16 --effort=-1
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import ml_collections

from educe import paths
from educe.compile import compile_config

HERE = pathlib.Path(__file__).resolve().parent
RESULTS, PAGE = HERE / 'results' / 'pods.json', HERE / 'pods.md'
LENGTH = 4096  # tokens a row of SFT
PROMPT, NEW = 1024, 1024  # tokens of a row of GRPO


class Point(NamedTuple):
  preset: str
  topology: str
  recipe: str
  rows: int  # of the global batch
  mesh: str = 'fsdp=-1'
  programs: tuple[str, ...] = ('train',)

  @property
  def name(self) -> str:
    return ' '.join((self.preset, self.topology, self.recipe, self.mesh))


POINTS = (
  Point('llama3_8b', 'v5p:4x4x4', 'sft', 64, 'data=4,fsdp=16'),
  Point(
    'llama3_8b',
    'v5p:4x4x4',
    'grpo',
    128,
    'data=4,fsdp=16',
    ('train', 'score', 'prefill', 'decode'),
  ),
  Point('llama3_8b', 'v6e:4x4', 'sft', 16),
  Point('llama3_8b', 'v6e:4x4', 'grpo', 32, programs=('train', 'score')),
  Point('llama3_8b', 'v6e:16x16', 'sft', 256),
  Point('llama3_8b', 'v5e:16x16', 'sft', 256),
  Point('llama3_70b', 'v5p:4x4x8', 'sft', 128, 'data=4,fsdp=32'),
  Point('llama3_70b', 'v6e:16x16', 'sft', 256),
  Point('llama3_70b', 'v5e:16x16', 'sft', 256),
  Point('qwen3_32b', 'v5p:4x4x4', 'sft', 64, 'data=4,fsdp=16'),
  Point('qwen3_32b', 'v6e:16x16', 'sft', 256),
  Point('olmoe_1b_7b', 'v6e:4x4', 'sft', 32, 'fsdp=4,expert=4'),
  Point('olmoe_1b_7b', 'v5e:8x8', 'sft', 64, 'fsdp=16,expert=4'),
)


def get_config(recipe: str = 'sft') -> ml_collections.ConfigDict:
  """SFT, or GRPO with a reference; the tokens are made up, and so is the batch size: pods
  have many sizes, and the points above say theirs."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='scratch',
    preset='llama3_8b',
    compute_dtype='bfloat16',
    remat='full',
    logprob='pallas_tpu',
  )
  config.tokenizer = dict(path='byte')
  config.mesh = dict(data=1, fsdp=-1)
  config.steps = 1000
  config.optimizer = dict(name='adamw', learning_rate=1e-5)
  problems = dict(name='countdown', size=16)
  if recipe == 'sft':
    config.source = dict(name='answers', environment=problems)
    config.data = dict(batch_size=4, max_length=LENGTH)
    config.algorithm = dict(name='sft')
    config.loss = dict(name='sft')
  elif recipe == 'grpo':
    config.environment = problems
    config.rollouts = dict(prompts=16, group=8, max_new_tokens=NEW, batch_size=128)
    config.advantage = dict(name='group_relative')
    config.algorithm = dict(name='grpo', reference_every=0)
    config.loss = dict(name='grpo', kl_coef=0.04)
  else:
    raise ValueError(f'no recipe {recipe!r}; there are sft and grpo')
  return config


def compiled(point: Point, *, largest: bool) -> dict[str, Any]:
  """What `educe compile` says of a point."""
  argv = [f'--config={__file__}:{point.recipe}']
  argv += [f'--config.mesh.{axis}' for axis in point.mesh.split(',')]
  options: dict[str, Any] = {}
  if point.recipe == 'grpo':
    argv.append(f'--config.rollouts.prompts={point.rows // 8}')
    options['prompt'] = PROMPT
  found = compile_config(
    argv,
    point.topology,
    preset=point.preset,
    programs=point.programs,
    effort=-1.0,
    largest=largest,
    rows=point.rows,
    **options,
  )
  return {'name': point.name, 'preset': point.preset, 'recipe': point.recipe, **found}


def table(runs: Sequence[dict[str, Any]]) -> str:
  """What is kept, as Markdown."""
  lines = [
    '| | chips | mesh | rows × tokens | held, GB | sends, GB | TFLOP | floor, s | bound '
    '| tokens/s | MFU | most rows |',
    '|---|---|---|---|---|---|---|---|---|---|---|---|',
  ]
  for run in runs:
    mesh = ' × '.join(f'{axis} {size}' for axis, size in run['mesh'].items())
    for name, found in run['programs'].items():
      first = name == next(iter(run['programs']))
      what = f'{run["preset"]}, {run["recipe"]}' if first else ''
      cells = [f'{what} {name}'.strip(), run['topology'], mesh]
      cells.append(f'{run["rows"]} × {run["length"]:,}' if name == 'train' else '')
      if 'reason' in found:
        cells += ['does not fit', *[''] * 6]
      else:
        sent = found['sent_gb']
        cells += [
          f'{found["peak_gb"]:.1f}' + ('' if found['fits'] else ', does not fit'),
          '?' if sent is None else f'{sum(sent.values()):.2f}',
          f'{found["flops"] / 1e12:,.1f}',
          f'{found["seconds"]:.4f}',
          found['bound'],
          f'{found["tokens_per_second"]:,.0f}',
          f'{found["mfu"]:.2f}',
        ]
      most = run.get('largest', {}) if name == 'train' else {}
      cells.append(f'{most["rows"]:,}' if most else 'none' if most is None else '')
      lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', default='', help='words of the names of points')
  parser.add_argument('--largest', action='store_true')
  args = parser.parse_args(argv)
  words = [word for word in args.only.split(',') if word]
  before = json.loads(RESULTS.read_text())['runs'] if RESULTS.exists() else []
  runs = {run['name']: run for run in before}
  for point in POINTS:
    if all(word in point.name for word in words):
      known_most = runs.get(point.name, {}).get('largest')
      runs[point.name] = compiled(point, largest=args.largest)
      if known_most is not None and not args.largest:
        runs[point.name]['largest'] = known_most
      known = [runs[x.name] for x in POINTS if x.name in runs]
      kept = {'benchmark': 'pods', 'jax': jax.__version__, 'runs': known}
      paths.write(RESULTS, json.dumps(kept, indent=1) + '\n')
      head, _, rest = PAGE.read_text().partition('<!-- table -->\n')
      tail = rest.partition('<!-- end -->')[2]
      text = f'{head}<!-- table -->\n{table(known)}\n<!-- end -->{tail}'
      paths.write(PAGE, text)


if __name__ == '__main__':
  main()
