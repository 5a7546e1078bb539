"""A GRPO step whose groups attend to one copy of their prompt, beside that of whole rows.

  python benchmarks/shared_prompts.py [--prompt=1024] [--completion=512] [--group=8]

The same batch both ways, in turns: tokens per second count the rows' tokens, shared or not,
as the loss sees them. Loss and gradient are compared too (largest difference over the
largest gradient). Prints a table and, as its last line, one JSON object.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from timing import about, in_turns

from educe.data.sharing import share
from educe.losses import grpo
from educe.losses.logprobs import lose
from educe.models import policy
from educe.models.architecture import Architecture
from educe.types import Batch


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--prompt', type=int, default=1024)
  parser.add_argument('--completion', type=int, default=512)
  parser.add_argument('--group', type=int, default=8)
  parser.add_argument('--prompts', type=int, default=1)
  parser.add_argument('--dim', type=int, default=256)
  parser.add_argument('--layers', type=int, default=4)
  parser.add_argument('--vocab', type=int, default=4096)
  parser.add_argument('--repeats', type=int, default=3)
  args = parser.parse_args()
  rows, length = args.prompts * args.group, args.prompt + args.completion
  model = policy.build(
    Architecture(
      vocab_size=args.vocab,
      dim=args.dim,
      layers=args.layers,
      heads=args.dim // 64,
      kv_heads=args.dim // 64,
      head_dim=64,
      ffn=4 * args.dim,
      max_length=length,
      remat='dots',
    )
  )
  params = model.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, args.vocab, (rows, length)).astype(np.int32)
  tokens[:, : args.prompt] = np.repeat(
    tokens[:: args.group, : args.prompt], args.group, 0
  )
  mask = np.float32(np.arange(length) >= args.prompt) * np.ones((rows, 1), np.float32)
  advantages = np.float32(rng.normal(size=(rows, 1))) * mask
  whole = Batch(tokens, mask, advantages=advantages)
  batches = {'whole rows': whole, 'shared': share(whole, args.group)}

  @jax.jit
  def step(params, batch):
    def total(params):
      mean = lose(model, params, batch, grpo.loss)[0]
      return mean.total / mean.count

    return jax.value_and_grad(total)(params)

  runs = {name: functools.partial(step, params, x) for name, x in batches.items()}
  took = in_turns(runs, args.repeats)
  (loss, gradient), (shared_loss, shared_gradient) = (run() for run in runs.values())
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
  apart = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), gradient, shared_gradient
  )
  rows = {
    name: {
      'wall_s': round(each.wall, 3),
      'cpu_s': round(each.cpu, 3),
      'tokens_per_second': round(whole.tokens.size / each.wall),
    }
    for name, each in took.items()
  }
  print(f'{"":>12} {"wall s":>8} {"CPU s":>8} {"tokens/s":>9}')
  for name, row in rows.items():
    print(f'{name:>12}', '{:8.3f} {:8.3f} {:9d}'.format(*row.values()))
  speedup = rows['whole rows']['wall_s'] / rows['shared']['wall_s']
  print(f'{speedup:.2f} times as fast')
  result = {
    'benchmark': 'shared_prompts',
    **vars(args),
    'params': policy.count(params),
    **about(),
    'speedup': round(speedup, 3),
    'loss_difference': abs(float(loss - shared_loss)),
    'gradient_difference': max(jax.tree.leaves(apart)) / largest,
    'ways': rows,
  }
  print(json.dumps(result))


if __name__ == '__main__':
  main()
