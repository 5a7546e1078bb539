"""Ways that take turns, so that a noisy machine is noisy for all; and what it is."""

import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax


class Seconds(NamedTuple):
  wall: float
  cpu: float  # of all threads


def in_turns(
  ways: Mapping[str, Callable[[], Any]],
  repeats: int,
  *,
  inner: int = 1,
  of: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[str, Seconds]:
  """Seconds a call of each way, `of` all turns but the first, which compiles and walks
  into fresh memory.

  inner: calls of a turn, of which the last is waited for
  """
  turns: dict[str, list[Seconds]] = {name: [] for name in ways}
  for turn in range(repeats + 1):
    for name, way in ways.items():
      wall, cpu = time.perf_counter(), time.process_time()
      for _ in range(inner):
        out = way()
      jax.block_until_ready(out)
      took = time.perf_counter() - wall, time.process_time() - cpu
      if turn:
        turns[name].append(Seconds(*(x / inner for x in took)))
  return {
    name: Seconds(*map(of, zip(*each, strict=True))) for name, each in turns.items()
  }


def about() -> dict[str, Any]:
  """The machine, for a benchmark's last line."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [x.split(':')[1].strip() for x in lines if x.startswith('model name')]
  return {
    'machine': f'{names[0] if names else platform.machine()}, {os.cpu_count()} cores',
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'date': time.strftime('%Y-%m-%d'),
  }
