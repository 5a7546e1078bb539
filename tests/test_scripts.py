"""The launch scripts: what they start, said to commands that only write it down."""

import dataclasses
import json
import math
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

from educe import cli, mesh_checks, paths, recipes, sharding

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
  down; `say` is what a stand-in does besides, in shell, with these arguments.
  """
  folder, notes = tmp_path / 'bin', tmp_path / 'notes'
  folder.mkdir()
  notes.mkdir()

  def stand_in(name, say=''):
    file = folder / name
    file.write_text(
      f'#!{sys.executable}\nimport json, os, sys\n'
      f'open("{notes}/{name}." + str(os.getpid()), "w").write(json.dumps(sys.argv[1:]))\n'
      + (f'os.execv("/bin/bash", ["bash", "-c", {say!r}, *sys.argv])\n' if say else '')
    )
    file.chmod(0o755)

  here = {k: v for k, v in os.environ.items() if k != 'EDUCE_DATA'}
  here['PATH'] = f'{folder}{os.pathsep}{here["PATH"]}'

  def start(script, *arguments, cwd=ROOT, **environment):
    return subprocess.Popen(
      ['bash', SCRIPTS / script, *arguments],
      env={**here, **environment},
      cwd=cwd,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )

  def told(name):
    files = sorted(notes.glob(f'{name}.*'), key=lambda file: file.stat().st_mtime_ns)
    return [json.loads(file.read_text()) for file in files]

  def run(script, *arguments, names=(), **more):
    for name in names:
      stand_in(name)
    process = start(script, *arguments, **more)
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


# The command in the header of each script, and the devices of what it starts on.
EXAMPLES = [
  ('local.sh', 8), ('slurm.sh', 32), ('gke.sh', 16), ('xpk.sh', 16),
  *(('tpu_vm.sh', chips) for chips in (4, 8, 16, 32, 64)),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Device:
  """As much of one as a mesh needs that nothing runs on."""

  id: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'
  process_index: int = 0


def example(name):
  """The words of the command in a script's header that starts training."""
  header = re.match(r'(#.*\n)+', (SCRIPTS / name).read_text())[0]
  header = re.sub(r'\\\n#', '', header)
  (line,) = [x for x in header.splitlines() if name in x and 'configs/' in x]
  return shlex.split(line.removeprefix('#'), comments=True)


@pytest.mark.parametrize(('name', 'count'), EXAMPLES)
def test_the_command_in_the_header_trains_where_it_says(name, count, monkeypatch):
  monkeypatch.chdir(ROOT)
  words = example(name)
  if name == 'gke.sh':
    said = dict(word.split('=', 1) for word in words if '=' in word)
    words = [f'--config={said["CONFIG"]}', *said['FLAGS'].split()]
  config = recipes.load([word for word in words if word.startswith('--config')])
  mesh = sharding.mesh_over([Device(i) for i in range(count)], **config['mesh'])
  mesh_checks.check_batch(
    config['data']['batch_size'], config.get('microbatches', 1), mesh
  )


def test_the_examples_are_on_as_many_devices_as_the_scripts_ask_for():
  said = {name: (SCRIPTS / name).read_text() for name, _ in EXAMPLES}
  each = re.search(r'^#SBATCH --ntasks-per-node=(\d+)$', said['slurm.sh'], re.M)[1]
  assert '--nodes=4' in example('slurm.sh')
  found = {'slurm.sh': 4 * int(each)}
  found['xpk.sh'] = int(re.search(r':-v6e-(\d+)\}', said['xpk.sh'])[1])
  for name, parts in (
    ('gke.sh', ('SLICES', 'HOSTS', 'CHIPS')),
    ('local.sh', ('PROCESSES', 'DEVICES')),
  ):
    found[name] = math.prod(
      int(re.search(rf'{part}:-(\d+)\}}', said[name])[1]) for part in parts
    )
  assert found.items() <= dict(EXAMPLES).items()


def test_a_second_free_axis_beside_data_says_what_to_set():
  with pytest.raises(ValueError, match=r'at most one is -1; set data=1 as well$'):
    sharding.mesh_over(range(8), data=-1, fsdp=-1)
  with pytest.raises(ValueError, match=r'at most one is -1$'):
    sharding.mesh_over(range(8), fsdp=-1, tensor=-1)
  with pytest.raises(ValueError, match=r'at most one is -1$'):
    sharding.mesh_over(range(8), data=-1, fsdp=0)


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
  (data,) = [x['value'] for x in container['env'] if x['name'] == paths.DATA]
  assert data.startswith(mount)
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


# gcloud runs what it is told to on a host, here in the folder where it is.
HOST = 'for last; do :; done; exec bash -c "${last#--command=}"'
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
  begin, end = words.index('-m'), words.index('>>')
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


def test_tpu_vm_sets_each_host_up_as_often_as_it_is_told_to(desk, tmp_path):
  desk.stand_in('gcloud', HOST)
  desk.stand_in('git', 'for last; do :; done; mkdir "$last"')  # fails where it is
  desk.stand_in(
    'python3.11', 'mkdir -p .venv/bin && ln -sf "$(command -v a_pip)" .venv/bin/pip'
  )
  desk.stand_in('a_pip')
  for _ in range(2):
    code, _, err = desk('tpu_vm.sh', 'setup', cwd=tmp_path, **TPU)
    assert code == 0, err
  assert desk.told('git') == [['clone', '--branch=main', 'r', 'educe']]
  assert ['-m', 'venv', '.venv'] in desk.told('python3.11')
  first, second = desk.told('a_pip')[-2:]
  assert first[-2:] == ['-e', '.[tpu,demo]']
  # The model of the recipes, as `make demo` installs it.
  assert 'pip install ' + shlex.join(second[1:]) in (ROOT / 'Makefile').read_text()
  desk.stand_in('python3.12', 'exit 4')
  assert desk('tpu_vm.sh', 'setup', cwd=tmp_path, PYTHON='python3.12', **TPU)[0] == 4


def test_tpu_vm_goes_on_in_the_same_log_and_hands_the_data_on(desk, tmp_path):
  desk.stand_in('gcloud', HOST)
  python = tmp_path / 'educe' / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  desk.stand_in('a_python', 'echo "data=$EDUCE_DATA"')
  python.symlink_to(tmp_path / 'bin' / 'a_python')
  log = python.parents[2] / 'train.log'
  settings = {**TPU, 'RUN_DIR': '/shared/my run'}
  for data in ('', '/shared/my data'):
    lines = log.read_text() if log.exists() else ''
    code, _, err = desk(
      'tpu_vm.sh', 'train', '--config=c.py', cwd=tmp_path, EDUCE_DATA=data, **settings
    )
    assert code == 0, err
    wait_for(lambda lines=lines: log.exists() and len(log.read_text()) > len(lines))
  assert log.read_text() == 'data=\ndata=/shared/my data\n'
  for told in desk.told('a_python'):
    flags = ['--multihost', '--run_dir=/shared/my run', '--config=c.py']
    assert told == ['-m', 'educe', 'train', *flags]


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
  flags = ['--config=configs/sft.py:gsm8k', '--config.data.batch_size=64']
  code, _, err = desk('xpk.sh', *flags, names=['xpk'], **names)
  assert code == 0, err
  (told,) = desk.told('xpk')
  assert told[:2] == ['workload', 'create']
  assert {word.partition('=')[0] for word in told[2:]} <= XPK
  (command,) = [x.removeprefix('--command=') for x in told if '--command=' in x]
  arguments = educe(shlex.split(command))
  assert arguments.multihost
  assert arguments.run_dir == '/s/r'
  assert 'EDUCE_DATA' not in command  # that of the image stays
  names |= dict(RUN_DIR='/s/my run', EDUCE_DATA='/s/my data')
  assert desk('xpk.sh', *flags, **names)[0] == 0
  command = desk.told('xpk')[-1][-1].removeprefix('--command=')
  assert '--run_dir=/s/my run' in shlex.split(command)
  ahead = command.removeprefix('cd /educe && ').partition('exec ')[0]
  found = subprocess.run(
    ['bash', '-c', f'{ahead} printenv EDUCE_DATA'], capture_output=True, text=True
  )
  assert found.stdout == '/s/my data\n', found.stderr


@pytest.mark.parametrize('name', ['tpu_vm.sh', 'xpk.sh'])
def test_no_flags_are_no_empty_flag(desk, name):
  more = dict(NAME='w', CLUSTER='c', IMAGE='i', STORAGE='n')
  begin = ['train'] if name == 'tpu_vm.sh' else []
  assert desk(name, *begin, names=['gcloud', 'xpk'], **TPU, **more)[0] == 0
  ((*_, command),) = desk.told('gcloud') + desk.told('xpk')
  assert '' not in shlex.split(command)


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
  ahead = int(re.search(r'^#SBATCH --signal=B:USR1@(\d+)$', text, re.M)[1])
  assert ahead >= 60
  # A directive behind the first command would not be read.
  first = re.search(r'^[^#\n]', text, re.M).start()
  assert '#SBATCH' not in text[first:]


# A command that saves when it is told to stop, as educe does, and exits with $1.
SAVES = (
  'trap "touch $FILE.saved; exit $CODE" TERM; touch $FILE; while :; do sleep 0.05; done'
)


# srun kills its tasks when it gets SIGTERM; they save when SLURM hands it to them, which
# SIGUSR2 stands for here.
SRUN = (
  'trap "exit 137" TERM; trap "touch $FILE.saved; exit 0" USR2; '
  'echo $$ > $FILE.new; mv $FILE.new $FILE; while :; do sleep 0.05; done'
)
# It may also be slower than they are.
SCANCEL = (
  'test "$*" = "--signal=TERM 7" || exit 1; pid=$(cat $FILE); kill -USR2 $pid; '
  'for _ in {1..500}; do kill -0 $pid 2>/dev/null || break; sleep 0.01; done'
)


@pytest.mark.parametrize('by_hand', [False, True])
def test_slurm_queues_again_what_its_time_stopped(desk, tmp_path, by_hand):
  desk.stand_in('srun', SRUN)
  desk.stand_in('scancel', SCANCEL)
  desk.stand_in('scontrol')
  file = tmp_path / 'began'
  process = desk.start(
    'slurm.sh', '--config=c', RUN_DIR='/s', SLURM_JOB_ID='7', FILE=str(file)
  )
  wait_for(file.exists)
  if by_hand:  # `scancel` of the job: SLURM stops the tasks, and tells the script
    process.send_signal(signal.SIGTERM)
    os.kill(int(file.read_text()), signal.SIGUSR2)
  else:
    process.send_signal(signal.SIGUSR1)
  _, err = process.communicate(timeout=30)
  assert process.returncode == 0, err
  assert file.with_suffix('.saved').exists()
  assert desk.told('scancel') == ([] if by_hand else [['--signal=TERM', '7']])
  assert desk.told('scontrol') == ([] if by_hand else [['requeue', '7']])


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


def test_the_guides_own_config_takes_recipes(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.syspath_prepend(str(ROOT))
  text = (SCRIPTS / 'README.md').read_text()
  (own,) = re.findall(r'```python\n(.*?)```', text, re.S)
  file = tmp_path / 'own.py'
  file.write_text(own)
  for words, clip in (('', 0.2), (':gspo', 4e-4), (':arithmetic,gspo,debug', 4e-4)):
    config = recipes.load([f'--config={file}{words}'])
    assert config['rollouts']['server']['model'] == 'policy'
    assert config['loss'].get('clip_high', 0.2) == clip


def test_the_guide_serves_what_it_has_written():
  text = (SCRIPTS / 'README.md').read_text()
  (written,) = re.findall(r'^python -m educe convert .*--to=(\S+)', text, re.M)
  served = re.findall(r'^.*(?:vllm serve|--model-path) (\S+)', text, re.M)
  assert served == [written] * 2
