"""Who is here, what they agree upon, and that no error leaves anybody waiting."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from educe import hosts


def test_one_process_is_the_first_and_has_nothing_to_exchange():
  assert (hosts.count(), hosts.index(), hosts.is_first()) == (1, 0, True)
  value = {'a': [1.5, None, 'é']}
  assert hosts.exchange(value) == [value]
  assert hosts.agreed(7) == 7
  assert hosts.gathered(lambda: 3) == [3]
  with pytest.raises(OSError, match='full'):
    hosts.by_first(lambda: (_ for _ in ()).throw(OSError('full')))
  assert hosts.leave(1) == 1


def test_asking_who_is_here_touches_no_device():
  text = (
    'from educe import hosts, progress; hosts.is_first(); hosts.start(); '
    'progress.say("x"); from jax._src import xla_bridge; '
    'assert not xla_bridge.backends_are_initialized()'
  )
  subprocess.run([sys.executable, '-c', text], check=True, env=os.environ)


def test_values_of_any_length_come_whole(monkeypatch):
  """Two processes: what each would get from JAX is put together here."""
  sent = {}

  def gather(index, other):
    def process_allgather(x):
      sent.setdefault((index, np.asarray(x).ndim), x)
      theirs = other[np.asarray(x).ndim]
      theirs = np.pad(theirs, (0, x.size - theirs.size)) if x.ndim else theirs
      return np.stack([x, theirs])

    return process_allgather

  text = '"' + 'é' * 70_000 + '"'
  other = np.frombuffer(text.encode(), np.uint8)
  monkeypatch.setattr(hosts, 'count', lambda: 2)
  gathers = gather(0, {0: np.int32(len(other)), 1: other})
  monkeypatch.setattr(hosts.multihost_utils, 'process_allgather', gathers)
  assert hosts.exchange({'short': 1}) == [{'short': 1}, 'é' * 70_000]


def test_process_0_decides(as_processes):
  assert as_processes(3, lambda i: hosts.agreed(f'said by {i}')) == ['said by 0'] * 3
  assert as_processes(2, lambda i: hosts.gathered(lambda: i)) == [[0, 1], [0, 1]]


@pytest.mark.parametrize('error', [ValueError, OSError])
def test_an_error_of_one_is_everybodys(as_processes, error):
  def what(index):
    if index == 1:
      raise error('disk full')
    return index

  found = as_processes(3, lambda i: hosts.gathered(lambda: what(i)))
  assert [str(x) for x in found] == [
    'process 1: disk full', 'disk full', 'process 1: disk full'
  ]  # fmt: skip
  assert isinstance(found[1], error)

  written = []
  as_processes(2, lambda i: hosts.by_first(lambda: written.append(i)))
  assert written == [0]
  found = as_processes(2, lambda i: hosts.by_first(lambda: what(i + 1)))
  assert [str(x) for x in found] == ['disk full', 'process 0: disk full']


@pytest.mark.parametrize('unit', [1, 2, 3])
@pytest.mark.parametrize('rows', [0, 1, 6, 12])
def test_rows_are_shared_by_units_and_come_back_in_order(as_processes, rows, unit):
  asked = {}

  def run(index):
    def what(which):
      asked[index] = which
      return [row * row for row in which]

    return hosts.shared(rows, unit, what)

  assert as_processes(3, run) == [[row * row for row in range(rows)]] * 3
  assert sorted(row for which in asked.values() for row in which) == list(range(rows))
  for which in asked.values():
    groups = {row // unit for row in which}
    assert len(which) == sum(min(unit, rows - g * unit) for g in groups)
  assert len(asked) == min(3, -(-rows // unit))


@pytest.mark.parametrize(
  ('flags', 'match'),
  [
    (
      dict(multihost=True, process=0),
      '--multihost finds the other processes by itself',
    ),
    (dict(coordinator='a:1'), 'belong together: coordinator=.a:1., processes=None'),
    (dict(processes=2), 'belong together'),
    (
      dict(coordinator='a', processes=2, process=0),
      '--coordinator=a must be host:port',
    ),
    (
      dict(coordinator='a:99999', processes=2, process=0),
      '--coordinator=a:99999 must be host:port',
    ),
    (
      dict(coordinator='http://a:1', processes=2, process=0),
      '--coordinator=http://a:1 must be host:port',
    ),
    (dict(coordinator='a:1', processes=2, process=2), r'--process=2 must be in 0\.\.1'),
    (dict(wait=0.0), '--wait=0 must be a number of seconds above 0'),
    (dict(multihost=True), 'neither TPU metadata, SLURM, GKE nor Open MPI'),
  ],
)
def test_flags_that_cannot_be_are_one_line(monkeypatch, flags, match):
  for name in list(os.environ):
    if name.startswith(('SLURM_', 'TPU_', 'OMPI_', 'KUBERNETES_', 'JAX_COORDINATOR')):
      monkeypatch.delenv(name)
  with pytest.raises(ValueError, match=match):
    hosts.start(**flags)


@pytest.mark.parametrize(
  ('environment', 'match'),
  [
    ({'SLURM_STEP_NUM_TASKS': '4'}, 'SLURM_STEP_NUM_TASKS=4: 4 processes would each'),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 'TPU_WORKER_HOSTNAMES=a,b: 2 hosts would each'),
  ],
)
def test_several_tasks_without_a_flag_are_one_line(monkeypatch, environment, match):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=f'{match} train alone: add --multihost'):
    hosts.start()
  hosts.start(processes=1)  # says that it is meant


@pytest.mark.parametrize(
  'environment',
  [{}, {'SLURM_NTASKS': '4'}, {'SLURM_STEP_NUM_TASKS': '1'}, {'TPU_WORKER_HOSTNAMES': 'a'}],
)  # fmt: skip
def test_one_task_needs_no_flag(environment):
  assert hosts.tasks(environment) is None


@pytest.mark.parametrize(
  ('environment', 'count', 'names'),
  [
    ({}, 2, []),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 2, ['a', 'b']),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 4, []),  # of one slice of two
    ({'SLURM_STEP_NODELIST': 'n[08-10,7],login'}, 5, ['n08', 'n09', 'n10', 'n7', 'login']),
    ({'SLURM_JOB_NODELIST': 'n1,n2'}, 4, ['n1', 'n1', 'n2', 'n2']),
    ({'SLURM_JOB_NODELIST': 'n1,n2'}, 3, []),
  ],
)  # fmt: skip
def test_hosts_have_names_where_the_environment_tells(environment, count, names):
  assert hosts.names(environment, count) == names


def test_a_host_whose_name_means_nothing_yet_is_one_line(monkeypatch):
  from jax._src.clusters import ClusterEnv

  def nobody(*_):
    raise RuntimeError('Failed to recognize coordinator address a.invalid')

  monkeypatch.setattr(ClusterEnv, 'auto_detect_unset_distributed_params', nobody)
  with pytest.raises(
    ValueError, match=r'waited 6 s for the host of process 0 \(Failed'
  ):
    hosts.start(multihost=True, wait=6)


def test_slurm_tells_who_the_others_are(monkeypatch):
  """What --multihost finds is what JAX would find."""
  environment = {
    'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_NTASKS': '2',
    'SLURM_PROCID': '1', 'SLURM_LOCALID': '0',
  }  # fmt: skip
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  for name in ('JAX_COORDINATOR_ADDRESS', 'TPU_WORKER_HOSTNAMES'):
    monkeypatch.delenv(name, raising=False)  # as compiling for TPUs sets it
  called, joined = [], []
  monkeypatch.setattr(hosts, 'roll_call', lambda *x: called.append(x))
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *x, **_: joined.append(x))
  hosts.start(multihost=True, wait=5)
  ((address, count, index, wait, names),) = called
  assert address.startswith('n1:')
  assert (count, index, wait, names) == (2, 1, 5, ['n1', 'n2'])
  assert joined == [(address, 2, 1)]
