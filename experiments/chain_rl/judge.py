"""results/<name>.json → a line per criterion, PASS or FAIL; exits 1 on a FAIL.

python experiments/chain_rl/judge.py cpu2
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent


def judge(runs: list[dict]) -> dict[str, tuple[bool, str]]:
  """Each criterion: (held, in numbers)."""
  base = [run['pretrain']['accuracy'][-1][1] for run in runs]
  ends = [run['grpo']['accuracy'][-1][1] for run in runs]
  seeds = len({run['seed'] for run in runs})
  return {
    'calibrated': (
      all(abs(p - run['exposure']) <= 0.02 for p, run in zip(base, runs, strict=True)),
      f'base at {listed(base)} for ρ = {runs[0]["exposure"]:g}',
    ),
    'reached': (
      seeds >= 3 and min(ends) >= 0.9,
      f'RL ends at {listed(ends)}; {seeds} seeds',
    ),
  }


def listed(rates: list[float]) -> str:
  return ', '.join(f'{rate:.3f}' for rate in rates)


if __name__ == '__main__':
  name = sys.argv[1] if len(sys.argv) > 1 else 'cpu2'
  verdicts = judge(json.loads((HERE / 'results' / f'{name}.json').read_text()))
  for key, (ok, figures) in verdicts.items():
    print(f'{"PASS" if ok else "FAIL"}  {key:10} {figures}')
  sys.exit(0 if all(ok for ok, _ in verdicts.values()) else 1)
