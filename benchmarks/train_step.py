"""One SFT step of SmolLM2-135M beside a matmul in the same process.

  python benchmarks/train_step.py [--rows=8] [--length=64] [--steps=8]

Prints a table and, as its last line, one JSON object. fraction_of_matmul_peak is
6·params·tokens per second over the best float32 matmul rate seen here; the optimizer is
inside the step. Weights are random: speed does not know the difference.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp

from educe.losses import sft
from educe.losses.logprobs import score
from educe.models import policy, presets
from educe.training import optimizer
from educe.training.metrics import measured_matmul_flops
from educe.training.step import init_state, make_step
from educe.types import Batch


def seconds(function, repeats):
  """Times of `repeats` calls, after one that compiles."""
  times = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - start)
  return times[1:]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--length', type=int, default=64)
  parser.add_argument('--steps', type=int, default=8)
  parser.add_argument('--remat', default='dots', choices=['none', 'dots', 'full'])
  args = parser.parse_args()
  tokens = args.rows * args.length

  architecture = dataclasses.replace(presets.smollm2_135m, remat=args.remat)
  model = policy.build(architecture)
  params = model.init(jax.random.key(0))
  count = policy.count(params)
  shape = (args.rows, args.length)
  ids = jax.random.randint(jax.random.key(1), shape, 0, architecture.vocab_size)
  batch = Batch(ids, jnp.ones(shape).at[:, 0].set(0))

  rates = [measured_matmul_flops(repeats=9)]

  # The parts, each timed alone.
  def states(params):
    return model.hidden(params, ids)[0].sum()

  def total(params):
    return score(model, params, batch).logp.sum()

  parts = {
    'forward to states': seconds(functools.partial(jax.jit(states), params), 3),
    'gradient of states': seconds(
      functools.partial(jax.jit(jax.grad(states)), params), 3
    ),
    'forward to log-probs': seconds(functools.partial(jax.jit(total), params), 3),
    'gradient': seconds(functools.partial(jax.jit(jax.grad(total)), params), 3),
  }
  rates.append(measured_matmul_flops(repeats=9))

  tx = optimizer.make(1000, name='adamw', learning_rate=1e-5)
  state = init_state(params, tx, jax.random.key(0))
  step = make_step(model, sft.loss, tx)
  del params

  def update():
    nonlocal state
    state, metrics = step(state, batch)
    return metrics['loss']

  parts['step (with AdamW)'] = seconds(update, args.steps)
  rates.append(measured_matmul_flops(repeats=9))

  peak = max(rates)
  print(f'SmolLM2-135M ({count:,} params), float32, {args.rows} × {args.length} tokens')
  print(f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores, '
        f'{jax.devices()[0].device_kind}, jax {jax.__version__}')  # fmt: skip
  print(f'matmul 2048³: {" ".join(f"{r / 1e9:.0f}" for r in rates)} GFLOP/s\n')
  print(f'{"":24}{"best s":>9}{"median s":>10}{"tokens/s":>10}')
  for name, times in parts.items():
    best, middle = min(times), statistics.median(times)
    print(f'{name:24}{best:9.3f}{middle:10.3f}{tokens / best:10.1f}')
  best = min(parts['step (with AdamW)'])
  result = {
    'benchmark': 'train_step',
    'model': 'smollm2_135m',
    'rows': args.rows,
    'length': args.length,
    'remat': args.remat,
    'params': count,
    'tokens_per_second': tokens / best,
    'tokens_per_second_median': tokens / statistics.median(parts['step (with AdamW)']),
    'matmul_flops_per_second': peak,
    'fraction_of_matmul_peak': 6 * count * tokens / best / peak,
    'fraction_of_mean_matmul': 6 * count * tokens / best / statistics.mean(rates),
    'seconds': {name: min(times) for name, times in parts.items()},
    'jax': jax.__version__,
    'cores': os.cpu_count(),
    'device': jax.devices()[0].device_kind,
  }
  print()
  print(json.dumps(result))


if __name__ == '__main__':
  main()
