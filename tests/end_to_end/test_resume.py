"""Killed and resumed equals never killed: losses and examples, bit for bit.

Real processes, real signals, Grain workers, three times through the data.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from educe.training import metrics

STEPS = 24  # 30 records in batches of 4: epochs end inside steps 8, 15 and 23
CONFIG = """
import ml_collections

def get_config():
  return ml_collections.ConfigDict(dict(
    steps={steps}, seed=3, save_every=3, keep=2,
    model=dict(name='scratch', preset='debug'),
    tokenizer=dict(path='byte'),
    algorithm=dict(name='sft'),
    loss=dict(name='sft'),
    source=dict(name='jsonl', path={data!r}),
    data=dict(batch_size=4, max_length=48, packing={packing}, workers=1, seed=5),
    optimizer=dict(name='adamw', learning_rate=1e-2, warmup_steps=3),
    mesh=dict(data=-1),
  ))
"""


def command(folder, name):
  return [
    sys.executable, '-m', 'educe', 'train', f'--config={folder / "config.py"}',
    f'--run_dir={folder / name}',
  ]  # fmt: skip


@pytest.fixture(scope='module')
def environment(one_device, tmp_path_factory):
  """Ten processes compile the same programs: once is enough."""
  return {
    **one_device,
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('cache')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def start(folder, name, environment):
  return subprocess.Popen(
    command(folder, name), env=environment, stderr=subprocess.PIPE, text=True
  )


def finish(folder, name, environment):
  process = start(folder, name, environment)
  _, errors = process.communicate(timeout=240)
  assert process.returncode == 0, errors[-3000:]
  return errors


def history(folder, name):
  records = metrics.read(folder / name / 'metrics.jsonl')
  keys = ('step', 'loss', 'grad_norm', 'learning_rate', 'data/ids_crc32')
  return [tuple(record[key] for key in keys) for record in records]


def wait_for(folder, name, step, process):
  """Until metrics.jsonl shows `step`."""
  deadline = time.time() + 240
  while time.time() < deadline and process.poll() is None:
    done = history(folder, name)
    if done and done[-1][0] >= step:
      return
    time.sleep(0.005)
  pytest.fail(f'{name} never reached step {step}: {process.stderr.read()[-3000:]}')


@pytest.mark.parametrize('packing', [False, True])
def test_killed_and_resumed_equals_never_killed(tmp_path, environment, packing):
  rng = random.Random(0)
  words = ['one', 'two', 'three', 'four']
  rows = [
    {'prompt': f'{i} ' + ' '.join(rng.choices(words, k=3)), 'completion': str(i * i)}
    for i in range(30)
  ]
  data = tmp_path / 'data.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  config = CONFIG.format(steps=STEPS, data=str(data), packing=packing)
  (tmp_path / 'config.py').write_text(config)

  finish(tmp_path, 'whole', environment)
  whole = history(tmp_path, 'whole')
  assert [row[0] for row in whole] == list(range(1, STEPS + 1))
  assert len({row[-1] for row in whole}) > STEPS / 2  # the data do change

  # SIGKILL somewhere in the first epoch, again in the second, SIGTERM in the third.
  kill = random.Random(os.getpid())
  for how, step in (
    (signal.SIGKILL, kill.randint(4, 8)),
    (signal.SIGKILL, kill.randint(11, 15)),
    (signal.SIGTERM, kill.randint(17, 20)),
  ):
    process = start(tmp_path, 'killed', environment)
    wait_for(tmp_path, 'killed', step, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    if how == signal.SIGKILL:
      assert process.returncode == -9
    else:
      assert process.returncode == 0, errors[-3000:]
      last = history(tmp_path, 'killed')[-1][0]
      assert last == STEPS or f'stopped at step {last}, saved' in errors
      assert (tmp_path / 'killed' / 'checkpoints' / str(last)).is_dir()
  errors = finish(tmp_path, 'killed', environment)
  assert 'resuming' in errors
  assert history(tmp_path, 'killed') == whole
  # … and the weights themselves.
  assert weights(tmp_path / 'killed') == weights(tmp_path / 'whole')


def weights(run_dir: pathlib.Path):
  import jax

  from educe.models import scratch
  from educe.training import checkpoint

  like = scratch.load(preset='debug')[1]
  params = checkpoint.saved_params(run_dir / 'checkpoints', like, STEPS)
  return [leaf.tobytes() for leaf in map(jax.device_get, jax.tree.leaves(params))]
