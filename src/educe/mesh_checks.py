"""What a mesh cannot divide: refused in one line that names the field, or said.

Asked where a run, or a plan of it, begins; sharding.py has the mesh and its rules.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from educe import sharding


def check_host() -> None:
  """Raises ValueError where devices cannot use the memory of their host."""
  device = jax.devices()[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if sharding.HOST not in kinds:
    raise ValueError(
      f'offload: {device.device_kind} has no memory of kind {sharding.HOST}, only {kinds}; '
      'leave it out'
    )


def check_params(params: Any, mesh: Mesh) -> None:
  """Raises ValueError for an axis of the mesh that is there to split params, and splits
  none of these."""
  specs = [x.sharding.spec for x in jax.tree.leaves(params)]
  for axis in ('fsdp', 'expert', 'tensor'):
    if mesh.shape[axis] > 1 and not any(axis in spec for spec in specs):
      raise ValueError(
        f'config.mesh.{axis}={mesh.shape[axis]} splits no param of this model: it has '
        f'none such, or their sizes do not divide; set {axis}=1, and data instead'
      )


def left_whole(params: Any, axes: Any, mesh: Mesh) -> str:
  """Which logical axes of these params an axis of the mesh does not divide, in a line that
  people read; '' where it divides all."""
  sizes: dict[str, dict[str, set[int]]] = {}

  def note(x, names):
    for name, size in zip(names, x.shape, strict=True):
      across = sharding.RULES.get(name)
      if isinstance(across, str) and size % mesh.shape[across]:
        sizes.setdefault(across, {}).setdefault(name, set()).add(size)

  jax.tree.map(note, params, axes)
  return '; '.join(
    f'config.mesh.{across}={mesh.shape[across]} does not divide '
    + ', '.join(
      f'{name} ({", ".join(map(str, sorted(of)))})'
      for name, of in sorted(names.items())
    )
    + ': those stay whole along it'
    for across, names in sorted(sizes.items())
  )


def check_batch(
  rows: int,
  microbatches: int,
  mesh: Mesh,
  group: int = 1,
  couples: bool = False,
  *,
  name: str = 'config.data.batch_size',
) -> None:
  """Rows of the global batch must split evenly over microbatches and devices.

  group: rows that must stay together
  couples: whether the loss must see all of them at once
  name: of the fields of the config that rows come from
  """
  if couples and microbatches > 1:
    raise ValueError(
      f'microbatches={microbatches}: the loss compares rows across the whole batch, so '
      'that it cannot be cut; set microbatches=1, or choose another loss'
    )
  parts = sharding.row_parts(mesh)
  if rows % (parts * microbatches * group):
    whole = f' in groups of {group}' if group > 1 else ''
    raise ValueError(
      f'{name}: a batch of {rows} rows{whole} does not divide into {microbatches} '
      f'microbatches × {parts} data-parallel devices; make its rows a multiple of '
      f'{parts * microbatches * group}'
    )
