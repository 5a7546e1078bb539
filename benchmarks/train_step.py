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
import statistics

import jax
import jax.numpy as jnp
from timing import about, in_turns

from educe.losses import sft
from educe.losses.logprobs import score
from educe.models import policy, presets
from educe.training import optimizer
from educe.training.metrics import measured_matmul_flops
from educe.training.step import init_state, make_step
from educe.types import Batch


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
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

  def states(params):
    return model.hidden(params, ids)[0].sum()

  def total(params):
    return score(model, params, batch).logp.sum()

  functions = {
    'forward to states': states,
    'gradient of states': jax.grad(states),
    'forward to log-probs': total,
    'gradient': jax.grad(total),
  }
  parts = {}
  for (
    name,
    function,
  ) in functions.items():  # each alone: there is memory for one of them
    way = functools.partial(jax.jit(function), params)
    parts |= in_turns({name: way}, 3, of=min)
  rates.append(measured_matmul_flops(repeats=9))

  tx = optimizer.make(1000, name='adamw', learning_rate=1e-5)
  state = init_state(params, tx, jax.random.key(0))
  step = make_step(model, sft.loss, tx)
  del params

  def update():
    nonlocal state
    state, metrics = step(state, batch)
    return metrics['loss']

  parts |= in_turns({'step (with AdamW)': update}, args.steps, of=min)
  rates.append(measured_matmul_flops(repeats=9))

  peak = max(rates)
  print(f'SmolLM2-135M ({count:,} params), float32, {args.rows} × {args.length} tokens')
  print(*about().values(), sep=', ')
  print(f'matmul 2048³: {" ".join(f"{r / 1e9:.0f}" for r in rates)} GFLOP/s\n')
  print(f'{"":24}{"best s":>9}{"tokens/s":>10}')
  for name, best in parts.items():
    print(f'{name:24}{best.wall:9.3f}{tokens / best.wall:10.1f}')
  best = parts['step (with AdamW)'].wall
  result = {
    'benchmark': 'train_step',
    'model': 'smollm2_135m',
    'rows': args.rows,
    'length': args.length,
    'remat': args.remat,
    'params': count,
    'tokens_per_second': tokens / best,
    'matmul_flops_per_second': peak,
    'fraction_of_matmul_peak': 6 * count * tokens / best / peak,
    'fraction_of_mean_matmul': 6 * count * tokens / best / statistics.mean(rates),
    'seconds': {name: best.wall for name, best in parts.items()},
    **about(),
  }
  print()
  print(json.dumps(result))


if __name__ == '__main__':
  main()
