"""The inside of a verifier's worker process; `verifiers.py` is the outside.

Messages are an 8-byte length and that many bytes: pickles in, JSON out.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import queue
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

# argv: sys.path, the channel's number, seconds a sample, GiB of address space.
BOOT = (
  'import sys, json; sys.path[:] = json.loads(sys.argv[1]); '
  'from educe.environments import worker; '
  'worker.serve(int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))'
)


def pack(function: Callable[..., Any]) -> bytes:
  """`function` for another interpreter, by value where that one could not import it.

  Raises ValueError for what cannot be sent, such as a lock.
  """
  import cloudpickle

  by_value = []

  class Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj):
      name = getattr(obj, '__module__', None)
      module = sys.modules.get(str(name))
      if module and module not in by_value and not _importable(str(name)):
        # A config's own file or a test: known here under a name that is no path.
        by_value.append(module)
        cloudpickle.register_pickle_by_value(module)
      return super().reducer_override(obj)

  buffer = io.BytesIO()
  try:
    Pickler(buffer).dump(function)
  except Exception as error:  # every unpicklable thing has an exception of its own
    raise ValueError(
      f'verifier {function!r:.80} cannot be sent to a worker process: {error}'
    ) from error
  finally:
    for module in by_value:
      cloudpickle.unregister_pickle_by_value(module)
  return buffer.getvalue()


def _importable(name: str) -> bool:
  """Whether a new interpreter with this sys.path finds the module."""
  if name == '__main__':
    return True  # cloudpickle's own case
  path = None
  for end in [i for i, c in enumerate(name) if c == '.'] + [len(name)]:
    for finder in sys.meta_path:
      spec = finder.find_spec(name[:end], path)
      if spec is not None:
        break
    else:
      return False
    path = spec.submodule_search_locations
  return True


def serve(channel: int, time_limit: float, memory_limit: float) -> None:
  """Judges samples for as long as the other end lives."""
  import resource

  if memory_limit:
    limit = int(memory_limit * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  connection = socket.socket(fileno=channel)
  requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
  # A thread reads, so that the parent's death is seen in the midst of a long verdict.
  threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
  try:
    respond = pickle.loads(requests.get())
  except BaseException as error:
    _send(connection, {'refused': one_line(error)})
    return
  _send(connection, {'ready': True})
  while True:
    request = requests.get()
    # … and where a verdict holds the interpreter's lock, the kernel ends it: by then
    # the parent is gone, or it would have.
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + 2 * time_limit) + 2, hard))
    _send(connection, _verdict(respond, request))


def _verdict(respond, request: bytes) -> dict[str, Any]:
  from educe.environments import verifiers

  try:
    prompt, transcript = pickle.loads(request)
    turn = verifiers.check(respond(prompt, transcript))
    return {'turn': json.loads(json.dumps(turn, default=str))}
  except BaseException as error:  # SystemExit too: the run goes on
    return {'error': one_line(error)}


def one_line(error: BaseException) -> str:
  """KeyError: 'x' (reward.py line 12), on one line of at most 500 characters."""
  text = ' '.join(f'{type(error).__name__}: {error}'.split())[:400]
  frames = traceback.extract_tb(error.__traceback__)
  ours = ('verifiers.py', 'reward_functions.py')  # they say which reward it was
  if not frames or os.path.basename(frames[-1].filename) in ours:
    return text
  return f'{text} ({os.path.basename(frames[-1].filename)} line {frames[-1].lineno})'


def _send(connection: socket.socket, reply: dict[str, Any]) -> None:
  data = json.dumps(reply).encode()
  connection.sendall(struct.pack('>Q', len(data)) + data)


def _receive(connection: socket.socket, requests: queue.SimpleQueue[bytes]) -> None:
  with connection.makefile('rb') as stream:
    while len(head := stream.read(8)) == 8:
      requests.put(stream.read(*struct.unpack('>Q', head)))
  os._exit(0)
