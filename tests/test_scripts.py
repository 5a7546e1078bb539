"""The launch scripts: what they start, said to commands that only write it down."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

from educe import cli

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ROOT / 'scripts'
SHELL = sorted(SCRIPTS.glob('*.sh'))
FILLED = dict(
  NAME='gsm8k', IMAGE='registry/educe:1', CLAIM='shared', CONFIG='configs/sft.py:gsm8k',
  FLAGS='--config.steps=9', SLICES='2', HOSTS='4', CHIPS='4',
  ACCELERATOR='tpu-v6e-slice', TOPOLOGY='4x4',
)  # fmt: skip


@pytest.fixture
def desk(tmp_path):
  """run(script, *arguments, **environment) -> (the process, what each stand-in was told).

  Commands that are not here (gcloud, srun, …) are stand-ins that write their arguments
  down; `say` is what a stand-in does besides, in shell.
  """
  folder, notes = tmp_path / 'bin', tmp_path / 'notes'
  folder.mkdir()
  notes.mkdir()

  def stand_in(name, say=''):
    file = folder / name
    file.write_text(
      f'#!{sys.executable}\nimport json, os, sys\n'
      f'open("{notes}/{name}." + str(os.getpid()), "w").write(json.dumps(sys.argv[1:]))\n'
      + (f'os.execv("/bin/bash", ["bash", "-c", {say!r}])\n' if say else '')
    )
    file.chmod(0o755)

  def start(script, *arguments, **environment):
    path = f'{folder}{os.pathsep}{os.environ["PATH"]}'
    return subprocess.Popen(
      ['bash', SCRIPTS / script, *arguments],
      env={**os.environ, 'PATH': path, **environment},
      cwd=ROOT,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )

  def told(name):
    files = sorted(notes.glob(f'{name}.*'), key=lambda file: file.stat().st_mtime_ns)
    return [json.loads(file.read_text()) for file in files]

  def run(script, *arguments, names=(), **environment):
    for name in names:
      stand_in(name)
    process = start(script, *arguments, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  run.stand_in, run.start, run.told = stand_in, start, told
  return run


def educe(words):
  """The arguments of `python -m educe` in a command line, checked by its own parser."""
  at = words.index('educe')
  assert words[at - 1] == '-m'
  arguments, rest = cli.parser().parse_known_args(words[at + 1 :])
  assert all(flag.startswith('--config.') for flag in rest), rest
  config = getattr(arguments, 'config', None)
  if config is not None:
    assert (ROOT / config.partition(':')[0]).is_file()
  return arguments


def wait_for(condition, seconds=30):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)


@pytest.mark.parametrize('path', SHELL, ids=lambda path: path.name)
def test_the_shell_can_read_it_and_it_can_be_run(path):
  subprocess.run(['bash', '-n', path], check=True)
  assert os.access(path, os.X_OK)
  text = path.read_text()
  assert text.startswith('#!/usr/bin/env bash\n')
  assert re.search(r'^set -e?u', text, re.M)  # a variable that is not set is an error


def jobset(**changes):
  text = (SCRIPTS / 'gke.yaml').read_text()
  body = ''.join(line for line in text.splitlines(True) if not line.startswith('#'))
  return string.Template(body).substitute(FILLED | changes)


def schema():
  found = json.loads((ROOT / 'tests' / 'golden' / 'jobset.schema.json').read_text())
  return jsonschema.Draft202012Validator(found)


def test_the_jobset_is_one():
  document = yaml.safe_load(jobset())
  schema().validate(document)
  (job,) = document['spec']['replicatedJobs']
  assert job['replicas'] == 2
  assert job['template']['spec']['parallelism'] == 4
  pod = job['template']['spec']['template']['spec']
  assert pod['nodeSelector']['cloud.google.com/gke-tpu-topology'] == '4x4'
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  (line,) = container['args']
  words = shlex.split(line)
  assert words[:3] == ['exec', 'bash', 'scripts/stoppable.sh']
  arguments = educe(words)
  assert arguments.multihost
  assert arguments.config == 'configs/sft.py:gsm8k'
  mount = container['volumeMounts'][0]['mountPath']
  assert arguments.run_dir.startswith(mount)
  assert '--config.steps=9' in words
  # Time to save in: more than the 30 seconds that pods have by default.
  assert pod['terminationGracePeriodSeconds'] >= 120


@pytest.mark.parametrize(
  ('before', 'after'),
  [
    ('backoffLimit', 'backofLimit'),
    ('completionMode: Indexed', 'completionMode: indexed'),
    ('maxRestarts: 100', 'maxRestarts: often'),
    ('v1alpha2', 'v1alpha1'),
    ('claimName: shared', 'name: shared'),
    ('restartPolicy: Never', 'restartPolicy: Always'),
    ('google.com/tpu: 4', 'google.com/tpu: all'),
    ('parallelism: 4', "parallelism: '4'"),
  ],
)
def test_the_schema_finds_what_a_cluster_would_refuse(before, after):
  text = jobset()
  assert before in text
  document = yaml.safe_load(text.replace(before, after))
  assert list(schema().iter_errors(document))


def test_gke_fills_in_all_that_stands_open(desk):
  named = set(re.findall(r'\$\{(\w+)\}', (SCRIPTS / 'gke.yaml').read_text()))
  assert named == set(FILLED)
  if shutil.which('envsubst') is None:
    desk.stand_in('envsubst', 'cat')  # gettext is not here: what is filled in, above
  need = {name: FILLED[name] for name in ('NAME', 'IMAGE', 'CLAIM', 'CONFIG')}
  code, out, err = desk('gke.sh', APPLY='cat', **need)
  assert code == 0, err
  if shutil.which('envsubst') is not None:
    schema().validate(yaml.safe_load(out))
    assert '${' not in re.sub('(?m)^#.*', '', out)
  code, _, err = desk('gke.sh', APPLY='cat', **{**need, 'CLAIM': ''})
  assert code != 0
  assert 'CLAIM' in err


TPU = dict(TPU='slice', ZONE='z', PROJECT='p', RUN_DIR='/shared/run', REPOSITORY='r')


def test_tpu_vm_runs_on_every_worker_and_stops_by_one(desk):
  flags = ['--config=configs/sft.py:gsm8k', "--config.source.split='[:5]'"]
  code, _, err = desk('tpu_vm.sh', 'train', *flags, names=['gcloud'], **TPU)
  assert code == 0, err
  (told,) = desk.told('gcloud')
  assert told[:5] == ['compute', 'tpus', 'tpu-vm', 'ssh', 'slice']
  assert {'--worker=all', '--zone=z', '--project=p'} <= set(told)
  (command,) = [x.removeprefix('--command=') for x in told if '--command=' in x]
  subprocess.run(['bash', '-n', '-c', command], check=True)
  words = shlex.split(command)
  begin, end = words.index('-m'), words.index('>')
  arguments = educe(words[begin - 1 : end])
  assert arguments.multihost
  assert (arguments.run_dir, arguments.config) == ('/shared/run', flags[0][9:])
  assert "--config.source.split='[:5]'" in words  # quoted on its way through two shells
  for what, worker in (('setup', 'all'), ('stop', '0'), ('log', '0')):
    code, _, err = desk('tpu_vm.sh', what, **TPU)
    assert code == 0, err
    assert f'--worker={worker}' in desk.told('gcloud')[-1]
  assert 'kill -TERM' in desk.told('gcloud')[-2][-1]
  code, _, err = desk('tpu_vm.sh', 'tarin', **TPU)
  assert code == 1
  assert 'tarin is not setup, train, log or stop' in err
  code, _, err = desk('tpu_vm.sh', 'train', **{**TPU, 'RUN_DIR': ''})
  assert code != 0
  assert 'RUN_DIR' in err


# Options of `xpk workload create` as its --help says (xpk 1.16).
XPK = {
  '--workload', '--cluster', '--zone', '--project', '--tpu-type', '--num-slices',
  '--docker-image', '--storage', '--max-restarts',
  '--termination-grace-period-seconds', '--command',
}  # fmt: skip


def test_xpk_gives_the_same_command(desk):
  names = dict(
    NAME='w', CLUSTER='c', ZONE='z', PROJECT='p', IMAGE='i', RUN_DIR='/s/r', STORAGE='n'
  )
  flags = ['--config=configs/grpo.py:chain', '--config.mesh.fsdp=-1']
  code, _, err = desk('xpk.sh', *flags, names=['xpk'], **names)
  assert code == 0, err
  (told,) = desk.told('xpk')
  assert told[:2] == ['workload', 'create']
  assert {word.partition('=')[0] for word in told[2:]} <= XPK
  (command,) = [x.removeprefix('--command=') for x in told if '--command=' in x]
  arguments = educe(shlex.split(command))
  assert arguments.multihost
  assert arguments.run_dir == '/s/r'


def test_slurm_starts_a_task_for_each_process(desk):
  code, _, err = desk(
    'slurm.sh', '--config=configs/sft.py:gsm8k', names=['srun', 'scontrol'],
    RUN_DIR='/s/r', SLURM_JOB_ID='7',
  )  # fmt: skip
  assert code == 0, err
  (told,) = desk.told('srun')
  arguments = educe(told)
  assert arguments.multihost
  assert arguments.run_dir == '/s/r'
  assert not desk.told('scontrol')  # it is done: it need not come again
  text = (SCRIPTS / 'slurm.sh').read_text()
  ahead = int(re.search(r'^#SBATCH --signal=B:TERM@(\d+)$', text, re.M)[1])
  assert ahead >= 60
  # A directive behind the first command would not be read.
  first = re.search(r'^[^#\n]', text, re.M).start()
  assert '#SBATCH' not in text[first:]


# A command that saves when it is told to stop, as educe does, and exits with $1.
SAVES = (
  'trap "touch $FILE.saved; exit $CODE" TERM; touch $FILE; while :; do sleep 0.05; done'
)


def test_slurm_queues_again_what_was_stopped(desk, tmp_path):
  desk.stand_in('srun', SAVES)
  desk.stand_in('scontrol')
  file = tmp_path / 'began'
  process = desk.start(
    'slurm.sh', '--config=c', RUN_DIR='/s', SLURM_JOB_ID='7', FILE=str(file), CODE='0'
  )
  wait_for(file.exists)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 0
  assert file.with_suffix('.saved').exists()
  assert desk.told('scontrol') == [['requeue', '7']]


def test_slurm_does_not_queue_again_what_failed(desk):
  desk.stand_in('srun', 'exit 3')
  desk.stand_in('scontrol')
  code, _, _ = desk('slurm.sh', '--config=c', RUN_DIR='/s', SLURM_JOB_ID='7')
  assert code == 3
  assert not desk.told('scontrol')


@pytest.mark.parametrize('code', [0, 3])
def test_stoppable_leaves_the_code_as_it_is(desk, code):
  assert desk('stoppable.sh', 'bash', '-c', f'exit {code}')[0] == code


@pytest.mark.parametrize(('saved', 'said'), [('0', 143), ('7', 7)])
def test_what_was_stopped_is_not_done(desk, tmp_path, saved, said):
  file = tmp_path / 'began'
  process = desk.start('stoppable.sh', 'bash', '-c', SAVES, FILE=str(file), CODE=saved)
  wait_for(file.exists)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == said
  assert file.with_suffix('.saved').exists()


def test_local_starts_as_many_as_are_asked_for(desk):
  desk.stand_in('python_here')
  flags = ['--config=configs/sft.py:demo,debug', '--run_dir=runs/two']
  code, _, err = desk('local.sh', *flags, PYTHON='python_here', PROCESSES='3')
  assert code == 0, err
  told = [educe(words) for words in desk.told('python_here')]
  assert sorted(x.process for x in told) == [0, 1, 2]
  assert {x.processes for x in told} == {3}
  assert len({x.coordinator for x in told}) == 1
  assert not any(x.multihost for x in told)


def test_local_fails_where_one_does_and_stops_all(desk, tmp_path):
  desk.stand_in('python_here', 'exit 5')
  assert desk('local.sh', '--config=c', PYTHON='python_here')[0] == 5
  file = tmp_path / 'began'
  desk.stand_in('python_here', SAVES.replace('$FILE', '$FILE.$$'))
  process = desk.start(
    'local.sh', '--config=c', PYTHON='python_here', FILE=str(file), CODE='0'
  )
  wait_for(lambda: len(list(tmp_path.glob('began.*'))) == 2)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 0
  assert len(list(tmp_path.glob('began.*.saved'))) == 2


def test_what_the_guide_says_to_type_exists():
  text = (SCRIPTS / 'README.md').read_text()
  lines = re.findall(r'^(?:python -m educe|scripts/local\.sh) .*$', text, re.M)
  assert lines
  for line in lines:
    words = shlex.split(line, comments=True)
    if words[0] == 'scripts/local.sh':
      words = ['python', '-m', 'educe', 'train', *words[1:]]
    educe(words)
  for name in re.findall(r'scripts/[\w.]+', text):
    assert (ROOT / name).exists(), name
