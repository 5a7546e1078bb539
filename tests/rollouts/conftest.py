import contextlib
import http.server
import json
import logging
import threading

import jax
import pytest


@pytest.fixture
def compilations(caplog):
  """`with compilations() as names:` lists what XLA compiles meanwhile.

  A test that asserts an empty list must assert a full one too, or it could not fail if
  JAX worded its log otherwise.
  """

  @contextlib.contextmanager
  def listen():
    names: list[str] = []
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger='jax'), jax.log_compiles():
      yield names
    texts = (record.getMessage() for record in caplog.records)
    names += [text for text in texts if text.startswith('Finished XLA compilation')]

  return listen


@pytest.fixture
def server():
  """`serve(answer)` is a chat-completions server in a thread: (its url, what it was asked).

  answer(question, count) is the text of the answer; or (status, headers, body bytes); or
  a function of the handler, which writes whatever it likes. count: of this question so far
  """
  running = []

  def serve(answer):
    asked = []
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        question = body['messages'][-1]['content']
        with lock:
          count = sum(x['question'] == question for x in asked)
          asked.append(
            {
              'question': question,
              'path': self.path,
              'key': self.headers.get('Authorization'),
              **body,
            }
          )
        said = answer(question, count)
        with contextlib.suppress(OSError):  # who asked may be gone
          if callable(said):
            return said(self)
          if isinstance(said, str):
            text = {'choices': [{'message': {'content': said}}]}
            said = 200, {}, json.dumps(text).encode()
          status, headers, data = said
          self.send_response(status)
          for name, value in {**headers, 'Content-Length': str(len(data))}.items():
            self.send_header(name, value)
          self.end_headers()
          self.wfile.write(data)

      def log_message(self, *_):
        pass

    running.append(http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler))
    running[-1].daemon_threads = True
    running[-1].block_on_close = False
    threading.Thread(
      target=running[-1].serve_forever, args=(0.05,), daemon=True
    ).start()
    return f'http://127.0.0.1:{running[-1].server_port}/v1', asked

  yield serve
  for each in running:
    each.shutdown()
    each.server_close()
