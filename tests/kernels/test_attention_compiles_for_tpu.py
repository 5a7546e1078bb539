"""A decoder whose attention is splash, compiled for real chips by libtpu."""

import dataclasses
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from educe.models import policy
from educe.models.transformer import Architecture

if importlib.util.find_spec('libtpu') is None:
  pytest.skip(
    'libtpu is not installed (pip install -e .[tpu])', allow_module_level=True
  )

B, T, H = 8, 2048, 8
ARCHITECTURE = Architecture(
  vocab_size=512,
  dim=256,
  layers=2,
  heads=H,
  kv_heads=2,
  head_dim=64,  # narrower than a chip's 128 lanes, as in SmolLM2
  ffn=512,
  max_length=T,
  compute_dtype='bfloat16',
  remat='full',
)


def total(model):
  def loss(params, tokens, segments=None, prefix=None):
    states, _ = model.hidden(params, tokens, segments=segments, prefix=prefix)
    return states.astype(jnp.float32).sum()

  return jax.value_and_grad(loss)


def compiled(chip, shape, attention='splash', **batch):
  """The program of a loss and its gradient, its batch over 'data'."""
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  topology = topologies.get_topology_desc(platform='tpu', topology_name=chip)
  mesh = Mesh(
    np.array(topology.devices[: np.prod(shape)]).reshape(shape),
    ('data', 'fsdp', 'tensor'),
    axis_types=(AxisType.Auto,) * 3,
  )
  architecture = dataclasses.replace(ARCHITECTURE, attention=attention)

  def like(x, spec):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  params = jax.tree.map(lambda x: like(x, P()), policy.shapes(architecture))
  batch = {
    name: like(jax.ShapeDtypeStruct(shape, jnp.int32), P('data'))
    for name, shape in batch.items()
  }
  with jax.set_mesh(mesh):
    return jax.jit(total(policy.build(architecture))).lower(params, **batch).compile()


def kernels(program):
  text = program.as_text()
  assert 'tpu_custom_call' in text
  return {way for way in ('fwd', 'dq', 'dkv') if f'splash_mha_{way}' in text}


@pytest.mark.parametrize('chip', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_a_packed_row_s_scores_stay_on_the_chip(chip):
  program = compiled(chip, (1, 1, 1), tokens=(B, T), segments=(B, T))
  assert kernels(program) == {'fwd', 'dq', 'dkv'}
  scores = B * H * T * T * 4
  assert program.memory_analysis().temp_size_in_bytes < scores / 4
  assert f'{T},{T}]' not in program.as_text()


def test_on_four_chips_heads_and_rows_are_split():
  program = compiled('v5e:2x2', (2, 1, 2), tokens=(B, T), segments=(B, T))
  assert kernels(program) == {'fwd', 'dq', 'dkv'}
  # Of one chip: half of the rows, half of the heads.
  assert f'bf16[{B // 2},{H // 2},{T},64]' in program.as_text()


def test_a_fork():
  program = compiled('v5e:2x2', (1, 1, 1), tokens=(B, 512), prefix=(2, 1024))
  assert kernels(program) == {'fwd', 'dq', 'dkv'}
