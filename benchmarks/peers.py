"""educe beside TRL (torch on the CPU) and google-tunix, each in an environment of its own.

  make peers        makes both environments, then runs this
  python benchmarks/peers.py [--trl_python=PATH] [--tunix_python=PATH]
                             [--vocab 4096 32768] [--cases sft dpo …] [--repeats=5]

This process makes a Llama (256 wide, 4 layers) and its batches, writes them into a folder,
and starts a worker a side (peers/), which load the same weights. It then asks the sides in
turn for a matmul and one run of a case; no two work at once. Float32 everywhere, the same
threads, the same AdamW and clipping (OMP_WAIT_POLICY=PASSIVE, for torch's threads would
else spin while they wait, and that would count as CPU seconds):

  sft          8 × (64 prompt + 192 completion), the completion trained
  dpo          8 pairs of the same, the reference's log-probs inside the step, as all three
               do by default
  grpo         a group of 8 of the same, given old log-probs (so that the ratio is not 1)
               and no KL
  generate_B   B prompts of 64, 128 new tokens at temperature 1, none of which ends a row

A step is forward, backward, clip, update. After every step the losses of all sides must
agree to 1e-4, or this fails. Tokens are those of the rows, prompts included, and for
generate those drawn; seconds are medians over the runs after two that compile.

`of matmul` is the FLOPs that a case cannot do without, per CPU second, over those of a
2,048³ product in the same worker by its own library. With P the parameters of the layers'
matrices, D the width, L the layers, V the vocabulary, a forward pass over B rows of T
tokens of which S are scored takes

  2·P·B·T + 2·D·V·S + 2·L·D·B·T²    (causal attention: half of all pairs)

a step three times that, DPO's four, and a drawn token 2·(P + D·V) + 4·L·D·(tokens so far).
A prompt of several rows need not be read more than once, and is counted once.

Prints a table and, as its last line, one JSON object: ratios[vocabulary][case][vs_peer]
are tokens per CPU second, ours over theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import jax
import numpy as np
from timing import about

from educe.losses.logprobs import score
from educe.models import policy, safetensors
from educe.models.architecture import Architecture
from educe.types import Batch

HERE = pathlib.Path(__file__).parent
CASES = ('sft', 'dpo', 'grpo', 'generate_8', 'generate_64')
ROWS, PROMPT, COMPLETION, NEW = 8, 64, 192, 128
LENGTH = PROMPT + COMPLETION
OPTIMIZER = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
# Each such that the losses of the steps differ, and none is 0.
LEARNING_RATES = {'sft': 1e-4, 'dpo': 1e-6, 'grpo': 1e-5}
AGREE = 1e-4  # nats
WARM = 2


def architecture(vocabulary: int) -> Architecture:
  return Architecture(
    vocab_size=vocabulary,
    dim=256,
    layers=4,
    heads=4,
    kv_heads=4,
    head_dim=64,
    ffn=768,
    max_length=LENGTH,
    rope_theta=1_000_000.0,  # Tunix's Llama knows no other
  )


def write(folder: pathlib.Path, a: Architecture, threads: int) -> None:
  """Weights, batches and settings: all that the workers read."""
  model = policy.build(a)
  params = model.init(jax.random.key(0))
  params['head'] = 4 * params['head']  # so that losses are not all log V
  safetensors.export(folder / 'model', a, params, bos_token_id=1, eos_token_id=1)
  rng = np.random.default_rng(0)

  def tokens(rows, length):  # 0 pads
    return rng.integers(1, a.vocab_size, (rows, length), dtype=np.int32)

  def rows_of(prompts, group):
    prompt = np.repeat(prompts, group, 0)
    return np.concatenate([prompt, tokens(len(prompt), COMPLETION)], 1)

  def mask(rows):
    return np.float32(np.arange(LENGTH) >= PROMPT) * np.ones((len(rows), 1), np.float32)

  prompts = tokens(64, PROMPT)
  arrays = {
    'sft_tokens': rows_of(prompts[:ROWS], 1),
    'dpo_tokens': rows_of(prompts[:ROWS], 2),
    'grpo_tokens': rows_of(prompts[:1], ROWS),
    'prompts': prompts,
  }
  arrays |= {f'{x}_mask': mask(arrays[f'{x}_tokens']) for x in ('sft', 'dpo', 'grpo')}
  group = Batch(arrays['grpo_tokens'], arrays['grpo_mask'])
  logp = np.asarray(jax.jit(lambda p: score(model, p, group).logp)(params))
  drift = rng.normal(0, 0.2, logp.shape).astype(np.float32)
  arrays['grpo_old_logp'] = (logp + drift) * group.mask
  arrays['grpo_advantages'] = rng.normal(size=ROWS).astype(np.float32)
  np.savez(folder / 'arrays.npz', **arrays)
  settings = {
    'vocab_size': a.vocab_size,
    'num_layers': a.layers,
    'embed_dim': a.dim,
    'hidden_dim': a.ffn,
    'num_heads': a.heads,
    'head_dim': a.head_dim,
    'norm_eps': a.norm_eps,
    'rope_theta': int(a.rope_theta),
    'prompt': PROMPT,
    'new_tokens': NEW,
    'threads': threads,
    'beta': 0.1,
    'optimizer': OPTIMIZER,
    'learning_rates': LEARNING_RATES,
  }
  (folder / 'settings.json').write_text(json.dumps(settings))


def work(case: str, a: Architecture) -> tuple[int, float]:
  """(tokens that count, FLOPs that nobody can do without); see the top of this file."""
  P = a.layers * (4 * a.dim * a.heads * a.head_dim + 3 * a.dim * a.ffn)
  head, attention = a.dim * a.vocab_size, 2 * a.layers * a.heads * a.head_dim

  def forward(rows, length, scored, prompts=None):
    prompts = prompts or rows
    read = prompts * PROMPT + rows * (length - PROMPT)
    squares = prompts * PROMPT**2 + rows * (length**2 - PROMPT**2)
    return 2 * P * read + 2 * head * scored + attention * squares

  if case.startswith('generate'):
    rows = int(case.removeprefix('generate_'))
    drawn = rows * NEW
    places = sum(range(PROMPT + 1, PROMPT + NEW))
    # The prompt gives the first token; each further one is read before the next.
    steps = 2 * (P + head) * (drawn - rows) + 2 * attention * rows * places
    return drawn, forward(rows, PROMPT, rows) + steps
  rows = 2 * ROWS if case == 'dpo' else ROWS
  prompts = 1 if case == 'grpo' else ROWS
  passes = 4 if case == 'dpo' else 3
  return rows * LENGTH, passes * forward(rows, LENGTH, rows * COMPLETION, prompts)


class Side:
  """A worker, and what it answers."""

  def __init__(self, name: str, python: str, script: str, folder: pathlib.Path):
    self.name = name
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'OMP_WAIT_POLICY': 'PASSIVE',
      'CUDA_VISIBLE_DEVICES': '',
      'HF_HUB_OFFLINE': '1',
      'TOKENIZERS_PARALLELISM': 'false',
      'TRANSFORMERS_VERBOSITY': 'error',
      'PYTHONWARNINGS': 'ignore',
    }
    self.log = (folder / f'{name}.log').open('w+')
    self.process = subprocess.Popen(
      [python, str(HERE / 'peers' / script), str(folder)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self.log,
      text=True,
      env=environment,
    )
    self.versions = self.answer()

  def answer(self):
    assert self.process.stdout
    line = self.process.stdout.readline()
    if not line:
      self.log.seek(0)
      raise RuntimeError(f'{self.name} died:\n{self.log.read()[-6000:]}')
    return json.loads(line)

  def ask(self, request: str):
    assert self.process.stdin
    self.process.stdin.write(request + '\n')
    self.process.stdin.flush()
    return self.answer()

  def close(self):
    assert self.process.stdin
    self.process.stdin.close()
    self.process.wait()
    self.log.close()


def measure(case: str, sides: list[Side], a: Architecture, repeats: int) -> dict:
  """{side: seconds, rates} of one case, and how far losses lie apart."""
  tokens, flops = work(case, a)
  for side in sides:
    side.ask(f'prepare {case}')
  runs: dict[str, list] = {side.name: [] for side in sides}
  products: dict[str, list] = {side.name: [] for side in sides}
  for _ in range(WARM + repeats):
    for side in sides:
      products[side.name].append(side.ask('matmul'))
      runs[side.name].append(side.ask('run'))
  apart = 0.0
  for values in zip(*([x['value'] for x in runs[s.name]] for s in sides), strict=True):
    if case.startswith('generate'):
      assert set(values) == {float(tokens)}, f'{case}: drew {values}, not {tokens}'
    else:
      apart = max(apart, max(values) - min(values))
  found = {}
  for side in sides:
    wall, cpu, product = (
      statistics.median(x[key] for x in rows[side.name][WARM:])
      for rows, key in ((runs, 'wall'), (runs, 'cpu'), (products, 'cpu'))
    )
    found[side.name] = {
      'wall_s': wall,
      'cpu_s': cpu,
      'tokens_per_second': tokens / wall,
      'tokens_per_cpu_second': tokens / cpu,
      'matmul_flops_per_cpu_second': 2 * 2048**3 / product,
      'fraction_of_matmul': flops / cpu * product / (2 * 2048**3),
    }
    if not case.startswith('generate'):
      found[side.name]['losses'] = [x['value'] for x in runs[side.name]]
  print(f'\n{case}, V {a.vocab_size:,}')
  print(f'{"":8}{"wall s":>9}{"CPU s":>9}{"tokens/CPU s":>14}{"of matmul":>11}'
        f'{"ours over it":>14}')  # fmt: skip
  ours = found['ours']['tokens_per_cpu_second']
  for name, x in found.items():
    ratio = '' if name == 'ours' else f'{ours / x["tokens_per_cpu_second"]:.2f}'
    print(
      f'{name:8}{x["wall_s"]:9.3f}{x["cpu_s"]:9.3f}{x["tokens_per_cpu_second"]:14.0f}'
      f'{x["fraction_of_matmul"]:11.3f}{ratio:>14}'
    )
  if not case.startswith('generate'):
    first, *_, last = found['ours']['losses']
    print(f'losses, {first:.4f} to {last:.4f}, at most {apart:.1e} apart', flush=True)
    assert apart < AGREE, {name: x['losses'] for name, x in found.items()}
    found['loss_difference'] = apart
  return found


def ratios(found: dict) -> dict[str, float]:
  ours = found['ours']['tokens_per_cpu_second']
  peers = [name for name in ('trl', 'tunix') if name in found]
  return {
    f'vs_{name}': round(ours / found[name]['tokens_per_cpu_second'], 3)
    for name in peers
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--trl_python', default='.venv-trl/bin/python')
  parser.add_argument('--tunix_python', default='.venv-tunix/bin/python')
  parser.add_argument('--sides', nargs='+', default=['trl', 'tunix'])
  parser.add_argument('--vocab', type=int, nargs='+', default=[4096, 32768])
  parser.add_argument('--cases', nargs='+', default=CASES, choices=CASES)
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()
  pythons = {'trl': args.trl_python, 'tunix': args.tunix_python}
  found: dict[str, dict] = {}
  versions: dict[str, dict] = {}
  for vocabulary in args.vocab:
    a = architecture(vocabulary)
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      write(folder, a, os.cpu_count() or 1)
      sides = [Side('ours', sys.executable, 'ours.py', folder)]
      sides += [Side(x, pythons[x], f'{x}_side.py', folder) for x in args.sides]
      versions = {side.name: side.versions for side in sides}
      found[str(vocabulary)] = {
        case: measure(case, sides, a, args.repeats) for case in args.cases
      }
      for side in sides:
        side.close()
  result = {
    'benchmark': 'peers',
    **about(),
    'versions': versions,
    'params': {v: policy.count(policy.shapes(architecture(int(v)))) for v in found},
    'repeats': args.repeats,
    'ratios': {
      v: {case: ratios(x) for case, x in cases.items()} for v, cases in found.items()
    },
    'measured': found,
  }
  print()
  print(json.dumps(result))


if __name__ == '__main__':
  main()
