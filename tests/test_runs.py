"""Runs and sequences of them, called as a user calls them: a config file and a folder."""

import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from educe import cli, policies, runs, sharding
from educe.models import lora, peft, quantized, safetensors, scratch, value_head
from educe.rollouts import rounds, transcripts
from educe.training import checkpoint, metrics

# Two stages on the chain world, small; the suite has eight virtual devices.
CONFIG = """
import ml_collections

def stage(**sections):
  return dict(
    seed=0, save_every=2,
    model=dict(name='scratch', preset='chain'),
    tokenizer=dict(path='characters:012345abcdefgh='),
    mesh=dict(data=-1),
    **sections,
  )

def get_config():
  exam = dict(
    name='accuracy', environment=dict(name='chain', depth=1, size=8), max_new_tokens=2,
  )
  base = stage(
    steps=4,
    source=dict(
      name='educe.environments.chain:records', size=256, exposure=1.0, shares=(1.0,),
    ),
    data=dict(batch_size=16, max_length=8),
    algorithm=dict(name='sft'),
    loss=dict(name='sft'),
    optimizer=dict(name='adamw', learning_rate=3e-2),
    evaluation=exam,
  )
  rl = stage(
    steps=3,
    environment=dict(name='chain', depth=1, reward='outcome'),
    rollouts=dict(prompts=4, group=4, max_new_tokens=2, workers=0, temperature=1.3),
    advantage=dict(name='rloo'),
    algorithm=dict(name='grpo', minibatches=2),
    loss=dict(name='grpo'),
    optimizer=dict(name='adamw', learning_rate=1e-9, schedule='constant'),
    evaluation=exam,
  )
  return ml_collections.ConfigDict(dict(stages=('base', 'rl'), base=base, rl=rl))
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp('config') / 'config.py'
  path.write_text(CONFIG)
  return f'--config={path}'


def go(config, folder, *flags):
  return cli.main(['train', config, f'--run_dir={folder}', *flags])


def losses(folder):
  return [r['loss'] for r in metrics.read(folder / 'metrics.jsonl') if 'loss' in r]


def params_of(folder):
  like = scratch.load(preset='chain')[1]
  return checkpoint.saved_params(folder / 'checkpoints', like)


@pytest.fixture(scope='module')
def both(config, tmp_path_factory):
  """The folder of a sequence that ran to its end."""
  folder = tmp_path_factory.mktemp('both')
  assert go(config, folder) == 0
  return folder


def test_a_stage_starts_from_the_weights_of_the_one_before(both):
  saved = json.loads((both / 'rl' / 'config.json').read_text())
  assert saved['init_from'] == str(both / 'base')
  base, rl = params_of(both / 'base'), params_of(both / 'rl')
  fresh = scratch.load(preset='chain')[1]
  # With a learning rate of 1e-9 three updates move nothing by more than 3e-9.
  np.testing.assert_allclose(rl['embedding'], base['embedding'], atol=1e-7)
  assert np.abs(base['embedding'] - fresh['embedding']).max() > 1e-2
  ends = [r['accuracy'] for r in metrics.read(both / 'base/metrics.jsonl')
          if 'accuracy' in r]  # fmt: skip
  begins = [r['accuracy'] for r in metrics.read(both / 'rl/metrics.jsonl')
            if 'accuracy' in r]  # fmt: skip
  assert begins[0] == ends[-1]


def test_the_log_says_how_far_the_sampler_is_from_the_trainer(both):
  """On policy at T = 1.3, through sampler, judge, mesh and step (float32)."""
  records = [r for r in metrics.read(both / 'rl/metrics.jsonl') if 'loss' in r]
  assert [r['step'] for r in records] == [1, 2, 3]
  for record in records:
    mean, worst = (record[f'sampling/logp_difference/{x}'] for x in ('mean', 'max'))
    assert 0 <= mean <= worst <= 1e-4
    assert record['importance_ratio'] == pytest.approx(1, abs=1e-4)
  assert [r.get('sampling/staleness_steps') for r in records] == [0, None, 0]
  assert 'reward' in records[0]
  written = sorted(p.name for p in (both / 'rl' / 'rollouts').iterdir())
  assert written == ['000000.jsonl', '000001.jsonl']


def test_finished_stages_are_left_alone(config, both, capsys):
  before = {p: p.stat().st_mtime_ns for p in both.rglob('metrics.jsonl')}
  assert go(config, both) == 0
  said = capsys.readouterr().err
  assert said.count('is already done') == 2
  assert {p: p.stat().st_mtime_ns for p in both.rglob('metrics.jsonl')} == before
  table = said[said.index('before and after each') :].splitlines()
  assert [line.split()[0] for line in table[1:4]] == ['before', 'base', 'rl']


def test_a_finished_stage_is_not_taken_for_another(config, both, capsys):
  assert go(config, both, '--config.rl.loss.clip_high=0.4') == 1
  said = capsys.readouterr().err
  mend = 'is done with loss.clip_high=0.2, and the config now says 0.4: restore it, or'
  assert mend in ' '.join(said.split())
  # What changes no result is no other run.
  assert go(config, both, '--config.rl.save_every=7', '--config.base.keep=1') == 0


def test_a_stages_mistake_is_named_with_the_stage(config, both, tmp_path, capsys):
  for name in ('base', 'rl'):
    (tmp_path / name).symlink_to(both / name) if name == 'base' else None
  assert go(config, tmp_path, '--config.rl.loss.kl_coef=0.1') == 1
  said = ' '.join(capsys.readouterr().err.split())
  assert 'config.rl.loss: grpo: kl_coef=0.1 needs' in said
  assert 'config.rl.algorithm.reference_every=0' in said


def test_sigterm_ends_the_sequence_and_the_same_command_goes_on(
  config, both, tmp_path, monkeypatch, capsys
):
  write = metrics.Log.write

  def and_terminate(self, step, values):
    write(self, step, values)
    if step == 1 and 'loss' in values:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.Log, 'write', and_terminate)
    assert go(config, tmp_path) == 0
  assert 'saved; the same command goes on' in capsys.readouterr().err
  assert 1 <= len(losses(tmp_path / 'base')) < 4
  assert not (tmp_path / 'rl').exists()
  assert go(config, tmp_path) == 0
  assert losses(tmp_path / 'base') == losses(both / 'base')
  assert losses(tmp_path / 'rl') == losses(both / 'rl')


MISTAKES = [
  ("algorithm=dict(name='grpo'", "source=dict(name='jsonl', path='x'), ", 'grpo'),
  ("algorithm=dict(name='sft'", "environment=dict(name='chain', depth=2), ", 'sft'),
  ("algorithm=dict(name='sft'", "advantage=dict(name='rloo'), ", 'sft'),
  ("algorithm=dict(name='sft'", 'rollouts=dict(prompts=1, group=1, max_new_tokens=1), ',
   'sft'),
]  # fmt: skip


@pytest.mark.parametrize(('before', 'extra', 'algorithm'), MISTAKES)
def test_a_section_that_nothing_reads_is_refused(
  tmp_path, capsys, before, extra, algorithm
):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG.replace(before, extra + before))
  assert go(f'--config={path}', tmp_path / 'run') == 1
  (line,) = capsys.readouterr().err.splitlines()
  name = extra.partition('=')[0]
  assert f'config.{name} is given' in line
  assert f"config.algorithm.name='{algorithm}' has no use for it" in line
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.rl.rollouts.prompt=3', "did you mean 'prompts'"),
    ('--config.rl.algorithm.name=grp', "did you mean 'grpo'"),
    ("--config.stages=('base',)", "leaves out the section 'rl': delete it, or"),
    ("--config.stages=('base', 'rl', 'more')", "there is no section 'more'"),
  ],
)
def test_what_any_stage_cannot_do_is_said_before_the_first(
  config, tmp_path, capsys, flag, message
):
  assert go(config, tmp_path / 'run', flag) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line
  assert not (tmp_path / 'run').exists()


@pytest.fixture
def alone(config, tmp_path):
  """Only the second stage, from random weights."""
  text = pathlib.Path(config.partition('=')[2]).read_text()
  path = tmp_path / 'alone.py'
  path.write_text(text.replace("dict(stages=('base', 'rl'), base=base, rl=rl)", 'rl'))
  return f'--config={path}'


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--config.rollouts.group=1'], 'compares the completions of a prompt: group=1'),
    (['--config.loss.kl_coef=0.1'], 'kl_coef=0.1 needs log-probs of a reference'),
    (['--config.algorithm.minibatches=3'], 'a multiple of minibatches'),
    (['--config.rollouts.max_new_tokens=15'], "in the model's context of 16; lower"),
    (
      ['--config.microbatches=2'],
      'minibatches: a batch of 8 rows does not divide into 2 microbatches',
    ),
    (['--config.init_from=nowhere'], "init_from='nowhere' is not the folder of a run"),
  ],
)
def test_what_a_run_cannot_do_is_one_line_before_anything_is_sampled(
  alone, tmp_path, capsys, monkeypatch, flags, message
):
  closed = []
  monkeypatch.setattr(rounds, 'collect', lambda *a, **k: pytest.fail('sampled'))
  close = rounds.Rounds.close
  monkeypatch.setattr(
    rounds.Rounds, 'close', lambda self: (closed.append(1), close(self))
  )
  folder = tmp_path / 'run'
  # With workers: were they not closed, their processes would outlive this test.
  assert go(alone, folder, '--config.rollouts.workers=1', *flags) == 1
  *before, line = capsys.readouterr().err.splitlines()
  assert all(x.startswith(f'{folder}: 3 steps of grpo') for x in before)
  assert len(before) <= 1
  assert message in line
  assert not folder.exists()
  assert not pathlib.Path('nowhere').exists()
  made = 'max_new_tokens' not in flags[0] and 'init_from' not in flags[0]
  assert bool(closed) == made


def test_what_a_mesh_leaves_whole_is_said_once(alone, tmp_path, capsys):
  mesh = ['--config.mesh.data=1', '--config.mesh.tensor=8']
  assert go(alone, tmp_path / 'run', *mesh, '--config.microbatches=3') == 1
  _, said, refused = capsys.readouterr().err.splitlines()
  assert said == (
    'config.mesh.tensor=8 does not divide heads (4), kv_heads (4): those stay whole '
    'along it'
  )
  assert 'does not divide into 3 microbatches' in refused  # before a step is made


def test_a_missing_section_is_named(alone, tmp_path, capsys):
  text = pathlib.Path(alone.partition('=')[2]).read_text()
  path = tmp_path / 'without.py'
  path.write_text(text.replace("advantage=dict(name='rloo'),", ''))
  assert go(f'--config={path}', tmp_path / 'run') == 1
  said = capsys.readouterr().err
  assert 'config.algorithm needs a section config.advantage' in said


def test_a_reference_survives_and_stays_what_it_was(alone, tmp_path):
  """Frozen at the start: the KL to it is 0 at first and grows, also after a restart."""
  flags = [
    '--config.algorithm.reference_every=0', '--config.algorithm.minibatches=1',
    '--config.optimizer.learning_rate=1e-3', '--config.loss.kl_coef=0.01',
  ]  # fmt: skip
  assert go(alone, tmp_path / 'whole', *flags, '--config.steps=4') == 0
  assert go(alone, tmp_path / 'cut', *flags, '--config.steps=2') == 0
  assert go(alone, tmp_path / 'cut', *flags, '--config.steps=4') == 0
  whole, cut = (
    [r['kl'] for r in metrics.read(tmp_path / x / 'metrics.jsonl') if 'loss' in r]
    for x in ('whole', 'cut')
  )
  assert whole == cut
  assert whole[0] < 1e-9 < 1e-7 < whole[3]


def test_going_on_with_a_reference_that_was_not_kept_is_refused(
  alone, tmp_path, capsys
):
  assert go(alone, tmp_path / 'run') == 0
  capsys.readouterr()
  flags = ['--config.algorithm.reference_every=0', '--config.steps=4']
  assert go(alone, tmp_path / 'run', *flags) == 1
  said = capsys.readouterr().err
  assert 'reference' in said
  assert 'damaged' not in said


def test_one_step_off_runs_on_a_mesh(alone, tmp_path):
  """The sampler and the step share eight devices from two threads."""
  assert go(alone, tmp_path / 'run', '--config.rollouts.ahead=True') == 0
  records = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  stale = [r['sampling/staleness_steps'] for r in records if 'reward' in r]
  assert stale == [0, 2]


@pytest.fixture(scope='module')
def adapted(config, tmp_path_factory):
  """Weights, an adapter on them, the same with a reference, and all of it merged."""
  folder = tmp_path_factory.mktemp('adapted')
  text = pathlib.Path(config.partition('=')[2]).read_text()
  for old, new in (
    ("stages=('base', 'rl'), base=base, rl=rl", (
      "stages=('base', 'sft', 'rl', 'full'), base=dict(base, steps=2), "
      "sft=dict(base, steps=2, adapter=dict(adapter)), "
      "rl=dict(rl, adapter=dict(adapter)), "
      "full=dict(base, steps=1, optimizer=dict(name='sgd', learning_rate=1e-9))"
    )),
    ("loss=dict(name='grpo')", "loss=dict(name='grpo', kl_coef=0.1)"),
    ('minibatches=2)', 'minibatches=2, reference_every=0)'),
    ("learning_rate=1e-9, schedule='c", "learning_rate=1e-2, schedule='c"),
    ('evaluation=exam,', ''),
    ('  exam =', "  adapter = dict(rank=2, alpha=8.0, kind='dora')\n  exam ="),
  ):  # fmt: skip
    assert old in text
    text = text.replace(old, new)
  path = folder / 'adapted.py'
  path.write_text(text)
  assert go(f'--config={path}', folder / 'run') == 0
  return f'--config={path}', folder / 'run'


def adapted_params(folder):
  return policies.open_policy(str(folder))[1]


def test_an_adapter_leaves_its_base_alone_and_goes_on_from_stage_to_stage(adapted):
  base = params_of(adapted[1] / 'base')
  sft, rl = (adapted_params(adapted[1] / name) for name in ('sft', 'rl'))
  for params in (sft, rl):
    jax.tree.map(np.testing.assert_array_equal, lora.without(params), base)
  names = [(params['adapter']['layers']['mlp']['up']) for params in (sft, rl)]
  assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(names[0]))
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *names)
  assert all(0 < x < 0.1 for x in jax.tree.leaves(moved))


def test_the_reference_of_an_adapter_is_a_copy_of_it_alone(adapted):
  """Where the adapter goes on, it is the adapter as it was: the first KL is 0."""
  folder = adapted[1]
  rows = [r for r in metrics.read(folder / 'rl' / 'metrics.jsonl') if 'loss' in r]
  assert rows[0]['kl'] == pytest.approx(0, abs=1e-6)
  assert rows[2]['kl'] > 1e-6
  shapes = checkpoint._saved_shapes(folder / 'rl' / 'checkpoints' / '3' / 'state')
  held = {name for name in shapes if name.startswith('reference/')}
  assert held
  assert all(name.startswith('reference/adapter/layers/') for name in held)
  assert len(held) == 7 * 3


def test_an_adapter_run_is_sampled_converted_and_merged_into_the_next(
  adapted, tmp_path, capsys
):
  folder = adapted[1]
  merged = lora.merged(adapted_params(folder / 'rl'))
  full = params_of(folder / 'full')  # trained whole, at a rate of nothing
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), full, merged
  )
  model, teacher = policies.load(path=str(folder / 'rl'))
  jax.tree.map(np.testing.assert_array_equal, teacher, merged)
  assert 'adapter' not in model.axes
  to = tmp_path / 'out'
  argv = ['convert', f'--model={folder / "rl"}', f'--to={to}']
  assert cli.main(argv) == 0
  jax.tree.map(np.testing.assert_array_equal, safetensors.load(path=str(to))[1], merged)
  apart = tmp_path / 'adapter'
  assert cli.main([*argv[:2], f'--to={apart}', '--adapter']) == 0
  said = json.loads((apart / peft.CONFIG).read_text())
  assert (said['r'], said['lora_alpha'], said['use_dora']) == (2, 8.0, True)
  assert said['base_model_name_or_path'] == str(folder / 'base')
  # On the base, as another folder, it is what was trained.
  argv = ['convert', f'--model={folder / "base"}', f'--to={tmp_path / "base"}']
  assert cli.main(argv) == 0
  again = peft.load(path=str(apart), base=str(tmp_path / 'base'))[1]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    again,
    adapted_params(folder / 'rl'),
  )
  said = []
  for model in (folder / 'rl', to):
    flags = ['--prompt=0a=', '--raw', '--max_new_tokens=4']
    capsys.readouterr()
    assert cli.main(['sample', f'--model={model}', *flags]) == 0
    said.append(capsys.readouterr().out)
  assert said[0] == said[1]


def test_an_adapter_run_goes_on_as_if_it_had_not_stopped(adapted, tmp_path):
  path, folder = adapted
  text = pathlib.Path(path.partition('=')[2]).read_text()
  start = text.index('ConfigDict(dict(stages')
  where = tmp_path / 'alone.py'
  where.write_text(text[:start] + 'ConfigDict(dict(rl, adapter=adapter))\n')
  first = f'--config.init_from={folder / "sft"}'
  for name, steps in (('whole', [3]), ('cut', [1, 3])):
    for count in steps:
      flags = [first, f'--config.steps={count}']
      assert go(f'--config={where}', tmp_path / name, *flags) == 0
  assert losses(tmp_path / 'whole') == losses(tmp_path / 'cut')
  assert losses(tmp_path / 'whole') == losses(folder / 'rl')


def test_another_adapter_on_top_is_refused_or_merged(adapted, tmp_path, capsys):
  path, folder = adapted
  shutil.copytree(folder, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'rl')
  capsys.readouterr()
  assert go(path, tmp_path / 'run', '--config.rl.adapter.alpha=4.0') == 1
  error = capsys.readouterr().err
  assert 'config.rl.adapter: scale is 4.0 in the one that is there and 2.0' in error
  assert 'merge=True' in error
  flags = ['--config.rl.adapter.alpha=4.0', '--config.rl.adapter.merge=True']
  flags += ['--config.rl.steps=1', "--config.rl.adapter.targets=('up', 'down')"]
  assert go(path, tmp_path / 'run', *flags) in (0, 1)  # the stage after is another's
  params = adapted_params(tmp_path / 'run' / 'rl')
  assert set(params['adapter']['layers']) == {'mlp'}
  before = lora.merged(adapted_params(folder / 'sft'))
  jax.tree.map(np.testing.assert_array_equal, lora.without(params), before)


def test_a_base_in_four_bits_is_saved_gone_on_with_and_merged(adapted, tmp_path):
  path, folder = adapted
  text = pathlib.Path(path.partition('=')[2]).read_text()
  start = text.index('ConfigDict(dict(stages')
  where = tmp_path / 'alone.py'
  where.write_text(
    text[:start] + "ConfigDict(dict(base, adapter=dict(adapter, base='nf4')))\n"
  )
  first = f'--config.init_from={folder / "base"}'
  for name, steps in (('whole', [2]), ('cut', [1, 2])):
    for count in steps:
      argv = [first, f'--config.steps={count}', '--config.optimizer.schedule=constant']
      assert go(f'--config={where}', tmp_path / name, *argv) == 0
  assert losses(tmp_path / 'whole') == losses(tmp_path / 'cut')
  params = adapted_params(tmp_path / 'whole')
  base = params_of(folder / 'base')
  want = quantized.store(base, 'nf4')
  jax.tree.map(np.testing.assert_array_equal, lora.without(params), want)
  to = tmp_path / 'out'
  assert cli.main(['convert', f'--model={tmp_path / "whole"}', f'--to={to}']) == 0
  jax.tree.map(
    np.testing.assert_array_equal,
    safetensors.load(path=str(to))[1],
    lora.merged(params),
  )


def test_a_critic_beside_an_adapter_is_one_too_until_it_goes_elsewhere(ppo, tmp_path):
  path, folder = ppo
  text = pathlib.Path(path.partition('=')[2]).read_text()
  where = tmp_path / 'alone.py'
  whole = "dict(stages=('base', 'rl'), base=base, rl=rl)"
  assert whole in text
  where.write_text(text.replace(whole, 'dict(rl, steps=1, adapter=dict(rank=2))'))
  start = f'--config.init_from={folder / "base"}'
  assert go(f'--config={where}', tmp_path / 'first', start) == 0
  _, params, _ = policies.open_values(str(tmp_path / 'first'))
  assert set(params['value']['trunk']) == {'adapter'}
  assert params['embedding'].sharding.shard_shape((16, 64)) == (16, 8)  # of a judge
  policy = policies.open_policy(str(tmp_path / 'first'))[1]
  jax.tree.map(np.testing.assert_array_equal, value_head.without(params), policy)
  b = params['value']['trunk']['adapter']['layers']['mlp']['up']['b']
  assert 1e-6 < np.abs(b).max() < 0.1  # it learned, and from 0
  # Elsewhere its trunk comes whole, with the adapter in it.
  flags = [
    start, f'--config.value_from={tmp_path / "first"}', '--config.value.init_std=0.0',
    '--config.optimizer.learning_rate=1e-9',
  ]  # fmt: skip
  assert go(f'--config={where}', tmp_path / 'second', *flags) == 0
  _, second, _ = policies.open_values(str(tmp_path / 'second'))
  taken = value_head.taken(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    second['value'],
    taken,
  )


@pytest.fixture(scope='module')
def ppo(config, tmp_path_factory):
  """(a config: SFT, then PPO with a critic; the folder of its run)."""
  folder = tmp_path_factory.mktemp('ppo')
  text = pathlib.Path(config.partition('=')[2]).read_text()
  text = text.replace("""    advantage=dict(name='rloo'),
    algorithm=dict(name='grpo', minibatches=2),
    loss=dict(name='grpo'),
""", """    value=dict(trunk='separate', init_std=0.1),
    algorithm=dict(
      name='ppo', epochs=1, minibatches=2, kl_target=1e-3, kl_horizon=16,
    ),
    loss=dict(name='ppo'),
""").replace('learning_rate=1e-9', 'learning_rate=1e-3')  # fmt: skip
  path = folder / 'ppo.py'
  path.write_text(text)
  assert go(f'--config={path}', folder / 'run') == 0
  return f'--config={path}', folder / 'run'


def values_of(folder):
  """(the value head and its trunk, the whole params) that a run ended with."""
  model, like = scratch.load(preset='chain')
  _, params = checkpoint.saved_with_value(folder / 'checkpoints', model, like)
  return value_head.taken(params), params


def test_ppo_logs_what_its_users_look_for(ppo):
  rows = [r for r in metrics.read(ppo[1] / 'rl' / 'metrics.jsonl') if 'loss' in r]
  assert len(rows) == 3
  for name in (
    'objective/kl', 'objective/kl_coef', 'objective/scores', 'objective/rlhf_reward',
    'explained_variance', 'policy_loss', 'value_loss', 'value_clip_ratio', 'approx_kl',
    'entropy', 'importance_ratio', 'clip_ratio/low', 'clip_ratio/high', 'kl',
  ):  # fmt: skip
    assert all(np.isfinite(row[name]) for row in rows), name
  assert rows[0]['objective/kl'] == pytest.approx(0, abs=1e-5)
  assert abs(rows[2]['objective/kl']) > 1e-5  # the second round
  used = [row['objective/kl_coef'] for row in rows]
  np.testing.assert_allclose(used, [0.05, 0.05, 0.05 * (1 - 0.2 * 16 / 16)])


def test_a_policy_is_sampled_and_gone_on_with_without_its_critic(ppo, tmp_path):
  folder = ppo[1]
  flags = ['--prompt=0a=', '--raw', '--max_new_tokens=2']
  assert cli.main(['sample', f'--model={folder / "rl"}', *flags]) == 0
  to = tmp_path / 'out'
  argv = ['convert', f'--model={folder / "rl"}', f'--to={to}']
  assert cli.main(argv) == 0
  assert (to / 'model.safetensors').exists()
  like = scratch.load(preset='chain')[1]
  alone = checkpoint.saved_params(folder / 'rl' / 'checkpoints', like)
  _, params = values_of(folder / 'rl')
  np.testing.assert_array_equal(alone['embedding'], params['embedding'])
  trunk = params['value']['trunk']
  assert np.abs(trunk['embedding'] - params['embedding']).max() > 1e-4  # it learned too


def test_a_critic_starts_as_another_runs_values(ppo, tmp_path):
  """By folder, and by the name of a stage: its values at the first step are theirs."""
  path, folder = ppo
  text = pathlib.Path(path.partition('=')[2]).read_text()
  text = text.replace("stages=('base', 'rl'), base=base, rl=rl", (
    "stages=('base', 'rl', 'more'), base=base, rl=rl, "
    "more=dict(rl, init_from='stage://base', value_from='stage://rl', optimizer=dict("
    "name='sgd', learning_rate=1e-9), value=dict(trunk='separate'))"
  ))  # fmt: skip
  where = tmp_path / 'more.py'
  where.write_text(text)
  shutil.copytree(folder, tmp_path / 'run')
  assert go(f'--config={where}', tmp_path / 'run') == 0
  theirs, _ = values_of(tmp_path / 'run' / 'rl')
  ours, params = values_of(tmp_path / 'run' / 'more')
  # A rate of 1e-9 moves a float32 by less than it can say, or by its last bit.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)
  base = checkpoint.saved_params(
    tmp_path / 'run' / 'base' / 'checkpoints', scratch.load(preset='chain')[1]
  )
  np.testing.assert_allclose(params['embedding'], base['embedding'], atol=1e-6)
  written = json.loads((tmp_path / 'run' / 'more' / 'config.json').read_text())
  assert written['value_from'] == str(tmp_path / 'run' / 'rl')


def test_ppo_goes_on_as_if_it_had_not_stopped(ppo, tmp_path):
  path, folder = ppo
  text = pathlib.Path(path.partition('=')[2]).read_text()
  where = tmp_path / 'alone.py'
  where.write_text(text.replace("dict(stages=('base', 'rl'), base=base, rl=rl)", 'rl'))
  first = f'--config.init_from={folder / "base"}'
  for name, steps in (('whole', [5]), ('cut', [3, 5])):  # 3: inside the second round
    for count in steps:
      flags = [first, f'--config.steps={count}', '--config.optimizer.schedule=constant']
      assert go(f'--config={where}', tmp_path / name, *flags) == 0
  whole, cut = (
    [
      {k: v for k, v in row.items() if not k.startswith(('timing/', 'perf/'))}
      for row in metrics.read(tmp_path / name / 'metrics.jsonl')
      if 'loss' in row
    ]
    for name in ('whole', 'cut')
  )
  assert len(whole) == 5
  assert whole == cut


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--config.rl.value.trunk=own'], "config.rl.value.trunk='own' must be one of"),
    (['--config.rl.value_from=nowhere'], "value_from='nowhere' is not the folder of"),
    (['--config.rl.value_from={base}'], 'is of a run without a value head'),
    (['--config.rl.algorithm.kl_coef=-1.0'], 'kl_coef=-1.0 must be at least 0'),
    (['--config.rl.loss.value_clip=-1.0'], 'value_clip=-1.0 must be above 0'),
  ],
)
def test_what_a_critic_cannot_be_is_one_line(ppo, tmp_path, capsys, flags, message):
  path, folder = ppo
  shutil.copytree(folder / 'base', tmp_path / 'run' / 'base')
  flags = [flag.format(base=folder / 'base') for flag in flags]
  assert go(path, tmp_path / 'run', *flags) == 1
  assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_a_value_head_refuses_names_its_section_and_stage(
  ppo, tmp_path, capsys, monkeypatch
):
  def attach(model, params, start=None, *, trunk='shared', init_std=0.0, seed=0):
    raise ValueError('no room for a head')

  path, folder = ppo
  shutil.copytree(folder / 'base', tmp_path / 'run' / 'base')
  monkeypatch.setattr(value_head, 'attach', attach)
  assert go(path, tmp_path / 'run') == 1
  said = capsys.readouterr().err.splitlines()[-1]
  assert said == 'educe: config.rl.value: no room for a head'


def test_a_value_head_that_no_loss_reads_is_refused(config, tmp_path, capsys):
  text = pathlib.Path(config.partition('=')[2]).read_text()
  path = tmp_path / 'mine.py'
  path.write_text(
    text.replace("loss=dict(name='sft'),", "loss=dict(name='sft'), value={},")
  )
  assert go(f'--config={path}', tmp_path / 'run') == 1
  said = capsys.readouterr().err.splitlines()[-1]
  assert 'config.base.value=' in said
  assert "config.base.loss reads no values, and algorithm 'sft' trains none" in said


def test_a_finished_run_keeps_the_config_that_it_was_run_with(
  config, both, tmp_path, capsys
):
  text = pathlib.Path(config.partition('=')[2]).read_text()
  path = tmp_path / 'one.py'
  path.write_text(text.replace("dict(stages=('base', 'rl'), base=base, rl=rl)", 'rl'))
  shutil.copytree(both / 'rl', tmp_path / 'run')
  before = (tmp_path / 'run' / 'config.json').read_text()
  assert go(f'--config={path}', tmp_path / 'run', '--config.loss.clip_high=0.4') == 0
  assert 'no step is left' in capsys.readouterr().err
  assert (tmp_path / 'run' / 'config.json').read_text() == before


def test_ppo_without_a_value_head_is_one_line(ppo, tmp_path, capsys):
  text = pathlib.Path(ppo[0].partition('=')[2]).read_text()
  where = tmp_path / 'without.py'
  text = text.replace("value=dict(trunk='separate', init_std=0.1),", '')
  where.write_text(text.replace("dict(stages=('base', 'rl'), base=base, rl=rl)", 'rl'))
  assert go(f'--config={where}', tmp_path / 'run') == 1
  assert 'ppo needs a value head' in capsys.readouterr().err.splitlines()[-1]
  (tmp_path / 'x' / 'checkpoints').mkdir(parents=True)
  flags = [f'--config.value_from={tmp_path / "x"}']
  assert go(f'--config={where}', tmp_path / 'run', *flags) == 1
  assert 'without a section value' in capsys.readouterr().err.splitlines()[-1]


def test_the_page_is_of_the_last_round_with_log_ratios_or_else_of_the_last(tmp_path):
  def write(number, **extra):
    row = {
      'id': 'q', 'prompt': 'p', 'reward': 1.0, 'outcome': 'verified', 'tokens': ['x'],
      'completion': f'round {number}\u2028 and\x85 more', **extra,
    }  # fmt: skip
    transcripts.save([row], tmp_path / 'rollouts' / f'{number:06}.jsonl')

  def shown():
    *_, page = runs.pictures(tmp_path)
    return page.read_text(encoding='utf-8')

  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 1.0}\n')
  for number in range(3):
    write(number, tokens=[f'round {number}'])
  assert 'round 2' in shown()
  write(1, tokens=['round 1'], log_ratio=[0.5])
  assert 'round 1' in shown()
  name = '/'.join(tmp_path.parts[-2:])
  assert f'<h1>{name} · rollouts/000001.jsonl, the first 1</h1>' in shown()


class Placed(BaseException):
  """Ends a run that gets so far."""


@pytest.mark.parametrize(
  ('kind', 'sections'),
  [
    ('scratch', ''),
    ('init_from', "init_from='{adapted}/base'"),
    ('merged', "init_from='{adapted}/rl'"),
    ('kept', "init_from='{adapted}/rl', adapter=adapter"),
    ('again', "init_from='{adapted}/rl', adapter=dict(adapter, alpha=2.0, merge=True)"),
    ('nf4', "init_from='{adapted}/base', adapter=dict(base='nf4')"),
    (
      'int8',
      "model=dict(name='safetensors', path='{golden}'), adapter=dict(base='int8')",
    ),
    ('peft', "model=dict(name='peft', path='{golden}_dora')"),
    ('run', "model=dict(name='educe.policies', path='{adapted}/rl')"),
    ('critic', "value_from='{ppo}/rl', value=dict(trunk='separate')"),
  ],
)
def test_a_model_is_put_together_in_the_memory_of_the_host(
  adapted, ppo, tmp_path, monkeypatch, request, kind, sections
):
  """Here another device stands for the host's processor: the others hold nothing."""
  golden = request.config.rootpath / 'tests' / 'golden' / 'tiny_llama'
  sections = sections.format(adapted=adapted[1], ppo=ppo[1], golden=golden)
  text = pathlib.Path((ppo if kind == 'critic' else adapted)[0].partition('=')[2])
  head, _, _ = text.read_text().partition(
    'return ml_collections.ConfigDict(dict(stages'
  )
  stage = 'rl' if kind == 'critic' else 'base'
  path = tmp_path / 'alone.py'
  path.write_text(
    f'{head}return ml_collections.ConfigDict(dict({stage}, {sections}))\n'
  )
  host = jax.devices()[-1]
  monkeypatch.setattr(sharding, 'host', lambda: host)
  known, made = jax.live_arrays(), []
  seen = {id(x) for x in known}

  def place(params, axes, mesh):
    made.append(params)
    fresh = [
      x for x in jax.live_arrays() if id(x) not in seen and host not in x.devices()
    ]
    made.append(sum(x.nbytes for x in fresh))
    raise Placed

  monkeypatch.setattr(sharding, 'place', place)
  with pytest.raises(Placed):
    go(f'--config={path}', tmp_path / 'run')
  params, elsewhere = made
  for x in jax.tree.leaves(params):
    assert isinstance(x, np.ndarray | np.generic) or x.devices() == {host}
  assert elsewhere < 100
