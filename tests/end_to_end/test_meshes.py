"""The config of one device on meshes of eight: the same losses, params and rollouts.

Whole runs, from the config to the checkpoint: pipelines, sampler, judge, the scoring passes
of policy, reference and critic, the update. SGD, whose step is linear in the gradient:
Adam's first steps are its sign, and a gradient that rounds to the other side of 0 moves a
param by twice the learning rate.
"""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from educe import cli, sharding
from educe.models import value_head
from educe.training import checkpoint, metrics

pytestmark = pytest.mark.usefixtures('no_pictures')
CONFIG = """
import dataclasses
import jax
import ml_collections
from educe.environments import reward_functions
from educe.models import policy, presets

def load(*, seed: int = 0):  # every logical axis divides by eight
  model = policy.build(dataclasses.replace(
    presets.chain, heads=8, kv_heads=8, head_dim=8, layers=2, tied=False))
  return model, model.init(jax.random.key(seed))

def letters(prompt, completion, record):
  return completion.count('a') - 0.3 * completion.count(prompt[0])

def world():
  prompts = [{'prompt': f + s + '=', 'id': f + s} for f in '012345' for s in 'abcd']
  return reward_functions.make(prompts=prompts, functions=letters)

RECORDS = [
  {'prompt': f'{i}{c}=', 'chosen': 'a' * n + 'b', 'rejected': 'c' * n + 'd'}
  for i in range(6) for c in 'abcd' for n in (1, 2, 3)
]
SAMPLE = dict(prompts=4, group=4, max_new_tokens=5, batch_size=10, workers=0)
WORLD = dict(environment=dict(name='tiny_world:world'), rollouts=SAMPLE)
PARTS = dict(
  sft=dict(
    source=dict(name='memory', records=[
      {'prompt': r['prompt'], 'completion': r['chosen']} for r in RECORDS]),
    data=dict(batch_size=16, max_length=8), algorithm=dict(name='sft'),
    loss=dict(name='sft'),
  ),
  dpo=dict(
    source=dict(name='memory', records=RECORDS),
    data=dict(records='pairs', batch_size=8, max_length=8), algorithm=dict(name='dpo'),
    loss=dict(name='dpo'),
  ),
  grpo=dict(
    **WORLD, advantage=dict(name='group_relative'),
    algorithm=dict(name='grpo', minibatches=2, reference_every=2),
    loss=dict(name='grpo', kl_coef=0.1),
  ),
  ppo=dict(
    **WORLD, value=dict(trunk='separate', init_std=0.1),
    algorithm=dict(name='ppo', epochs=2), loss=dict(name='ppo'),
  ),
)

def get_config(name):
  return ml_collections.ConfigDict(dict(
    steps=3, seed=1, save_every=100, microbatches=2 if name == 'sft' else 1,
    model=dict(name='tiny_world:load'),
    tokenizer=dict(path='characters:012345abcdefgh='),
    optimizer=dict(
      name='sgd', learning_rate=0.3, schedule='constant', clip_norm=None),
    mesh=dict(data=1), **PARTS[name],
  ))
"""
MESHES = {
  'data': dict(data=8),
  'fsdp': dict(fsdp=8),
  'all': dict(data=2, fsdp=2, tensor=2),
  'tensor': dict(tensor=8),
}


@pytest.fixture(scope='module')
def go(tmp_path_factory):
  """`go(algorithm, **mesh)`: the folder of its run on the first devices."""
  folder = tmp_path_factory.mktemp('meshes')
  (folder / 'tiny_world.py').write_text(CONFIG)
  made: dict[str, pathlib.Path] = {}
  patch = pytest.MonkeyPatch()
  patch.syspath_prepend(folder)

  def first(*, data=1, fsdp=1, expert=1, context=1, tensor=1):
    sizes = dict(data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
    return sharding.mesh_over(jax.devices()[: math.prod(sizes.values())], **sizes)

  patch.setattr(sharding, 'make_mesh', first)

  def run(name, *more, **mesh):
    to = folder / f'{name}{mesh}{more}'
    if str(to) not in made:
      sizes = {'data': 1} | mesh
      flags = [*(f'--config.mesh.{axis}={n}' for axis, n in sizes.items()), *more]
      config = f'--config={folder / "tiny_world.py"}:{name}'
      assert cli.main(['train', config, f'--run_dir={to}', *flags]) == 0
      made[str(to)] = to
    return to

  yield run
  patch.undo()


def start_of(name):
  import tiny_world

  model, params = tiny_world.load()
  if name == 'ppo':
    params = value_head.attach(model, params, trunk='separate', init_std=0.1)[1]
  return params


def written(folder):
  """Every prompt, token and reward of every round."""
  rows = [
    json.loads(line)
    for file in sorted((folder / 'rollouts').glob('*.jsonl'))
    for line in file.read_text().splitlines()
  ]
  return [(row['prompt'], row['tokens'], row['reward']) for row in rows]


def check_same(one, other, name):
  assert written(one) == written(other)
  assert bool(written(one)) == (name in ('grpo', 'ppo'))
  ours, theirs = (metrics.read(x / 'metrics.jsonl') for x in (other, one))
  assert [x['step'] for x in ours] == [x['step'] for x in theirs] == [1, 2, 3]
  for a, b in zip(ours, theirs, strict=True):
    # A loss near 0 is a difference of numbers near 1.
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-6, abs=1e-6)
    assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-4)
  start, moved = start_of(name), 0.0
  ends = [checkpoint.saved_params(x / 'checkpoints', start) for x in (one, other)]
  for a, b, c in zip(*map(jax.tree.leaves, (*ends, start)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    moved = max(moved, np.abs(a - c).max())
  assert moved > 1e-3


@pytest.mark.parametrize('mesh', list(MESHES))
@pytest.mark.parametrize('name', ['sft', 'dpo', 'grpo', 'ppo'])
def test_eight_devices_do_what_one_does(go, name, mesh):
  check_same(go(name), go(name, **MESHES[mesh]), name)


def test_the_tokens_of_a_row_on_two_devices(go):
  check_same(go('grpo'), go('grpo', data=2, context=2, tensor=2), 'grpo')


@pytest.mark.parametrize('name', ['dpo', 'grpo'])
def test_moments_and_reference_in_the_host_s_memory(go, name):
  """And back from a checkpoint: the run of three steps goes on to five."""
  away = "--config.offload=('opt_state','reference')"
  optimizer = '--config.optimizer.momentum=0.5'
  near, far = go(name, optimizer), go(name, optimizer, away, fsdp=2)
  check_same(near, far, name)
  for folder, sizes, more in ((near, {}, ()), (far, {'fsdp': 2}, (away,))):
    flags = [
      '--config.mesh.data=1',
      *(f'--config.mesh.{k}={n}' for k, n in sizes.items()),
    ]
    config = f'--config={folder.parent / "tiny_world.py"}:{name}'
    flags += [optimizer, *more, '--config.steps=5']
    assert cli.main(['train', config, f'--run_dir={folder}', *flags]) == 0
  a, b = (metrics.read(x / 'metrics.jsonl')[-1] for x in (near, far))
  assert a['step'] == b['step'] == 5
  assert a['loss'] == pytest.approx(b['loss'], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
  ('name', 'flags', 'message'),
  [
    (
      'sft',
      ["--config.offload=('moments',)"],
      "'moments' is none of ('opt_state', 'reference')",
    ),
    (
      'sft',
      ['--config.mesh.context=3', '--config.data.max_length=8'],
      'config.data.max_length=8 does not divide into config.mesh.context=3 parts; make '
      'the sum a multiple of 3',
    ),
    ('grpo', ['--config.mesh.context=3'], 'config.mesh.context=3 must divide 16'),
  ],
)
def test_what_cannot_be_is_one_line(go, tmp_path, capfd, name, flags, message):
  config = f'--config={go("sft").parent / "tiny_world.py"}:{name}'
  assert cli.main(['train', config, f'--run_dir={tmp_path}', *flags]) == 1
  assert message in capfd.readouterr().err.splitlines()[-1]
