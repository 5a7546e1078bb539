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

  def first(**sizes):
    sizes = {k: max(n, 1) for k, n in sizes.items()}
    return sharding.mesh_over(jax.devices()[: math.prod(sizes.values())], **sizes)

  patch.setattr(sharding, 'make_mesh', lambda *, data=1, fsdp=1, tensor=1: first(
    data=data, fsdp=fsdp, tensor=tensor))  # fmt: skip

  def run(name, **mesh):
    to = folder / f'{name}{mesh}'
    if str(to) not in made:
      flags = [f'--config.mesh.{axis}={n}' for axis, n in ({'data': 1} | mesh).items()]
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
  """Every token, reward and advantage of every round."""
  rows = [
    json.loads(line)
    for file in sorted((folder / 'rollouts').glob('*.jsonl'))
    for line in file.read_text().splitlines()
  ]
  return [(row['prompt'], row['tokens'], row['reward']) for row in rows]


@pytest.mark.parametrize('mesh', list(MESHES))
@pytest.mark.parametrize('name', ['sft', 'dpo', 'grpo', 'ppo'])
def test_eight_devices_do_what_one_does(go, name, mesh):
  one, eight = go(name), go(name, **MESHES[mesh])
  assert written(one) == written(eight)
  assert bool(written(one)) == (name in ('grpo', 'ppo'))
  ours, theirs = (metrics.read(x / 'metrics.jsonl') for x in (eight, one))
  assert [x['step'] for x in ours] == [x['step'] for x in theirs] == [1, 2, 3]
  for a, b in zip(ours, theirs, strict=True):
    # A loss near 0 is a difference of numbers near 1.
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-6, abs=1e-6)
    assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-4)
  start, moved = start_of(name), 0.0
  ends = [checkpoint.saved_params(x / 'checkpoints', start) for x in (one, eight)]
  for a, b, c in zip(*map(jax.tree.leaves, (*ends, start)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    moved = max(moved, np.abs(a - c).max())
  assert moved > 1e-3
