"""Weights that an engine is told to read: whole, the right ones, and not too often."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil
import threading

import jax
import numpy as np
import pytest
import safetensors.numpy

from educe.data import tokenizer as tokenizers
from educe.models import lora, policy, presets
from educe.models import safetensors as huggingface
from educe.rollouts import publishing, server
from educe.rollouts.http_client import EndpointError
from educe.rollouts.publishing import Publisher

WORDS = tokenizers.load(path='characters:012345abcdefgh=')
MODEL = policy.build(presets.chain)
SHAPES = policy.shapes(presets.chain)


def params(number):
  return jax.tree.map(lambda x: np.full(x.shape, number, x.dtype), SHAPES)


def number_in(folder):
  """What all the weights in a folder are; ValueError unless they are whole."""
  folder = pathlib.Path(folder)
  assert json.loads((folder / 'config.json').read_text())['model_type'] == 'llama'
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  assert len(tensors) == 2 + 9 * presets.chain.layers
  (found,) = {float(x) for tensor in tensors.values() for x in np.unique(tensor)}
  return found


class Engine:
  """Reads weights as vLLM and SGLang do when they are told to."""

  def __init__(self):
    self.told, self.stale = [], False

  def __call__(self, path, body, headers):
    if path == '/reset_prefix_cache':
      self.stale = False
      return 200, {}, b''
    self.stale = path == '/collective_rpc'
    self.folder = body['kwargs']['weights_path'] if self.stale else body['model_path']
    self.told.append((path, self.folder))
    self.number = number_in(self.folder)
    return {'success': True}


def publisher(engine, listen, run_dir, **changes):
  settings = dict(model='policy', timeout=5.0, retries=1, backoff=0.0)
  to = server.connect(url=f'{listen(engine)}/v1', **(settings | changes))
  return Publisher(to, MODEL, WORDS, run_dir)


def kept(run_dir):
  return sorted(p.name for p in (run_dir / 'server').iterdir())


@pytest.mark.parametrize(
  ('reload', 'path'),
  [
    ('vllm', '/collective_rpc'),
    ('sglang', '/update_weights_from_disk'),
    ((('/update_weights_from_disk', {'model_path': '{folder}'}),), '/update_weights'),
  ],
)
def test_the_engine_reads_what_was_given_and_the_rest_is_deleted(
  listen, tmp_path, reload, path
):
  engine = Engine()
  publish = publisher(engine, listen, tmp_path, reload=reload)
  for step, number in ((0, 0), (4, 1), (8, 2)):
    assert publish(params(step + 0.5), step, number) == step
    assert engine.number == step + 0.5
    assert tokenizers.load(path=engine.folder).encode('ab') == WORDS.encode(
      'ab'
    )  # it could be started anew
    assert not engine.stale
    folder = tmp_path / 'server' / f'{step:08}'
    assert engine.folder == str(folder)
    assert kept(tmp_path) == [f'{step:08}', 'current']
    assert (tmp_path / 'server' / 'current').resolve() == folder
  assert all(told.startswith(path) for told, _ in engine.told)
  assert len({folder for _, folder in engine.told}) == 3  # a name it has not seen


def test_posts_of_ones_own_name_the_step(listen, tmp_path):
  asked = []
  posts = (('/a', {'at': ['/mnt/{step}', 3]}), ('/b/{step}', {}))
  publish = publisher(
    lambda path, body, headers: asked.append((path, body)) or {},
    listen,
    tmp_path,
    reload=posts,
  )
  publish(params(1), 7, 0)
  assert asked == [('/a', {'at': ['/mnt/00000007', 3]}), ('/b/{step}', {})]


def test_rounds_between_two_exports_are_sampled_by_the_last(listen, tmp_path):
  engine = Engine()
  publish = publisher(engine, listen, tmp_path, export_every=3)
  steps = [publish(params(step), step, step // 2) for step in range(0, 14, 2)]
  assert steps == [0, 0, 0, 6, 6, 6, 12]
  assert [int(folder[-8:]) for _, folder in engine.told] == [0, 6, 12]


def test_a_run_that_goes_on_tells_an_engine_that_may_be_new(listen, tmp_path):
  engine = Engine()
  publisher(engine, listen, tmp_path, export_every=3)(params(6), 6, 3)
  anew = Engine()
  later = publisher(anew, listen, tmp_path, export_every=3)
  later.step = 6  # from the checkpoint
  assert later(params(8), 8, 4) == 6
  assert anew.number == 6
  assert later(params(10), 10, 5) == 6
  assert len(anew.told) == 1
  # Where that export is gone, the policy as it is takes its place.
  shutil.rmtree(tmp_path / 'server')
  last = publisher(anew, listen, tmp_path, export_every=3)
  last.step = 6
  assert last(params(10), 10, 5) == 10
  assert anew.number == 10


def test_a_step_that_comes_again_is_written_again(listen, tmp_path):
  """A run went on from an older checkpoint: the same step, other weights perhaps."""
  engine = Engine()
  publisher(engine, listen, tmp_path)(params(1), 5, 5)
  publisher(engine, listen, tmp_path)(params(2), 5, 5)
  assert engine.number == 2


def test_what_cannot_be_written_is_one_line_and_what_was_there_stays(
  listen, tmp_path, monkeypatch
):
  engine = Engine()
  publish = publisher(engine, listen, tmp_path)
  publish(params(1), 1, 0)

  def full(arrays, path, metadata):
    pathlib.Path(path).write_bytes(b'half')
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patched:
    patched.setattr(safetensors.numpy, 'save_file', full)
    with pytest.raises(
      OSError, match=r'00000002: the weights for rollouts\.server'
    ) as e:
      publish(params(2), 2, 1)
  assert 'is the disk full' in str(e.value)
  assert '\n' not in str(e.value)
  assert kept(tmp_path) == ['00000001', 'current']
  assert publish.step == 1
  assert len(engine.told) == 1
  assert number_in(tmp_path / 'server' / 'current') == 1
  assert publish(params(2), 2, 1) == 2
  assert engine.number == 2


def test_what_a_killed_process_left_is_swept_up(listen, tmp_path):
  for name in ('.00000002.partial', '.00000009.partial'):
    (tmp_path / 'server' / name).mkdir(parents=True)
    (tmp_path / 'server' / name / 'config.json').write_text('half')
  engine = Engine()
  publisher(engine, listen, tmp_path)(params(2), 2, 0)
  assert engine.number == 2
  assert kept(tmp_path) == ['00000002', 'current']


@pytest.mark.parametrize(
  ('reload', 'answer', 'wrong'),
  [
    ('vllm', (404, {}, b'Not Found'), r'HTTP 404 Not Found.*POST /collective_rpc'),
    ('vllm', (500, {}, b'no such file'), r'HTTP 500 no such file \(asked 2 times\)'),
    ('sglang', {'success': False, 'message': 'shapes differ'}, 'shapes differ.*POST'),
    ('sglang', (400, {}, b'{"success": false}'), 'HTTP 400'),
    ('vllm', lambda handler: None, 'questions without an answer'),
  ],
)
def test_an_engine_that_does_not_take_them_is_one_line(
  listen, tmp_path, reload, answer, wrong
):
  good, engine = [], Engine()
  publish = publisher(
    lambda *asked: engine(*asked) if good else answer, listen, tmp_path, reload=reload
  )
  good.append(1)
  publish(params(1), 1, 0)
  good.clear()
  with pytest.raises(EndpointError, match=wrong) as error:
    publish(params(2), 2, 1)
  said = str(error.value)
  assert f'does not read the weights in {tmp_path}/server/00000002' in said
  assert '\n' not in said
  assert publish.step == 1
  assert '00000001' in kept(tmp_path)  # which it serves still
  good.append(1)
  assert publish(params(2), 2, 1) == 2
  assert kept(tmp_path) == ['00000002', 'current']


def test_who_reads_the_pointer_meanwhile_finds_whole_weights(listen, tmp_path):
  engine, over, found, lost = Engine(), threading.Event(), set(), []
  publish = publisher(engine, listen, tmp_path)
  publish(params(0), 0, 0)

  def read():
    while not over.is_set():
      folder = (tmp_path / 'server' / 'current').resolve()
      try:
        found.add(number_in(folder))
      except Exception as error:
        if folder.exists():  # not one that was replaced and deleted meanwhile
          lost.append(error)

  reader = threading.Thread(target=read)
  reader.start()
  try:
    for step in range(1, 12):
      publish(params(step), step, step)
  finally:
    over.set()
    reader.join()
  assert not lost
  assert len(found) > 1


def test_an_engine_gets_base_and_adapter_as_one(listen, tmp_path):
  model, own = lora.attach(MODEL, params(0.5), rank=2)
  own['adapter']['layers'] = jax.tree.map(
    lambda x: np.full(x.shape, 0.25, np.float32), own['adapter']['layers']
  )
  folders = []
  to = server.connect(
    url=f'{listen(lambda path, body, headers: folders.append(body) or {})}/v1',
    model='policy',
    reload='sglang',
    retries=0,
  )
  Publisher(to, model, WORDS, tmp_path)(own, 1, 0)
  _, found = huggingface.load(path=folders[0]['model_path'])
  jax.tree.map(np.testing.assert_array_equal, found, lora.merged(own))


def test_the_pointer_never_points_at_nothing(listen, tmp_path, monkeypatch):
  publish = publisher(Engine(), listen, tmp_path)
  real, seen = os.replace, []

  def replace(a, b):
    real(a, b)
    link = tmp_path / 'server' / 'current'
    if link.is_symlink():
      seen.append(number_in(link.resolve()))

  monkeypatch.setattr(publishing.os, 'replace', replace)
  for step in range(3):
    publish(params(step), step, step)
  assert set(seen) == {0, 1, 2}


def test_a_model_of_no_known_family_is_refused_before_anything_is_sampled(tmp_path):
  to = server.connect(url='http://localhost:8000/v1', model='policy')
  odd = dataclasses.replace(presets.chain, qk_norm='whole')
  with pytest.raises(ValueError, match=r"rollouts\.server: .*qk_norm='whole'.* no fam"):
    Publisher(to, policy.build(odd), WORDS, tmp_path)


def test_names_are_put_in_once():
  names = {'{folder}': '/runs/{step}/server/00000002', '{step}': '00000002'}
  assert publishing._filled('{folder}', names) == '/runs/{step}/server/00000002'


def test_of_several_processes_the_first_writes_and_tells(
  listen, tmp_path, as_processes
):
  engine = Engine()

  def run(index, step, rounds):
    publish = publisher(engine, listen, tmp_path, export_every=2)
    publish.step = step
    return [publish(params(step + index), step, number) for step, number in rounds]

  rounds = [(0, 0), (5, 1), (10, 2)]
  assert as_processes(3, lambda i: run(i, None, rounds)) == [[0, 0, 10]] * 3
  assert [int(folder[-8:]) for _, folder in engine.told] == [0, 10]
  assert engine.number == 10  # the weights of the first
  # Going on: the first looks whether the last export is there.
  assert as_processes(2, lambda i: run(i, 10, [(15, 3)])) == [[10], [10]]
  shutil.rmtree(tmp_path / 'server')
  assert as_processes(2, lambda i: run(i, 10, [(15, 3)])) == [[15], [15]]
  assert [int(folder[-8:]) for _, folder in engine.told] == [0, 10, 10, 15]


def test_what_the_first_cannot_hand_over_all_hear_of(listen, tmp_path, as_processes):
  steps = []

  def run(index):
    publish = publisher(lambda *_: (404, {}, b'Not Found'), listen, tmp_path)
    try:
      publish(params(2), 2, 0)
    finally:
      steps.append(publish.step)

  first, second = as_processes(2, run)
  assert isinstance(first, EndpointError)
  assert 'HTTP 404 Not Found' in str(first)
  assert str(second) == f'process 0: {first}'
  assert steps == [None, None]
