"""educe's training step compiled for TPUs that are not here: what a chip would hold and do.

  python benchmarks/pods.py [--topology=v5e:2x4] [--preset=six_million] [--loss=sft,grpo]
    [--rows=8] [--length=512] [--mesh=fsdp=4,tensor=2] [--logprob=pallas_tpu]

libtpu compiles it on any host (pip install -e .[dev]), in minutes that the size of the
graph decides and the number of chips does not. Per device: arguments, temporaries and the
most that is held at once. FLOPs come from a formula (XLA counts the body of a loop over
layers once), and the time is the longest of three floors:

  matmul     FLOPs of the step / (devices · peak)
  memory     (arguments + results + 2·temporaries) / bandwidth: each read or written once,
             temporaries both
  exchange   weights gathered for either pass and gradients scattered,
             3·bytes·(fsdp − 1)/fsdp, of what a tensor shard holds / the chip's links

None of them was measured: no TPU has run this. --logprob is that of `config.model`. Prints
a table and, as its last line, one JSON object;
--keep adds it to results/pods.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import time
from typing import Any, NamedTuple

# Before jax looks for chips. A second process would abort on the lock of a first.
os.environ |= {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from step_work import LOSSES, ONE_BILLION, step_flops, train_batch

from educe import sharding
from educe.models import policy, presets
from educe.models.transformer import Architecture
from educe.training import optimizer
from educe.training.metrics import PEAK_FLOPS
from educe.training.step import init_state, make_step
from educe.types import LossFn

RESULTS = pathlib.Path(__file__).resolve().parent / 'results' / 'pods.json'
SIX_MILLION = Architecture(
  vocab_size=8192,
  dim=256,
  layers=2,
  heads=4,
  kv_heads=4,
  head_dim=64,
  ffn=1024,
  max_length=8192,
)
OWN = {'six_million': SIX_MILLION, 'llama3_1b': ONE_BILLION}


class Chip(NamedTuple):
  """Of one device, by the vendor's data sheets (cloud.google.com/tpu/docs)."""

  memory: float  # bytes
  bandwidth: float  # bytes/s
  links: float  # bytes/s to its neighbours, all links together


CHIPS = {
  'TPU v4': Chip(32e9, 1228e9, 300e9),
  'TPU v5 lite': Chip(16e9, 819e9, 200e9),
  'TPU v5': Chip(95e9, 2765e9, 600e9),
  'TPU v6 lite': Chip(32e9, 1640e9, 448e9),
  # A chip of this one is two devices.
  'TPU7x': Chip(96e9, 3690e9, 600e9),
}


def mesh_of(topology: str, **sizes: int) -> Mesh:
  """A (data, fsdp, tensor) mesh over a topology like v5e:2x4 that need not be here."""
  described = topologies.get_topology_desc(platform='tpu', topology_name=topology)
  return sharding.mesh_over(described.devices, **sizes)


def placed(tree: Any, axes: Any, mesh: Mesh) -> Any:
  """Shapes of a TrainState with the shardings that a run gives it.

  What belongs to a param (the param, its moments, its copy in a reference) has its path's
  names in its own, and lies as the param does; the rest is everywhere.
  """
  names = jax.tree_util.tree_flatten_with_path(
    axes, is_leaf=lambda x: isinstance(x, tuple)
  )[0]
  known = {_names(path): axes for path, axes in names}

  def put(path, leaf):
    of_param = known.get(_names(path))
    spec = sharding.spec(of_param, leaf.shape, mesh) if of_param else PartitionSpec()
    return jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
    )

  return jax.tree_util.tree_map_with_path(put, tree)


def _names(path) -> tuple[str, ...]:
  return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def compile_step(
  architecture: Architecture,
  loss: LossFn,
  mesh: Mesh,
  *,
  rows: int,
  length: int,
  microbatches: int = 1,
  **options: Any,
) -> Any:
  """The step of `training/step.py`, compiled for the mesh's devices.

  options: of `optimizer.make`

  Raises ValueError where the batch does not divide, and what the compiler raises for
  what does not fit.
  """
  sharding.check_batch(rows, microbatches, mesh)
  model = policy.build(architecture)
  tx = optimizer.make(1000, **{'learning_rate': 1e-5} | options)
  key = jax.random.key(0)
  state = jax.eval_shape(lambda key: init_state(model.init(key), tx, key), key)
  state = placed(state, model.axes, mesh)
  rows_over = NamedSharding(mesh, sharding.BATCH)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows_over),
    jax.eval_shape(functools.partial(train_batch, architecture, rows, length)),
  )
  step = make_step(
    model,
    loss,
    tx,
    microbatches=microbatches,
    state_shardings=jax.tree.map(lambda x: x.sharding, state),
  )
  with sharding.using(mesh):
    return step.lower(state, batch).compile()


def report(
  compiled: Any, architecture: Architecture, mesh: Mesh, rows: int, length: int
) -> dict[str, Any]:
  """What a compiled step says of itself, and the floors under its time."""
  kind = mesh.devices.flat[0].device_kind
  chip, devices = CHIPS[kind], mesh.size
  said = compiled.memory_analysis()
  sizes = {
    'arguments': said.argument_size_in_bytes,
    'results': said.output_size_in_bytes,
    'temporaries': said.temp_size_in_bytes,
  }
  # What is donated is counted once.
  held = sum(sizes.values()) - said.alias_size_in_bytes
  peak = getattr(said, 'peak_memory_in_bytes', 0) or held
  count = policy.count(policy.shapes(architecture))
  width = jnp.dtype(architecture.param_dtype).itemsize
  fsdp, tensor = mesh.shape['fsdp'], mesh.shape['tensor']
  flops = step_flops(architecture, rows, length)
  floors = {
    'matmul': flops / (devices * PEAK_FLOPS[kind]),
    'memory': (sizes['arguments'] + sizes['results'] + 2 * sizes['temporaries'])
    / chip.bandwidth,
    'exchange': 3 * count * width / tensor * (fsdp - 1) / fsdp / chip.links,
  }
  slowest = max(floors, key=lambda name: floors[name])
  try:
    pallas = 'logprob_moments' in compiled.as_text()
  except Exception:  # some compilers cannot print what they made
    pallas = None
  return {
    'device': kind,
    'devices': devices,
    'params': count,
    **{f'{name}_mb': size / 1e6 for name, size in sizes.items()},
    'peak_mb': peak / 1e6,
    'fits': peak <= chip.memory,
    'flops': flops,
    'floors_seconds': floors,
    'seconds': floors[slowest],
    'bound': slowest,
    'tokens_per_second': rows * length / floors[slowest],
    'pallas_logprob': pallas,
  }


def main(argv: list[str] | None = None) -> dict[str, Any]:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--topology', default='v5e:2x4')
  parser.add_argument(
    '--preset', default='six_million', help='of models/presets, or own'
  )
  parser.add_argument('--loss', default='sft,grpo')
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--mesh', default='fsdp=4,tensor=2')
  parser.add_argument('--microbatches', type=int, default=1)
  parser.add_argument('--logprob', default='auto')
  parser.add_argument('--remat', default='dots')
  parser.add_argument('--keep', action='store_true')
  args = parser.parse_args(argv)
  architecture = dataclasses.replace(
    OWN.get(args.preset) or presets.get(args.preset),
    compute_dtype='bfloat16',
    remat=args.remat,
    logprob=args.logprob,
  )
  axes = (part.split('=') for part in args.mesh.split(','))
  mesh = mesh_of(args.topology, **{name: int(size) for name, size in axes})
  runs = []
  print(
    f'{args.preset}, {args.rows} × {args.length} tokens, {args.topology} as {args.mesh}'
  )
  print(
    f'{"MB a device":>19}{"arguments":>12}{"temporaries":>13}{"peak":>9}{"TFLOP":>9}'
    f'{"floor ms":>10}{"bound":>10}{"tokens/s":>11}{"Pallas":>8}{"compiled":>10}'
  )
  for name in args.loss.split(','):
    start = time.perf_counter()
    compiled = compile_step(
      architecture,
      LOSSES[name],
      mesh,
      rows=args.rows,
      length=args.length,
      microbatches=args.microbatches,
    )
    took = time.perf_counter() - start
    run = report(compiled, architecture, mesh, args.rows, args.length)
    asked = {k: v for k, v in vars(args).items() if k not in ('loss', 'keep')}
    runs.append({**asked, 'loss': name, **run, 'compile_seconds': round(took, 1)})
    print(
      f'{name:19}{run["arguments_mb"]:12.1f}{run["temporaries_mb"]:13.1f}'
      f'{run["peak_mb"]:9.1f}{run["flops"] / 1e12:9.3f}{1e3 * run["seconds"]:10.3f}'
      f'{run["bound"]:>10}{run["tokens_per_second"]:11.0f}'
      f'{run["pallas_logprob"]!s:>8}{took:9.0f}s'
      + ('' if run['fits'] else '  DOES NOT FIT'),
      flush=True,
    )
  result = {'benchmark': 'pods', 'jax': jax.__version__, 'runs': runs}
  if args.keep:
    kept = json.loads(RESULTS.read_text())['runs'] if RESULTS.exists() else []
    chosen = ('topology', 'preset', 'mesh', 'rows', 'length', 'loss', 'logprob')
    merged = {str([run[key] for key in chosen]): run for run in [*kept, *runs]}
    RESULTS.write_text(
      json.dumps({**result, 'runs': list(merged.values())}, indent=1) + '\n'
    )
  print(json.dumps(result))
  return result


if __name__ == '__main__':
  main()
