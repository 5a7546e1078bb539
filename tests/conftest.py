"""Eight virtual CPU devices; shape annotations of losses and kernels are checked."""

import contextlib
import gc
import http.server
import importlib
import json
import math
import os
import pathlib
import sys
import threading
from importlib.metadata import PackageNotFoundError, version

os.environ['JAX_PLATFORMS'] = 'cpu'
# A test's program runs once or twice: unoptimised it compiles in an eighth of the time.
# (XLA aborts at a flag that it does not have: newer ones lack the last.)
os.environ['XLA_FLAGS'] = ' '.join(
  (
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false' if version('jaxlib') < '0.11' else '',
  )
)

import jax
import jaxtyping
import pytest

# jaxtyping's annotations are promises; here they are kept.
jaxtyping.install_import_hook(['educe.kernels', 'educe.losses'], 'beartype.beartype')

# The longest files, longest first: of two workers none goes on alone with one at the end.
LONGEST = (
  'end_to_end/test_meshes', 'test_compile', 'test_configs', 'end_to_end/test_two_processes',
  'test_notebooks', 'end_to_end/test_engine', 'end_to_end/test_resume_rl',
  'end_to_end/test_resume', 'test_cli', 'training/test_checkpoint', 'models/test_lora',
  'models/test_gguf', 'test_runs', 'end_to_end/test_judged', 'test_collectives',
)  # fmt: skip


def pytest_collection_modifyitems(items):
  here = pathlib.Path(__file__).parent
  place = {here / f'{name}.py': number for number, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish():
  """What was imported stays: the garbage collector need not look at it again."""
  gc.collect()
  gc.freeze()


@pytest.fixture
def mesh_of():
  """A mesh over the first n virtual devices; axes that are left out are 1."""

  def make(data=1, fsdp=1, tensor=1, **more):
    from educe.sharding import mesh_over

    sizes = dict(data=data, fsdp=fsdp, tensor=tensor, **more)
    return mesh_over(jax.devices()[: math.prod(sizes.values())], **sizes)

  return make


@pytest.fixture
def as_processes():
  """`as_processes(n, run)`: what run(index) returns in each of n threads that take
  themselves for processes, or the error that it raised. One that leaves the common path
  while the others exchange something breaks the test."""
  from educe import hosts

  def start(count, run):
    here = threading.local()
    table, barrier = {}, threading.Barrier(count, timeout=20)
    found = [None] * count

    def exchange(value):
      table[here.index] = json.dumps(value, default=str)
      barrier.wait()
      said = [json.loads(table[i]) for i in range(count)]
      barrier.wait()
      return said

    def one(index):
      here.index = index
      try:
        found[index] = run(index)
      except Exception as error:
        found[index] = error

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(hosts, 'count', lambda: count)
      patch.setattr(hosts, 'index', lambda: here.index)
      patch.setattr(hosts, 'exchange', exchange)
      threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
      for thread in threads:
        thread.start()
      for thread in threads:
        thread.join()
    for error in found:
      if isinstance(error, threading.BrokenBarrierError):
        raise error
    return found

  return start


@pytest.fixture(scope='module')
def scripts():
  """`scripts(folder, name, …)`: {name: module} as commands import them from there."""
  folders, path = [], list(sys.path)

  def load(folder, *names):
    folders.append(str(folder))
    sys.path.insert(0, str(folder))
    return {name: importlib.import_module(name) for name in names}

  yield load
  sys.path[:] = path
  for name, module in list(sys.modules.items()):
    if os.path.dirname(getattr(module, '__file__', None) or '') in folders:
      del sys.modules[name]


@pytest.fixture(scope='session')
def chips():
  """`chips('v5e:2x2')`: TPUs that are not here, for which libtpu compiles."""
  from educe import topology

  try:
    version('libtpu')
  except PackageNotFoundError:
    pytest.skip('libtpu is not installed (pip install -e .[dev])')
  topology.check_libtpu()
  return topology.devices


@pytest.fixture(scope='session', autouse=True)
def compile_once(tmp_path_factory):
  """The same programs come again in test after test: what was compiled is kept on disk."""
  jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('cache')))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """A compiled program is some ten memory maps, of which Linux gives a process 65,530."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='session')
def one_device():
  """The environment of a process that has one device and compiles as tests do."""
  flags = os.environ['XLA_FLAGS'].split()
  kept = (flag for flag in flags if 'device_count' not in flag)
  return {**os.environ, 'XLA_FLAGS': ' '.join(kept)}


@pytest.fixture(scope='module')
def no_pictures():
  """Runs do not draw themselves, which takes each a second (tests/test_configs.py draws
  those of every algorithm)."""
  from educe import runs

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runs, 'pictures', lambda run_dir: [])
    yield


@pytest.fixture
def listen():
  """`listen(answer)` is a server in a thread; its address is returned.

  answer(path, body, headers) is JSON; or (status, headers, body bytes); or a function of
  the handler, which writes whatever it likes
  """
  running = []

  class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # several processes may ask a busy machine at once

  def start(answer):
    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        said = answer(self.path, body, self.headers)
        with contextlib.suppress(OSError):  # who asked may be gone
          if callable(said):
            return said(self)
          if not isinstance(said, tuple):
            said = 200, {}, json.dumps(said).encode()
          status, headers, data = said
          self.send_response(status)
          for name, value in {**headers, 'Content-Length': str(len(data))}.items():
            self.send_header(name, value)
          self.end_headers()
          self.wfile.write(data)

      def log_message(self, *_):
        pass

    running.append(Server(('127.0.0.1', 0), Handler))
    running[-1].daemon_threads = True
    running[-1].block_on_close = False
    threading.Thread(
      target=running[-1].serve_forever, args=(0.05,), daemon=True
    ).start()
    return f'http://127.0.0.1:{running[-1].server_port}'

  yield start
  for each in running:
    each.shutdown()
    each.server_close()


@pytest.fixture
def server(listen):
  """`serve(answer)` is a chat-completions server: (its url, what it was asked).

  answer(question, count) is the text of the answer, or what `listen` takes. count: of
  this question so far
  """

  def serve(answer):
    asked = []
    lock = threading.Lock()

    def chat(path, body, headers):
      question = body['messages'][-1]['content']
      with lock:
        count = sum(x['question'] == question for x in asked)
        key = headers.get('Authorization')
        asked.append({'question': question, 'path': path, 'key': key, **body})
      said = answer(question, count)
      if isinstance(said, str):
        return {'choices': [{'message': {'content': said}}]}
      return said

    return f'{listen(chat)}/v1', asked

  return serve
