"""Against a real server in a thread: good, slow, dripping, down, overloaded, nonsense."""

import functools
import itertools
import json
import socket
import threading
import time

import pytest

from educe.rollouts import http_client
from educe.rollouts import server as server_lib
from educe.rollouts.http_client import Client, EndpointError

ask = functools.partial(server_lib.chat, temperature=0.3, max_tokens=17)


def client(url, **changes):
  settings = dict(
    section='judge', url=url, model='judge-1', key=None, timeout=5.0, retries=2,
    backoff=0.01, concurrency=4, error_limit=0.0,
  )  # fmt: skip
  return Client(**(settings | changes))


def number(text):
  return float(text) if text.replace('.', '').isdigit() else None


def test_answers_come_in_the_order_of_the_questions(server):
  def answer(question, count):
    time.sleep(0.02 * (7 - int(question)))  # the last is done first
    return f'{10 * int(question)}'

  url, asked = server(answer)
  got = ask(client(url), [str(i) for i in range(8)], number)
  assert got == [10.0 * i for i in range(8)]
  assert {x['path'] for x in asked} == {'/v1/chat/completions'}
  assert all(
    (x['model'], x['temperature'], x['max_tokens'], x['key'])
    == ('judge-1', 0.3, 17, None)
    for x in asked
  )


def test_no_more_than_concurrency_are_under_way(server):
  now, most, lock = [0], [0], threading.Lock()

  def answer(question, count):
    with lock:
      now[0] += 1
      most[0] = max(most[0], now[0])
    time.sleep(0.05)
    with lock:
      now[0] -= 1
    return '1'

  url, _ = server(answer)
  ask(client(url, concurrency=3), [str(i) for i in range(12)], number)
  assert most[0] == 3


def test_the_key_goes_along_and_what_was_thought_is_left_out(server):
  url, asked = server(lambda question, count: '<think>7</think>8')
  assert ask(client(url, key='s3'), ['q'], number) == [8.0]
  assert asked[0]['key'] == 'Bearer s3'


@pytest.mark.parametrize(
  'first',
  [
    (500, {}, b'oops'),
    (503, {}, b''),
    (429, {'Retry-After': '0'}, b'slow down'),
    (200, {}, b'<html>not JSON</html>'),
    (200, {}, b'[' * 100_000),
    (200, {}, b'\xff\xfe'),
    (503, {'Retry-After': '\xb2'}, b'a digit, and no number'),
    (200, {}, json.dumps({'choices': []}).encode()),
    (200, {}, json.dumps({'choices': [{'message': {'content': None}}]}).encode()),
    'I would rather not say',
    lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
  ],
)
def test_what_passes_is_asked_again(server, first):
  url, asked = server(lambda question, count: first if count < 2 else '5')
  assert ask(client(url), ['q'], number) == [5.0]
  assert len(asked) == 3
  # … but not for ever.
  url, asked = server(lambda question, count: first)
  loose = client(url, error_limit=1.0)
  assert ask(loose, ['q', 'r'], number) == [None, None]
  assert len(asked) == 6


def test_pauses_double_and_a_server_may_ask_for_longer(server):
  times = []

  def answer(question, count):
    times.append(time.monotonic())
    return (503, {'Retry-After': '1'} if count == 2 else {}, b'')

  url, _ = server(answer)
  patient = client(url, retries=3, backoff=0.2, error_limit=1.0)
  ask(patient, ['q'], number)
  pauses = [b - a for a, b in itertools.pairwise(times)]
  for pause, least in zip(pauses, (0.2, 0.4, 1.0), strict=True):
    assert least <= pause < least + 0.35


def drip(handler):
  handler.send_response(200)
  handler.end_headers()
  for _ in range(100):
    handler.wfile.write(b' ')
    handler.wfile.flush()
    time.sleep(0.05)


def drip_headers(handler):
  handler.wfile.write(b'HTTP/1.1 200 OK\r\nX-Long: ')
  for _ in range(100):
    handler.wfile.write(b'x')
    handler.wfile.flush()
    time.sleep(0.05)


def stall(status):
  """Headers that promise a body, which does not come."""

  def write(handler):
    handler.send_response(status)
    handler.send_header('Content-Length', '10')
    handler.end_headers()
    handler.wfile.flush()
    time.sleep(3)

  return write


@pytest.mark.parametrize(
  'how', [lambda handler: time.sleep(3), drip, drip_headers, stall(200), stall(503)]
)
def test_a_slow_server_is_given_up_on_in_time(server, how):
  url, _ = server(lambda question, count: how if question == 'slow' else '1')
  began = time.monotonic()
  hasty = client(url, timeout=0.3, retries=1, error_limit=0.5)
  assert ask(hasty, ['a', 'slow', 'b'], number) == [1.0, None, 1.0]
  assert 0.6 < time.monotonic() - began < 2.0


def test_an_error_without_its_body_is_one_like_any_other(server):
  for first in (stall(503), (503, {'Content-Length': '10'}, b'')):
    url, asked = server(lambda question, count, first=first: '5' if count else first)
    assert ask(client(url, timeout=0.3), ['q'], number) == [5.0]
    assert len(asked) == 2
  # … also in what is said of it.
  url, asked = server(lambda question, count: stall(503))
  with pytest.raises(EndpointError, match=r'the first: HTTP 503 \(asked 2 times\)'):
    ask(client(url, timeout=0.2, retries=1), ['q'], number)
  url, asked = server(lambda question, count: stall(401))
  with pytest.raises(EndpointError, match=r'HTTP 401; look at judge\.url'):
    ask(client(url, timeout=0.2), ['q'], number)
  assert len(asked) == 1


def test_too_many_without_an_answer_are_one_line_and_the_rest_is_not_asked(server):
  url, asked = server(lambda question, count: 'no' if int(question) < 10 else '1')
  questions = [str(i) for i in range(200)]
  with pytest.raises(EndpointError) as error:
    ask(client(url, error_limit=0.01, retries=0), questions, number)
  said = str(error.value)
  assert said.startswith(
    f'judge judge-1 at {url}: 3 of 200 questions without an answer'
  )
  assert said.endswith("the first: no verdict in 'no' (asked 1 times)")
  assert '\n' not in said
  assert len(asked) < 100
  # Ten are below a tenth and a bit.
  got = ask(client(url, error_limit=0.05, retries=0), questions, number)
  assert got == [None] * 10 + [1.0] * 190


def test_a_server_that_is_down_says_so():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  with pytest.raises(EndpointError, match=r'Connection refused \(asked 3 times\)'):
    ask(client(f'http://127.0.0.1:{port}'), ['q'] * 5, number)


@pytest.mark.parametrize('status', [400, 401, 404])
def test_what_asking_again_cannot_mend_is_said_at_once(server, status):
  url, asked = server(lambda question, count: (status, {}, b'no such\nmodel'))
  with pytest.raises(
    EndpointError, match=f'HTTP {status} no such model; look at judge.url'
  ):
    ask(client(url, error_limit=1.0, concurrency=1), ['q'] * 9, number)
  assert len(asked) == 1


def test_a_server_may_not_ask_for_a_pause_longer_than_a_timeout(server):
  url, _ = server(lambda question, count: (429, {'Retry-After': '3600'}, b''))
  began = time.monotonic()
  hasty = client(url, timeout=0.3, retries=1, error_limit=1.0)
  assert ask(hasty, ['q'], number) == [None]
  assert 0.3 < time.monotonic() - began < 2.0


def test_an_answer_without_end_is_not_read_to_it(server):
  url, asked = server(lambda question, count: '5' if count else '1' * 100_000)
  assert ask(client(url, largest=1000), ['q'], number) == [5.0]
  assert len(asked) == 2


def test_a_refusal_is_said_while_other_questions_wait(server):
  url, _ = server(
    lambda question, count: (401, {}, b'no') if question == 'no' else stall(200)
  )
  began = time.monotonic()
  with pytest.raises(EndpointError, match='HTTP 401'):
    ask(client(url, timeout=3), ['a', 'no', 'b'], number)
  assert time.monotonic() - began < 2


def test_a_key_is_not_carried_to_where_a_redirect_leads(server):
  other, theirs = server(lambda question, count: '1')
  where = {'Location': f'{other}/chat/completions'}
  url, _ = server(lambda question, count: (302, where, b''))
  with pytest.raises(EndpointError, match=r'HTTP 302.*look at judge\.url'):
    ask(client(url, key='s3'), ['q'], number)
  assert not theirs


@pytest.mark.parametrize(
  ('url', 'key'),
  [
    ('http://localhost:port/v1', None),
    ('http://localhost/v1/a b', None),
    ('http://localhost/v1/\xe9', None),
    ('http://127.0.0.1:9/v1', 'secret\n'),
    ('http://127.0.0.1:9/v1', 'secret\u201d'),
  ],
)
def test_what_cannot_be_sent_is_one_line_that_does_not_tell_the_key(url, key):
  with pytest.raises(EndpointError, match=r'^judge judge-1 at ') as error:
    ask(client(url, key=key, error_limit=1.0), ['q'], number)
  assert 'look at judge.url' in str(error.value)
  assert 'secret' not in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('changes', 'wrong'),
  [
    (dict(url='localhost:8000/v1'), r'part\.url='),
    (dict(timeout=0.0), r'part\.timeout=0\.0'),
    (dict(backoff=-1.0), 'backoff=-1'),
    (dict(retries=-1), r'part\.retries=-1'),
    (dict(concurrency=0), 'concurrency=0'),
    (dict(error_limit=1.5), r'part\.error_limit=1\.5'),
    (dict(api_key_env='EDUCE_NO_KEY'), r"part\.api_key_env='EDUCE_NO_KEY'"),
  ],
)
def test_settings_out_of_range_name_their_section(changes, wrong):
  settings = dict(
    url='http://here/v1', model='m', api_key_env=None, timeout=1.0, retries=0,
    backoff=0.0,
  )  # fmt: skip
  http_client.connect('part', **settings)
  with pytest.raises(ValueError, match=wrong):
    http_client.connect('part', **(settings | changes))


def test_the_key_comes_from_the_environment_and_goes_along_once(server, monkeypatch):
  monkeypatch.setenv('EDUCE_KEY', 's3')
  url, asked = server(lambda question, count: '1')
  made = http_client.connect(
    'judge', url=url, model='m', api_key_env='EDUCE_KEY', timeout=5.0, retries=0,
    backoff=0.0,
  )  # fmt: skip
  assert ask(made, ['q'], number) == [1.0]
  assert asked[0]['key'] == 'Bearer s3'
