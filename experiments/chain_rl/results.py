"""Run folders of configs/grpo.py:chain → results/<name>.json.

python experiments/chain_rl/results.py cpu2 runs/chain0 runs/chain1 runs/chain2
"""

import json
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).parent


def read(run: pathlib.Path) -> dict:
  """What a pre-training and its RL came to: rates on held-out compositions."""
  stages = {}
  for stage in ('pretrain', 'grpo'):
    lines = (run / stage / 'metrics.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    stages[stage] = {
      'accuracy': [
        [r['step'], r['accuracy'], r['accuracy/low'], r['accuracy/high']]
        for r in rows
        if 'accuracy' in r
      ],
      'reward': [[r['step'], r['reward']] for r in rows if 'reward' in r],
      'logp_difference_max': max(
        (r.get('sampling/logp_difference/max', 0) for r in rows), default=0
      ),
      'median_step_seconds': statistics.median(
        r['timing/step_seconds'] for r in rows if 'timing/step_seconds' in r
      ),
    }
  config = json.loads((run / 'pretrain' / 'config.json').read_text())
  stages['seed'] = config['seed']
  stages['exposure'] = config['source']['exposure']
  return stages


if __name__ == '__main__':
  name, *runs = sys.argv[1:]
  out = HERE / 'results' / f'{name}.json'
  out.parent.mkdir(exist_ok=True)
  out.write_text(json.dumps([read(pathlib.Path(run)) for run in runs]) + '\n')
  print(out)
