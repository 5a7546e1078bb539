"""What a mesh cannot divide is refused in a line, or said."""

import types

import jax
import numpy as np
import pytest

from educe import mesh_checks, sharding


def test_a_batch_that_does_not_divide_says_what_would(mesh_of):
  mesh_checks.check_batch(16, 2, mesh_of(2, 4))
  with pytest.raises(
    ValueError, match=r'^config\.data\.batch_size: a batch of 12 .* a multiple of 16$'
  ):
    mesh_checks.check_batch(12, 2, mesh_of(2, 4))
  with pytest.raises(ValueError, match=r'^config\.x: a batch of 12 rows'):
    mesh_checks.check_batch(12, 2, mesh_of(2, 4), name='config.x')


def test_rows_that_belong_together_stay_together(mesh_of):
  mesh = mesh_of(2, 4)
  mesh_checks.check_batch(16, 1, mesh, group=2)
  with pytest.raises(ValueError, match=r'8 rows in groups of 2 .* multiple of 16'):
    mesh_checks.check_batch(8, 1, mesh, group=2)
  with pytest.raises(ValueError, match='multiple of 32'):
    mesh_checks.check_batch(16, 2, mesh, group=2)


def test_a_loss_that_compares_all_rows_is_not_cut(mesh_of):
  mesh_checks.check_batch(16, 1, mesh_of(2, 4), couples=True)
  with pytest.raises(ValueError, match='microbatches=2: the loss compares rows'):
    mesh_checks.check_batch(16, 2, mesh_of(2, 4), couples=True)


def test_an_axis_that_splits_no_param_is_refused(mesh_of):
  axes = {'w': ('embed', 'mlp')}

  def check(shape, **sizes):
    mesh = mesh_of(**sizes)
    mesh_checks.check_params(sharding.place({'w': np.ones(shape)}, axes, mesh), mesh)

  check((4, 4), fsdp=2, tensor=2)
  check((4, 4), data=2, context=2)
  with pytest.raises(ValueError, match=r'config\.mesh\.expert=2 splits no param'):
    check((4, 4), expert=2, tensor=2)
  with pytest.raises(ValueError, match=r'config\.mesh\.tensor=2 splits no param'):
    check((4, 3), fsdp=2, tensor=2)


def test_what_an_axis_does_not_divide_is_told_once_for_all_params(mesh_of):
  axes = {
    'q': ('embed', 'heads', None),
    'k': ('embed', 'kv_heads'),
    'up': ('embed', 'mlp'),
  }
  shapes = {'q': (6, 6, 3), 'k': (6, 2), 'up': (6, 8)}
  params = {name: np.ones(shape) for name, shape in shapes.items()}

  def told(params=params, **sizes):
    return mesh_checks.left_whole(params, axes, mesh_of(**sizes))

  assert told(data=8) == told(fsdp=2, tensor=2) == ''
  assert told(tensor=4) == (
    'config.mesh.tensor=4 does not divide heads (6), kv_heads (2): those stay whole '
    'along it'
  )
  assert told(fsdp=4, tensor=2) == (
    'config.mesh.fsdp=4 does not divide embed (6): those stay whole along it'
  )
  assert told({**params, 'up': np.ones((5, 7))}, fsdp=4, tensor=2) == (
    'config.mesh.fsdp=4 does not divide embed (5, 6): those stay whole along it; '
    'config.mesh.tensor=2 does not divide mlp (7): those stay whole along it'
  )


@pytest.mark.parametrize('kinds', [['device'], ['device', 'pinned_host']])
def test_offload_needs_memory_that_devices_can_use(monkeypatch, kinds):
  memories = [types.SimpleNamespace(kind=kind) for kind in kinds]
  device = types.SimpleNamespace(
    device_kind='a chip', addressable_memories=lambda: memories
  )
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  if sharding.HOST in kinds:
    return mesh_checks.check_host()
  with pytest.raises(
    ValueError, match=r'offload: a chip has no memory of kind pinned_h'
  ):
    mesh_checks.check_host()
