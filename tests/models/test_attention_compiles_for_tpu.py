"""Splash attention, alone and in a decoder, compiled for real chips by libtpu."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from educe.models import attention, policy
from educe.models.architecture import Architecture
from educe.sharding import mesh_over

B, T, H, K, h = 2, 4096, 8, 4, 64  # h: half of a chip's 128 lanes, as in SmolLM2
# A decoder compiles in half the time; kernels are the same.
LIGHTLY = {'exec_time_optimization_effort': -1.0}
SCORES = B * H * T * T * 4  # bytes


def like(mesh, dtype, shape, *spec):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def check(program, scores):
  text = program.as_text()
  assert 'tpu_custom_call' in text
  for way in ('fwd', 'dq', 'dkv'):
    assert f'splash_mha_{way}' in text, way
  assert f'{T},{T}]' not in text
  assert program.memory_analysis().temp_size_in_bytes < scores / 4
  return text


@pytest.mark.parametrize(
  ('topology', 'fork'),
  [('v4:2x2x1', False), ('v5e:2x2', True), ('v5p:2x2x1', False), ('v6e:2x2', False)],
)
def test_scores_stay_on_the_chip(chips, topology, fork):
  mesh = mesh_over(chips(topology)[:1])
  q, k = ((B, T, H, h), (B, K, T, h))
  args = [like(mesh, jnp.bfloat16, shape) for shape in (q, k, k)]
  segments = like(mesh, jnp.int32, (B, T))

  def total(q, k, v, segments):
    visible = attention.Causal(segments)
    if fork:
      visible = attention.Fork(segments[:, : T // 4] > 0, T // 4)
    mixed = attention.attend(q, k, v, visible, 'splash')
    return mixed.astype(jnp.float32).sum()

  with jax.set_mesh(mesh):
    check(jax.jit(jax.grad(total, (0, 1, 2))).lower(*args, segments).compile(), SCORES)


def test_a_decoder_s_rows_and_heads_over_four_chips(chips):
  mesh = mesh_over(chips('v5e:2x2'), data=2, tensor=2)
  architecture = Architecture(
    vocab_size=512,
    dim=128,
    layers=1,
    heads=H,
    kv_heads=K,
    head_dim=h,
    ffn=256,
    max_length=T,
    compute_dtype='bfloat16',
    attention='splash',
  )
  model = policy.build(architecture)

  @jax.jit
  @jax.value_and_grad
  def total(params, tokens, segments):
    states, _ = model.hidden(params, tokens, segments=segments)
    return states.astype(jnp.float32).sum()

  params = jax.tree.map(
    lambda x: like(mesh, x.dtype, x.shape), policy.shapes(architecture)
  )
  batch = [like(mesh, jnp.int32, (B, T), 'data')] * 2
  with jax.set_mesh(mesh):
    program = total.lower(params, *batch).compile(LIGHTLY)
  # Of one chip: half of the rows, half of the heads.
  assert f'bf16[{B // 2},{H // 2},{T},{h}]' in check(program, SCORES / 4)
