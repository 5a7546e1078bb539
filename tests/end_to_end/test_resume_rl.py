"""RL killed and resumed equals RL never killed: numbers, rollouts and weights, by bits.

The middle of a round (two passes over two minibatches), an adaptive pool, refills, a
reference that moves, and sampling one round ahead. Real processes, real signals.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from educe.models import scratch
from educe.training import checkpoint, metrics

STEPS = 13  # rounds of 4 steps; checkpoints every 3, so inside rounds
CONFIG = """
import time
import ml_collections
from educe.environments import reward_functions

def letters(prompt, completion, record):  # in half of the groups all are equal
  time.sleep(0.01)  # time to be killed in
  return float(len(completion)) if prompt < '3' else float('a' in completion)

def world():
  prompts = [{{'prompt': f + s + '=', 'id': f + s}} for f in '012345' for s in 'abcd']
  return reward_functions.make(prompts=prompts, functions=letters)

def get_config():
  return ml_collections.ConfigDict(dict(
    steps={steps}, seed=3, save_every=3, keep=2,
    model=dict(name='scratch', preset='chain'),
    tokenizer=dict(path='characters:012345abcdefgh='),
    environment=dict(name='world:world'),
    rollouts=dict(
      prompts=4, group=4, max_new_tokens=4, pool='adaptive', refills=2, workers=0,
      ahead={ahead},
    ),
    advantage=dict(name='rloo'),
    algorithm=dict(
      name='grpo', epochs=2, minibatches=2, reference_every=5, kl_in_reward=0.1,
    ),
    loss=dict(name='grpo', kl_coef=0.01),
    optimizer=dict(name='adamw', learning_rate=1e-2, warmup_steps=2),
    mesh=dict(data=-1),
  ))
"""


def start(folder, name, environment):
  path = os.pathsep.join([str(folder), os.environ.get('PYTHONPATH', '')])
  command = [
    sys.executable, '-m', 'educe', 'train', f'--config={folder / "world.py"}',
    f'--run_dir={folder / name}',
  ]  # fmt: skip
  return subprocess.Popen(
    command, env={**environment, 'PYTHONPATH': path}, stderr=subprocess.PIPE, text=True
  )


def finish(folder, name, environment):
  process = start(folder, name, environment)
  _, errors = process.communicate(timeout=240)
  assert process.returncode == 0, errors[-3000:]
  return errors


def history(folder, name):
  """All numbers but clocks."""
  return [
    {k: v for k, v in record.items() if not k.startswith(('timing/', 'perf/'))}
    for record in metrics.read(folder / name / 'metrics.jsonl')
  ]


def files(folder, name):
  return {p.name: p.read_bytes() for p in (folder / name / 'rollouts').iterdir()}


def weights(folder, name):
  like = scratch.load(preset='chain')[1]
  params = checkpoint.saved_params(folder / name / 'checkpoints', like)
  return {key: bytes(memoryview(params[key])) for key in ('embedding',)}


@pytest.fixture(scope='module')
def environment(one_device, tmp_path_factory):
  """Seven processes compile the same programs: once is enough."""
  return {
    **one_device,
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('cache')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


@pytest.mark.parametrize('ahead', [False, True])
def test_killed_and_resumed_equals_never_killed(tmp_path, environment, ahead):
  (tmp_path / 'world.py').write_text(CONFIG.format(steps=STEPS, ahead=ahead))
  finish(tmp_path, 'whole', environment)
  whole = history(tmp_path, 'whole')
  assert [row['step'] for row in whole] == list(range(1, STEPS + 1))
  stale = [row['sampling/staleness_steps'] for row in whole if 'reward' in row]
  assert stale == ([0, 4, 4, 4] if ahead else [0, 0, 0, 0])
  assert max(row['sampling/prompts'] for row in whole if 'reward' in row) > 4
  assert len({row['loss'] for row in whole}) == STEPS
  far = [row['sampling/logp_difference/max'] for row in whole]
  assert max(far[:4]) < 1e-4
  assert (max(far) > 1e-2) == ahead

  kill = random.Random(os.getpid())
  hows = [(signal.SIGKILL, kill.randint(4, 6)), (signal.SIGTERM, kill.randint(7, 10))]
  for how, step in hows[: 1 + ahead]:
    process = start(tmp_path, 'killed', environment)
    deadline = time.time() + 240
    while process.poll() is None and time.time() < deadline:
      done = history(tmp_path, 'killed')
      kept = (tmp_path / 'killed' / 'checkpoints').glob('[1-9]*')
      if done and done[-1]['step'] >= step and any(x.name.isdigit() for x in kept):
        break
      time.sleep(0.005)
    else:
      pytest.fail(f'never reached step {step}: {process.stderr.read()[-3000:]}')
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    wanted = -9 if how == signal.SIGKILL else 0
    assert process.returncode == wanted, errors[-3000:]
  assert 'resuming' in finish(tmp_path, 'killed', environment)
  assert history(tmp_path, 'killed') == whole
  assert files(tmp_path, 'killed') == files(tmp_path, 'whole')
  assert weights(tmp_path, 'killed') == weights(tmp_path, 'whole')
