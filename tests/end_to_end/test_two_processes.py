"""Two processes of four devices are one run: they train, stop and save as one, and other
processes go on from what they saved.

Real processes, real signals; a model whose params lie over the devices of both.
"""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import fake_engine
import pytest

from educe.training import metrics

LIMIT = 400  # seconds; a machine may be busy
# What one device adds in one order, several hosts add in another: float32's last digits.
CLOSE = dict(rel=1e-5, abs=2e-6)
SFT = """
import ml_collections

def get_config():
  return ml_collections.ConfigDict(dict(
    steps=400, seed=3, save_every={save_every}, keep=400,
    model=dict(name='scratch', preset='debug'),
    tokenizer=dict(path='byte'),
    algorithm=dict(name='sft'),
    loss=dict(name='sft'),
    source=dict(name='jsonl', path={data!r}),
    data=dict(batch_size=8, max_length=40, seed=5),
    optimizer=dict(
      name='adamw', learning_rate=1e-2, warmup_steps=3, schedule='constant',
    ),
    mesh=dict(data=1, fsdp=-1),
  ))
"""
RL = """
import json
import os
import pathlib
import signal
import ml_collections
from educe.environments import reward_functions

def letters(prompt, completion, record):
  who = os.environ['WHO']
  asked = pathlib.Path(__file__).parent / f'asked.{{who}}'
  with asked.open('a') as file:
    file.write(prompt + '\\n')
  if who == '2.1' and len(asked.read_text().split()) == {stop_at}:
    os.kill(os.getpid(), signal.SIGTERM)
  return float(len(completion)) if prompt < '3' else float('a' in completion)

def world():
  prompts = [{{'prompt': f + s + '=', 'id': f + s}} for f in '012345' for s in 'abcd']
  return reward_functions.make(prompts=prompts, functions=letters)

def get_config():
  return ml_collections.ConfigDict(dict(
    steps={steps}, seed=3, save_every=100,
    model=dict(name='scratch', preset='chain'),
    tokenizer=dict(path='characters:012345abcdefgh='),
    environment=dict(name='world:world'),
    rollouts=dict(prompts=4, group=4, max_new_tokens=3, workers=0, server={server}),
    advantage=dict(name='rloo'),
    algorithm=dict(name='grpo', minibatches=2, reference_every={reference}),
    loss=dict(name='grpo', kl_coef=0.1),
    optimizer=dict(name='adamw', learning_rate=1e-2, warmup_steps=2),
    mesh=dict(data=1, fsdp=-1),
  ))
"""


def free_port():
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


def start(config, run_dir, *flags, processes=2, wait=LIMIT, only=None):
  """The processes, 8 virtual devices in all, each with its messages in a file."""
  address, started = f'localhost:{free_port()}', []
  for index in range(processes) if only is None else [only]:
    joining = [
      f'--coordinator={address}', f'--processes={processes}', f'--process={index}',
      f'--wait={wait}',
    ]  # fmt: skip
    environment = {
      **os.environ,
      'WHO': f'{processes}.{index}',
      'PYTHONPATH': os.pathsep.join(
        [str(config.parent), os.environ.get('PYTHONPATH', '')]
      ),
      'JAX_COMPILATION_CACHE_DIR': str(config.parent / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'XLA_FLAGS': ' '.join(
        x for x in os.environ['XLA_FLAGS'].split() if 'device_count' not in x
      )
      + f' --xla_force_host_platform_device_count={8 // processes}',
    }
    command = [
      sys.executable, '-m', 'educe', 'train', f'--config={config}',
      f'--run_dir={run_dir}', *flags, *(joining if processes > 1 else []),
    ]  # fmt: skip
    said = run_dir.with_name(f'{run_dir.name}.{processes}.{index}.txt')
    with said.open('w') as file:
      process = subprocess.Popen(
        command, env=environment, stderr=file, stdout=file, text=True
      )
    process.said = said
    started.append(process)
  return started


def finish(started, code=0):
  """What each of them said."""
  try:
    for process in started:
      process.wait(LIMIT)
  finally:
    for process in started:
      process.kill()
  said = [process.said.read_text() for process in started]
  for process, text in zip(started, said, strict=True):
    assert process.returncode == code, '\n'.join(x[-3000:] for x in said)
    assert 'Traceback' not in text
    assert 'stack trace' not in text
  return said


def history(run_dir):
  """step -> its numbers, but for clocks and what is of process 0 alone."""
  beside = ('timing/', 'perf/', 'data/')
  return {
    record['step']: {k: v for k, v in record.items() if not k.startswith(beside)}
    for record in metrics.read(run_dir / 'metrics.jsonl')
  }


def same(ours, theirs, steps):
  for step in steps:
    assert ours[step].keys() == theirs[step].keys()
    assert theirs[step]['loss'] == pytest.approx(ours[step]['loss'], rel=1e-6, abs=1e-6)
    for name, value in ours[step].items():
      assert theirs[step][name] == pytest.approx(value, **CLOSE), (step, name)


def checkpoints(run_dir):
  """Those that are committed; nothing else may lie there."""
  return sorted(int(x.name) for x in (run_dir / 'checkpoints').iterdir())


def test_they_stop_as_one_and_others_go_on(tmp_path):
  rng = random.Random(0)
  words = ['one', 'two', 'three', 'four']
  rows = [  # every seventh is too long, so that the shards read on at their own pace
    {
      'prompt': ' '.join(rng.choices(words, k=3 + 9 * (i % 7 == 3))),
      'completion': str(i),
    }
    for i in range(30)
  ]
  data = tmp_path / 'data.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  config = tmp_path / 'config.py'
  config.write_text(SFT.format(save_every=3, data=str(data)))

  cut = tmp_path / 'cut'
  started = start(config, cut)
  deadline = time.time() + LIMIT
  while len(history(cut)) < 8 and time.time() < deadline:
    assert all(process.poll() is None for process in started), finish(started)
    time.sleep(0.02)
  started[1].send_signal(signal.SIGTERM)
  said = finish(started)
  whole = history(cut)
  last = max(whole)
  assert 8 <= last < 400
  assert f'stopped at step {last}, saved' in said[0]
  assert 'stopped' not in said[1]  # the first speaks for all
  assert list(whole) == list(range(1, last + 1))
  assert checkpoints(cut) == [*range(3, last, 3), last]

  # One process with all devices goes on from where they were stopped; another from step 3,
  # to the same end; then two from step 6 of that.
  after, once, twice = (tmp_path / name for name in ('after', 'once', 'twice'))
  for to, of, step, processes, end in (
    (after, cut, last, 1, last + 2),
    (once, cut, 3, 1, last + 2),
    (twice, once, 6, 2, 8),
  ):
    shutil.copytree(of, to)
    for folder in (to / 'checkpoints').iterdir():
      if int(folder.name) > step:
        shutil.rmtree(folder)
    said = finish(start(config, to, f'--config.steps={end}', processes=processes))
    assert f'resuming from step {step} of {end}' in said[0]
    again = history(to)
    assert list(again) == list(range(1, end + 1))
    same(whole, again, range(1, min(end, last) + 1))
    assert checkpoints(to)[-1] == end
  same(history(once), history(after), [last + 1, last + 2])
  assert history(once)[7] != whole[3]


def rollouts(run_dir):
  files = sorted((run_dir / 'rollouts').iterdir())
  rows = [json.loads(x) for file in files for x in file.read_text().splitlines()]
  return [(r['id'], r['completion'], r['reward'], r['outcome']) for r in rows]


def test_rounds_are_the_same_judged_in_shares_and_stopped_in_the_middle(tmp_path):
  config = tmp_path / 'world.py'
  # Of 8 verdicts a round: SIGTERM comes while the second is judged, for steps 3 and 4.
  config.write_text(RL.format(steps=6, stop_at=12, server=None, reference=0))
  run_dirs = tmp_path / '1', tmp_path / '2'

  def asked(*who):
    return [(tmp_path / f'asked.{w}').read_text().split() for w in who]

  finish(start(config, run_dirs[0], processes=1))
  (whole,) = asked('1.0')
  said = finish(start(config, run_dirs[1]))
  (last,) = checkpoints(run_dirs[1])
  assert 3 <= last < 6
  assert f'stopped at step {last}, saved' in said[0]
  assert 'stopped' not in said[1]
  assert list(history(run_dirs[1])) == list(range(1, last + 1))
  said = finish(start(config, run_dirs[1], processes=1))
  assert f'resuming from step {last} of 6' in said[0]

  one, two = map(history, run_dirs)
  assert list(two) == list(range(1, 7))
  same(one, two, two)
  assert rollouts(run_dirs[0]) == rollouts(run_dirs[1])
  first, second, then = asked('2.0', '2.1', '1.0')
  assert len(first) == len(second) == (last + 1) // 2 * 8
  assert sorted(first + second + then[len(whole) :]) == sorted(whole)


def test_an_engine_samples_in_shares_and_what_it_denies_one_is_told_by_all(
  listen, tmp_path
):
  engine, asked = fake_engine.Engine(), []

  def answer(path, body, headers):
    who = headers['Authorization'].removeprefix('Bearer ')
    if path != '/v1/completions':
      asked.append((who, path))
      return engine(path, body, headers)
    step = int(pathlib.Path(engine.folder).name)
    if step == 2 and who in ('1.0', '2.1'):
      return 503, {}, b'tired'
    if step < 2:
      asked.append((who, step, body['prompt'], body['seed']))
    return engine(path, body, headers)

  url = f'{listen(answer)}/v1'
  server = dict(url=url, model='policy', api_key_env='WHO', retries=0, timeout=100.0)
  config = tmp_path / 'world.py'
  config.write_text(RL.format(steps=3, stop_at=None, server=server, reference=None))
  run_dirs = tmp_path / '1', tmp_path / '2'
  flags = [
    '--config.algorithm.minibatches=1', '--config.loss.kl_coef=0.0',
    '--config.optimizer.learning_rate=0.1', '--config.rollouts.show_every=0',
  ]  # fmt: skip
  for processes, run_dir in enumerate(run_dirs, 1):
    said = finish(start(config, run_dir, *flags, processes=processes), 1)
  why = f'rollouts.server policy at {url}: 1 of 8 questions without an answer'
  first, second = (text.strip().splitlines()[-1] for text in said)
  assert first.startswith(f'educe: process 0: process 1: {why}')
  assert second.startswith(f'educe: process 1: {why}')
  assert 'HTTP 503 tired' in first
  assert 'HTTP 503 tired' in second

  one, two = map(history, run_dirs)
  assert list(two) == [1, 2]
  same(one, two, two)
  assert rollouts(run_dirs[0]) == rollouts(run_dirs[1])
  assert checkpoints(run_dirs[1]) == [2]
  told = {who: [x[1:] for x in asked if x[0] == who] for who in ('1.0', '2.0', '2.1')}
  posts = [('/collective_rpc',), ('/reset_prefix_cache',)]
  assert [x for x in told['2.0'] if len(x) == 1] == posts * 3  # by the first alone
  assert len(told['2.1']) == 2 * 8
  both = told['2.0'] + told['2.1']
  assert sorted(both, key=str) == sorted(told['1.0'], key=str)


def test_a_host_that_never_arrives_is_named(tmp_path):
  config = tmp_path / 'config.py'
  config.write_text(SFT.format(save_every=3, data='data.jsonl'))
  began = time.time()
  first = start(config, tmp_path / 'a', wait=1, only=0)
  second = start(config, tmp_path / 'b', wait=1, only=1)
  said = [*finish(first, 1), *finish(second, 1)]
  assert time.time() - began < 100
  for text, who, why in zip(
    said, ('1', r'0 \(\S+\)'), ('', r' \(\S+: .*refused\)'), strict=True
  ):
    assert re.fullmatch(
      f'educe: waited 1 s for process {who} of 2: it never arrived{why}; look at its log, '
      'or give it more time with --wait',
      text.strip(),
    )
  assert not pathlib.Path(tmp_path / 'a').exists()
