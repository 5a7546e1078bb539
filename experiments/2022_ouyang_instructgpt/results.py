"""A run of configs/instruct_gpt.py → results/<name>.json, and PASS or FAIL.

python experiments/2022_ouyang_instructgpt/results.py cpu2 runs/instruct_gpt

What gold thinks of every evaluation is in the run. What the proxy thinks of the same
answers is computed here, by the reward model that PPO was trained on. Both are told in
standard deviations of that judge's scores of the answers of SFT, from their mean.
"""

import json
import pathlib
import sys

import numpy as np

from educe import policies
from educe.measurement.accuracy import Z
from educe.rollouts import judges, transcripts
from educe.training import metrics

HERE = pathlib.Path(__file__).parent
POLICIES = ('ppo', 'dpo')


def read(run: pathlib.Path) -> dict:
  """What the five stages came to."""
  judge = judges.reward_model(
    policies.open_values, path=str(run / 'reward_model'), max_length=256
  )
  out: dict = {'seconds': {}, 'reward_models': {}, 'policies': {}}
  for stage in ('sft', 'gold', 'reward_model', *POLICIES):
    out['seconds'][stage] = seconds(run / stage)
  for stage in ('gold', 'reward_model'):
    exam = exams(run / stage, 'accuracy')[-1]
    keys = ('accuracy', 'accuracy/low', 'accuracy/high', 'preferences/ece')
    out['reward_models'][stage] = {key: exam[key] for key in keys if key in exam}
  for stage in POLICIES:
    out['policies'][stage] = [
      {
        'step': exam['step'],
        'kl': exam['judged/kl'],
        'kl_error': exam['judged/kl_error'],
        'length': exam['judged/length'],
        'win_rate': interval(exam, 'win_rate'),
        'win_rate_at_equal_length': interval(exam, 'win_rate_at_equal_length'),
        **scores(run / stage / 'samples' / f'{exam["step"]}.jsonl', judge),
      }
      for exam in exams(run / stage, 'win_rate')
    ]
  return out


def exams(folder: pathlib.Path, key: str) -> list[dict]:
  return [row for row in metrics.read(folder / 'metrics.jsonl') if key in row]


def interval(exam: dict, key: str) -> list[float]:
  return [exam[f'{key}{x}'] for x in ('', '/low', '/high')]


def seconds(folder: pathlib.Path) -> float:
  """Of its updates alone, the first with its compilation: without loading, sampling,
  judging and evaluating."""
  rows = metrics.read(folder / 'metrics.jsonl')
  return sum(row.get('timing/step_seconds', 0) for row in rows)


def scores(file: pathlib.Path, judge) -> dict[str, list[float]]:
  """What gold and the proxy say of the same answers, by prompt: {judge: [P]}."""
  rows = transcripts.load(file)
  proxy = judge(rows, [row['completion'] for row in rows])
  by_prompt: dict = {}
  for row, ours in zip(rows, proxy, strict=True):
    by_prompt.setdefault(row['id'], []).append((row['reward'], ours))
  gold, proxy = np.array([np.mean(x, 0) for x in by_prompt.values()]).T
  return {'gold': gold.tolist(), 'proxy': proxy.tolist()}


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


def verdicts(found: dict) -> dict[str, tuple[bool, str]]:
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
  name, run = sys.argv[1:]
  found = read(pathlib.Path(run))
  found['verdicts'] = {key: list(x) for key, x in verdicts(found).items()}
  out = HERE / 'results' / f'{name}.json'
  out.parent.mkdir(exist_ok=True)
  out.write_text(json.dumps(found) + '\n')
  for key, (ok, figures) in found['verdicts'].items():
    print(f'{"PASS" if ok else "FAIL"}  {key:27} {figures}')
  print(out)
