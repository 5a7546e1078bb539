"""results/<name>.json → a line per criterion, PASS or FAIL; exits 1 on a FAIL.

python experiments/2022_ouyang_instructgpt/judge.py cpu2

Scores are told in standard deviations of that judge's scores of the answers of SFT, from
their mean.
"""

import json
import pathlib
import sys

import numpy as np

from educe.measurement.accuracy import Z

HERE = pathlib.Path(__file__).parent
POLICIES = ('ppo', 'dpo')


def moved(found: dict, stage: str) -> list[dict]:
  """How far each judge's score went from SFT's answers, prompt by prompt, in standard
  deviations (over prompts) of its scores of them: {judge: (mean, standard error)}."""
  start = found['policies'][stage][0]
  return [
    {
      'root_kl': max(x['kl'], 0) ** 0.5,
      **{
        judge: of_mean((np.array(x[judge]) - start[judge]) / np.std(start[judge]))
        for judge in ('gold', 'proxy')
      },
      'gap': of_mean(
        (np.array(x['proxy']) - start['proxy']) / np.std(start['proxy'])
        - (np.array(x['gold']) - start['gold']) / np.std(start['gold'])
      ),
    }
    for x in found['policies'][stage]
  ]


def of_mean(x: np.ndarray) -> tuple[float, float]:
  return float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5)


def judge(found: dict) -> dict[str, tuple[bool, str]]:
  """claim → (whether it holds, the figures)."""
  out = {}
  for stage in ('reward_model', 'gold'):
    x = found['reward_models'][stage]
    out[f'{stage}_learns'] = (
      x['accuracy/low'] > 0.5,
      f'{x["accuracy"]:.3f} [{x["accuracy/low"]:.3f}, {x["accuracy/high"]:.3f}]',
    )
  for stage in POLICIES:
    for key, claim in (
      ('win_rate', 'wins'),
      ('win_rate_at_equal_length', 'wins_at_equal_length'),
    ):
      rate, low, high = found['policies'][stage][-1][key]
      out[f'{stage}_{claim}'] = low > 0.5, f'{rate:.3f} [{low:.3f}, {high:.3f}]'
  proxy, error = moved(found, 'ppo')[-1]['proxy']
  out['proxy_rises'] = proxy > Z * error, f'{proxy:+.2f} ± {Z * error:.2f}'
  gap, error = moved(found, 'ppo')[-1]['gap']
  out['over_optimised'] = gap > Z * error, f'{gap:+.2f} ± {Z * error:.2f}'
  return out


if __name__ == '__main__':
  name = sys.argv[1] if len(sys.argv) > 1 else 'cpu2'
  verdicts = judge(json.loads((HERE / 'results' / f'{name}.json').read_text()))
  for key, (ok, figures) in verdicts.items():
    print(f'{"PASS" if ok else "FAIL"}  {key:27} {figures}')
  sys.exit(0 if all(ok for ok, _ in verdicts.values()) else 1)
