"""A run of configs/instruct_gpt.py → results/<name>.json.

python experiments/2022_ouyang_instructgpt/results.py cpu2 runs/instruct_gpt

What gold thinks of every evaluation is in the run. What the proxy thinks of the same
answers is computed here, by the reward model that PPO was trained on.
"""

import json
import pathlib
import sys

import numpy as np

from educe import policies
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


if __name__ == '__main__':
  name, run = sys.argv[1:]
  out = HERE / 'results' / f'{name}.json'
  out.parent.mkdir(exist_ok=True)
  out.write_text(json.dumps(read(pathlib.Path(run))) + '\n')
  print(out)
