"""python -m educe compile: what a config's programs would need of TPUs that are not here.

  python -m educe compile --config=configs/grpo.py --preset=llama3_8b --topology=v5p:4x4x4
    --config.mesh.data=4 --config.mesh.fsdp=16 --programs=train --effort=-1

The very programs of a run (plans.py) are compiled by libtpu, on any host, in minutes that
the size of the program decides and the number of chips does not. What is printed was not
measured: no chip has run it (roofline.py).

  train      an update
  score      the policy's log-probs of a round's tokens, a step's rows at a time
  prefill    prompts read into the sampler's slots
  decode     one token more of every slot; times and bytes are of one

GB are 10⁹ bytes of one device: arguments and temporaries of the program and what lies
beside it meanwhile are its peak; `sends` goes to other devices. TFLOP and tokens/s are of
all devices. No run is faster than the floor, the longest of the three that `bound` names:
matmul, memory, exchange. Last, in brackets, what compiling took.
"""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from educe import config as config_lib
from educe import paths, plans, recipes, roofline, runs, sharding, topology
from educe.progress import say
from educe.spelling import near

PROGRAMS = ('train', 'score', 'prefill', 'decode')


def compile_config(
  argv: Sequence[str],
  chips: str,
  *,
  stage: str | None = None,
  programs: Sequence[str] = (),
  preset: str | None = None,
  prompt: int | None = None,
  rows: int | None = None,
  effort: float = 0.0,
  largest: bool = False,
  to: str | None = None,
) -> dict[str, Any]:
  """Compiles the programs of a config, prints what each needs, and returns it.

  Args:
    argv: --config=file.py and --config.section.key=value, as `train` takes them
    chips: a topology, such as v5p:4x4x4
    stage: of a config of stages, which one
    programs: which of PROGRAMS; all that the run has
    preset, prompt, rows: see `plans.plan`
    effort: XLA's on the program's speed, −1 to 1: less compiles faster
    largest: also the most rows of an update that fit, by powers of two
    to: a JSON file that gets what is returned

  Raises ValueError, in one line, for whatever is wrong with any of them.
  """
  if not -1 <= effort <= 1:
    raise ValueError(f'--effort={effort} must be from −1 to 1')
  for name in programs:
    if name not in PROGRAMS:
      raise ValueError(
        f'--programs={name} is none of {", ".join(PROGRAMS)}{near(name, PROGRAMS)}'
      )
  if to is not None and (not to.strip() or pathlib.Path(to).is_dir()):
    raise ValueError(f'--to={to} is no file; name one, such as --to=runs/pod.json')
  config = _config(argv, stage)
  devices = topology.devices(chips)
  mesh = sharding.mesh_over(devices, **config['mesh'])
  kind = devices[0].device_kind
  planned = plans.plan(config, mesh, preset=preset, prompt=prompt, rows=rows)
  for name in programs:
    if name not in planned.programs:
      raise ValueError(f'--programs={name}: the run has {", ".join(planned.programs)}')
  sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
  result: dict[str, Any] = {
    'topology': chips,
    'device': kind,
    'devices': mesh.size,
    'mesh': sizes,
    'params': jax.tree.reduce(
      lambda n, x: n + math.prod(x.shape), planned.state.params, 0
    ),
    'rows': planned.rows,
    'length': planned.length,
    'microbatches': config['microbatches'],
    'jax': jax.__version__,
    'programs': {},
  }
  say(
    f'{chips}: {mesh.size} × {kind} of {topology.CHIPS[kind].memory / 1e9:.0f} GB as '
    + (' × '.join(f'{axis} {size}' for axis, size in sizes.items()) or 'one device')
    + f'; {result["params"]:,} parameters, {planned.rows} rows of {planned.length} tokens'
  )
  say(HEAD)
  for name in programs or planned.programs:
    found = measured(planned.programs[name], mesh, effort)
    result['programs'][name] = found
    say(line(name, found))
  if largest:

    def fits(rows: int) -> dict[str, Any]:
      if rows == planned.rows and 'train' in result['programs']:
        return result['programs']['train']
      more = plans.plan(config, mesh, preset=preset, prompt=prompt, rows=rows)
      return measured(more.programs['train'], mesh, effort)

    group, parts = planned.method.group, config['microbatches']
    each = sharding.row_parts(mesh) * parts * group
    most = most_rows(fits, each, topology.CHIPS[kind].memory)
    result['largest'] = most
    say(
      f'the largest update that fits has {most["rows"]} rows'
      if most
      else f'no update fits: {each} rows are one a device'
    )
  if to is not None:
    pathlib.Path(to).parent.mkdir(parents=True, exist_ok=True)
    paths.write(pathlib.Path(to), json.dumps(result, indent=1) + '\n')
  return result


def _config(argv: Sequence[str], stage: str | None) -> dict[str, Any]:
  """A run's sections, expanded."""
  values = recipes.load(argv)
  stages = values.pop('stages', None)
  where = 'config'
  if stages is not None:
    if stage is None or stage not in stages:
      said = 'is missing' if stage is None else f'{stage!r} is none'
      raise ValueError(f'--stage {said}: name one of {", ".join(stages)}')
    values, where = values[stage], f'config.{stage}'
  elif stage is not None:
    raise ValueError(f'--stage={stage}: the config has no stages')
  config = config_lib.expand(values, runs.train, where)
  config_lib.check_used(config, runs.READ)
  return config


def measured(program: plans.Program, mesh: Any, effort: float) -> dict[str, Any]:
  """Compiles it; `roofline.report` of what came out, and the seconds that it took. Of what
  does not fit into a chip's memory {'fits': False, 'reason'}."""
  start, worked = time.perf_counter(), time.process_time()
  try:
    compiled = program.lower().compile(compiler_options=_options(effort))
  except jax.errors.JaxRuntimeError as error:
    text = ' '.join(str(error).split())
    if 'RESOURCE_EXHAUSTED' not in text or 'hbm' not in text:
      raise
    found: dict[str, Any] = {'fits': False, 'reason': text[:200]}
  else:
    found = roofline.report(
      compiled,
      mesh.devices,
      program.work,
      beside=program.beside,
      kept=program.kept,
    )
  return {
    **found,
    'compile_seconds': round(time.perf_counter() - start, 1),
    'compile_cpu_seconds': round(time.process_time() - worked, 1),
  }


def _options(effort: float) -> dict[str, Any]:
  """XLA's for an effort; since jax 0.12 it has levels: 19 is O1, 39 is O3."""
  if not effort:
    return {}
  if hasattr(jax.config, 'jax_exec_time_optimization_effort'):
    return {'exec_time_optimization_effort': effort}
  return {'optimization_level': 19 if effort < 0 else 39}


def most_rows(
  fits: Callable[[int], dict[str, Any]], each: int, memory: float
) -> dict[str, Any] | None:
  """What is said of the most rows that fit, `each` times a power of two; None: none do.

  Peaks grow with the rows: where two of them point is tried, and then its neighbours.

  fits: rows → `measured`; slow
  memory: bytes that a device has
  """
  said: dict[int, dict[str, Any]] = {}

  def fit(power: int) -> bool:
    rows = each * 2**power
    if power not in said:
      said[power] = {'rows': rows, **fits(rows)}
      answer = 'fits' if said[power]['fits'] else 'does not fit'
      say(f'{rows} rows: {answer} ({said[power]["compile_seconds"]:.0f} s)')
    return said[power]['fits']

  if not fit(0):
    return None
  power = 0
  if fit(1):
    power = 1
    first, second = (1e9 * said[i]['peak_gb'] for i in (0, 1))
    slope = second - first
    if slope > 0:
      power = max(1, int(math.log2(max(1 + (memory - first) / slope, 2))))
  while power and not fit(power):
    power -= 1
  while fit(power + 1):
    power += 1
  return said[power]


HEAD = (
  f'{"GB a device":12}{"arguments":>11}{"temporaries":>13}{"beside":>9}{"peak":>9}'
  f'{"sends":>9}{"TFLOP":>11}{"floor ms":>11}{"bound":>10}{"tokens/s":>12}{"MFU":>7}'
  f'  kernels'
)


def line(name: str, found: Mapping[str, Any]) -> str:
  """A row of the table under HEAD."""
  took = f'  ({found["compile_seconds"]:.0f} s)'
  if 'reason' in found:
    return f'{name:12}  DOES NOT FIT: {found["reason"]}{took}'
  sent = None if found['sent_gb'] is None else sum(found['sent_gb'].values())
  kernels = '?' if found['kernels'] is None else ', '.join(found['kernels']) or 'none'
  return (
    f'{name:12}{_short(found["arguments_gb"]):>11}{_short(found["temporaries_gb"]):>13}'
    f'{_short(found["beside_gb"]):>9}{_short(found["peak_gb"]):>9}{_short(sent):>9}'
    f'{_short(found["flops"] / 1e12):>11}{_short(1e3 * found["seconds"]):>11}'
    f'{found["bound"]:>10}{found["tokens_per_second"]:12.0f}{found["mfu"]:7.2f}  '
    f'{kernels}{took}' + ('' if found['fits'] else '  DOES NOT FIT')
  )


def _short(x: float | None) -> str:
  """Three digits that count, whatever the size: of pods, and of a model of a thousand
  params."""
  if x is None:
    return '?'
  return f'{x:,.0f}' if abs(x) >= 100 else f'{x:.3g}'
