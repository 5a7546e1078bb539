"""The log-prob of a token, forward and backward, beside the matmuls that it cannot avoid.

  python benchmarks/logprob.py [--tokens=2048] [--width=512] [--vocab=32768] [--masked=0]

Ways take turns, so that a noisy machine is noisy for all. fraction_of_matmul is the time
of three bare products of these sizes (z = hW, dH = dz·Wᵀ, dW = hᵀ·dz) over that of the
way: what makes the logits twice cannot pass 0.75. With --masked=m the tokens that nobody
needs are left out, and the fraction counts as if they had not been. Prints a table and, as
its last line, one JSON object.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
from timing import about, in_turns

from educe.kernels.logprob import IMPLEMENTATIONS, one_pass


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--tokens', type=int, default=2048)
  parser.add_argument('--width', type=int, default=512)
  parser.add_argument('--vocab', type=int, default=32768)
  parser.add_argument('--masked', type=float, default=0.0)
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  args = parser.parse_args()
  N, D, V = args.tokens, args.width, args.vocab
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (N, D)).astype(args.dtype)
  head = (jax.random.normal(keys[1], (D, V)) / D**0.5).astype(args.dtype)
  targets = jax.random.randint(keys[2], (N,), 0, V)
  needed = jax.random.uniform(keys[3], (N,)) >= args.masked
  given = (hidden, head, targets, needed)

  ways = {'matmul': products, 'one_pass': in_one_pass}
  # The kernels of another chip would only be interpreted here.
  skipped = {'pallas_tpu': 'tpu', 'pallas_gpu': 'gpu'}
  skipped = {k for k, backend in skipped.items() if backend != jax.default_backend()}
  for name, op in IMPLEMENTATIONS.items():
    if name not in skipped:
      ways[name] = in_two_passes(op)
  compiled = {name: jax.jit(way).lower(*given).compile() for name, way in ways.items()}
  runs = {name: functools.partial(way, *given) for name, way in compiled.items()}
  took = in_turns(runs, args.repeats)
  temporaries = {
    name: way.memory_analysis().temp_size_in_bytes / 1e6
    for name, way in compiled.items()
  }
  rows = {
    name: {
      'wall_s': round(took[name].wall, 4),
      'cpu_s': round(took[name].cpu, 4),
      'fraction_of_matmul': round(took['matmul'].wall / took[name].wall, 3),
      'temp_mb': round(temporaries[name], 1),
    }
    for name in ways
  }
  print(f'{"way":>12} {"wall s":>8} {"CPU s":>8} {"of matmul":>10} {"temp MB":>9}')
  for name, row in rows.items():
    print(f'{name:>12}', '{:8.3f} {:8.3f} {:10.2f} {:9.1f}'.format(*row.values()))
  rate = 6 * N * D * V / took['matmul'].wall
  result = {
    'benchmark': 'logprob',
    'tokens': N,
    'width': D,
    'vocab': V,
    'masked': args.masked,
    'dtype': args.dtype,
    **about(),
    'matmul_gflops': round(rate / 1e9, 1),
    'ways': rows,
  }
  print(json.dumps(result))


def products(hidden, head, targets, needed):
  z = jnp.einsum('nd,dv->nv', hidden, head)
  # As fast as this backend knows: see kernels/logprob/chunked.py.
  across = jax.lax.optimization_barrier(hidden.T)
  return jnp.einsum('nv,dv->nd', z, head), across @ z


def value(scores):
  return scores.logp.sum() + 0.01 * scores.entropy.sum()


def in_one_pass(hidden, head, targets, needed):
  return one_pass(
    hidden, head, targets, lambda scores, _: jax.grad(value)(scores), needed=needed
  )


def in_two_passes(op):
  def way(hidden, head, targets, needed):
    def total(hidden, head):
      scores = op(hidden, head, targets, needed=needed)
      return value(scores), scores

    return jax.grad(total, (0, 1), has_aux=True)(hidden, head)

  return way


if __name__ == '__main__':
  main()
