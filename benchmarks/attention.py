"""Causal attention and its gradient, by each implementation that runs here.

  python benchmarks/attention.py [--rows=8] [--tokens=1024] [--heads=4] [--kv_heads=4]
                                 [--width=64] [--dtype=float32] [--packed=4]

Ways take turns, so that a noisy machine is noisy for all. `softmax` is the definition in
four lines, on every pair of tokens; `jax.nn` JAX's own portable function. --packed: so
many documents a row. Prints a table and, as its last line, one JSON object.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
from timing import about, in_turns

from educe.models import attention


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--tokens', type=int, default=1024)
  parser.add_argument('--heads', type=int, default=4)
  parser.add_argument('--kv_heads', type=int, default=4)
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--packed', type=int, default=1)
  parser.add_argument('--repeats', type=int, default=9)
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  args = parser.parse_args()
  B, T, H, K, h = args.rows, args.tokens, args.heads, args.kv_heads, args.width
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (B, T, H, h), (B, K, T, h), (B, K, T, h), (B, T, H, h)
  draws = zip(keys, shapes, strict=True)
  given = [(jax.random.normal(*draw) / h**0.25).astype(args.dtype) for draw in draws]
  document = jnp.broadcast_to(jnp.arange(T) * args.packed // T + 1, (B, T))
  segments = document if args.packed > 1 else None
  visible = attention.Causal(segments)

  ways = {'softmax': definition, 'jax.nn': jax_nn}
  for name in attention.IMPLEMENTATIONS[1:]:
    try:
      attention.choose(name, *given[:3], visible)
    except ValueError:
      continue
    ways[name] = functools.partial(attention.attend, implementation=name)
  programs = {}
  for name, way in ways.items():
    forward = functools.partial(way, visible=visible)
    programs[name, 'forward'] = jax.jit(lambda q, k, v, _, f=forward: f(q, k, v))
    programs[name, 'gradient'] = jax.jit(functools.partial(gradient, forward))
  compiled = {key: way.lower(*given).compile() for key, way in programs.items()}
  runs = {key: functools.partial(way, *given) for key, way in compiled.items()}
  took = in_turns(runs, args.repeats)
  rows = {
    name: {
      'forward_ms': round(1e3 * took[name, 'forward'].wall, 3),
      'gradient_ms': round(1e3 * took[name, 'gradient'].wall, 3),
      'gradient_speedup': round(
        took['softmax', 'gradient'].wall / took[name, 'gradient'].wall, 2
      ),
      'temp_mb': round(
        compiled[name, 'gradient'].memory_analysis().temp_size_in_bytes / 1e6, 1
      ),
    }
    for name in ways
  }
  print(f'{"way":>10} {"forward ms":>11} {"gradient ms":>12} {"×":>6} {"temp MB":>9}')
  for name, row in rows.items():
    print(f'{name:>10}', '{:11.3f} {:12.3f} {:6.2f} {:9.1f}'.format(*row.values()))
  print(json.dumps({'benchmark': 'attention', **vars(args), **about(), 'ways': rows}))


def gradient(forward, q, k, v, out):
  """Of q, k and v, where `out` is that of the result."""
  return jax.vjp(forward, q, k, v)[1](out)


def mask(T, visible):
  earlier = jnp.tril(jnp.ones((T, T), bool))[None]
  if visible.segments is None:
    return earlier
  return earlier & (visible.segments[:, :, None] == visible.segments[:, None])


def definition(q, k, v, visible):
  B, T, H, h = q.shape
  q = q.reshape(B, T, k.shape[1], -1, h)
  scores = jnp.einsum('btkgh,bksh->bkgts', q, k, preferred_element_type=jnp.float32)
  scores = jnp.where(jnp.expand_dims(mask(T, visible), (1, 2)), scores, -1e30)
  weights = jax.nn.softmax(scores).astype(v.dtype)
  return jnp.einsum('bkgts,bksh->btkgh', weights, v).reshape(B, T, H, h)


def jax_nn(q, k, v, visible):
  k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
  seen = mask(q.shape[1], visible)[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=seen, scale=1.0)


if __name__ == '__main__':
  main()
