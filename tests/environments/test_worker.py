"""What is sent to a worker, and how its errors read. The rest: test_verifiers.py."""

import functools
import os
import pickle
import subprocess
import sys
import types

import cloudpickle
import pytest

from educe.environments import worker


def run(packed: bytes, argument: int) -> int:
  """The packed function's value in an interpreter that knows nothing of this one."""
  script = (
    'import pickle, sys; f = pickle.loads(bytes.fromhex(sys.argv[1])); '
    'print(f(int(sys.argv[2])))'
  )
  command = [sys.executable, '-c', script, packed.hex(), str(argument)]
  return int(subprocess.check_output(command, cwd=os.sep))


def test_functions_of_unimportable_modules_travel_by_value():
  module = types.ModuleType('of_this_run')
  exec('OFFSET = 3\ndef add(x, times=1):\n  return x * times + OFFSET', module.__dict__)
  sys.modules['of_this_run'] = module
  try:
    packed = worker.pack(functools.partial(module.add, times=2))
    # The mark is taken back: other users of cloudpickle are not affected.
    assert not cloudpickle.list_registry_pickle_by_value()
  finally:
    del sys.modules['of_this_run']
  assert run(packed, 5) == 13
  assert run(worker.pack(lambda x: x + 1), 5) == 6


def test_functions_of_installed_modules_travel_by_name():
  packed = worker.pack(os.path.join)
  assert pickle.loads(packed) is os.path.join
  assert len(packed) < 100


@pytest.mark.parametrize(
  ('name', 'found'),
  [
    ('json', True),
    ('json.decoder', True),
    ('sys', True),
    ('educe.environments.worker', True),
    ('__main__', True),
    ('json.no_such', False),
    ('no_such.decoder', False),
  ],
)
def test_what_a_new_interpreter_can_import(name, found):
  assert worker._importable(name) is found


def test_errors_are_one_bounded_line_with_their_place():
  try:
    raise RuntimeError('a\nb' + 'x' * 1000)
  except RuntimeError as error:
    text = worker.one_line(error)
  assert text.startswith('RuntimeError: a bxxx')
  assert text[text.index('(') :].startswith('(test_worker.py line ')
  assert len(text) < 500
  assert worker.one_line(KeyError('x')) == "KeyError: 'x'"
