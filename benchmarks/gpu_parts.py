"""The parts of gpu.py: what each measures. Importing it starts nothing.

A part is a function of a Size that returns plain values: `rows`, name → numbers, and for
what did not run `skipped`, in a line. MB are 10^6 bytes; times are medians, in seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import logprob
import numpy as np
import rollout
from gpu_sizes import Head, Size, stages
from step_work import LOSSES, train_batch
from timing import in_turns

from educe import roofline
from educe.kernels.logprob import chunked, pallas_gpu, reference
from educe.models import policy
from educe.rollouts import sampler
from educe.training import metrics, optimizer
from educe.training.step import init_state, make_step
from educe.types import Scores

HERE = pathlib.Path(__file__).resolve().parent
TORCH_LIMIT = 270  # seconds of what torch does
ENTROPY = 0.01  # its weight in the loss that the log-prob ways are differentiated for


def memory(compiled) -> dict[str, float]:
  """MB that the compiler says a program needs beside its arguments and results."""
  said = compiled.memory_analysis()
  return {
    'temp_mb': said.temp_size_in_bytes / 1e6,
    'arguments_mb': said.argument_size_in_bytes / 1e6,
    'results_mb': said.output_size_in_bytes / 1e6,
  }


def why(error: BaseException) -> str:
  """What a way that does not run here said, in a line."""
  return f'{type(error).__name__}: {error}'.splitlines()[0][:300]


def beside(part: str, work: dict[str, Any], cpu: bool) -> dict[str, Any]:
  """What torch makes of the same work, in a process of its own: rows, or why not."""
  if importlib.util.find_spec('torch') is None:
    return {'skipped': 'torch is not installed'}
  command = [sys.executable, str(HERE / 'gpu_torch.py'), part, json.dumps(work)]
  env = os.environ | ({'CUDA_VISIBLE_DEVICES': ''} if cpu else {})
  try:
    done = subprocess.run(
      command, env=env, capture_output=True, text=True, timeout=TORCH_LIMIT
    )
  except subprocess.TimeoutExpired:
    return {'skipped': f'torch took more than {TORCH_LIMIT} s'}
  if done.returncode:
    return {'skipped': (done.stderr.strip() or 'torch failed').splitlines()[-1][:300]}
  return json.loads(done.stdout.splitlines()[-1])


def on_cpu() -> bool:
  return jax.default_backend() == 'cpu'


# The ceilings.


def ceilings(size: Size) -> dict[str, Any]:
  """Copies, read and written bytes both counted, and products of random bfloat16."""
  block = jnp.zeros(size.copied // 4)
  copy = jax.jit(lambda x: x + 1)
  rates = {}
  ways = {'copy': functools.partial(copy, block)}
  each = in_turns(ways, size.repeats, inner=4)['copy'].wall
  rates['copy'] = {'seconds': each, 'gb_per_second': 2 * block.nbytes / each / 1e9}
  del block
  square = Head(size.square, size.square, size.square)
  for name, shape in {'square': square, **size.heads}.items():
    N, D, V = shape
    keys = jax.random.split(jax.random.key(0))
    a, b = (
      jax.random.normal(key, of, jnp.bfloat16)
      for key, of in zip(keys, ((N, D), (D, V)), strict=True)
    )
    run = functools.partial(jax.jit(jnp.matmul), a, b)
    each = in_turns({'matmul': run}, size.repeats, inner=4)['matmul'].wall
    rates[f'matmul {name}'] = {
      'seconds': each,
      'tflops': 2 * N * D * V / each / 1e12,
      'shape': [N, D, V],
    }
  return {'rows': rates}


# The log-prob.


def full_logits(hidden, head, targets):
  """As most write it: logits in the operands' dtype, log-softmax of all in float32."""
  z = (hidden @ head).astype(jnp.float32)
  log_p = jax.nn.log_softmax(z)
  logp = jnp.take_along_axis(log_p, targets[:, None], 1)[:, 0]
  return Scores(logp, -(jnp.exp(log_p) * log_p).sum(-1))


def value(scores: Scores, worth):
  return (worth * (scores.logp + ENTROPY * scores.entropy)).sum()


def operations(size: Size) -> dict[str, Callable]:
  """name → log-prob of (hidden, head, targets), each as it is called here."""

  def in_chunks(rows):
    def op(*operands):
      # While it is traced, the chunks are these.
      with mock.patch.object(chunked, 'chunk_rows', lambda N, _: min(rows, N)):
        return chunked.logprob(*operands)

    return op

  return {
    'full logits': full_logits,
    'reference': reference.logprob,
    **{f'chunked {rows}': in_chunks(rows) for rows in size.chunks},
    'pallas_gpu': pallas_gpu.logprob,
  }


def one_passes(size: Size) -> dict[str, Callable]:
  """name → (scores, gradients) with the gradients formed in the forward pass."""

  def of(rows):
    def way(hidden, head, targets, worth):
      with mock.patch.object(chunked, 'chunk_rows', lambda N, _: min(rows, N)):
        scores, *gradients = chunked.one_pass(
          hidden, head, targets, jax.grad(value), worth
        )
      return scores, gradients

    return way

  return {f'one_pass {rows}': of(rows) for rows in size.chunks}


def forward(op):
  return lambda hidden, head, targets, worth: op(hidden, head, targets)


def backward(op):
  def way(hidden, head, targets, worth):
    def total(hidden, head):
      scores = op(hidden, head, targets)
      return value(scores, worth), scores

    gradients, scores = jax.grad(total, (0, 1), has_aux=True)(hidden, head)
    return scores, gradients

  return way


def in_float64(hidden, head, targets, worth, at):
  """(log-probs, entropies, dH) of the tokens `at`, and dW where only they are worth
  anything, from the definition in NumPy."""
  h, w, g = (
    np.asarray(x).astype(np.float64) for x in (hidden[at], head, worth[at][:, None])
  )
  y = np.asarray(targets)[at]
  z = h @ w
  z -= z.max(1, keepdims=True)
  log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
  p = np.exp(log_p)
  entropy = -(p * log_p).sum(1)
  ds = -g * p * (1 + ENTROPY * (log_p + entropy[:, None]))
  ds[np.arange(len(y)), y] += g[:, 0]
  return log_p[np.arange(len(y)), y], entropy, ds @ w.T, h.T @ ds


def largest(x) -> float:
  return float(jnp.abs(x).max())


def errors(scores, gradients, exact, at) -> dict[str, float]:
  """Largest differences: nats, and of gradients as a share of the largest entry."""
  logp, entropy, d_hidden, d_head = exact
  return {
    'logp_error': largest(scores.logp[at] - logp),
    'entropy_error': largest(scores.entropy[at] - entropy),
    'd_hidden_error': largest(gradients[0][at] - d_hidden) / largest(d_hidden),
    'd_head_error': largest(gradients[1] - d_head) / largest(d_head),
  }


def fraction_of_ceiling(shape: Head, products: int, rate: float, time: float) -> float:
  """Time of so many products 2·N·D·V at `rate` FLOP/s, of the time that it took."""
  return products * 2 * shape.tokens * shape.width * shape.vocab / rate / time


def logprob_part(size: Size, name: str) -> dict[str, Any]:
  shape = size.heads[name]
  N, D, V = shape
  work = dict(shape._asdict(), chunks=size.chunks, repeats=size.repeats)
  peers = beside('logprob', work, on_cpu())
  seed = time.time_ns() % 2**31  # fresh numbers every time
  keys = jax.random.split(jax.random.key(seed), 5)
  hidden = jax.random.normal(keys[0], (N, D), jnp.bfloat16)
  head = jax.random.normal(keys[1], (D, V), jnp.bfloat16) / jnp.bfloat16(D**0.5)
  targets = jax.random.randint(keys[2], (N,), 0, V)
  worth = jax.random.normal(keys[3], (N,))
  at = np.sort(jax.random.choice(keys[4], N, (size.checked,), replace=False))
  operands = (hidden, head, targets, worth)
  few = (hidden, head, targets, jnp.zeros(N).at[at].set(worth[at]))

  ways: dict[str, Callable] = {
    'matmul, forward': lambda h, w, y, _: h @ w,
    'matmul, forward + backward': lambda h, w, y, _: logprob.products(h, w, y, None),
  }
  for op_name, op in operations(size).items():
    ways[f'{op_name}, forward'] = forward(op)
    ways[f'{op_name}, forward + backward'] = backward(op)
  for op_name, op in one_passes(size).items():
    ways[f'{op_name}, forward + backward'] = op
  # What float32 adds to it, 1e-7, is nothing here, and a GPU compares faster.
  exact = [jnp.float32(x) for x in in_float64(*operands, at)]
  rows: dict[str, dict[str, Any]] = {}
  runs = {}
  for way_name, way in ways.items():
    if way_name.startswith('pallas_gpu') and on_cpu():
      rows[way_name] = {'skipped': 'there is no GPU'}
      continue
    try:
      compiled = jax.jit(way).lower(*operands).compile()
      out = jax.block_until_ready(compiled(*few))
    except Exception as error:  # out of memory, or a kernel of another jax
      rows[way_name] = {'skipped': why(error)}
      continue
    rows[way_name] = memory(compiled)
    if not way_name.startswith('matmul') and way_name.endswith('backward'):
      rows[way_name] |= errors(*out, exact, at)
    del out
    runs[way_name] = functools.partial(compiled, *operands)
  for way_name, each in in_turns(runs, size.repeats).items():
    rows[way_name]['seconds'] = each.wall
  flops = 2 * N * D * V
  for way_name in runs:
    products = 3 if way_name.endswith('backward') else 1
    rate = flops / rows['matmul, forward']['seconds']
    each = rows[way_name]['seconds']
    rows[way_name]['tflops'] = products * flops / each / 1e12
    rows[way_name]['of_ceiling'] = fraction_of_ceiling(shape, products, rate, each)
  return {'shape': [N, D, V], 'seed': seed, 'rows': rows, 'torch': peers}


# Training.


def train_part(size: Size, name: str) -> dict[str, Any]:
  a = dataclasses.replace(size.models[name], compute_dtype='bfloat16', remat='dots')
  work = dict(
    architecture=dataclasses.asdict(a),
    rows=size.rows,
    length=size.length,
    losses=list(LOSSES),
    repeats=size.repeats,
  )
  peers = beside('train', work, on_cpu())
  model = policy.build(a)
  batch = train_batch(a, size.rows, size.length)
  read = roofline.full(size.rows, size.length)
  tokens, flops = read.tokens, roofline.update(model, policy.shapes(a), read).flops
  peak = metrics.peak_flops()
  tx = optimizer.make(1000, name='adamw', learning_rate=1e-5)
  rows = {}
  for loss_name, loss in LOSSES.items():
    state = init_state(model.init(jax.random.key(0)), tx, jax.random.key(0))
    step = make_step(model, loss, tx).lower(state, batch).compile()

    def update(step=step):
      nonlocal state
      state, said = step(state, batch)
      return said['loss']

    each = in_turns({'step': update}, size.repeats)['step'].wall
    rows[loss_name] = {
      'seconds': each,
      'tokens_per_second': tokens / each,
      'mfu': flops / each / peak,
      'loss': float(update()),
      **memory(step),
    }
    del state, step
  for row in peers.get('rows', {}).values():
    row['mfu'] = flops / row['seconds'] / peak
  return {
    'params': policy.count(policy.shapes(a)),
    'tokens': tokens,
    'flops': flops,
    'peak_flops': peak,
    'rows': rows,
    'torch': peers,
  }


# Decoding.


def decode_part(size: Size, name: str) -> dict[str, Any]:
  """A step is what all tokens take less what one takes, a token."""
  a = dataclasses.replace(
    size.models[name], param_dtype='bfloat16', compute_dtype='bfloat16'
  )
  shared = dict(prompt=size.prompt, new_tokens=size.new_tokens, repeats=size.repeats)
  work = dict(architecture=dataclasses.asdict(a), batches=size.batches, **shared)
  peers = beside('decode', work, on_cpu())
  model = policy.build(a)
  params = model.init(jax.random.key(0))
  bandwidth = ceilings(size._replace(heads={}))['rows']['copy']['gb_per_second'] * 1e9
  peak = metrics.peak_flops()
  rng = np.random.default_rng(0)
  rows: dict[str, dict[str, Any]] = {}
  for many in size.batches:
    prompts = rng.integers(0, a.vocab_size, (many // size.group, size.prompt))
    prompts = np.repeat(prompts, size.group, 0).tolist()

    def run(new, prompts=prompts):
      key = jax.random.key(0)
      return sampler.sample(model, params, prompts, key, max_new_tokens=new).tokens

    ways = {'whole': size.new_tokens, 'one': 1}
    ways = {name: functools.partial(run, new) for name, new in ways.items()}
    took = in_turns(ways, min(size.repeats, 3))
    whole, one = took['whole'].wall, took['one'].wall
    step = (whole - one) / (size.new_tokens - 1)
    places = sampler.bucket(size.prompt - 1) + size.new_tokens
    read, flops = rollout.step_cost(model, params, many, places)
    read = read * jnp.dtype(a.compute_dtype).itemsize / 4
    bounds = {'memory': read / bandwidth, 'matmul': flops / peak}
    rows[f'{many} rows'] = {
      'seconds': step,
      'tokens_per_second': many / step,
      'of_bound': max(bounds.values()) / step,
      **{f'{kind}_bound_seconds': bound for kind, bound in bounds.items()},
      'prefill_seconds': one,
      'tokens_per_second_with_prefill': many * size.new_tokens / whole,
    }
  return {
    'params': policy.count(params),
    'bytes_per_second': bandwidth,
    'rows': rows,
    'torch': peers,
  }


# The science.


def science(size: Size, seed: int, runs: pathlib.Path) -> dict[str, Any]:
  """experiments/chain_rl at this size: what its results.py reads of one run."""
  needed = ('ml_collections', 'grain', 'orbax', 'cloudpickle', 'jinja2', 'tokenizers')
  missing = [name for name in needed if importlib.util.find_spec(name) is None]
  if missing:
    return {'skipped': f'not installed: {", ".join(missing)}'}
  root, folder = HERE.parent, runs / f'chain{seed}'
  command = [
    *(sys.executable, '-m', 'educe', 'train', '--config=configs/grpo.py:chain'),
    *(f'--run_dir={folder}', *stages(f'seed={seed}'), *size.science),
  ]
  code = subprocess.run(command, cwd=root).returncode
  if code:
    raise RuntimeError(f'educe train of {folder} ended with {code}')
  sys.path.insert(0, str(root / 'experiments' / 'chain_rl'))
  import results

  run = results.read(folder)
  (first, *_), (last, *_) = (run['grpo']['accuracy'][at][1:] for at in (0, -1))
  return {'rows': {'heldout': {'base': first, 'after RL': last}}, 'run': run}
