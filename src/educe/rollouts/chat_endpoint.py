"""Questions to a server that speaks OpenAI's chat completions, with limits that hold.

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
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar('T')
LARGEST = 1 << 22  # bytes of an answer
PASSING = (408, 425, 429)  # and 5xx: of the moment, where other 4xx are of the request


class JudgeError(ValueError):
  """Too many questions have no answer; the message says the first reason."""


class Client(NamedTuple):
  """Where to ask, and for how long.

  timeout: seconds for one answer, however slowly it drips · retries: of a question ·
  backoff: seconds before the first, twice as many before each next · concurrency:
  questions under way at once · error_limit: share of a batch that may stay unanswered
  """

  url: str
  model: str
  key: str | None
  timeout: float
  retries: int
  backoff: float
  concurrency: int
  error_limit: float
  temperature: float
  max_tokens: int


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


def ask(
  client: Client, questions: Sequence[str], read: Callable[[str], T | None]
) -> list[T | None]:
  """What `read` reads in the answer to each question, in order; None where it has none.

  Raises JudgeError when more than error_limit of them have none, and at once for what
  asking again cannot mend: a wrong key, model or address.
  """
  stop = threading.Event()
  allowed = client.error_limit * len(questions)
  failures: list[str] = []
  answers: list[T | None] = [None] * len(questions)
  pool = concurrent.futures.ThreadPoolExecutor(client.concurrency)
  try:
    rows = {
      pool.submit(_persist, client, question, read, stop): row
      for row, question in enumerate(questions)
    }
    for done in concurrent.futures.as_completed(rows):
      answer, why = done.result()
      answers[rows[done]] = answer
      if why is not None:
        failures.append(why)
      if len(failures) > allowed:
        raise JudgeError(
          f'judge {client.model} at {client.url}: {len(failures)} of {len(questions)} '
          f'questions without an answer, more than error_limit={client.error_limit:g} '
          f'allows; the first: {failures[0]}'
        )
  finally:  # also after Ctrl-C; `with` would wait for the rest
    stop.set()
    pool.shutdown(wait=False, cancel_futures=True)
  return answers


def _persist(client: Client, question, read, stop) -> tuple[Any, str | None]:
  """(answer, None), or (None, why there is none)."""
  why = ''
  for attempt in range(client.retries + 1):
    if stop.is_set():  # somebody raises already
      return None, None
    pause = None
    try:
      text = _once(client, question)
      answer = read(text)
      if answer is not None:
        return answer, None
      why, pause = f'no verdict in {" ".join(text.split())[:120]!r}', 0.0
    except _Passing as error:
      why, pause = str(error), error.pause
    except JudgeError:
      stop.set()
      raise
    if attempt < client.retries:
      stop.wait(client.backoff * 2**attempt if pause is None else pause)
  return None, f'{why} (asked {attempt + 1} times)'


def _once(client: Client, question: str) -> str:
  """The text of one answer. Raises _Passing, and JudgeError for what will not pass."""
  headers = {'Content-Type': 'application/json'}
  if client.key is not None:
    headers['Authorization'] = f'Bearer {client.key}'
  body = {
    'model': client.model,
    'messages': [{'role': 'user', 'content': question}],
    'temperature': client.temperature,
    'max_tokens': client.max_tokens,
  }
  where = f'{client.url.rstrip("/")}/chat/completions'
  who = f'judge {client.model} at {client.url}'
  slow = f'no answer in {client.timeout:g} s'
  deadline = time.monotonic() + client.timeout
  try:
    request = urllib.request.Request(where, json.dumps(body).encode(), headers)
    with _opened(request, client.timeout) as response:
      data = _read(response, deadline, slow)
  except urllib.error.HTTPError as error:
    rest = b''
    # The status says enough, if there is no more.
    with error, contextlib.suppress(OSError, http.client.HTTPException, _Passing):
      rest = _read(error.fp, deadline, slow)
    said = ' '.join(rest.decode(errors='replace').split())[:200]
    said = f'HTTP {error.code} {said}'.rstrip()
    if error.code in PASSING or error.code >= 500:
      raise _Passing(said, _asked(error, client)) from None
    raise JudgeError(
      f'{who}: {said}; look at judge.url, judge.model and judge.api_key_env'
    ) from None
  except http.client.InvalidURL as error:
    raise JudgeError(f'{who}: {error}; look at judge.url') from None
  except (OSError, http.client.HTTPException) as error:
    reason = getattr(error, 'reason', error)
    if isinstance(reason, TimeoutError):
      raise _Passing(slow) from None
    raise _Passing(f'{type(reason).__name__}: {reason}') from None
  except ValueError:  # whose text may hold the key
    raise JudgeError(
      f'{who}: this cannot be asked; look at judge.url and judge.api_key_env'
    ) from None
  try:
    content = json.loads(data)['choices'][0]['message']['content']
  except (ValueError, KeyError, IndexError, TypeError, RecursionError):
    raise _Passing(f'no chat completion: {data[:120]!r}', 0.0) from None
  if not isinstance(content, str):
    raise _Passing(f'no text in the answer: {content!r:.120}', 0.0)
  return content.rpartition('</think>')[2]  # what was thought is no verdict


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


def _read(response, deadline: float, slow: str) -> bytes:
  """The body; a server that drips does not outlive the deadline."""
  parts, size = [], 0
  while part := response.read1(1 << 16):
    parts.append(part)
    size += len(part)
    if time.monotonic() > deadline:
      raise _Passing(slow)
    if size > LARGEST:
      raise _Passing(f'an answer of more than {LARGEST >> 20} MiB', 0.0)
  return b''.join(parts)


def _asked(error: urllib.error.HTTPError, client: Client) -> float | None:
  """Seconds that the server asks to wait, up to a timeout's worth."""
  said = error.headers.get('Retry-After', '')
  return min(float(said), client.timeout) if said.isdecimal() else None
