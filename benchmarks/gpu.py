"""Everything that asks for a large GPU, in one command, a part at a time.

  python benchmarks/gpu.py [--size=h200] [--parts=ceilings,logprob-…] [--out=folder]

  ceilings   what copies and bfloat16 matmuls come to here
  logprob-…  the log-prob of a token, forward and backward, every way that there is, beside
             the matmuls that it cannot avoid and beside torch; against float64
  train-…    SFT, DPO and GRPO steps in bfloat16, tokens/s and MFU, beside transformers
  decode-…   tokens/s at several batch sizes, beside their bounds and transformers
  science-…  experiments/chain_rl with a model of 8.4M parameters, a seed each

A part is a process of its own, so that its memory is, and writes <out>/<part>.json; one
that is there is not run again. Prints tables, a PASS or FAIL for each thing that must
hold, and as its last line one JSON object. Where torch, or a package of the science, is
not installed, that part of a part says so. --size=tiny is the same on any CPU, in no time.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import gpu_parts
from gpu_sizes import SIZES, Size
from timing import about

HERE = pathlib.Path(__file__).resolve().parent
LIMIT = 540  # seconds of a part


def parts(size: Size, runs: pathlib.Path) -> dict[str, Callable[[], dict[str, Any]]]:
  """name → what makes it; runs: a folder for those of the science, which resume."""
  of = functools.partial
  return {
    'ceilings': of(gpu_parts.ceilings, size),
    **{
      f'logprob-{name}': of(gpu_parts.logprob_part, size, name) for name in size.heads
    },
    **{f'train-{name}': of(gpu_parts.train_part, size, name) for name in size.models},
    **{f'decode-{name}': of(gpu_parts.decode_part, size, name) for name in size.models},
    **{
      f'science-{seed}': of(gpu_parts.science, size, seed, runs) for seed in size.seeds
    },
  }


def verdicts(found: Mapping[str, Any]) -> list[tuple[str, bool | None, str]]:
  """(what must hold, does it, in numbers); None: what it is about was not measured."""
  rows = found.get('logprob-llama3_8b', {}).get('rows', {})
  timed = {name: row for name, row in rows.items() if 'seconds' in row}

  def best(kind, ours):
    names = [
      name
      for name in timed
      if name.endswith(kind)
      and not name.startswith('matmul')
      and name.startswith(('full logits', 'reference')) != ours
    ]
    return min(names, key=lambda name: timed[name]['seconds'], default=None)

  out: list[tuple[str, bool | None, str]] = []
  forward = best(', forward', True)
  share = timed[forward]['of_ceiling'] if forward else math.nan
  out.append(
    ('forward at 0.85 of its matmul or more', forward and share >= 0.85, f'{share:.3f}')
  )
  # Of the ways with a quarter of the memory, the fastest; beside the faster full one.
  full = best('backward', False)
  if full:
    room = timed[full]['temp_mb'] / 4
    timed = {
      name: row for name, row in timed.items() if row['temp_mb'] <= room or name == full
    }
  ours = best('backward', True)
  ratio = timed[ours]['seconds'] / timed[full]['seconds'] if full and ours else math.nan
  claim = (
    'forward + backward in 1.15 of the time of full logits, in 1/4 of their memory'
  )
  out.append(
    (claim, full and ours is not None and ratio <= 1.15, f'{ratio:.3f}, {ours}')
  )
  checked = {
    name: row
    for name, row in rows.items()
    if 'logp_error' in row and not name.startswith('full logits')
  }
  worst = max((row['logp_error'] for row in checked.values()), default=math.nan)
  slope = max(
    (max(row['d_hidden_error'], row['d_head_error']) for row in checked.values()),
    default=math.nan,
  )
  # bfloat16 rounds at 2^-9: once in the logits' gradient and once in the result.
  right = worst < 1e-3 and slope < 2**-6
  claim = 'float64 agrees: 1e-3 nats, gradients to 2^-6'
  out.append((claim, right if checked else None, f'{worst:.1e}, {slope:.1e}'))
  mfu = found.get('train-1b', {}).get('rows', {}).get('sft', {}).get('mfu', math.nan)
  claim = 'MFU 0.45 or more in SFT of 1B'
  out.append((claim, None if math.isnan(mfu) else mfu >= 0.45, f'{mfu:.3f}'))
  return [
    (claim, held if held is None else bool(held), said) for claim, held, said in out
  ]


def table(part: str, found: dict[str, Any]) -> str:
  """The rows of a part, and torch's, in columns; what is no number is left out."""
  lines = [f'\n{part}']
  if 'skipped' in found:
    return f'{lines[0]}\n  skipped: {found["skipped"]}'
  peers = found.get('torch', {})
  rows = {
    **found['rows'],
    **{f'torch: {name}': row for name, row in peers.get('rows', {}).items()},
  }
  columns: dict[str, int] = {}
  for row in rows.values():
    for key, x in row.items():
      if isinstance(x, int | float):
        columns[key] = max(len(key), 9)
  wide = max(map(len, rows)) + 2
  lines.append(' ' * wide + ' '.join(f'{key:>{n}}' for key, n in columns.items()))
  for name, row in rows.items():
    said = ' '.join(
      f'{row[key]:{n}.4g}' if key in row else ' ' * n for key, n in columns.items()
    )
    lines.append(f'{name:{wide}}{said}{row.get("skipped", "")}'.rstrip())
  if 'skipped' in peers:
    lines.append(f'torch skipped: {peers["skipped"]}')
  return '\n'.join(lines)


def make(part: str, name: str, out: pathlib.Path) -> dict[str, Any]:
  """Runs a part here and writes its file."""
  runs = HERE.parent / 'runs' / 'gpu' / name
  found = {**parts(SIZES[name], runs)[part](), 'size': name, **about()}
  kept = out / f'{part}.json'
  kept.with_suffix('.new').write_text(json.dumps(found) + '\n')
  kept.with_suffix('.new').replace(kept)
  return found


def within(limit: float, command: list[str], env: Mapping[str, str]) -> str | None:
  """Runs a command; why it failed. At the limit it ends, with all that it started."""
  run = subprocess.Popen(
    command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
  )
  try:
    _, said = run.communicate(timeout=limit)
  except subprocess.TimeoutExpired:
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    return f'took more than {limit:g} s'
  if run.returncode:
    sys.stderr.write(said)
    return (said.strip() or 'failed').splitlines()[-1][:300]
  return None


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', default='h200', choices=SIZES)
  parser.add_argument('--parts', help='names with commas between them; all by default')
  parser.add_argument('--out', type=pathlib.Path, default=HERE / 'results' / 'gpu')
  parser.add_argument('--inside', help=argparse.SUPPRESS)  # a part, in this process
  args = parser.parse_args(argv)
  out = args.out.resolve()
  known = parts(SIZES[args.size], out)
  asked = args.parts.split(',') if args.parts else list(known)
  for part in asked:
    if part not in known:
      parser.error(f'no part {part!r}; there are {", ".join(known)}')
  out.mkdir(parents=True, exist_ok=True)
  if args.inside:
    make(args.inside, args.size, out)
    return 0
  found, failed = {}, {}
  for part in asked:
    kept = out / f'{part}.json'
    if kept.exists() and json.loads(kept.read_text())['size'] != args.size:
      parser.error(f'{kept} is of another size; choose another --out')
    if not kept.exists():
      command = [sys.executable, __file__, '--inside', part, '--size', args.size]
      # torch, in another process, needs memory too.
      env = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
      said = within(LIMIT, [*command, '--out', str(out)], env)
      if said is not None:
        failed[part] = said
    if part in failed:
      print(f'\n{part}\n  failed: {failed[part]}', flush=True)
      continue
    found[part] = json.loads(kept.read_text())
    print(table(part, found[part]), flush=True)
  print()
  judged = verdicts(found)
  for claim, held, said in judged:
    print(f'{ {True: "PASS", False: "FAIL", None: "----"}[held] }  {claim}: {said}')
  last = {
    'benchmark': 'gpu',
    'size': args.size,
    'accepted': {claim: held for claim, held, _ in judged},
    'failed': failed,
    'parts': found,
  }
  print(json.dumps(last))
  return bool(failed)


if __name__ == '__main__':
  sys.exit(main())
