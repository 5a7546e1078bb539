"""Where numbers go: a JSONL line per record, TensorBoard if asked."""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from educe import hosts, paths

# Dense bf16 peak of one device, FLOP/s (vendors' data sheets). Others are measured.
PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
  'TPU7x': 1153e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}


def peak_flops() -> float:
  """FLOP/s that all devices could do; a float32 matmul is timed where no table knows."""
  device = jax.devices()[0]
  each = PEAK_FLOPS.get(device.device_kind) or measured_matmul_flops()
  # Virtual CPU devices share one processor.
  several = hosts.count() if device.platform == 'cpu' else jax.device_count()
  return each * several


def measured_matmul_flops(size: int = 2048, repeats: int = 3) -> float:
  """Best rate of a float32 [size, size] matmul here, FLOP/s."""
  a = jnp.ones((size, size), jnp.float32)
  multiply = jax.jit(jnp.matmul)
  best = math.inf
  for _ in range(repeats + 1):
    start = time.perf_counter()
    multiply(a, a).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


class Log:
  """Appends records to run_dir/metrics.jsonl, on process 0 alone.

  A run that resumes at step k first drops what an interrupted run wrote after k, and any
  half-written last line, so the file reads as if nothing had happened.
  """

  def __init__(
    self, run_dir: pathlib.Path, *, step: int = 0, tensorboard: bool = False
  ):
    self.path = run_dir / 'metrics.jsonl'
    self.writer: Any = None
    self.on = hosts.is_first()
    hosts.by_first(lambda: self._open(run_dir, step, tensorboard))
    # Steps whose evaluation is already written; to all the same, for all evaluate or none.
    kept = evaluated(read(self.path)) if self.on else ()
    self.evaluated: set[int] = set(hosts.agreed(sorted(kept)))

  def _open(self, run_dir: pathlib.Path, step: int, tensorboard: bool) -> None:
    kept = [line for line in read(self.path) if line['step'] <= step and step > 0]
    paths.write(self.path, ''.join(_line(record) for record in kept))
    if tensorboard:
      try:
        import tensorboardX
      except ImportError:
        raise ValueError(
          'tensorboard=True needs the package tensorboardX: pip install tensorboardX'
        ) from None
      self.writer = tensorboardX.SummaryWriter(
        str(run_dir / 'tensorboard'), purge_step=step + 1
      )

  def write(self, step: int, values: dict[str, Any]) -> None:
    if not self.on:
      return
    with self.path.open('a') as file:
      file.write(_line({'step': step, **values}))
    if self.writer is not None:
      for name, value in values.items():
        if isinstance(value, int | float):
          self.writer.add_scalar(name, value, step)
      self.writer.flush()

  def close(self) -> None:
    if self.writer is not None:
      self.writer.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The whole records of a metrics file; a torn last line is not one."""
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith('\n') and line.strip()]


def evaluated(lines: Iterable[dict[str, Any]]) -> set[int]:
  """The steps whose evaluation is among the records; a training step's has its loss."""
  return {line['step'] for line in lines if 'loss' not in line}


def _line(record: dict[str, Any]) -> str:
  """JSON has no NaN: a number that is not finite becomes null."""
  clean = {
    k: None if isinstance(v, float) and not math.isfinite(v) else v
    for k, v in record.items()
  }
  return json.dumps(clean) + '\n'
