"""What is saved comes back bitwise; what is broken is named; the last good one stays."""

import dataclasses
import pathlib
import re
import shutil
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe import sharding
from educe.models import lora, policy, presets, value_head
from educe.training import checkpoint, optimizer
from educe.training.checkpoint import CheckpointError
from educe.training.step import init_state

ROOT = pathlib.Path(__file__).parents[2]
TX = optimizer.make(10, learning_rate=0.1)


def state_of(width=3, step=0, seed=0, dtype=jnp.float32):
  key = jax.random.key(seed)
  params = {
    'embed': jax.random.normal(key, (4, width)).astype(dtype),
    'layers': {'w': jax.random.normal(key, (width, width))},
  }
  return init_state(params, TX, key)._replace(step=jnp.int32(step))


def stream():
  return iter(grain.MapDataset.range(20).shuffle(seed=1).repeat().to_iter_dataset())


def save(folder, *states, keep=2, data=None):
  manager = checkpoint.open_manager(folder, keep=keep)
  for state in states:
    checkpoint.save(manager, state, data or stream(), {'note': 'ü'})
  checkpoint.wait(manager)
  manager.close()


def restore(folder, like=None, data=None):
  manager = checkpoint.open_manager(folder)
  return checkpoint.restore(manager, like or state_of(seed=9), data or stream())


def same(a, b):
  a, b = (s._replace(key=jax.random.key_data(s.key)) for s in (a, b))
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_state_and_data_come_back_bitwise(tmp_path, dtype):
  data = stream()
  for _ in range(23):  # past the end of an epoch of 20
    next(data)
  state = state_of(step=5, dtype=dtype)
  save(tmp_path, state, data=data)
  want = [next(data) for _ in range(20)]
  again = stream()
  got = restore(tmp_path, state_of(seed=9, dtype=dtype), again)
  same(got, state)
  assert [next(again) for _ in range(20)] == want


def test_nothing_saved_is_none(tmp_path):
  assert restore(tmp_path) is None


def test_the_newest_keep_stay(tmp_path):
  save(tmp_path, *(state_of(step=i) for i in (1, 2, 3, 4)), keep=2)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['3', '4']
  assert restore(tmp_path).step == 4
  with pytest.raises(ValueError, match='keep=0'):
    checkpoint.open_manager(tmp_path, keep=0)


def test_saving_a_step_twice_is_saving_it_once(tmp_path):
  save(tmp_path, state_of(step=1), state_of(step=1, seed=5))
  same(restore(tmp_path), state_of(step=1))


def test_a_checkpoint_of_another_model_names_the_param(tmp_path):
  save(tmp_path, state_of(width=3, step=1))
  with pytest.raises(CheckpointError, match=r'another model: .*embed is \(4, 3\) there '
                     r'and \(4, 5\) here'):  # fmt: skip
    restore(tmp_path, state_of(width=5))
  other = state_of()
  other.params['head'] = jnp.ones(2)
  with pytest.raises(CheckpointError, match=r'head is absent there and \(2,\) here'):
    restore(tmp_path, init_state(other.params, TX, other.key))


@pytest.mark.parametrize(
  ('before', 'now', 'told'),
  [
    ({}, None, 'it was trained with config.adapter; this config has none'),
    (None, {}, 'it was trained without config.adapter; this config has one'),
    ({'rank': 2}, {'rank': 4}, 'with config.adapter.rank=2; this config has rank=4'),
    (
      {'kind': 'dora'},
      {},
      "with config.adapter.kind='dora'; this config has kind='lora'",
    ),
    (
      {'targets': ('up', 'key')},
      {'targets': ('up',)},
      "with config.adapter.targets=('key', 'up'); this config has targets=('up',)",
    ),
    ({'base': 'nf4'}, {}, "with config.adapter.base='nf4'; this config has base=None"),
    (
      {},
      {'base': 'int8'},
      "with config.adapter.base=None; this config has base='int8'",
    ),
    (
      {'base': 'int8'},
      {'base': 'nf4'},
      "with config.adapter.base='int8'; this config has base='nf4'",
    ),
  ],
)
def test_a_checkpoint_of_another_adapter_says_which_before_its_tensors(
  tmp_path, before, now, told
):
  model = policy.build(presets.debug)
  plain = model.init(jax.random.key(0))

  def state(adapter):
    params = plain
    if adapter is not None:
      params = lora.attach(model, plain, **{'rank': 2, **adapter})[1]
    return init_state(params, TX, jax.random.key(0))._replace(step=jnp.int32(1))

  save(tmp_path, state(before))
  with pytest.raises(CheckpointError) as found:
    restore(tmp_path, state(now))
  text = str(found.value)
  assert 'belongs to another model: it was trained with' in text
  assert f'{told} (params/' in text
  assert text.endswith('here); use its own config, or another --run_dir')


def test_an_adapter_that_weighs_more_is_another(tmp_path):
  model = policy.build(presets.debug)
  plain = model.init(jax.random.key(0))

  def state(alpha):
    params = lora.attach(model, plain, rank=2, alpha=alpha)[1]
    return init_state(params, TX, jax.random.key(0))._replace(step=jnp.int32(1))

  save(tmp_path, state(8.0))
  assert restore(tmp_path, state(8.0)) is not None
  with pytest.raises(CheckpointError, match=r'alpha/rank = 4; this config says 8: '):
    restore(tmp_path, state(16.0))


def test_an_adapter_that_is_the_same_says_nothing_of_another_model(tmp_path):
  def state(width):
    model = policy.build(dataclasses.replace(presets.debug, dim=width))
    params = lora.attach(model, model.init(jax.random.key(0)), rank=2)[1]
    return init_state(params, TX, jax.random.key(0))._replace(step=jnp.int32(1))

  save(tmp_path, state(32))
  with pytest.raises(CheckpointError, match='another model: params/adapter/layers/'):
    restore(tmp_path, state(64))


def test_a_checkpoint_of_another_optimizer_is_named(tmp_path):
  save(tmp_path, state_of(step=1))
  sgd = optimizer.make(10, name='sgd', learning_rate=0.1)
  with pytest.raises(
    CheckpointError, match=r'another optimizer: opt_state/.*absent here'
  ):
    restore(tmp_path, init_state(state_of().params, sgd, jax.random.key(0)))


KILLED = """
import os, pathlib, sys
sys.path.insert(0, {tests!r})
import test_checkpoint as t
from educe.training import checkpoint
folder = pathlib.Path({folder!r})
t.save(folder, t.state_of(step=1))
manager = checkpoint.open_manager(folder)
checkpoint.save(manager, t.state_of(width=3000, step=2), t.stream(), {{}})
os.kill(os.getpid(), 9)
"""


def test_a_checkpoint_that_was_not_finished_is_never_read(tmp_path):
  """A process dies while 100 MB are on their way to the disk."""
  program = KILLED.format(
    tests=str(pathlib.Path(__file__).parent), folder=str(tmp_path)
  )
  done = subprocess.run([sys.executable, '-c', program], timeout=120, check=False)
  assert done.returncode == -9
  assert any(p.name.startswith('2') for p in tmp_path.iterdir())  # it had begun
  same(restore(tmp_path), state_of(step=1))


# Orbax abandons coroutines of the read that failed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_damaged_checkpoint_is_named_with_the_one_to_go_back_to(tmp_path):
  save(tmp_path, state_of(step=1), state_of(step=2))
  for file in (tmp_path / '2' / 'state').rglob('*'):
    if file.is_file() and file.parent.name == 'd':
      file.write_bytes(file.read_bytes()[:7])
  with pytest.raises(CheckpointError, match=r'2 is damaged; move it away to resume '
                     r'from step 1'):  # fmt: skip
    restore(tmp_path)
  shutil.move(tmp_path / '2', tmp_path.parent / 'away')
  assert restore(tmp_path).step == 1


FULL = """
import resource, sys
from educe import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_disk_that_fills_up_is_one_line_and_leaves_the_last_good_one(
  tmp_path, one_device
):
  """The process may write no file over 50 kB: to the writer, a full disk."""
  folder = tmp_path / 'run'
  train = ['train', '--config=configs/sft.py:demo,debug', f'--run_dir={folder}']

  def run(program, steps):
    argv = [sys.executable, '-c', program, *train, f'--config.steps={steps}']
    environment = {
      **one_device,
      'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
      # What may write no large file only reads what was compiled.
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1e9' if program == FULL else '0',
    }
    return subprocess.run(
      argv, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment
    )

  assert run(FULL.replace('50_000', '2**30'), steps=2).returncode == 0
  done = run(FULL, steps=12)
  assert done.returncode == 1
  assert 'Traceback' not in done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert re.match(
    r'educe: checkpoint 4 could not be written .* step 2 is intact$', last
  )
  assert done.stderr.count('educe: ') == 1
  manager = checkpoint.open_manager(folder / 'checkpoints')
  assert manager.latest_step() == 2
  manager.close()
  assert run(FULL.replace('50_000', '2**30'), steps=4).returncode == 0


ORPHANS = """
import asyncio, gc, sys
from educe.training import checkpoint

async def write():
  raise OSError('no space')

async def stuck():
  await asyncio.Future()

class Stubborn:
  def __await__(self):
    try:
      yield
    except GeneratorExit:
      yield  # what is no end: an exception that nobody can catch

async def stubborn():
  await Stubborn()

async def nobody_waits():
  asyncio.gather(write(), write())
  await asyncio.sleep(0.01)
  asyncio.get_running_loop().create_task(stuck())
  write()
  stubborn().send(None)
  gc.collect()

if sys.argv[1:]:
  checkpoint.quiet()
loop = asyncio.new_event_loop()
loop.run_until_complete(nobody_waits())
loop.close()
del loop
gc.collect()
"""


def test_writes_nobody_waits_for_print_nothing():
  """What asyncio says of them hangs on the garbage collector: here it says it all."""

  def stderr(*argv):
    argv = [sys.executable, '-c', ORPHANS, *argv]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stderr

  loud = stderr()
  for said in (
    'exception was never retrieved',
    'was never awaited',
    'was destroyed but it is pending',
    'ignored GeneratorExit',
  ):
    assert said in loud, said
  assert stderr('quiet') == ''


def test_params_alone_come_back_for_sampling(tmp_path):
  state = state_of(step=3)
  save(tmp_path, state)
  like = state_of(seed=7).params
  got = checkpoint.saved_params(tmp_path, like)
  jax.tree.map(np.testing.assert_array_equal, got, state.params)
  save(tmp_path, state_of(step=4, seed=4))
  older = checkpoint.saved_params(tmp_path, like, step=3)
  jax.tree.map(np.testing.assert_array_equal, older, state.params)
  with pytest.raises(CheckpointError, match='no finished checkpoint of step 5'):
    checkpoint.saved_params(tmp_path, like, step=5)
  with pytest.raises(CheckpointError, match='no finished checkpoint'):
    checkpoint.saved_params(tmp_path / 'empty', like)
  with pytest.raises(CheckpointError, match='another model'):
    checkpoint.saved_params(tmp_path, state_of(width=5).params)


def test_a_checkpoint_moves_from_mesh_to_mesh(tmp_path, mesh_of):
  """Split eight ways, then in two by two by two, then not at all: always the same bits."""
  axes = {'embed': ('vocab', 'embed'), 'layers': {'w': ('embed', 'mlp')}}

  def on(mesh, seed):
    placed = sharding.place(state_of(width=8, seed=seed).params, axes, mesh)
    state = init_state(placed, TX, jax.random.key(seed))
    return sharding.replicate_rest(state, mesh)

  first = on(mesh_of(1, 8), 0)._replace(step=jnp.int32(1))
  first = sharding.replicate_rest(first, mesh_of(1, 8))
  data = stream()
  save(tmp_path / '0', first, data=data)
  for place, sizes in enumerate([(8, 1, 1), (2, 2, 2), (1, 1, 1)]):
    like = on(mesh_of(*sizes), 9)
    got = restore(tmp_path / str(place), like, stream())
    where = (jax.tree.map(lambda x: x.sharding, s.params) for s in (got, like))
    assert next(where) == next(where)
    same(jax.device_get(got), jax.device_get(first))
    save(tmp_path / str(place + 1), got)


def critic(trunk, model=None):
  """(Model, params) with a value head that is not zero."""
  model = model or policy.build(presets.get('debug'))
  params = model.init(jax.random.key(1))
  return value_head.attach(model, params, trunk=trunk, init_std=1.0)


@pytest.mark.parametrize('trunk', ['shared', 'separate'])
def test_a_run_with_a_value_head_comes_back_whole_or_as_its_policy(tmp_path, trunk):
  _, params = critic(trunk)
  kept = jax.tree.map(np.array, params)
  save(tmp_path, init_state(params, TX, jax.random.key(0)))
  plain = policy.build(presets.get('debug'))
  like = plain.init(jax.random.key(2))
  alone = checkpoint.saved_params(tmp_path, like)
  jax.tree.map(np.testing.assert_array_equal, alone, value_head.without(kept))
  model, whole = checkpoint.saved_with_value(tmp_path, plain, like)
  jax.tree.map(np.testing.assert_array_equal, whole, kept)
  tokens = jnp.arange(12).reshape(2, 6)
  states, _ = model.hidden(whole, tokens)
  assert np.std(model.values(whole, states, tokens)[0]) > 0
  resumed = restore(tmp_path, init_state(critic(trunk)[1], TX, jax.random.key(9)))
  jax.tree.map(np.testing.assert_array_equal, resumed.params, kept)


def test_a_value_head_that_is_not_there_is_named(tmp_path):
  plain = policy.build(presets.get('debug'))
  params = plain.init(jax.random.key(0))
  save(tmp_path, init_state(params, TX, jax.random.key(0)))
  with pytest.raises(CheckpointError, match='a run without a value head; name one'):
    checkpoint.saved_with_value(tmp_path, plain, params)
  shared = critic('shared')[1]
  with pytest.raises(CheckpointError, match='params/value/head/bias is absent there'):
    checkpoint.saved_params(tmp_path, shared)
  with pytest.raises(CheckpointError, match='params/value/head/bias is absent there'):
    restore(tmp_path, init_state(shared, TX, jax.random.key(0)))
