"""A step compiled for chips that are not here: laid out as a run lays it, and counted."""

import dataclasses
import math
import os
import pathlib
import types

import jax
import pytest
from jax.sharding import PartitionSpec as P

from educe import sharding
from educe.models import policy, presets
from educe.training import optimizer
from educe.training.step import init_state

HERE = pathlib.Path(__file__).parents[2] / 'benchmarks'
TINY = dataclasses.replace(
  presets.debug, dim=128, head_dim=32, vocab_size=512, compute_dtype='bfloat16'
)


@pytest.fixture(scope='module')
def pods(scripts):
  before = dict(os.environ)
  yield scripts(HERE, 'pods')['pods']
  os.environ.clear()
  os.environ.update(before)


def test_a_state_lies_as_a_run_puts_it(pods, mesh_of):
  """Beside what sharding.place and the optimizer make of real arrays."""
  mesh = mesh_of(1, 4, 2)
  model = policy.build(TINY)
  tx = optimizer.make(10, learning_rate=1e-3)

  def start(params):
    return init_state(params, tx, jax.random.key(0), reference=True)

  shapes = jax.eval_shape(lambda: start(model.init(jax.random.key(0))))
  said = pods.placed(shapes, model.axes, mesh)
  params = sharding.place(model.init(jax.random.key(0)), model.axes, mesh)
  real = sharding.replicate_rest(start(params), mesh)
  split = 0
  for like, array in zip(jax.tree.leaves(said), jax.tree.leaves(real), strict=True):
    assert (like.shape, like.dtype) == (array.shape, array.dtype)
    assert like.sharding.is_equivalent_to(array.sharding, array.ndim)
    split += like.sharding.spec != P()
  # Of every matrix: the param, two moments, and the reference.
  assert split >= 4 * 9


def test_the_floors_are_the_formulas(pods):
  memory = types.SimpleNamespace(
    argument_size_in_bytes=3e9,
    output_size_in_bytes=2e9,
    temp_size_in_bytes=7e9,
    alias_size_in_bytes=2e9,
  )

  def text():
    raise RuntimeError('cannot be printed')

  compiled = types.SimpleNamespace(memory_analysis=lambda: memory, as_text=text)
  device = types.SimpleNamespace(device_kind='TPU v5 lite')
  mesh = types.SimpleNamespace(
    devices=types.SimpleNamespace(flat=[device]),
    size=8,
    shape={'data': 1, 'fsdp': 4, 'tensor': 2},
  )
  said = pods.report(compiled, TINY, mesh, rows=4, length=16)
  assert said['pallas_logprob'] is None
  assert said['peak_mb'] == 10_000  # what is donated is there once
  assert said['fits']
  floors = said['floors_seconds']
  assert floors['memory'] == pytest.approx(19e9 / 819e9)
  assert floors['matmul'] == pytest.approx(said['flops'] / (8 * 197e12))
  held = 4 * policy.count(policy.shapes(TINY)) / 2  # float32, of a tensor shard
  assert floors['exchange'] == pytest.approx(3 * held * 3 / 4 / 200e9)
  assert (said['bound'], said['seconds']) == ('memory', floors['memory'])
  assert said['tokens_per_second'] == pytest.approx(4 * 16 / floors['memory'])
  memory.temp_size_in_bytes = 14e9
  assert not pods.report(compiled, TINY, mesh, rows=4, length=16)['fits']


@pytest.mark.parametrize(('loss', 'logprob'), [('grpo', 'auto'), ('sft', 'pallas_tpu')])
@pytest.mark.usefixtures('chips')
def test_the_real_step_compiles_for_four_chips(pods, loss, logprob):
  mesh = pods.mesh_of('v5e:2x2', fsdp=2, tensor=2)
  architecture = dataclasses.replace(TINY, logprob=logprob)
  compiled = pods.compile_step(architecture, pods.LOSSES[loss], mesh, rows=4, length=33)
  said = pods.report(compiled, TINY, mesh, 4, 33)
  assert said['devices'] == 4
  assert said['fits']
  assert said['pallas_logprob'] == (logprob == 'pallas_tpu')
  # The params and two moments, of which a device has a quarter, or half where an axis
  # has no rule or does not divide.
  state = 3 * 4 * said['params'] / 1e6
  assert state / 4 < said['arguments_mb'] < state / 2
  assert math.isclose(said['results_mb'], said['arguments_mb'], rel_tol=0.05)
  text = compiled.as_text()
  assert 'all-gather' in text
  assert 'all-reduce' in text


def test_what_does_not_divide_is_refused(pods, mesh_of):
  with pytest.raises(ValueError, match='does not divide'):
    pods.compile_step(TINY, pods.LOSSES['sft'], mesh_of(1, 4, 2), rows=6, length=8)
