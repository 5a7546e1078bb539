"""Verifiers in processes of their own, with limits that hold.

  with worker_pool(environment.respond, workers=2, time_limit=10) as verifier:
    turns = verifier([(prompt, transcript), …])   # one Turn a sample, in order

A verifier that hangs (sympy, a backtracking regex), exhausts memory or kills its
interpreter must not take the run with it, and an alarm set inside it (math_verify)
works only in a main thread. So each worker is a fresh Python process that judges one
sample at a time in its main thread, and the clock is here, outside it.

- Over `time_limit`: SIGKILL to the worker and its children, a new worker, 'timeout'.
- An exception, or a Turn that is none (`check`): 'error', with one line that says why.
- A worker that dies is replaced and its sample judged once more; then it is an 'error'.

Such a sample's reward is None, not 0: nothing was learned about the answer, and the
policy is not made to pay for it. `verifier.counts` holds how many of each of OUTCOMES
there were. When errors and timeouts exceed `error_limit` the verifier raises
VerifierError with the first of them: a broken one must not train a policy on silence.

The function goes out by cloudpickle (so it may come from a notebook) and the samples by
pickle, both this process's own data; what comes back is only ever parsed as JSON. `info`
must therefore be made of plain values; other objects arrive as their text. Workers start
as new interpreters, never by a fork: a fork of a process with JAX's threads can
deadlock. They see no accelerator. This is containment of accidents, not a sandbox.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import numbers
import os
import pickle
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from educe.environments import worker
from educe.types import OUTCOMES, Turn

Respond = Callable[[Mapping[str, Any], Sequence[str]], Turn]

START_LIMIT = 120.0  # seconds for a worker to import what the verifier needs
STILLBORN = 3  # deaths in a row while starting that stop the run
WINDOW = 256  # latest samples that the share of errors is taken over
TOLERATED = 3  # errors that stop nothing, however few samples there are
LARGEST = 3.4e38  # of a reward: kept as float32, where more is infinite


class VerifierError(ValueError):
  """The verifier is broken: judging on would train on noise."""


def worker_pool(
  respond: Respond,
  *,
  workers: int = 2,
  time_limit: float = 10.0,
  memory_limit: float = 8.0,
  error_limit: float = 0.1,
) -> WorkerPool:
  """A pool of worker processes that call `respond(prompt, transcript)`.

  time_limit: seconds a sample (wall clock)
  memory_limit: GiB of address space a worker; 0 is no limit
  error_limit: the share of errors and timeouts among the last 256 samples beyond which
    VerifierError is raised (three are always let pass, unless all that was judged so
    far are errors); 1 never raises

  Use as a context manager, or `close()` it. Raises ValueError for limits that cannot be
  and for a function that cannot be sent; calling it raises VerifierError if a worker
  cannot start.
  """
  if workers < 1:
    raise ValueError(f'workers={workers}: must be at least 1')
  if not time_limit > 0:
    raise ValueError(f'time_limit={time_limit}: must be more than 0 seconds')
  if memory_limit < 0:
    raise ValueError(f'memory_limit={memory_limit}: must be at least 0 GiB')
  return WorkerPool(
    worker.pack(respond), workers, time_limit, memory_limit, error_limit
  )


class WorkerPool:
  """What `worker_pool` returns. Call it with (prompt, transcript) pairs."""

  def __init__(self, respond, workers, time_limit, memory_limit, error_limit):
    self._tally = Tally(error_limit)
    self.counts = self._tally.counts
    self.time_limit = time_limit
    self._stillborn = 0  # workers in a row that died before they could judge
    self._lock = threading.Lock()
    self._start = lambda: _Worker.start(respond, time_limit, memory_limit)
    self._workers: list[_Worker] = []
    for _ in range(workers):
      self._workers.append(self._start())

  def __enter__(self) -> WorkerPool:
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def close(self) -> None:
    """Kills the workers and waits until they are gone."""
    while self._workers:
      self._workers.pop().stop()

  def __call__(
    self, samples: Sequence[tuple[Mapping[str, Any], Sequence[str]]]
  ) -> list[Turn]:
    """One Turn a sample, in order. Raises VerifierError, and ValueError if closed."""
    with self._lock:
      if not self._workers:
        raise ValueError('worker_pool: already closed')
      try:
        turns = self._judge([pickle.dumps(tuple(sample)) for sample in samples])
      finally:
        # After Ctrl-C a worker may still be at work on what nobody waits for.
        for index, each in enumerate(self._workers):
          if each.sample is not None:
            self._replace(index)
      finished = [turn for turn in turns if turn.done]
      self._tally.add((outcome(t), t.info.get('error')) for t in finished)
      return turns

  def _judge(self, requests: list[bytes]) -> list[Turn]:
    for each in self._workers:
      if not each.ready:  # what it needs is sent now, however long ago it was started
        each.deadline = time.monotonic() + START_LIMIT
    turns: dict[int, Turn] = {}
    waiting = collections.deque(range(len(requests)))
    died: set[int] = set()
    while len(turns) < len(requests):
      for each in self._workers:
        if each.ready and each.sample is None and waiting:
          index = waiting.popleft()
          each.send(requests[index], index, time.monotonic() + self.time_limit)
      for index in _wait(self._workers):
        each = self._workers[index]
        sample = each.sample
        try:
          reply = each.exchange()
        except EOFError:
          self._replace(index)
          if sample is None:
            self._stillborn += not each.ready
            if self._stillborn >= STILLBORN:
              raise VerifierError(
                f'verifier workers die while starting ({each.fate()})'
              ) from None
          elif sample in died:
            turns[sample] = _failed('error', f'its worker died ({each.fate()})')
          else:
            died.add(sample)
            waiting.appendleft(sample)
          continue
        if reply is not None and 'refused' in reply:
          raise VerifierError(f'verifier cannot be loaded: {reply["refused"]}')
        if reply is not None:
          each.ready, self._stillborn = True, 0
          if sample is not None:
            turns[sample] = _turn(reply)
            each.sample = None
        elif time.monotonic() >= each.deadline:
          self._replace(index)
          if not each.ready:
            raise VerifierError(f'verifier worker not ready in {START_LIMIT:g} s')
          if sample is not None:
            message = f'no verdict in {self.time_limit:g} s'
            turns[sample] = _failed('timeout', message)
    return [turns[i] for i in range(len(requests))]

  def _replace(self, index: int) -> None:
    self._workers[index].stop()
    self._workers[index] = self._start()


class Tally:
  """Counts outcomes; more failures than `worker_pool` says are too many are the end."""

  def __init__(self, error_limit: float):
    if not 0 <= error_limit <= 1:
      raise ValueError(f'error_limit={error_limit}: must be in 0..1')
    self.error_limit = error_limit
    self.counts: dict[str, int] = dict.fromkeys(OUTCOMES, 0)  # finished turns so far
    self._recent: collections.deque[str] = collections.deque(maxlen=WINDOW)
    self._first_errors: list[str] = []  # different ones

  def add(self, judged: Iterable[tuple[str, str | None]]) -> None:
    """(outcome, error message) of each sample. Raises VerifierError."""
    for kind, message in judged:
      self.counts[kind] += 1
      self._recent.append(kind)
      said = f'{kind}: {message or "no message"}'
      new = kind in ('error', 'timeout') and said not in self._first_errors
      if new and len(self._first_errors) < 3:
        self._first_errors.append(said)
    errors = self._recent.count('error')
    failed = errors + self._recent.count('timeout')
    share = failed / max(len(self._recent), 1)
    all_errors = errors > 0 and errors == sum(self.counts.values())
    over = share > self.error_limit and (failed > TOLERATED or all_errors)
    if over and self.error_limit < 1:
      raise VerifierError(
        f'{failed} of the last {len(self._recent)} samples could not be verified, more '
        f'than error_limit={self.error_limit:g} allows: mend the reward, or give it '
        f'more time_limit; first: {" | ".join(self._first_errors)}'
      )


def outcome(turn: Turn) -> str:
  """One of OUTCOMES: what `info` says, or else what the reward means: 1 or more is
  'verified', less 'wrong', None 'unparsable'."""
  said = turn.info.get('outcome')
  if said is not None:
    return said
  if turn.reward is None:
    return 'unparsable'
  return 'verified' if turn.reward >= 1 else 'wrong'


def check(turn: Any) -> Turn:
  """`turn`, its rewards as Python floats. Raises ValueError for what is no answer.

  A reward is None or a finite real number; a bool or a text is a mistake, for it would
  train as something else than its author meant.
  """
  if not isinstance(turn, Turn):
    raise ValueError(f'respond returned {turn!r:.80}, expected a Turn')
  if not isinstance(turn.info, Mapping):
    raise ValueError(f'Turn.info={turn.info!r:.80}: must be a dict')
  if not isinstance(turn.done, bool):
    raise ValueError(f'Turn.done={turn.done!r:.80}: must be True or False')
  if not turn.done and not isinstance(turn.observation, str):
    raise ValueError(
      f'Turn.observation={turn.observation!r:.80}: must be text until done'
    )
  if turn.info.get('outcome', OUTCOMES[0]) not in OUTCOMES:
    raise ValueError(
      f'Turn.info["outcome"]={turn.info["outcome"]!r:.80}: must be one of {OUTCOMES}'
    )
  info = dict(turn.info)
  if 'rewards' in info:
    if not isinstance(info['rewards'], Mapping):
      raise ValueError(f'Turn.info["rewards"]={info["rewards"]!r:.80}: must be a dict')
    info['rewards'] = {k: real(v, f'reward {k!r}') for k, v in info['rewards'].items()}
  return turn._replace(reward=real(turn.reward, 'reward'), info=info)


def real(value: Any, what: str) -> float | None:
  """A finite float (of float32's range), or None. Raises ValueError naming `what` and
  the mend."""
  if value is None:
    return None
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    raise ValueError(
      f'{what} is {value!r:.80} ({type(value).__name__}): return a float, or None for '
      '"not scored"'
    )
  size: Any = abs(value)
  if not size <= LARGEST:  # nor is NaN
    raise ValueError(
      f'{what} is {value!r:.80}: return a finite number, or None for "not scored"'
    )
  return float(value)


def _failed(kind: str, message: str) -> Turn:
  return Turn(None, None, True, {'outcome': kind, 'error': message})


def _turn(reply: dict[str, Any]) -> Turn:
  if 'error' in reply:
    return _failed('error', reply['error'])
  return Turn(*reply['turn'])


def _wait(workers: list[_Worker]) -> list[int]:
  """Indices of workers that have something to say or whose time is up."""
  with selectors.DefaultSelector() as selector:
    for index, each in enumerate(workers):
      writing = selectors.EVENT_WRITE if each.outbox else 0
      selector.register(each.channel, selectors.EVENT_READ | writing, index)
    deadline = min(each.deadline for each in workers)
    left = max(deadline - time.monotonic(), 0)
    ready = {key.data for key, _ in selector.select(min(left, 3600))}
  now = time.monotonic()
  return sorted(ready | {i for i, each in enumerate(workers) if now >= each.deadline})


@dataclasses.dataclass
class _Worker:
  """One process, and what is under way to and from it."""

  process: subprocess.Popen
  channel: socket.socket
  outbox: bytearray
  deadline: float  # of what it is doing now (monotonic seconds)
  inbox: bytearray = dataclasses.field(default_factory=bytearray)
  sample: int | None = None
  ready: bool = False

  @classmethod
  def start(cls, respond: bytes, time_limit: float, memory_limit: float) -> _Worker:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    # As here, with '' spelt out; -P keeps the working folder off the path until then.
    path = [entry or os.getcwd() for entry in sys.path]
    arguments = [json.dumps(path), str(theirs.fileno()), str(time_limit)]
    # The workers are the parallelism, and accelerators belong to the trainer.
    threads = dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'), '1')
    process = subprocess.Popen(
      [sys.executable, '-P', '-c', worker.BOOT, *arguments, str(memory_limit)],
      stdin=subprocess.DEVNULL,
      stdout=2,  # what a verifier prints is no part of what it says
      pass_fds=[theirs.fileno()],
      env={**os.environ, **threads, 'JAX_PLATFORMS': 'cpu'},
      start_new_session=True,  # no Ctrl-C from the terminal, and one group to kill
    )
    theirs.close()
    outbox = bytearray(struct.pack('>Q', len(respond)) + respond)
    return cls(process, ours, outbox, time.monotonic() + START_LIMIT)

  def send(self, request: bytes, sample: int, deadline: float) -> None:
    self.outbox += struct.pack('>Q', len(request)) + request
    self.sample, self.deadline = sample, deadline

  def exchange(self) -> dict[str, Any] | None:
    """Writes and reads what can be now; a whole reply, or None. EOFError: it died."""
    try:
      if self.outbox:
        with contextlib.suppress(BlockingIOError):
          del self.outbox[: self.channel.send(self.outbox)]
      data = self.channel.recv(1 << 20)
    except BlockingIOError:
      return None
    except ConnectionError:
      raise EOFError from None
    if not data:
      raise EOFError
    self.inbox += data
    if len(self.inbox) < 8:
      return None
    (length,) = struct.unpack_from('>Q', self.inbox)
    if len(self.inbox) < 8 + length:
      return None
    reply = json.loads(self.inbox[8 : 8 + length])
    del self.inbox[: 8 + length]
    self.deadline = math.inf
    return reply

  def stop(self) -> None:
    # Not reaped before this line, so the number still names this group alone.
    if self.process.returncode is None:
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()
    self.channel.close()

  def fate(self) -> str:
    """How it ended, after `stop`."""
    code = self.process.returncode
    return f'signal {-code}' if code < 0 else f'exit status {code}'
