"""A plan beside the run that it is of: the same state, where it lies; the same batches."""

import functools
import json
import math
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from educe import config as config_lib
from educe import plans, recipes, roofline, runs, sharding
from educe.data.sharing import share
from educe.models import peft, policy, presets, safetensors, scratch, weights
from educe.rollouts import sampler, slots, texts
from educe.training import checkpoint
from educe.types import Algorithm, Batch

# Small runs on eight virtual devices, one of each algorithm.
CONFIG = """
import ml_collections

def get_config(kind):
  config = ml_collections.ConfigDict(dict(
    steps=1, save_every=1, seed=0,
    model=dict(name='scratch', preset='chain'),
    tokenizer=dict(path='characters:012345abcdefgh='),
    mesh=dict(data=2, fsdp=2, tensor=2),
    optimizer=dict(name='adamw', learning_rate=1e-3),
    loss=dict(name=kind.removesuffix('_packed')),
    algorithm=dict(name=kind.removesuffix('_packed')),
  ))
  records = dict(
    name='educe.environments.chain:records', size=64, exposure=1.0, shares=(1.0,),
  )
  pairs = dict(name='jsonl', path='PAIRS')
  sampled = dict(
    environment=dict(name='chain', depth=1, reward='outcome'),
    rollouts=dict(prompts=4, group=4, max_new_tokens=2, workers=0, temperature=1.3),
  )
  sections = {
    'sft': dict(source=records, data=dict(batch_size=8, max_length=8)),
    'sft_packed': dict(
      source=records, data=dict(batch_size=8, max_length=16, packing=True)
    ),
    'dpo': dict(source=pairs, data=dict(batch_size=8, max_length=10, records='pairs')),
    'reward_model': dict(
      source=pairs,
      data=dict(batch_size=8, max_length=10, records='pairs'),
      value=dict(trunk='shared'),
    ),
    'grpo': dict(advantage=dict(name='group_relative'), **sampled),
    'ppo': dict(value=dict(trunk='separate'), **sampled),
    'online_dpo': dict(**sampled),
    'distillation': dict(**sampled),
  }[kind]
  config.update(ml_collections.ConfigDict(sections))
  if kind == 'grpo':
    config.algorithm.update(minibatches=2, reference_every=0)
    config.loss.kl_coef = 0.1
  if kind == 'online_dpo':
    config.loss.name = 'dpo'
    config.algorithm.batch_size = 4
  if kind == 'distillation':
    config.algorithm.teacher = dict(name='scratch', preset='chain', seed=1)
  return config
"""
ADAPTER = dict(rank=2, targets=('query', 'up'))
KINDS = (
  'sft',
  'sft_packed',
  'dpo',
  'reward_model',
  'grpo',
  'ppo',
  'online_dpo',
  'distillation',
)


@pytest.fixture(scope='module')
def config_of(tmp_path_factory):
  folder = tmp_path_factory.mktemp('config')
  pairs = [
    {'prompt': f'{i % 6}a', 'chosen': f'={i % 6}', 'rejected': f'={5 - i % 6}'}
    for i in range(16)
  ]
  (folder / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
  text = CONFIG.replace('PAIRS', str(folder / 'pairs.jsonl'))
  (folder / 'config.py').write_text(text)

  def of(kind, *flags):
    values = recipes.load([f'--config={folder / "config.py"}:{kind}', *flags])
    return config_lib.expand(values, runs.train)

  return of


class Seen(Exception):
  """What a run had made when its first step was due."""


@pytest.fixture
def stopped(monkeypatch, tmp_path):
  """(state, batch, method) of a run."""

  def run(config):
    def at_first_step(state, step, method, *, place, flops, **_):
      batch, _ = method.next_batch(state)
      raise Seen(state, place(batch, method.shares), method, flops)

    with monkeypatch.context() as patch:
      patch.setattr(runs.loop, 'run', at_first_step)
      with pytest.raises(Seen) as seen:
        runs.train(tmp_path / 'run', **config)
    return seen.value.args

  return run


def same_state(plan, state):
  """That the plan's state is the run's, leaf by leaf; how many of them are split."""
  assert jax.tree.structure(plan.state) == jax.tree.structure(state)
  split = 0
  leaves = zip(jax.tree.leaves(plan.state), jax.tree.leaves(state), strict=True)
  for like, array in leaves:
    assert (like.shape, like.dtype) == (array.shape, array.dtype)
    assert like.sharding.is_equivalent_to(array.sharding, array.ndim)
    split += like.sharding.spec != P()
  assert plans.held(plan.state) == sum(
    x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)
  )
  return split


@pytest.mark.parametrize('kind', KINDS)
def test_a_plan_is_of_what_the_run_makes(kind, config_of, stopped):
  config = config_of(kind)
  state, batch, method, flops = stopped(config)
  grid = config_lib.call('mesh', config['mesh'])
  plan = plans.plan(config, grid)
  # Every matrix and two moments of it, at the least.
  assert same_state(plan, state) >= 2 * 9
  assert plan.programs['train'].work.flops == flops(plan.batch) > 0
  if kind == 'ppo':  # what it scores shares no prompt, and has a column more
    read = roofline.full(plan.rows, plan.length + 1)
    work = plan.programs['score'].work
    assert work.flops == roofline.forward(plan.model, plan.state.params, read)
  there = {name for name, x in batch._asdict().items() if x is not None}
  assert {name for name, x in plan.batch._asdict().items() if x is not None} == there
  assert {'tokens', 'mask', *method.fields} - there == set()
  for name in there:
    like, array = getattr(plan.batch, name), getattr(batch, name)
    assert like.dtype == array.dtype, name
    assert like.sharding.is_equivalent_to(array.sharding, array.ndim)
    # As full as it can be.
    assert len(like.shape) == array.ndim
    assert all(x >= y for x, y in zip(like.shape, array.shape, strict=True)), name
    assert like.shape[0] == array.shape[0]
    if config['data']:
      assert like.shape == array.shape


@pytest.fixture(scope='module')
def run(config_of, tmp_path_factory):
  """run(kind, …) is the folder of one that was trained for a step."""

  @functools.cache
  def of(kind, adapter=False):
    folder = tmp_path_factory.mktemp('runs') / kind
    adapters = {'adapter': ADAPTER} if adapter else {}
    config = through(config_of(kind), **adapters)
    runs.train(folder, **config)
    return str(folder)

  return of


@pytest.fixture
def unread(monkeypatch):
  """After `unread()` whoever reads a weight fails."""

  def refuse(*_, **__):
    raise AssertionError('a plan reads no weights')

  def start():
    monkeypatch.setattr(weights, 'read', refuse)
    monkeypatch.setattr(checkpoint.ocp.args, 'PyTreeRestore', refuse)
    monkeypatch.setattr(peft.safetensors.numpy, 'load_file', refuse)

  return start


def through(config, **sections):
  """With these sections, expanded."""
  return config_lib.expand({**config, **sections}, runs.train)


def starts(name, config_of, run, root):
  """The config of a run that starts from others."""
  if name == 'teacher':
    config = config_of('distillation')
    section = dict(name='educe.policies', path=run('sft', True))
    return through(config, algorithm={**config['algorithm'], 'teacher': section})
  if name == 'critic':  # beside an adapter the trunk of another run is whole
    value = dict(trunk='separate')
    start = dict(value_from=run('reward_model'), value=value, adapter=dict(rank=2))
    return through(config_of('ppo'), **start)
  config = config_of('sft')
  if name == 'peft':  # goes into the weights: no section adapter
    folder = str(root / 'tests' / 'golden' / 'tiny_llama_dora')
    section = dict(name='peft', path=folder)
    return through(config, model=section, mesh=dict(data=4, fsdp=2))
  adapter = ADAPTER | ({'merge': True} if name == 'merged' else {})
  return through(config, init_from=run('sft', True), adapter=adapter)


@pytest.mark.parametrize('name', ['teacher', 'critic', 'peft', 'goes_on', 'merged'])
def test_a_run_that_starts_from_others(name, config_of, run, stopped, unread, request):
  config = starts(name, config_of, run, request.config.rootpath)
  state, _, _, flops = stopped(config)
  unread()
  plan = plans.plan(config, config_lib.call('mesh', config['mesh']))
  assert same_state(plan, state)
  assert plan.programs['train'].work.flops == flops(plan.batch)


def test_a_stage_to_come_is_of_this_architecture(config_of, run):
  config = config_of('ppo', '--config.mesh.data=4', '--config.mesh.tensor=1')
  value, adapter = dict(trunk='separate'), dict(rank=2)
  grid = config_lib.call('mesh', config['mesh'])

  def params(**sections):
    plan = plans.plan(through(config, value=value, **sections), grid)
    return jax.tree.map(lambda x: x.shape, plan.state.params)

  first = dict(init_from='stage://sft')
  assert params(**first) == params()
  from_reward = dict(value_from='stage://reward', adapter=adapter)
  theirs = params(value_from=run('reward_model'), adapter=adapter)
  assert params(**from_reward) == theirs != params(adapter=adapter)


@pytest.mark.parametrize(
  ('kind', 'sections', 'said'),
  [
    ('sft', dict(offload=('reference',)), 'this run keeps no reference; leave it out'),
    ('sft', dict(offload=('params',)), "'params' is none of"),
    ('sft', dict(value=dict(trunk='shared')), 'reads no values, and algorithm .sft.'),
    (
      'sft',
      dict(init_from='nowhere'),
      "init_from='nowhere' is not the folder of a run",
    ),
    ('ppo', dict(value_from='nowhere'), "value_from='nowhere' is not the folder of"),
    ('sft', dict(steps=0), 'config.steps=0 must be at least 1'),
  ],
)
def test_what_a_run_refuses_its_plan_refuses(kind, sections, said, config_of, tmp_path):
  config = through(config_of(kind), **sections)
  grid = config_lib.call('mesh', config['mesh'])
  for start in (
    lambda: plans.plan(config, grid),
    lambda: runs.train(tmp_path / 'run', **config),
  ):
    with pytest.raises(config_lib.ConfigError, match=said):
      start()


def test_prompts_that_a_run_drops_are_no_plan(config_of):
  config = config_of('grpo', "--config.rollouts.overlong_prompts='drop'")
  words = config_lib.call('tokenizer', config['tokenizer'])
  prompts = [{'prompt': 'a' * n} for n in (3, 9, 14)]
  assert [plans.longest(words, prompts, most) for most in (14, 13, 4)] == [14, 9, 3]


def shapes_of(tree):
  return jax.tree.map(lambda x: tuple(getattr(x, 'shape', ())), tree)


@pytest.mark.parametrize('size', [8, 16])
def test_it_samples_in_arrays_of_the_sampler_s_sizes(size, config_of, monkeypatch):
  """Beside those that a round is really sampled in: 16 completions of 100 tokens, in rings
  of 64 and then 100, `size` of them at a time."""
  config = config_of('grpo')
  section = {**config['rollouts'], 'max_new_tokens': 100, 'batch_size': size}
  config = through(
    config,
    model=dict(name='scratch', preset='debug'),
    rollouts={**section, 'stop': ('=',)},
  )
  grid = config_lib.call('mesh', config['mesh'])
  plan = plans.plan(config, grid, prompt=20)
  seen = {'prefill': [], 'decode': []}

  def watched(name, program):
    def call(*args, **options):
      seen[name].append(shapes_of(args))
      return program(*args, **options)

    return call

  monkeypatch.setattr(slots, 'enter', watched('prefill', slots.enter))
  monkeypatch.setattr(slots, 'advance', watched('decode', slots.advance))
  model, params = config_lib.call('model', config['model'])
  words = config_lib.call('tokenizer', config['tokenizer'])
  sampler.sample(
    model,
    sharding.place(params, model.axes, grid),
    [[row, *range(19)] for row in range(4) for _ in range(4)],
    jax.random.key(0),
    max_new_tokens=100,
    temperature=1.3,
    stop=texts.stop_table(words, ('=',), 264),
    eos_ids=words.eos_ids,
    batch_size=size,
  )
  monkeypatch.undo()
  for name, calls in seen.items():
    planned = shapes_of(plan.programs[name].lower().args_info[0])
    assert jax.tree.leaves(planned) == jax.tree.leaves(calls[-1]), name
  assert seen['decode'][0] != seen['decode'][-1]


@pytest.mark.parametrize('kind', ['grpo', 'sft'])
def test_its_programs_are_those_of_the_run(kind, config_of, stopped):
  config = config_of(kind)
  state, batch, *_ = stopped(config)
  plan = plans.plan(config, config_lib.call('mesh', config['mesh']))
  names = ['train', 'score', 'prefill', 'decode'] if kind == 'grpo' else ['train']
  assert list(plan.programs) == names
  program = plan.programs['train'].lower().compile()
  new, metrics = program(state, batch)
  assert np.isfinite(metrics['loss'])
  assert int(new.step) == 1
  rows, length = (8, 16) if kind == 'grpo' else (8, 8)
  assert (plan.rows, plan.length) == (rows, length)
  assert plan.programs['train'].work.tokens == rows * length
  if kind == 'grpo':
    score = plan.programs['score']
    logp, _ = score.lower().compile()(new.params, Batch(batch.tokens, batch.mask))
    assert logp.shape == batch.tokens.shape
    assert score.beside == plans.held(plan.state) - plans.held(plan.state.params)
    for name, tokens in (('prefill', 8 * 16), ('decode', 16)):
      sampling = plan.programs[name]
      assert sampling.work.tokens == tokens
      assert sampling.beside == plans.held(plan.state)
      assert sampling.lower().compile() is not None


def test_a_preset_takes_the_place_of_weights(config_of):
  config = config_of('sft', '--config.model.compute_dtype=bfloat16')
  grid = config_lib.call('mesh', config['mesh'])
  plan = plans.plan(config, grid, preset='llama3_8b')
  a = plan.model.architecture
  assert (a.dim, a.layers, a.compute_dtype) == (4096, 32, 'bfloat16')
  assert policy.count(plan.state.params) == 8_030_261_248


def test_a_folder_is_asked_for_its_description_alone(config_of, tmp_path):
  _, params = scratch.load(preset='debug')
  folder = tmp_path / 'model'
  safetensors.export(folder, presets.debug, params)
  (folder / safetensors.SINGLE).unlink()
  config = config_of('sft')
  config['model'] = dict(name='safetensors', path=str(folder), remat='full')
  config = config_lib.expand(config, runs.train)
  plan = plans.plan(config, config_lib.call('mesh', config['mesh']))
  assert plan.model.architecture.remat == 'full'
  assert policy.count(plan.state.params) == policy.count(params)
  with pytest.raises(ValueError, match='incomplete'):
    safetensors.load(path=str(folder))


@pytest.mark.parametrize(
  ('kind', 'options', 'said'),
  [
    ('sft', dict(rows=6), 'does not divide'),
    ('grpo', dict(prompt=15), 'a prompt of 15 tokens .* context of the model, 16'),
    ('sft', dict(preset='llama9'), "no architecture is called 'llama9'"),
  ],
)
def test_what_cannot_be_is_one_line(kind, options, said, config_of):
  config = config_of(kind)
  with pytest.raises(ValueError, match=said) as caught:
    plans.plan(config, config_lib.call('mesh', config['mesh']), **options)
  assert '\n' not in str(caught.value)


def test_log_probs_that_are_computed_beforehand_are_no_plan(config_of, tmp_path):
  config = config_of('dpo', f'--config.algorithm.precompute={tmp_path}')
  with pytest.raises(ValueError, match='precompute=None'):
    plans.plan(config, config_lib.call('mesh', config['mesh']))
  assert not list(tmp_path.iterdir())


def test_each_host_reads_rows_of_its_own_and_shares_no_prompt(config_of, mesh_of):
  """As runs.train does with several processes."""
  grid = mesh_of(2, 2, 2)
  hosts = types.SimpleNamespace(
    devices=np.array(
      [types.SimpleNamespace(process_index=i // 4) for i in range(grid.size)]
    )
  )
  assert plans.hosts_of(grid) == 1
  assert plans.hosts_of(hosts) == 2
  method = Algorithm(None, None, None, 16, fields=('old_logp', 'labels'), shares=4)
  alone = plans.batch_of(method, 16, 64, 40, grid)
  shared = plans.batch_of(method, 16, 64, 40, grid, lambda x: share(x, 4, 4))
  assert alone.prefix is None
  assert alone.labels.shape == (16,)
  assert shared.prefix.shape[0] == 4
  assert math.prod(shared.tokens.shape) < math.prod(alone.tokens.shape)
  assert shared.old_logp.shape == shared.tokens.shape
  read = roofline.reading(shared)
  assert read.tokens < roofline.reading(alone).tokens == 16 * 64
