"""JSON questions to a server, with limits that hold.

Slow, down or overloaded servers are asked again, after a pause that doubles; an answer
that nothing can be read from is asked for again at once. What still has none is None, and
when more than a share of the questions end so, one line says why and the rest is not asked.
A redirect is not followed: the key is for this server alone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar('T')
Body = Mapping[str, Any]  # what becomes a JSON object
LARGEST = 1 << 22  # bytes of an answer
PASSING = (408, 425, 429)  # and 5xx: of the moment, where other 4xx are of the request


class EndpointError(ValueError):
  """No answer, or none that can be used; the message says which server, and the reason."""


class Unread(Exception):
  """An answer that nothing can be read from: it is asked for again, at once."""


class Client(NamedTuple):
  """Where to ask, and for how long.

  section: of the config, which errors name · timeout: seconds for one answer, however
  slowly it drips · retries: of a question · backoff: seconds before the first, twice as
  many before each next · concurrency: questions under way at once · error_limit: share
  of a batch that may stay unanswered · largest: bytes of an answer
  """

  section: str
  url: str
  model: str
  key: str | None
  timeout: float
  retries: int
  backoff: float
  concurrency: int = 1
  error_limit: float = 0.0
  largest: int = LARGEST

  @property
  def name(self) -> str:
    return f'{self.section} {self.model} at {self.url}'


class _Stay(urllib.request.HTTPRedirectHandler):
  """A redirect is an answer like any other status."""

  def redirect_request(self, req, fp, code, msg, headers, newurl):
    return None


_OPENER = urllib.request.build_opener(_Stay)


class _Passing(Exception):
  """A failure that may be gone the next time."""

  def __init__(self, why: str, pause: float | None = None):
    super().__init__(why)
    self.pause = pause  # seconds, where the server asks for that; 0: ask again at once


def connect(
  section: str,
  *,
  url: str,
  model: str,
  api_key_env: str | None,
  timeout: float,
  retries: int,
  backoff: float,
  concurrency: int = 1,
  error_limit: float = 0.0,
) -> Client:
  """A Client of checked settings; asks nothing yet.

  url: of the server, up to and with /v1
  api_key_env: name of the environment variable that holds the key; None sends none

  Raises ValueError, naming the setting in `section`, for one that is out of range.
  """
  wrong = None
  key = os.environ.get(api_key_env) if api_key_env else None
  if not re.match(r'https?://[^/\s]', url):
    wrong = (
      f'url={url!r} must begin with http:// or https://, as http://localhost:8000/v1'
    )
  elif not (0 < timeout < math.inf and 0 <= backoff < math.inf):
    wrong = f'timeout={timeout} must be more than 0 seconds, backoff={backoff} not less'
  elif retries < 0 or concurrency < 1:
    wrong = f'{retries=} must be at least 0, {concurrency=} at least 1'
  elif not 0 <= error_limit <= 1:
    wrong = f'error_limit={error_limit} must be in 0..1'
  elif api_key_env is not None and not key:
    wrong = f'api_key_env={api_key_env!r}: no such environment variable; export it'
  elif key and not re.fullmatch('[!-~]+', key):
    wrong = (
      f'api_key_env={api_key_env!r}: what it holds is no key: it has a space, a line '
      'break or a letter that is not ASCII'
    )
  if wrong:
    raise ValueError(f'{section}.{wrong}')
  return Client(
    section, url, model, key, timeout, retries, backoff, concurrency, error_limit
  )


def ask(
  client: Client,
  path: str,
  bodies: Sequence[Body],
  read: Callable[[int, Any], T],
) -> list[T | None]:
  """What `read` reads in the answer to each POST to url + path, in order; None where it
  has none.

  read: (index of the question, the answer's JSON) -> anything. It raises Unread for an
    answer to ask for again, and EndpointError for one that will be no better.

  Raises EndpointError when more than error_limit of them have none, and at once for what
  asking again cannot mend: a wrong key, model or address.
  """
  stop = threading.Event()
  allowed = client.error_limit * len(bodies)
  failures: list[str] = []
  answers: list[T | None] = [None] * len(bodies)
  pool = concurrent.futures.ThreadPoolExecutor(client.concurrency)
  try:
    rows = {
      pool.submit(_persist, client, path, row, body, read, stop): row
      for row, body in enumerate(bodies)
    }
    for done in concurrent.futures.as_completed(rows):
      answer, why = done.result()
      answers[rows[done]] = answer
      if why is not None:
        failures.append(why)
      if len(failures) > allowed:
        raise EndpointError(
          f'{client.name}: {len(failures)} of {len(bodies)} questions without an '
          f'answer, more than error_limit={client.error_limit:g} allows; the first: '
          f'{failures[0]}'
        )
  finally:  # also after Ctrl-C; `with` would wait for the rest
    stop.set()
    pool.shutdown(wait=False, cancel_futures=True)
  return answers


def _persist(client: Client, path, row, body, read, stop) -> tuple[Any, str | None]:
  """(answer, None), or (None, why there is none)."""
  why = ''
  for attempt in range(client.retries + 1):
    if stop.is_set():  # somebody raises already
      return None, None
    pause: float | None = 0.0
    try:
      return read(row, _once(client, path, body)), None
    except Unread as error:
      why = str(error)
    except _Passing as error:
      why, pause = str(error), error.pause
    except EndpointError:
      stop.set()
      raise
    if attempt < client.retries:
      stop.wait(client.backoff * 2**attempt if pause is None else pause)
  return None, f'{why} (asked {attempt + 1} times)'


def _once(client: Client, path: str, body: Body) -> Any:
  """The JSON of one answer, None for an empty one.

  Raises _Passing, Unread, and EndpointError for what will not pass.
  """
  headers = {'Content-Type': 'application/json'}
  if client.key is not None:
    headers['Authorization'] = f'Bearer {client.key}'
  where = f'{client.url.rstrip("/")}{path}'
  slow = f'no answer in {client.timeout:g} s'
  settings = f'{client.section}.url, {client.section}.model and'
  deadline = time.monotonic() + client.timeout
  try:
    request = urllib.request.Request(where, json.dumps(body).encode(), headers)
    with _opened(request, client.timeout) as response:
      data = _read(response, client, deadline, slow)
  except urllib.error.HTTPError as error:
    rest = b''
    # The status says enough, if there is no more.
    with (
      error,
      contextlib.suppress(OSError, http.client.HTTPException, _Passing, Unread),
    ):
      rest = _read(error.fp, client, deadline, slow)
    said = ' '.join(rest.decode(errors='replace').split())[:200]
    said = f'HTTP {error.code} {said}'.rstrip()
    if error.code in PASSING or error.code >= 500:
      raise _Passing(said, _asked(error, client)) from None
    raise EndpointError(
      f'{client.name}: {said}; look at {settings} {client.section}.api_key_env'
    ) from None
  except http.client.InvalidURL as error:
    raise EndpointError(
      f'{client.name}: {error}; look at {client.section}.url'
    ) from None
  except (OSError, http.client.HTTPException) as error:
    reason = getattr(error, 'reason', error)
    if isinstance(reason, TimeoutError):
      raise _Passing(slow) from None
    raise _Passing(f'{type(reason).__name__}: {reason}') from None
  except ValueError:  # whose text may hold the key
    raise EndpointError(
      f'{client.name}: this cannot be asked; look at {client.section}.url and '
      f'{client.section}.api_key_env'
    ) from None
  try:
    return json.loads(data) if data.strip() else None
  except (ValueError, RecursionError):
    raise Unread(f'no JSON: {data[:120]!r}') from None


def _opened(request: urllib.request.Request, timeout: float):
  """The response, once its headers are here. Raises TimeoutError after `timeout` seconds.

  A socket's own timeout begins anew with every byte, and headers that drip outlive it: a
  thread waits for them, and is left behind.
  """
  box: concurrent.futures.Future = concurrent.futures.Future()

  def wait():
    try:
      box.set_result(_OPENER.open(request, timeout=timeout))
    except Exception as error:
      box.set_exception(error)

  threading.Thread(target=wait, daemon=True).start()
  return box.result(timeout)


def _read(response, client: Client, deadline: float, slow: str) -> bytes:
  """The body; a server that drips does not outlive the deadline."""
  parts, size = [], 0
  while part := response.read1(1 << 16):
    parts.append(part)
    size += len(part)
    if time.monotonic() > deadline:
      raise _Passing(slow)
    if size > client.largest:
      raise Unread(f'an answer of more than {client.largest >> 20} MiB')
  return b''.join(parts)


def _asked(error: urllib.error.HTTPError, client: Client) -> float | None:
  """Seconds that the server asks to wait, up to a timeout's worth."""
  said = error.headers.get('Retry-After', '')
  return min(float(said), client.timeout) if said.isdecimal() else None
