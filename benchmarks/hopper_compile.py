"""The Hopper kernels compiled to sm_90a, and what ptxas says of them; no GPU is needed.

  JAX_PLATFORMS=cuda,cpu python benchmarks/hopper_compile.py [--tokens=16384] …

Needs jax ≥ 0.12 and the CUDA wheels (jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc
and its kin). Prints a line a kernel and, as its last line, one JSON object; exits with 1
if a register was spilled.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import sys
import tempfile

DUMP = tempfile.mkdtemp(prefix='mosaic')
os.environ |= {
  'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1',
  'CUDA_VISIBLE_DEVICES': '-1',
  'JAX_PLATFORMS': 'cuda,cpu',
  'MOSAIC_GPU_DUMP_PTXAS': '1',
  'MOSAIC_GPU_DUMP_TO': DUMP,
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import (  # noqa: E402
  AbstractDevice,
  AbstractMesh,
  AxisType,
  NamedSharding,
  PartitionSpec,
)

from educe.kernels.logprob import pallas_gpu  # noqa: E402

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--tokens', type=int, default=16384)
  parser.add_argument('--width', type=int, default=4096)
  parser.add_argument('--vocab', type=int, default=128256)
  args = parser.parse_args()
  topology = topologies.get_topology_desc(
    platform='cuda', target_config=H200, topology='1x1x1'
  )
  mesh = topologies.make_mesh(topology, (1,), ('x',))
  here = NamedSharding(mesh, PartitionSpec())
  like = functools.partial(jax.ShapeDtypeStruct, sharding=here)
  operands = (
    like((args.tokens, args.width), jnp.bfloat16),
    like((args.width, args.vocab), jnp.bfloat16),
    like((args.tokens,), jnp.int32),
  )
  chip = AbstractDevice(device_kind='NVIDIA H200', num_cores=132, platform='gpu')
  abstract = AbstractMesh((1,), ('x',), (AxisType.Auto,), abstract_device=chip)

  def total(hidden, head, targets):
    scores = pallas_gpu.logprob(hidden, head, targets, multiprocessors=132)
    return scores.logp.sum() + 0.01 * scores.entropy.sum()

  temporaries = {}
  for way, function in (('forward', total), ('backward', jax.grad(total, (0, 1)))):
    with jax.sharding.use_abstract_mesh(abstract):
      lowered = jax.jit(function).trace(*operands).lower(lowering_platforms=('cuda',))
    memory = lowered.compile().memory_analysis()
    temporaries[way] = memory.temp_size_in_bytes / 1e6
    print(f'{way}: compiled, {temporaries[way]:.0f} MB of temporaries')
  spilled = {}
  for file in sorted(pathlib.Path(DUMP).rglob('*')):
    if file.is_file():
      for count in re.findall(r'(\d+) bytes spill', file.read_text(errors='replace')):
        spilled[file.name] = spilled.get(file.name, 0) + int(count)
  for name, count in spilled.items():
    print(f'{name}: {count} bytes spilled')
  print(
    json.dumps(
      {
        'benchmark': 'hopper_compile',
        **vars(args),
        'temp_mb': temporaries,
        'spilled_bytes': sum(spilled.values()),
        'kernels': len(spilled),
        'jax': jax.__version__,
      }
    )
  )
  sys.exit(bool(sum(spilled.values())) or not spilled)


if __name__ == '__main__':
  main()
