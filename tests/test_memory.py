"""In a process of its own: what is set here stays set."""

import subprocess
import sys

CODE = """
import resource, sys
from educe import memory
import numpy as np

def faults(calls):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(calls):
    np.ones(8 << 20)  # 64 MB, handed back at once
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(1)
usual = faults(4)
assert memory.keep()
faults(1)
print(usual, faults(4))
"""


def test_what_is_freed_is_there_for_the_next_one():
  run = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  usual, kept = map(int, run.stdout.split())
  assert usual > 1000  # pages that the system cleared
  assert kept < usual / 100


def test_a_c_library_without_it_changes_nothing(monkeypatch):
  from educe import memory

  monkeypatch.setattr(memory.ctypes, 'CDLL', lambda name: object())
  assert memory.keep() is False
