"""Are all processes here? Asked before JAX is, which ends those who wait in an abort.

`jax.distributed.initialize` tells nobody who is missing: when one process never comes, the
others die by LOG(FATAL) after twice the time-out. So process 0 first listens at the address
that JAX will use, the others say who they are, and everybody hears who has not.
"""

from __future__ import annotations

import contextlib
import json
import select
import selectors
import socket
import time
from collections.abc import Sequence
from typing import cast

LONGEST = 4096  # bytes of a message
GRACE = 10.0  # seconds that process 0 may have begun to wait later than the others
PAUSE = 0.1  # seconds between two attempts to reach it


class Absent(ValueError):
  """A process never came, or came as another than it should; the message says which."""


def roll_call(
  address: str, count: int, index: int, wait: float, names: Sequence[str] = ()
) -> None:
  """Returns once all `count` processes have called it, in each of them.

  address: 'host:port' of process 0, at a port that is free there
  wait: seconds
  names: of the hosts, by process, if they are known

  Raises Absent, in every process that came, if some did not within `wait`.
  """
  if count == 1:
    return
  host, _, port = address.rpartition(':')
  why = ''
  if index == 0:
    error = _listen(int(port), count, wait)
  else:
    error, why = _answer(host.strip('[]'), int(port), count, index, wait)
  if isinstance(error, list):
    who = ', '.join(_name(process, names or [host]) for process in error)
    error = (
      f'waited {wait:g} s for process {who} of {count}: it never arrived{why}; look at '
      'its log, or give it more time with --wait'
    )
  if error:
    raise Absent(error)


def _name(process: int, names: Sequence[str]) -> str:
  return f'{process} ({names[process]})' if process < len(names) else str(process)


def _listen(port, count, wait) -> str | list[int] | None:
  """What is wrong, or who is missing; None once all are here. Tells the others."""
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    server = socket.create_server(('', port), family=family, dualstack_ipv6=both)
  except OSError as error:
    return f'--coordinator: port {port} cannot be had here ({error}); name another'
  deadline = time.monotonic() + wait
  here: dict[int, socket.socket] = {}
  told: list[socket.socket] = []
  wrong = None
  with contextlib.ExitStack() as closing, selectors.DefaultSelector() as selector:
    closing.enter_context(server)
    selector.register(server, selectors.EVENT_READ)
    while len(here) < count - 1 and not wrong:
      left = deadline - time.monotonic()
      if left <= 0:
        break
      for key, _ in selector.select(left):
        if key.fileobj is server:
          connection = closing.enter_context(server.accept()[0])
          connection.settimeout(1.0)
          selector.register(connection, selectors.EVENT_READ)
          continue
        selector.unregister(key.fileobj)
        connection = cast(socket.socket, key.fileobj)
        said = _read(connection)
        if said is None:  # somebody else, or one who gave up
          continue
        process, of = said
        if of != count:
          wrong = f'process {process} counts {of} processes, and process 0 {count}'
        elif not 0 < process < count or _waits(here.get(process)):
          wrong = f'two processes say that they are process {process} of {count}'
        here[process] = connection
        told.append(connection)
    missing = [process for process in range(1, count) if process not in here]
    verdict = (json.dumps(wrong or missing) + '\n').encode()
    for connection in told:
      with contextlib.suppress(OSError):
        connection.sendall(verdict)
        # They close first: then it is not this port that has to rest before JAX has it.
        connection.recv(1)
  return wrong or missing or None


def _read(connection: socket.socket):
  try:
    said = json.loads(connection.recv(LONGEST))
    return int(said['process']), int(said['of'])
  except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
    return None


def _waits(connection: socket.socket | None) -> bool:
  """Whether there is such a one, and it has not gone: one that was restarted may come
  again."""
  if connection is None:
    return False
  if not select.select([connection], [], [], 0)[0]:
    return True
  try:
    return bool(connection.recv(1, socket.MSG_PEEK))
  except OSError:
    return False


def _answer(host, port, count, index, wait) -> tuple[str | list[int] | None, str]:
  """(What process 0 says, as `_listen` does, '') or ([0], why it could not be asked)."""
  why = ''
  deadline = time.monotonic() + wait
  while time.monotonic() < deadline:
    try:
      with socket.create_connection((host, port), deadline - time.monotonic()) as to:
        to.sendall(json.dumps({'process': index, 'of': count}).encode())
        to.settimeout(wait + GRACE)
        heard = b''
        while not heard.endswith(b'\n'):
          part = to.recv(LONGEST)
          if not part:
            raise ConnectionError('closed')
          heard += part
        return json.loads(heard) or None, ''
    except (OSError, ValueError) as error:  # not there yet, or gone again
      why = f' ({host}:{port}: {error})'
      time.sleep(PAUSE)
  return [0], why
