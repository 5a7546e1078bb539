"""The TPU kernels, compiled for real chips by libtpu; no TPU is there or needed.

At the sizes that they are for: 16,384 tokens, width 4,096, Llama 3's vocabulary, bfloat16;
GAE of 256 rows of 2,048 tokens.
"""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from educe.kernels.advantage import pallas as advantage_pallas
from educe.kernels.logprob import pallas_tpu
from educe.types import Split

if importlib.util.find_spec('libtpu') is None:
  pytest.skip(
    'libtpu is not installed (pip install -e .[dev])', allow_module_level=True
  )

N, D, V = 16384, 4096, 128256
LOGITS = N * V * 4  # bytes
CHIPS = {'v4': '2x2x1', 'v5e': '2x2', 'v5p': '2x2x1', 'v6e': '2x2', 'tpu7x': '2x2x1'}


def devices(name: str):
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  # Or a second test process would abort on the first one's lock.
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  topology = f'{name}:{CHIPS.get(name, name)}'
  return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices


WHOLE = P()


def operands(mesh, rows=WHOLE, head=WHOLE):
  def like(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  return (
    like((N, D), jnp.bfloat16, P(*rows, None)),
    like((D, V), jnp.bfloat16, head),
    like((N,), jnp.int32, rows),
  )


def total(hidden, head, targets, **how):
  scores = pallas_tpu.logprob(hidden, head, targets, interpret=False, **how)
  return scores.logp.sum() + 0.01 * scores.entropy.sum()


@pytest.mark.parametrize('chip', CHIPS)
@pytest.mark.parametrize('way', ['forward', 'backward'])
def test_one_chip(chip, way):
  device = devices(chip)[0]
  mesh = Mesh(np.array([device]), ('x',), axis_types=(AxisType.Auto,))
  tiles = pallas_tpu.CHIPS[device.device_kind]
  run = functools.partial(total, tiles=tiles)
  function = run if way == 'forward' else jax.grad(run, (0, 1))
  compiled = jax.jit(function).lower(*operands(mesh)).compile()
  assert 'logprob_moments' in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < LOGITS / 20


@pytest.mark.parametrize('chip', ['v5e', 'v5p', 'v6e'])
def test_a_vocabulary_in_parallel(chip):
  mesh = Mesh(
    np.array(devices(chip)).reshape(2, 2),
    ('data', 'tensor'),
    axis_types=(AxisType.Auto,) * 2,
  )
  split = Split(mesh, ('data',), 'tensor')
  tiles = pallas_tpu.CHIPS[devices(chip)[0].device_kind]
  run = functools.partial(total, tiles=tiles, split=split)
  args = operands(mesh, P('data'), P(None, 'tensor'))
  compiled = jax.jit(jax.value_and_grad(run, (0, 1))).lower(*args).compile()
  text = compiled.as_text()
  assert 'all-reduce' in text
  assert 'logprob_d_head' in text
  # Of one chip: a quarter of the logits, and its half of dW before that is rounded.
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  assert temporaries < LOGITS / 4 / 20 + D * V // 2 * 4


@pytest.mark.parametrize('given', [3, 5], ids=['no more', 'bootstrap and segments'])
@pytest.mark.parametrize('chip', CHIPS)
def test_gae_is_one_kernel(chip, given):
  mesh = Mesh(np.array([devices(chip)[0]]), ('x',), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, WHOLE)
  arrays = [
    jax.ShapeDtypeStruct((256, 2048), dtype, sharding=sharding)
    for dtype in [jnp.float32] * 4 + [jnp.int32]
  ]
  run = functools.partial(advantage_pallas.gae, gamma=0.99, lam=0.95, interpret=False)
  compiled = jax.jit(run).lower(*arrays[:given]).compile()
  text = compiled.as_text()
  assert text.count('tpu_custom_call') == 1
  assert 'while(' not in text
  assert compiled.memory_analysis().temp_size_in_bytes == 0
