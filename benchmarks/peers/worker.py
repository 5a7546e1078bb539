"""One side of peers.py: a process that does one thing at a time, when asked.

The judge writes a line, the worker answers with a line of JSON:

  matmul        {"wall", "cpu"}: one float32 product of [SIZE, SIZE] matrices
  prepare NAME  {}: the case NAME from fresh weights, what was there before dropped
  run           {"wall", "cpu", "value"}: one step, or one batch of completions

Between lines it waits for the next, and no side works while another is measured. Imports
nothing but NumPy, so that it runs in every side's environment.
"""

from __future__ import annotations

import gc
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

import numpy as np

SIZE = 2048
Run = Callable[[], float]


def given() -> tuple[pathlib.Path, dict, dict[str, np.ndarray]]:
  """(folder of the weights, settings, arrays) that the judge wrote; see peers.py."""
  folder = pathlib.Path(sys.argv[1])
  with np.load(folder / 'arrays.npz') as arrays:
    found = dict(arrays)
  return folder / 'model', json.loads((folder / 'settings.json').read_text()), found


def answering():
  """A stream to the judge; what libraries print goes to stderr from here on."""
  stream = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  return stream


def timed(run: Run) -> dict[str, float]:
  """Seconds of the clock, and of this process on all its cores."""
  wall, cpu = time.perf_counter(), time.process_time()
  value = run()
  return {
    'wall': time.perf_counter() - wall,
    'cpu': time.process_time() - cpu,
    'value': value,
  }


def serve(
  cases: dict[str, Callable[[], Run]], matmul: Run, versions: dict[str, str]
) -> None:
  """Answers until the judge closes its end.

  cases: name -> what prepares it; what that returns runs it once, to the end, and
    returns the loss, or for completions how many tokens were drawn
  """
  stream = answering()

  def answer(value) -> None:
    print(json.dumps(value), file=stream, flush=True)

  answer(versions)
  run: Run | None = None
  for line in sys.stdin:
    command, *rest = line.split()
    if command == 'matmul':
      answer(timed(matmul))
    elif command == 'prepare':
      run = None
      gc.collect()
      run = cases[rest[0]]()
      answer({})
    else:
      assert run, line
      answer(timed(run))
