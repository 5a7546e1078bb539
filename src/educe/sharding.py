"""One mesh, one table of rules, and the arrays placed by them.

A param carries logical axis names ('embed', 'mlp', …); RULES says which mesh axis each
lies on. Changing the mesh in the config is all that it takes to go from a laptop to a
pod; the model and the losses do not know.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from educe.types import Split

AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
ROWS = ('data', 'fsdp', 'expert')  # what the rows of a batch are split over
BATCH = PartitionSpec(ROWS)

# logical axis → mesh axis, or axes. What is not named here is replicated.
RULES: dict[str, Any] = {
  'rows': ROWS,
  'length': 'context',
  'vocab': 'tensor',
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'experts': 'expert',
}


def make_mesh(
  *, data: int = -1, fsdp: int = 1, expert: int = 1, context: int = 1, tensor: int = 1
) -> Mesh:
  """A mesh over every device; one axis may be −1 and takes what the others leave.

  Args:
    data: copies of the params, each with rows of its own
    fsdp: parts of every param and of its optimizer state; rows are split over it too
    expert: parts of the experts of a sparse model; rows are split over it too
    context: parts of a row's tokens, for contexts that no device could hold
    tensor: parts of heads, of an MLP's width and of the vocabulary; the innermost, for it
      exchanges most

  Axes are Auto: the compiler propagates shardings (explicit mode is jax.make_mesh's
  default and would ask every reshape in the model for its output sharding).
  """
  sizes = dict(data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
  return mesh_over(jax.devices(), **sizes)


def mesh_over(devices: Sequence[Any], **sizes: int) -> Mesh:
  """`make_mesh` of given devices, such as those of a topology that is not here; an axis
  that is left out is 1."""
  sizes = dict.fromkeys(AXES, 1) | sizes
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f'mesh={sizes}: sizes are positive, and at most one is -1')
  if free:
    if len(devices) % known:
      raise ValueError(
        f'mesh={sizes}: {len(devices)} devices are here, which do not divide by {known}'
      )
    sizes[free[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f'mesh={sizes} needs {math.prod(sizes.values())} devices; {len(devices)} are here'
    )
  shape, types = tuple(sizes[axis] for axis in AXES), (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def using(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
  """While it lasts, what is traced knows that it will run on this mesh, here or not."""
  if mesh.size == 1:
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def mesh_of(params: Any) -> Mesh | None:
  """The mesh that these arrays lie on."""
  where: Any = getattr(jax.tree.leaves(params)[0], 'sharding', None)
  named = isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh)
  return where.mesh if named else None


def using_that_of(params: Any) -> contextlib.AbstractContextManager[Any]:
  """`using` the mesh that these arrays lie on, outside of jit: programs without operands
  run on it too. Nothing if they lie on none."""
  mesh = mesh_of(params)
  one = mesh is None or mesh.size == 1
  return contextlib.nullcontext() if one else jax.set_mesh(mesh)


def whole_over(axis: str, params: Any) -> Any:
  """What describes these arrays, on a mesh, if they were not split over this axis."""

  def describe(x):
    spec = PartitionSpec(*(None if name == axis else name for name in x.sharding.spec))
    where = NamedSharding(x.sharding.mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(describe, params)


def in_use() -> Any:
  """The mesh of `using`; None outside of it, and where its axes are a kernel's own."""
  mesh = jax.sharding.get_abstract_mesh()
  ours = mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}
  return mesh if ours else None


def split(rows: int, size: int, axis: str, length: int = 1) -> Split | None:
  """How `rows`, `size` of the logical axis `axis`, and rows' `length` lie on the mesh in
  use, by RULES where they divide; None where there is none."""
  mesh = in_use()
  if mesh is None or mesh.size == 1:
    return None
  across, parts = RULES[axis], ways(mesh)
  by_rows = parts > 1 and rows % parts == 0
  by_size = mesh.shape[across] > 1 and size % mesh.shape[across] == 0
  along = RULES['length'] if length > 1 and length % in_parts(mesh) == 0 else None
  return Split(
    mesh,
    ROWS if by_rows else (),
    across if by_size else None,
    along if in_parts(mesh) > 1 else None,
  )


def ways(mesh: Any) -> int:
  """How many parts the rows of a batch are split into; 1 without a mesh."""
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def in_parts(mesh: Any) -> int:
  """How many parts the tokens of a row are split into; 1 without a mesh."""
  return 1 if mesh is None else mesh.shape[RULES['length']]


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any):
  """The PartitionSpec of one array; an axis that does not divide stays whole."""
  used: set[Any] = set()
  dims: list[Any] = []
  for name, size in zip(axes, shape, strict=True):
    target = RULES.get(name) if name else None
    parts = ways(mesh) if target == ROWS else mesh.shape[target] if target else 1
    fits = parts > 1 and target not in used and size % parts == 0
    dims.append(target if fits else None)
    if fits:
      used.add(target)
  return PartitionSpec(*dims)


def by_row(x: Any) -> Any:
  """Activations `[B, …]` with their rows split as a batch's are, where a mesh is in use.

  Left to itself the compiler splits their width, for that is how the weights lie, and then
  every device holds the activations of all rows.
  """
  return lay(x, 'rows')


def by_token(x: Any) -> Any:
  """`by_row` of `[B, T, …]`, tokens split as well where the mesh splits contexts."""
  return lay(x, 'rows', 'length')


def lay(x: Any, *axes: str | None) -> Any:
  """x with its first dimensions split by their logical axes, where a mesh is in use and
  one of them divides; what is not named stays whole then."""
  mesh = in_use()
  if mesh is None:
    return x
  how = spec(axes + (None,) * (x.ndim - len(axes)), x.shape, mesh)
  return jax.lax.with_sharding_constraint(x, how) if any(how) else x


def shardings(shapes: Any, axes: Any, mesh: Mesh) -> Any:
  """A tree of NamedShardings for params of these shapes and logical axes."""
  return jax.tree.map(
    lambda leaf, names: NamedSharding(mesh, spec(names, leaf.shape, mesh)), shapes, axes
  )


def place(tree: Any, axes: Any, mesh: Mesh) -> Any:
  """Params onto the mesh, tensor by tensor."""
  return jax.tree.map(jax.device_put, tree, shardings(tree, axes, mesh))


def replicate_rest(tree: Any, mesh: Mesh) -> Any:
  """What does not lie on the mesh yet (counters, keys) goes to every device of it."""
  everywhere = NamedSharding(mesh, PartitionSpec())

  def put(x):
    on_mesh = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
    return x if on_mesh else jax.device_put(x, everywhere)

  return jax.tree.map(put, tree)


def place_batch(batch: Any, mesh: Mesh) -> Any:
  """This process's rows of a batch → global arrays split by row over data × fsdp."""
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
  )


def check_batch(
  rows: int, microbatches: int, mesh: Mesh, group: int = 1, couples: bool = False
) -> None:
  """Rows of the global batch must split evenly over microbatches and devices.

  group: rows that must stay together
  couples: whether the loss must see all of them at once
  """
  if couples and microbatches > 1:
    raise ValueError(
      f'microbatches={microbatches}: the loss compares rows across the whole batch, so '
      'that it cannot be cut; set microbatches=1, or choose another loss'
    )
  parts = ways(mesh)
  if rows % (parts * microbatches * group):
    whole = f' in groups of {group}' if group > 1 else ''
    raise ValueError(
      f'batch of {rows} rows{whole} does not divide into {microbatches} microbatches × '
      f'{parts} data-parallel devices; make it a multiple of '
      f'{parts * microbatches * group}'
    )
