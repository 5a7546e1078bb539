"""The loop. One, for every algorithm, without hooks: to change the control flow, copy it.

batch → step → metrics, one step late so that the device never waits for the host;
save, then evaluate, every so often; stop cleanly on SIGTERM; abort on endless NaNs.
"""

from __future__ import annotations

import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from educe import hosts, progress, sharding
from educe.training import checkpoint as ckpt
from educe.training import metrics as metrics_lib
from educe.training.step import Step
from educe.types import Algorithm, Batch, TrainState

Evaluate = Callable[[TrainState], dict[str, Any]]


class NonFinite(RuntimeError):
  """Gradients stayed NaN or infinite; the batch lies beside the metrics."""


def run(
  state: TrainState,
  step: Step,
  algorithm: Algorithm,
  *,
  steps: int,
  run_dir: pathlib.Path,
  manager: Any,
  config: dict[str, Any],
  place: Callable[..., Batch],
  log: metrics_lib.Log,
  evaluate: Evaluate | None = None,
  evaluate_every: int = 0,
  save_every: int = 100,
  abort_after: int = 10,
  flops: Callable[[Batch], float] = lambda batch: 0.0,
) -> tuple[TrainState, bool]:
  """Trains from `state.step` to `steps`. Returns the state, and whether it got there.

  False means that SIGTERM came, to any of the processes: the state was saved at that step
  boundary, and the same command goes on from it.

  Args:
    place: a batch of host arrays onto the devices, prompts that its rows share once.
    evaluate_every: steps between calls of `evaluate`, which also runs before the first
      step and after the last; 0 means only there.
    abort_after: raise NonFinite after this many skipped updates in a row; at once if the
      very first loss is not finite either, for then no update can be to blame.
    flops: of a step on a placed batch, for MFU.

  Raises NonFinite too if not a single update of the run was applied.
  """
  stop, before = catch_sigterm()
  start = int(state.step)
  peak = metrics_lib.peak_flops()
  bar = progress.steps(steps, start)
  clock = time.perf_counter()
  pending: tuple[int, Batch, int, float, dict, dict] | None = None
  asked = 0.0  # seconds that the batch in flight took to come

  def flush():
    """Writes the step in flight, waiting for it if it still runs."""
    nonlocal pending, clock
    if pending is None:
      return
    number, batch, tokens, work, values, info = pending
    pending = None
    values = {name: float(x) for name, x in sharding.fetch(values).items()}
    now = time.perf_counter()
    seconds, clock = now - clock - asked, now
    rate = tokens / seconds  # padding counts as work
    values |= {
      'timing/step_seconds': seconds,
      'perf/tokens_per_second': rate,
      'perf/mfu': work / seconds / peak,
    }
    log.write(number, values | info)
    bar.set_postfix_str(
      f'loss {values["loss"]:.4f}, {rate:.0f} tok/s, mfu {values["perf/mfu"]:.0%}',
      refresh=False,
    )
    if number == start + 1:
      bar.initial = bar.n = bar.n + 1  # it compiled: no measure of those to come
      bar.refresh()
    else:
      bar.update()
    skipped = int(values['skipped_in_a_row'])
    broken = number == 1 and skipped == 1 and not math.isfinite(values['loss'])
    if broken or skipped >= min(abort_after, steps):
      dump = run_dir / f'nonfinite_{number}.npz'
      if hosts.is_first():
        np.savez(dump, **{k: v for k, v in batch._asdict().items() if v is not None})
      if skipped == number:  # from the first on
        raise NonFinite(
          f'loss {values["loss"]} and gradients that are not finite before any update, '
          f'up to step {number}: look at config.model (its weights, its dtypes) and '
          f'config.loss; the batch is in {dump}'
        )
      raise NonFinite(
        f'gradients were not finite for {skipped} steps in a row, up to step {number}; '
        f'its batch is in {dump}. Lower optimizer.learning_rate, or look there'
      )

  def due(number: int) -> bool:
    every = bool(evaluate_every) and number % evaluate_every == 0
    return evaluate is not None and (every or number in (0, steps))

  def report(number: int):
    nonlocal clock
    if due(number) and number not in log.evaluated:
      assert evaluate is not None
      log.write(number, evaluate(state))
      bar.unpause()  # the time that it took is no step's
    clock = time.perf_counter()

  try:
    report(start)  # of a fresh start, or what a stop came in the way of
    for number in range(start + 1, steps + 1):
      if algorithm.asks_policy:
        flush()  # it would wait anyway, and its time would be taken for the step's
      began = time.perf_counter()
      try:
        batch, info = algorithm.next_batch(state)
      except StopIteration:
        flush()
        raise ValueError(
          f'the data ended before step {number} of {steps}; raise data.epochs, or '
          'lower steps'
        ) from None
      except hosts.Alone:  # to save it would need the others
        flush()
        raise
      except (ValueError, OSError):  # a judge is down, say: no update is lost to that
        flush()
        if number > start + 1:
          ckpt.save(manager, state, algorithm.data, config)
          ckpt.wait(manager)
        raise
      waited = time.perf_counter() - began
      placed = place(batch, algorithm.shares)
      work = flops(placed)
      state, values = step(state, placed)
      flush()
      asked = waited if algorithm.asks_policy else 0.0
      tokens = len(placed.tokens) * batch.tokens.shape[1]
      pending = (number, batch, tokens, work, values, info)
      stopping = stop()
      if number == steps or stopping or due(number) or number % save_every == 0:
        flush()
        ckpt.save(manager, state, algorithm.data, config)
        if stopping:
          return state, False
        report(number)
    return state, True
  finally:
    bar.close()
    if before is not None:
      signal.signal(signal.SIGTERM, before)


def catch_sigterm() -> tuple[Callable[[], bool], Any]:
  """(whether this process is asked to stop, the handler to put back).

  Of several processes, whether this is the step that all of them stop at; JAX has a
  handler of its own there. Python delivers signals to the main thread alone; elsewhere
  the answer is always no.
  """
  if hosts.count() > 1:
    return hosts.stopping, None
  stop = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    return stop.is_set, None
  return stop.is_set, signal.signal(signal.SIGTERM, lambda *_: stop.set())
