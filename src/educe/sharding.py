"""One mesh, one table of rules, and the arrays placed by them.

A param carries logical axis names ('embed', 'mlp', …); RULES says which mesh axis each
lies on. Changing the mesh in the config is all that it takes to go from a laptop to a
pod; the model and the losses do not know.

Four functions are about which mesh that is:

  using(mesh)            around what is traced for a mesh: under jit, or for one not here
  using_that_of(params)  around calls outside of jit, for arrays that lie on one already
  mesh_of(params)        asks arrays: where do these lie?
  in_use()               asks the trace: inside of the first two, what are we traced for?

The model and the losses ask `in_use` alone, through `split`, `by_row`, `by_token`, `lay`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from educe import hosts
from educe.types import Split

AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
ROWS = ('data', 'fsdp', 'expert')  # what the rows of a batch are split over
BATCH = PartitionSpec(ROWS)

HOST = 'pinned_host'  # memory of the host, as JAX calls what devices read by themselves

# logical axis → mesh axis, or axes. What is not named here is replicated.
RULES: dict[str, Any] = {
  'rows': ROWS,
  'blocks': ('data', 'expert'),  # of rows, beside a width that lies over fsdp
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

  Raises ValueError for sizes that the devices cannot have, and where other processes are
  on the mesh with which this one has not met: each would write the same folder.
  """
  there = jax.process_count()
  if there > hosts.count():  # a slice of TPUs tells JAX of its hosts, asked or not
    raise ValueError(f'{there} processes are here, which have not met: add --multihost')
  sizes = dict(data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
  return mesh_over(jax.devices(), **sizes)


def mesh_over(devices: Sequence[Any], **sizes: int) -> Mesh:
  """`make_mesh` of given devices, such as those of a topology that is not here; an axis
  that is left out is 1."""
  sizes = dict.fromkeys(AXES, 1) | sizes
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    mend = '; set data=1 as well' if len(free) > 1 and 'data' in free else ''
    raise ValueError(f'mesh={sizes}: sizes are positive, and at most one is -1{mend}')
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
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices == 1:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  # Between slices of TPUs there is a network that only gradients should cross.
  if sizes['data'] % slices:
    raise ValueError(
      f'mesh={sizes}: {slices} slices of TPUs are here; make data a multiple of {slices}'
    )
  inside, across = (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(AXES) - 1))
  found = mesh_utils.create_hybrid_device_mesh(inside, across, devices=devices)
  return Mesh(found, AXES, axis_types=types)


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
  """What would describe these params, which lie on a mesh, if they were not split over this
  axis of it. Of params alone: a dimension of rows lies over several axes at once."""

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
  """How operands of a kernel lie on the mesh in use; None where none is.

  What does not divide by its parts is left whole.

  Args:
    rows: of the batch, split over ROWS
    size: of their other dimension, split as RULES say of `axis`
    axis: that dimension's logical name: 'vocab', 'heads', …
    length: tokens of a row, split over 'context'; 1: the operands have none to split
  """
  mesh = in_use()
  if mesh is None or mesh.size == 1:
    return None
  across = RULES[axis]
  parts = row_parts(mesh)
  by_rows = parts > 1 and rows % parts == 0
  by_size = mesh.shape[across] > 1 and size % mesh.shape[across] == 0
  along = RULES['length'] if length > 1 and length % token_parts(mesh) == 0 else None
  return Split(
    mesh,
    ROWS if by_rows else (),
    across if by_size else None,
    along if token_parts(mesh) > 1 else None,
  )


def row_parts(mesh: Any) -> int:
  """How many parts the rows of a batch are split into; 1 without a mesh."""
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def token_parts(mesh: Any) -> int:
  """How many parts the tokens of a row are split into; 1 without a mesh."""
  return 1 if mesh is None else mesh.shape[RULES['length']]


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any):
  """The PartitionSpec of one array; an axis that does not divide stays whole."""
  used: set[Any] = set()
  dims: list[Any] = []
  for name, size in zip(axes, shape, strict=True):
    target = RULES.get(name, ()) if name else ()
    among = (target,) if isinstance(target, str) else target
    parts = math.prod(mesh.shape[axis] for axis in among)
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
  """Params onto the mesh, tensor by tensor; every process has all of them."""
  return jax.tree.map(_put, tree, shardings(tree, axes, mesh))


def _put(x: Any, where: NamedSharding) -> jax.Array:
  """A host's array onto a mesh that may go beyond it."""
  if where.is_fully_addressable:
    return jax.device_put(x, where)
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(
      _put(jax.random.key_data(x), where), impl=jax.random.key_impl(x)
    )
  # device_put would compare all that it is given between all processes.
  host = np.asarray(x)
  return jax.make_array_from_callback(host.shape, where, lambda part: host[part])


def place_like(tree: Any, like: Any) -> Any:
  """Arrays of the host, where those of `like` lie."""
  return jax.tree.map(lambda x, other: _put(x, other.sharding), tree, like)


def to_host(tree: Any) -> Any:
  """Arrays on a mesh into the memory of their devices' hosts, split as they are; numbers
  stay. What describes arrays comes back as what would describe those."""

  def move(x):
    if not x.ndim:
      return x
    where = x.sharding.with_memory_kind(HOST)
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.device_put(x, where)

  return jax.tree.map(move, tree)


def to_device(tree: Any, layout: Any = None) -> Any:
  """What `to_host` moved, back to the devices; the rest as it is.

  layout: a tree of shardings, under jit, where arrays do not know their own
  """

  def move(x, where):
    away = getattr(where, 'memory_kind', None) == HOST
    return jax.device_put(x, where.with_memory_kind('device')) if away else x

  if layout is None:
    return jax.tree.map(lambda x: move(x, getattr(x, 'sharding', None)), tree)
  return jax.tree.map(move, tree, layout)


def host() -> jax.Device:
  """The processor of this process's host, as JAX counts it among its devices.

  Raises ValueError where JAX was told to leave it out.
  """
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    platforms = os.environ.get('JAX_PLATFORMS')
    raise ValueError(
      f'JAX_PLATFORMS={platforms} leaves out the host, where a model is put together '
      f'before it is spread over devices; set JAX_PLATFORMS={platforms},cpu'
    ) from None


@contextlib.contextmanager
def on_host() -> Iterator[None]:
  """While it lasts, what is made is in the memory of the host: no device may have room
  for a whole model, which `place` then spreads over all of them."""
  with jax.default_device(host()):
    yield


def replicate_rest(tree: Any, mesh: Mesh) -> Any:
  """What does not lie on the mesh yet (counters, keys) goes to every device of it."""
  everywhere = NamedSharding(mesh, PartitionSpec())

  def put(x):
    on_mesh = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
    return x if on_mesh else _put(x, everywhere)

  return jax.tree.map(put, tree)


def process_rows(mesh: Mesh, rows: int, process: int | None = None) -> np.ndarray:
  """Which rows of a batch lie on the devices of a process (this one), in order.

  On a torus they need not be next to each other; with a tensor axis that goes across
  hosts several processes have the same. Raises ValueError where rows do not divide.
  """
  each = row_parts(mesh)
  if rows % each:
    raise ValueError(
      f'config.data.batch_size: a batch of {rows} rows does not divide over {each} '
      f'data-parallel devices; make it a multiple of {each}'
    )
  process = hosts.index() if process is None else process
  parts: Any = NamedSharding(mesh, BATCH).devices_indices_map((rows,))
  there = [part for device, (part,) in parts.items() if device.process_index == process]
  return np.unique(np.concatenate([np.arange(rows)[part] for part in there]))


def distinct_row_parts(mesh: Mesh) -> int:
  """How many different parts of a batch the processes have."""
  devices: Any = mesh.devices.flat
  there = {device.process_index for device in devices}
  rows = row_parts(mesh)
  return len({process_rows(mesh, rows, process).tobytes() for process in there})


def place_batch(batch: Any, mesh: Mesh, rows: int | None = None) -> Any:
  """Rows of a batch → global arrays split by row (ROWS).

  rows: of the global batch. Then each process brings all of them, or those of
    `process_rows` alone; None: all.
  """
  sharding = NamedSharding(mesh, BATCH)
  here = len(jax.tree.leaves(batch)[0])
  if rows is None or here == rows:
    return jax.tree.map(lambda x: _put(np.asarray(x), sharding), batch)
  mine = process_rows(mesh, rows)

  def put(x):
    x = np.asarray(x)

    def part(index):  # of one device: rows next to each other
      start = np.searchsorted(mine, index[0].start or 0)
      stop = rows if index[0].stop is None else index[0].stop
      return x[start : np.searchsorted(mine, stop)]

    return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, part)

  return jax.tree.map(put, batch)


def fetch(tree: Any, *, keep: bool = True) -> Any:
  """Arrays as NumPy's, whole, in every process. All processes must ask for them.

  keep: False takes part and gets None for each: who has no use for them has no room either
  """

  def get(x):
    here = not isinstance(x, jax.Array) or x.is_fully_addressable
    if here or x.is_fully_replicated:
      return jax.device_get(x) if keep else None
    whole = multihost_utils.process_allgather(x, tiled=True)
    return whole if keep else None

  return jax.tree.map(get, tree)
