"""Several processes as one: how they find each other, agree, and stop together.

Every process runs the same program with the same inputs, and so calls the same compiled
programs in the same order; what is done by process 0 alone is what people see, messages
and files. What differs between processes (a file that one of them cannot read, verdicts
that each gives for its share of the rows) is exchanged before anybody acts upon it, for a
process that leaves the common path keeps the others waiting in a collective.

  name         who calls, and who acts                 where it fails
  start        all, once: they meet                    ValueError in each that waits
  exchange     all: each brings a value, gets all      its own error there; the others wait
  agreed       all: each gets process 0's value        as exchange
  gathered     all: each runs what(), gets all         ValueError, OSError: raised in all
  by_first     all: process 0 alone runs what()        as gathered
  shared       all: each runs what() for its rows      as gathered
  alone        one, around what the others cannot see  Alone there: do not ask the others
  stopping     all, once a step: is one to stop?       nobody's: the answer is the same
  leave        one that failed, at its end             waits FAREWELL_SECONDS, then is gone

Any other error within `gathered` is a bug, and one process's alone: `leave` ends that one,
which the others notice.

Nothing here touches a device before `start` has been called, or where it is not.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from educe.roll_call import roll_call

WAIT = 300.0  # seconds for all processes to arrive
FAREWELL_SECONDS = 10  # that a process that failed waits for the others to fail as well


class Alone(ValueError):
  """An error of one process: the others do not know, and cannot be asked any more."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
  """Around what only this process reads: a mistake in it is raised as `Alone`, where there
  are others."""
  try:
    yield
  except (ValueError, OSError) as error:
    if count() == 1:
      raise
    raise Alone(str(error)) from error


def start(
  *,
  multihost: bool = False,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  wait: float = WAIT,
) -> None:
  """Joins this process to the others; before any device is touched.

  Args:
    multihost: JAX finds the others: TPU metadata, SLURM, GKE, Open MPI.
    coordinator, processes, process: or they are named: 'host:port' of process 0, how many
      there are, and which this is. processes=1 says that this one is alone.
    wait: seconds for all of them to arrive.

  Raises ValueError for flags that contradict each other, where none is given though the
  environment shows several tasks, and for a process that does not arrive in time.
  """
  given = [x is not None for x in (coordinator, processes, process)]
  if not 0 < wait < float('inf'):
    raise ValueError(f'--wait={wait:g} must be a number of seconds above 0')
  if multihost and any(given):
    raise ValueError(
      '--multihost finds the other processes by itself: leave out --coordinator, '
      '--processes and --process, or it'
    )
  if processes == 1 and coordinator is None:
    return
  if any(given) and not all(given):
    raise ValueError(
      '--coordinator=host:port, --processes=2 and --process=0 belong together: '
      f'{coordinator=}, {processes=}, {process=}'
    )
  if not multihost and coordinator is None:
    several = tasks(os.environ)
    if several:
      raise ValueError(
        f'{several} would each train alone: add --multihost (or --processes=1, if that '
        'is meant)'
      )
    return
  if multihost:
    coordinator, processes, process, devices = _found(wait)
  else:
    devices = None
  assert coordinator is not None
  assert processes is not None
  assert process is not None
  host, _, port = coordinator.rpartition(':')
  if not (re.fullmatch(r'[^\s:/]+|\[[^\]\s]+\]', host) and _is_port(port)):
    raise ValueError(f'--coordinator={coordinator} must be host:port of process 0')
  if not 0 <= process < processes:
    raise ValueError(
      f'--process={process} must be in 0..{processes - 1} (--processes={processes})'
    )
  roll_call(coordinator, processes, process, wait, names(os.environ, processes))
  jax.distributed.initialize(
    coordinator,
    processes,
    process,
    local_device_ids=devices,
    cluster_detection_method='deactivate',  # all is known by now
    initialization_timeout=int(max(wait, 60)),
  )


def _is_port(text: str) -> bool:
  return text.isdecimal() and len(text) < 6 and 0 < int(text) < 1 << 16


def tasks(environment: Mapping[str, str]) -> str | None:
  """What shows that this process is one of several; None if nothing does."""
  count = environment.get('SLURM_STEP_NUM_TASKS', '1')  # of srun, not of the allocation
  if count.isdigit() and int(count) > 1:
    return f'SLURM_STEP_NUM_TASKS={count}: {count} processes'
  workers = environment.get('TPU_WORKER_HOSTNAMES', '')
  if ',' in workers:
    return f'TPU_WORKER_HOSTNAMES={workers}: {workers.count(",") + 1} hosts'
  return None


def names(environment: Mapping[str, str], count: int) -> list[str]:
  """The host of each of `count` processes, where the environment tells; else []."""
  workers = environment.get('TPU_WORKER_HOSTNAMES')
  if workers:  # of one slice: with several, nobody here knows the others'
    found = workers.split(',')
    return found if len(found) == count else []
  nodes = environment.get('SLURM_STEP_NODELIST', environment.get('SLURM_JOB_NODELIST'))
  found = _nodes(nodes or '')
  if not found or count % len(found):
    return []
  return [name for name in found for _ in range(count // len(found))]


def _nodes(text: str) -> list[str]:
  """SLURM's 'node[001-003,7],login' as names."""
  found = []
  for prefix, inside in re.findall(r'([^,\[]+)(?:\[([^\]]*)\])?', text):
    for part in inside.split(',') if inside else ['']:
      first, _, last = part.partition('-')
      last = last or first
      if not (first.isdigit() and last.isdigit()):
        found.append(prefix + part)
        continue
      for number in range(int(first), int(last) + 1):
        found.append(f'{prefix}{number:0{len(first)}}')
  return found


def _found(wait: float) -> tuple[str, int, int, Sequence[int] | None]:
  """What JAX knows of where this process runs."""
  # Not public: but initialize() would ask it too, and then abort if one is missing.
  from jax._src.clusters import ClusterEnv

  known = os.environ.get('JAX_COORDINATOR_ADDRESS')
  try:
    coordinator, processes, process, devices = (
      ClusterEnv.auto_detect_unset_distributed_params(
        known, None, None, None, None, int(wait)
      )
    )
  except RuntimeError as error:  # its name means nothing yet: a pod that is not up
    raise ValueError(
      f'--multihost: waited {wait:g} s for the host of process 0 ({error}); look at its '
      'log, or give it more time with --wait'
    ) from error
  if coordinator is None or processes is None or process is None:
    raise ValueError(
      '--multihost: neither TPU metadata, SLURM, GKE nor Open MPI tells of other '
      'processes; name them: --coordinator=host:port --processes=2 --process=0'
    )
  return coordinator, processes, process, devices


def count() -> int:
  """How many processes there are."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
  """Which of them this is, from 0."""
  return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
  """Whether this process is the one that people see."""
  return index() == 0


def exchange(value: Any) -> list[Any]:
  """What every process brings, by process; plain JSON. All must call it."""
  if count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value, default=str).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  # Few widths, for each is a program.
  padded = np.zeros(max(1 << 16, 1 << (int(sizes.max()) - 1).bit_length()), np.uint8)
  padded[: len(text)] = text
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def agreed(value: Any) -> Any:
  """Process 0's value, in every process; plain JSON. All must call it."""
  return exchange(value if is_first() else None)[0]


def gathered(what: Callable[[], Any]) -> list[Any]:
  """what() of every process, by process; plain JSON. All must call it.

  Where it fails in one, by a mistake that a user can mend (ValueError, OSError), the same
  error is raised in all of them.
  """
  if count() == 1:
    return [what()]
  failed, value = None, None
  try:
    value = what()
  except (ValueError, OSError) as error:
    failed = error
  said = exchange([value, None if failed is None else str(failed)])
  if failed is not None:
    raise failed
  for process, (_, why) in enumerate(said):
    if why is not None:
      raise ValueError(f'process {process}: {why}')
  return [value for value, _ in said]


def by_first(what: Callable[[], object]) -> None:
  """what() in process 0 alone, such as a file written: if it fails, all fail."""

  def first() -> None:
    if is_first():
      what()

  gathered(first)


def shared(rows: int, unit: int, what: Callable[[list[int]], Sequence[Any]]) -> list:
  """what(those rows) of each process for its share of 0 … rows − 1, put in order.

  unit: rows next to each other that one process gets; a share may be empty
  what: a plain JSON value for each row that it is given. Errors are everybody's
  """
  if count() == 1:
    return list(what(list(range(rows))))

  def share(process: int) -> list[int]:
    return [row for row in range(rows) if row // unit % count() == process]

  def mine() -> list[Any]:
    asked = share(index())
    return list(what(asked)) if asked else []

  every = gathered(mine)
  found = {
    row: x
    for p, said in enumerate(every)
    for row, x in zip(share(p), said, strict=True)
  }
  return [found[row] for row in range(rows)]


_asked = itertools.count(1)  # through all runs of a process: it must never go back


def stopping() -> bool:
  """Whether all stop here: one of them has had SIGTERM, and this is the step agreed upon.

  Of several processes; asked by all of them once a step.
  """
  return multihost_utils.reached_preemption_sync_point(next(_asked))


def leave(code: int) -> int:
  """The exit code of a process that failed, once it is safe to end with it.

  JAX waits for the others at the end; if they did not fail too, they wait in a collective
  for this one. Then it goes at once, and they notice that.
  """
  if count() == 1:
    return code
  from jax._src import distributed  # its client is not public

  client: Any = distributed.global_state.client
  try:
    client.wait_at_barrier('educe_failed', FAREWELL_SECONDS * 1000)
  except Exception:  # time is up, or there is nobody left to wait for
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code
