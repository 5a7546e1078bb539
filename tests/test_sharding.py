import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from educe import sharding
from educe.models import policy, presets


def test_minus_one_takes_what_is_left():
  mesh = sharding.make_mesh(data=-1, fsdp=2, tensor=2)
  assert mesh.shape == {'data': 2, 'fsdp': 2, 'expert': 1, 'context': 1, 'tensor': 2}


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'data': 3}, 'needs 3 devices; 8 are here'),
    ({'data': -1, 'fsdp': -1}, 'at most one is -1'),
    ({'data': -1, 'fsdp': 3}, '8 devices are here, which do not divide by 3'),
    ({'data': -1, 'fsdp': 16}, '8 devices are here, which do not divide by 16'),
    ({'data': 0}, 'sizes are positive'),
  ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(**sizes)


def test_rules_place_axes_and_leave_whole_what_does_not_divide(mesh_of):
  mesh = mesh_of(2, 2, 2)
  assert sharding.spec(('embed', 'mlp'), (4, 6), mesh) == P('fsdp', 'tensor')
  assert sharding.spec(('embed', 'mlp'), (4, 7), mesh) == P('fsdp', None)
  assert sharding.spec(('layers', None), (4, 6), mesh) == P(None, None)
  # One mesh axis splits at most one dimension of an array.
  assert sharding.spec(('vocab', 'mlp'), (4, 6), mesh) == P('tensor', None)


def test_place_splits_params_and_keeps_their_values(mesh_of):
  tree = {'w': np.arange(32.0).reshape(4, 8), 'norm': np.ones(3)}
  axes = {'w': ('embed', 'mlp'), 'norm': ('embed',)}
  placed = sharding.place(tree, axes, mesh_of(1, 4, 2))
  assert placed['w'].sharding.spec == P('fsdp', 'tensor')
  assert placed['w'].addressable_shards[0].data.shape == (1, 4)
  jax.tree.map(np.testing.assert_array_equal, placed, tree)


def test_a_batch_is_split_by_rows_over_data_and_fsdp(mesh_of):
  batch = sharding.place_batch({'tokens': np.arange(16).reshape(8, 2)}, mesh_of(2, 4))
  shards = batch['tokens'].addressable_shards
  assert sorted(int(s.data[0, 0]) for s in shards) == list(range(0, 16, 2))


@dataclasses.dataclass(frozen=True)
class Device:
  """One of several hosts'; process_rows asks where rows lie, and no more."""

  id: int
  process_index: int


def rows_of(monkeypatch, mesh, hosts_of, rows):
  """process_rows of each process, where device i of the mesh is of host hosts_of[i]."""
  there = {d: Device(d.id, hosts_of[i]) for i, d in enumerate(mesh.devices.flat)}

  class Named(NamedSharding):
    def devices_indices_map(self, shape):
      found = super().devices_indices_map(shape)
      return {there[device]: where for device, where in found.items()}

  monkeypatch.setattr(sharding, 'NamedSharding', Named)
  every = sorted(set(hosts_of))
  return [sharding.process_rows(mesh, rows, process).tolist() for process in every]


@pytest.mark.parametrize(
  ('sizes', 'hosts_of', 'rows'),
  [
    # Next to each other; a tensor axis within a host; across hosts: both have all rows.
    ((2, 4, 1), [0] * 4 + [1] * 4, [[*range(8)], [*range(8, 16)]]),
    ((2, 2, 2), [0] * 4 + [1] * 4, [[*range(8)], [*range(8, 16)]]),
    ((1, 1, 8), [0] * 4 + [1] * 4, [[*range(16)]] * 2),
    # On a torus a host has a corner of the mesh.
    (
      (2, 4, 1),
      [0, 0, 1, 1] * 2,
      [[*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)]],
    ),
    # Hosts of four devices, and three of tensor: they share rows in part.
    ((2, 1, 3), [0] * 4 + [1] * 2, [[*range(16)], [*range(8, 16)]]),
  ],
)  # fmt: skip
def test_a_process_needs_the_rows_of_its_devices(
  mesh_of, monkeypatch, sizes, hosts_of, rows
):
  assert rows_of(monkeypatch, mesh_of(*sizes), hosts_of, 16) == rows


def test_rows_that_do_not_divide_are_one_line(mesh_of):
  with pytest.raises(
    ValueError,
    match=r'config\.data\.batch_size: a batch of 12 rows does not divide over 8 data-',
  ):
    sharding.process_rows(mesh_of(8), 12)


def test_a_share_of_the_rows_or_all_of_them_make_the_same_array(mesh_of, monkeypatch):
  """Of this process's rows alone, devices elsewhere get nothing: here they are left out."""
  mesh = mesh_of(2, 4)
  whole = {'tokens': np.arange(32).reshape(16, 2), 'labels': np.arange(16.0)}
  placed = sharding.place_batch(whole, mesh, 16)
  jax.tree.map(np.testing.assert_array_equal, placed, whole)
  assert placed['tokens'].sharding.spec == sharding.BATCH

  mine, asked = np.array([0, 1, 2, 3, 8, 9, 10, 11]), []
  monkeypatch.setattr(sharding, 'process_rows', lambda mesh, rows: mine)
  make = jax.make_array_from_callback

  def only_mine(shape, where, part):
    def get(index):
      rows = np.arange(shape[0])[index[0]]
      if not np.isin(rows, mine).all():
        return np.zeros((len(rows), *shape[1:]), part((slice(0, 2),)).dtype)
      asked.extend(rows)
      return part(index)

    return make(shape, where, get)

  monkeypatch.setattr(jax, 'make_array_from_callback', only_mine)
  share = sharding.place_batch({n: x[mine] for n, x in whole.items()}, mesh, 16)
  assert sorted(set(asked)) == mine.tolist()
  for name, x in share.items():
    np.testing.assert_array_equal(np.asarray(x)[mine], whole[name][mine])


def test_what_is_fetched_is_whole(mesh_of):
  tree = {'w': np.arange(32.0).reshape(4, 8), 'host': np.ones(2)}
  placed = sharding.place(
    tree, {'w': ('embed', 'mlp'), 'host': (None,)}, mesh_of(1, 4, 2)
  )
  found = sharding.fetch({**placed, 'none': None, 'own': np.ones(2)})
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found))
  jax.tree.map(np.testing.assert_array_equal, {n: found[n] for n in tree}, tree)
  assert not jax.tree.leaves(sharding.fetch(placed, keep=False))


def test_operands_are_split_where_they_divide(mesh_of):
  assert sharding.split(8, 6, 'vocab') is None  # no mesh is in use
  with sharding.using(mesh_of(2, 2, 2)):
    assert sharding.split(8, 6, 'vocab')[1:] == (sharding.ROWS, 'tensor', None, None)
    assert sharding.split(6, 6, 'kv_heads')[1:] == ((), 'tensor', None, None)
    assert sharding.split(8, 5, 'vocab')[1:] == (sharding.ROWS, None, None, None)
    assert sharding.split(3, 5, 'vocab')[1:] == ((), None, None, None)


def test_where_the_axes_are_a_kernel_s_own_nothing_is_split_again(mesh_of):
  """Inside of a shard_map a device sees its part alone, and constrains nothing."""
  mesh, found = mesh_of(2, 2, 2), []

  def part(x):
    found.append(sharding.split(len(x), 6, 'vocab'))
    return sharding.by_row(x)

  x = jnp.arange(16.0).reshape(16, 1)
  with sharding.using(mesh):
    run = jax.shard_map(
      part, mesh=mesh, in_specs=sharding.BATCH, out_specs=sharding.BATCH
    )
    np.testing.assert_array_equal(jax.jit(run)(x), x)
  assert found == [None]


def test_the_mesh_of_params_is_found(mesh_of):
  mesh = mesh_of(2, 4)
  placed = sharding.place({'w': np.ones((4, 4))}, {'w': ('embed', None)}, mesh)
  with sharding.using_that_of(placed):
    assert sharding.split(8, 5, 'vocab')[1:] == (sharding.ROWS, None, None, None)
  for elsewhere in ({'w': np.ones(3)}, {'w': jnp.ones(3)}):
    with sharding.using_that_of(elsewhere):
      assert sharding.split(8, 5, 'vocab') is None


def test_the_rest_goes_everywhere_and_the_placed_stays(mesh_of):
  mesh = mesh_of(2, 4)
  split = sharding.place({'w': np.ones((4, 4))}, {'w': ('embed', None)}, mesh)['w']
  tree = sharding.replicate_rest({'w': split, 'step': jnp.int32(3)}, mesh)
  assert tree['w'] is split
  assert tree['step'].sharding.is_fully_replicated
  assert len(tree['step'].sharding.device_set) == 8


def test_a_device_holds_the_activations_of_its_own_rows(mesh_of):
  """The weights' width lies over fsdp; in use they are gathered, not the rows."""
  mesh = mesh_of(1, 8)
  model = policy.build(dataclasses.replace(presets.debug, dim=64))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    shapes,
    sharding.shardings(shapes, model.axes, mesh),
  )
  rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
  tokens = jax.ShapeDtypeStruct((16, 128), jnp.int32, sharding=rows)

  def compiled(in_use):
    def total(params, tokens):
      if not in_use:
        return model.hidden(params, tokens)[0].sum()
      with sharding.using(mesh):
        return model.hidden(params, tokens)[0].sum()

    return jax.jit(jax.grad(total)).lower(params, tokens).compile()

  # The shape of what is projected, were it of all rows.
  everyone = re.compile(rf'\[{16 * 128},\d\d+\]')
  with_mesh, without = compiled(True), compiled(False)
  assert everyone.search(without.as_text())  # or this test tells nothing
  assert not everyone.search(with_mesh.as_text())
  held, much = (x.memory_analysis().temp_size_in_bytes for x in (with_mesh, without))
  assert held < much / 2


def test_weights_over_tensor_stay_so_and_those_over_fsdp_are_whole(mesh_of):
  mesh = mesh_of(1, 2, 2)
  params = sharding.place(
    {'w': np.ones((4, 4), np.float32)}, {'w': ('embed', 'mlp')}, mesh
  )
  found = sharding.whole_over('fsdp', params)
  assert found['w'].sharding.spec == P(None, 'tensor')


def test_processes_with_the_same_rows_are_one_part(mesh_of, monkeypatch):
  """Four hosts of two devices, of which two have the same rows."""
  rows = {0: [0], 1: [0], 2: [1], 3: [1]}
  monkeypatch.setattr(
    sharding, 'process_rows', lambda mesh, count, process: np.array(rows[process])
  )
  devices = [types.SimpleNamespace(process_index=i // 2) for i in range(8)]
  mesh = types.SimpleNamespace(shape=mesh_of(2, 1, 4).shape, devices=np.array(devices))
  assert sharding.distinct_row_parts(mesh) == 2


@pytest.mark.usefixtures('chips')
def test_only_copies_lie_on_several_slices():
  described = topologies.get_topology_desc(
    platform='tpu', topology_name='v5e:2x2', num_slices=2
  )
  mesh = sharding.mesh_over(described.devices, data=2, fsdp=4)
  rows = [{d.slice_index for d in row.flat} for row in mesh.devices]
  assert sorted(map(list, rows)) == [[0], [1]]
  with pytest.raises(ValueError, match=r'2 slices of TPUs .* data a multiple of 2'):
    sharding.mesh_over(described.devices, fsdp=8)


def test_processes_that_have_not_met_make_no_mesh(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  with pytest.raises(
    ValueError, match=r'^4 processes are here, which have not met: add --multihost$'
  ):
    sharding.make_mesh()
  monkeypatch.setattr(sharding.hosts, 'count', lambda: 4)
  assert sharding.make_mesh().size == 8


def test_what_is_made_on_the_host_goes_nowhere_else(monkeypatch):
  """Another device stands for the host; what is used elsewhere goes there."""
  apart = jax.devices()[5]
  monkeypatch.setattr(sharding, 'host', lambda: apart)
  with sharding.on_host():
    made = jax.jit(lambda key: jax.random.normal(key, (4, 8)))(jax.random.key(0))
  assert made.devices() == {apart}
  assert (made + 1).devices() == {jax.devices()[0]}
  assert jnp.zeros(2).devices() == {jax.devices()[0]}
  np.testing.assert_array_equal(made, jax.random.normal(jax.random.key(0), (4, 8)))


def test_a_jax_that_leaves_out_the_host_is_one_line(monkeypatch):
  def absent(**_):
    raise RuntimeError("Unknown backend: 'cpu' requested")

  assert sharding.host() == jax.devices()[0]
  monkeypatch.setattr(jax, 'local_devices', absent)
  with (
    pytest.raises(ValueError, match=r'leaves out the host.*; set JAX_PLATFORMS=.*,cpu'),
    sharding.on_host(),
  ):
    pass
