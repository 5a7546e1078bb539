"""TPUs that are not here: their names, their data sheets, and compile-only devices.

libtpu compiles for any of them on any host, from a name such as v5e:2x4: a generation and
how its chips are laid out. Cloud names differ: v5p-128 and v4-128 count cores, of which a
chip has two, v5litepod-16 and v6e-16 count chips.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

# What libtpu is told before it is first loaded: not to ask a metadata server for the
# machine, nor to say that there is no chip, and that another process may have it loaded.
SETTINGS = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}


class Chip(NamedTuple):
  """Of one device, by the vendor's data sheets (cloud.google.com/tpu/docs)."""

  memory: float  # bytes
  bandwidth: float  # bytes/s
  links: float  # bytes/s to its neighbours, all links together


# By `device_kind`.
CHIPS = {
  'TPU v4': Chip(32e9, 1228e9, 300e9),
  'TPU v5 lite': Chip(16e9, 819e9, 200e9),
  'TPU v5': Chip(95e9, 2765e9, 600e9),
  'TPU v6 lite': Chip(32e9, 1640e9, 448e9),
  # A chip of this one is two devices.
  'TPU7x': Chip(96e9, 3690e9, 600e9),
}
# A pod of each generation that there is, and cores a chip of it as cloud names count.
EXAMPLES = {
  'v4': ('v4:4x4x4', 2),
  'v5e': ('v5e:4x8', 1),
  'v5p': ('v5p:4x4x4', 2),
  'v6e': ('v6e:4x8', 1),
  'tpu7x': ('tpu7x:2x2x1', 2),
}


def devices(name: str) -> Sequence[Any]:
  """The devices of a topology, for which programs compile and never run.

  Raises ValueError, in one line, for a name that is none, and where no libtpu is here or
  one that this jax cannot talk to.
  """
  if not re.fullmatch(r'[a-z0-9]+:\d+x\d+(x\d+)?', name):
    raise ValueError(f'topology={name!r} is not a name: {_names(name)}')
  if name.partition(':')[0] not in EXAMPLES:
    raise ValueError(f'topology={name!r}: there is no such generation: {_names(name)}')
  check_libtpu()
  os.environ |= {key: os.environ.get(key, value) for key, value in SETTINGS.items()}
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=name).devices
  except jax.errors.JaxRuntimeError as error:
    said = ' '.join(str(error).split()).partition(': ')[2]
    raise ValueError(f'topology={name!r}: {said}: {_names(name)}') from error


def check_libtpu() -> None:
  """Raises ValueError if libtpu is missing or not of the version that jax asks for, which
  would take the process with it and say nothing."""
  asked = next(x for x in metadata.requires('jax') or () if x.startswith('libtpu'))
  needs = asked.partition(';')[0].strip()
  try:
    have = metadata.version('libtpu')
  except metadata.PackageNotFoundError:
    raise ValueError(
      f"libtpu, which compiles for TPUs, is not installed: pip install '{needs}' (or "
      "-e '.[tpu]' in the clone)"
    ) from None
  name, _, version = needs.partition('==')
  if name == 'libtpu' and not f'{have}.'.startswith(version.removesuffix('*')):
    raise ValueError(
      f"libtpu {have} is not what jax {jax.__version__} needs: pip install '{needs}'"
    )


def _names(asked: str) -> str:
  """What could have been meant."""
  known = ', '.join(example for example, _ in EXAMPLES.values())
  hint = ''
  cloud = re.fullmatch(r'(v5litepod|[a-z0-9]+)-(\d+)', asked)
  generation = cloud and {'v5litepod': 'v5e', 'v7x': 'tpu7x'}.get(cloud[1], cloud[1])
  cores = EXAMPLES[generation][1] if generation in EXAMPLES else 0
  chips = int(cloud[2]) // cores if cloud and cores and len(cloud[2]) < 6 else 0
  if generation and chips:
    count = f'counts cores and has {chips} chips' if cores > 1 else f'has {chips} chips'
    hint = f'; {asked} {count}, laid out as {generation}:{layout(generation, chips)}'
  return f'name the generation and its layout, as {known}{hint}'


def layout(generation: str, chips: int) -> str:
  """The most even layout of so many chips: 4x4x4 of 64, on a plane 8x8."""
  dims = 2 if generation in ('v5e', 'v6e') else 3
  sides = [1] * dims
  prime = 2
  rest = chips
  while rest > 1:
    while rest % prime:
      prime += 1
    sides[sides.index(min(sides))] *= prime
    rest //= prime
  return 'x'.join(map(str, sorted(sides, reverse=dims == 3 and min(sides) == 1)))
