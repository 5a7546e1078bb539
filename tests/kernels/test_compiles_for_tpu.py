"""The TPU kernels, compiled for real chips by libtpu; no TPU is there or needed.

At the sizes that they are for: 16,384 tokens, width 4,096, Llama 3's vocabulary, bfloat16;
GAE of 256 rows of 2,048 tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from educe.kernels.advantage import pallas as advantage_pallas
from educe.kernels.logprob import pallas_tpu
from educe.types import Split

N, D, V = 16384, 4096, 128256
LOGITS = N * V * 4  # bytes
TOPOLOGIES = ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1']


WHOLE = P()


def operands(mesh, rows=WHOLE, head=WHOLE, N=N, D=D):
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


@pytest.mark.parametrize('topology', TOPOLOGIES)
@pytest.mark.parametrize('way', ['forward', 'backward'])
def test_one_chip(chips, topology, way):
  device = chips(topology)[0]
  mesh = Mesh(np.array([device]), ('x',), axis_types=(AxisType.Auto,))
  tiles = pallas_tpu.CHIPS[device.device_kind]
  run = functools.partial(total, tiles=tiles)
  function = run if way == 'forward' else jax.grad(run, (0, 1))
  compiled = jax.jit(function).lower(*operands(mesh)).compile()
  assert 'logprob_moments' in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < LOGITS / 20


@pytest.mark.parametrize('data', [1, 2], ids=['tensor', 'data and tensor'])
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_a_vocabulary_in_parallel(chips, topology, data):
  devices = chips(topology)
  mesh = Mesh(
    np.array(devices).reshape(data, -1),
    ('data', 'tensor'),
    axis_types=(AxisType.Auto,) * 2,
  )
  rows = ('data',) if data > 1 else ()
  split = Split(mesh, rows, 'tensor')
  tiles = pallas_tpu.CHIPS[devices[0].device_kind]
  run = functools.partial(total, tiles=tiles, split=split)
  hidden, head, targets = operands(mesh, P(rows or None), P(None, 'tensor'))
  # Given a choice, XLA lets arguments of this width lie by columns, and copies them.
  lying = Format(Layout((0, 1)), head.sharding)
  head = jax.ShapeDtypeStruct(head.shape, head.dtype, sharding=lying)
  step = jax.jit(jax.value_and_grad(run, (0, 1)), out_shardings=(None, (None, lying)))
  compiled = step.lower(hidden, head, targets).compile()
  text = compiled.as_text()
  assert 'all-reduce' in text
  assert 'logprob_d_head' in text
  # Where tokens are split as well, dW is added up over them before it is rounded.
  before = D * V // 2 * 4 if rows else 0
  assert compiled.memory_analysis().temp_size_in_bytes < LOGITS / 20 + before


@pytest.mark.parametrize('topology', TOPOLOGIES)
def test_the_width_of_a_large_model_has_room(chips, topology):
  """Of 70B, where dH and dW are float32: they are summed over devices."""
  devices = chips(topology)
  mesh = Mesh(
    np.array(devices).reshape(2, -1),
    ('data', 'tensor'),
    axis_types=(AxisType.Auto,) * 2,
  )
  tiles = pallas_tpu.CHIPS[devices[0].device_kind]
  run = functools.partial(total, tiles=tiles, split=Split(mesh, ('data',), 'tensor'))
  wide = operands(mesh, P('data'), P(None, 'tensor'), N=4096, D=8192)
  text = jax.jit(jax.grad(run, (0, 1))).lower(*wide).compile().as_text()
  assert 'logprob_d_head' in text


@pytest.mark.parametrize('given', [3, 5], ids=['no more', 'bootstrap and segments'])
@pytest.mark.parametrize('topology', TOPOLOGIES)
def test_gae_is_one_kernel(chips, topology, given):
  mesh = Mesh(np.array([chips(topology)[0]]), ('x',), axis_types=(AxisType.Auto,))
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
