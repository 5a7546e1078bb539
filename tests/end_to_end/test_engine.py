"""Runs whose rollouts an engine in another process samples, at the policy's own weights."""

import errno
import pathlib

import fake_engine
import numpy as np
import pytest
import safetensors.numpy

from educe import cli
from educe.rollouts import transcripts
from educe.training import metrics

pytestmark = pytest.mark.usefixtures('no_pictures')
CONFIG = """
import ml_collections

def get_config():
  return ml_collections.ConfigDict(dict(
    seed=0, steps=4, save_every=2, mesh=dict(data=-1),
    model=dict(name='scratch', preset='chain'),
    tokenizer=dict(path='characters:012345abcdefgh='),
    environment=dict(name='chain', depth=2, part='train'),
    judge=dict(name='length', target=8),
    rollouts=dict(
      prompts=2, group=4, max_new_tokens=8, workers=0, show_every=1, server=dict(
        url=URL, model='policy', retries=0, timeout=60.0, EXTRA
      ), MORE
    ),
    advantage=dict(name='rloo'),
    algorithm=dict(name='grpo'),
    loss=dict(name='grpo', sampler_correction='token_truncate'),
    optimizer=dict(name='adamw', learning_rate=1e-2, schedule='constant'),
  ))
"""


def train(folder, url, *flags, name='run', extra='', more=''):
  text = CONFIG.replace('URL', repr(f'{url}/v1'))
  (folder / 'config.py').write_text(text.replace('EXTRA', extra).replace('MORE', more))
  return cli.main(
    ['train', f'--config={folder}/config.py', f'--run_dir={folder}/{name}', *flags]
  )


def rows(folder, name='run'):
  return [r for r in metrics.read(folder / name / 'metrics.jsonl') if 'loss' in r]


def logp_ratios(folder, number, name='run'):
  """What the policy of the update says of the engine's tokens, against what that said."""
  file = folder / name / 'rollouts' / f'{number:06}.jsonl'
  return np.concatenate([row['log_ratio'] for row in transcripts.load(file)])


def test_grpo_on_policy(listen, tmp_path, capsys):
  engine = fake_engine.Engine()
  url = listen(engine)
  flags = ['--config.loss.sampler_correction=none']
  assert train(tmp_path, url, *flags) == 0
  said = ' '.join(capsys.readouterr().err.split())
  assert 'warning: rollouts.server samples with other kernels' in said
  run = rows(tmp_path)
  assert [r['step'] for r in run] == [1, 2, 3, 4]
  assert [r['sampling/staleness_steps'] for r in run] == [0, 0, 0, 0]
  # The weights move (`ahead`, below, shows how far), and still every token's log-prob is
  # that of the policy.
  assert any(r['reward_std'] > 0 for r in run[:3])
  assert all(r['sampling/logp_difference/max'] < 1e-4 for r in run)
  for number in range(4):
    assert np.abs(logp_ratios(tmp_path, number)).max() < 1e-4
  assert all(r['timing/export_seconds'] > 0 for r in run)
  assert len(engine.asked) == 4 * 8
  # Each round by the weights of its own step.
  steps = [int(pathlib.Path(folder).name) for folder in engine.served]
  assert steps == [step for step in range(4) for _ in range(8)]
  assert sorted(p.name for p in (tmp_path / 'run' / 'server').iterdir()) == [
    '00000003',
    'current',
  ]


def test_ahead_is_exported_and_sampled_while_training_goes_on(listen, tmp_path):
  engine = fake_engine.Engine()
  assert train(tmp_path, listen(engine), more='ahead=True') == 0
  run = rows(tmp_path)
  assert [r['sampling/staleness_steps'] for r in run] == [0, 1, 1, 1]
  steps = [int(pathlib.Path(folder).name) for folder in engine.served]
  assert steps[: 4 * 8] == [step for step in (0, 0, 1, 2) for _ in range(8)]
  # Now an update is of another policy than the one that sampled.
  assert run[0]['sampling/logp_difference/max'] < 1e-4
  assert max(r['sampling/logp_difference/max'] for r in run[1:]) > 1e-2


def test_fewer_exports_say_how_stale_they_are_and_a_run_goes_on_the_same(
  listen, tmp_path
):
  engine = fake_engine.Engine()
  url = listen(engine)
  assert train(tmp_path, url, extra='export_every=3', name='whole') == 0
  whole = rows(tmp_path, 'whole')
  assert [r['sampling/staleness_steps'] for r in whole] == [0, 1, 2, 0]
  assert [int(f[-8:]) for _, f in engine.told] == [0, 3]
  # Stopped in the middle; an engine that was started anew takes over.
  assert train(tmp_path, url, '--config.steps=2', extra='export_every=3') == 0
  url = listen(fake_engine.Engine())
  assert train(tmp_path, url, extra='export_every=3') == 0
  again = rows(tmp_path)
  assert [r['sampling/staleness_steps'] for r in again] == [0, 1, 2, 0]
  for a, b in zip(again, whole, strict=True):
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-5, abs=1e-7)
    assert a['reward'] == b['reward']


def test_an_engine_that_goes_down_costs_one_line_and_no_step(listen, tmp_path, capsys):
  engine, asked = fake_engine.Engine(), []

  def answer(path, body, headers):
    asked.extend([path] * (path == '/v1/completions'))
    return (503, {}, b'tired') if len(asked) > 20 else engine(path, body, headers)

  url = listen(answer)
  assert train(tmp_path, url) == 1
  said = capsys.readouterr().err.strip().splitlines()[-1]
  assert said.startswith(f'educe: rollouts.server policy at {url}/v1: ')
  assert 'HTTP 503 tired' in said
  assert [r['step'] for r in rows(tmp_path)] == [1, 2]
  assert (tmp_path / 'run' / 'checkpoints' / '2').is_dir()
  honest = listen(fake_engine.Engine())
  assert train(tmp_path, honest) == 0
  assert train(tmp_path, honest, name='whole') == 0
  for a, b in zip(rows(tmp_path), rows(tmp_path, 'whole'), strict=True):
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-5, abs=1e-7)


def test_a_full_disk_costs_one_line_and_no_checkpoint(
  listen, tmp_path, capsys, monkeypatch
):
  saves, real = [], safetensors.numpy.save_file

  def save_file(*arguments):
    saves.append(1)
    if len(saves) == 3:
      raise OSError(errno.ENOSPC, 'No space left on device')
    return real(*arguments)

  engine = fake_engine.Engine()
  url = listen(engine)
  with monkeypatch.context() as patched:
    patched.setattr(safetensors.numpy, 'save_file', save_file)
    assert train(tmp_path, url) == 1
  said = capsys.readouterr().err.strip().splitlines()[-1]
  assert 'the weights for rollouts.server could not be written' in said
  assert 'No space left' in said
  assert [r['step'] for r in rows(tmp_path)] == [1, 2]
  assert train(tmp_path, url) == 0
  assert [r['step'] for r in rows(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
  ('flags', 'wrong'),
  [
    (['--config.rollouts.temperature=0.7'], 'config.rollouts.temperature=0.7 with'),
    (['--config.rollouts.top_k=3'], 'no engine says how much probability'),
    (['--config.rollouts.server.url=x'], 'config.rollouts.server.url='),
    (['--config.rollouts.server.relaod=vllm'], 'server:connect|takes no'),
  ],
)
def test_mistakes_are_told_before_anything_is_asked(
  listen, tmp_path, capsys, flags, wrong
):
  asked = []
  url = listen(lambda *question: asked.append(question))
  assert train(tmp_path, url, *flags, extra="reload='vllm',", more='top_k=0,') == 1
  said = capsys.readouterr().err.strip().splitlines()[-1]
  assert any(part in said for part in wrong.split('|')), said
  assert not asked


def test_a_policy_that_the_engine_does_not_serve_cannot_be_asked(
  listen, tmp_path, capsys
):
  text = CONFIG.replace("name='grpo')", "name='online_dpo', batch_size=4, alpha=0.1)")
  text = text.replace("name='grpo', sampler_correction='token_truncate'", "name='dpo'")
  text = text.replace("advantage=dict(name='rloo'),", '')
  text = text.replace('URL', "'http://127.0.0.1:9/v1'")
  (tmp_path / 'config.py').write_text(text.replace('EXTRA', '').replace('MORE', ''))
  flags = [f'--config={tmp_path}/config.py', f'--run_dir={tmp_path}/run']
  assert cli.main(['train', *flags]) == 1
  said = capsys.readouterr().err.strip().splitlines()[-1]
  assert 'rollouts.server serves the policy alone' in said
