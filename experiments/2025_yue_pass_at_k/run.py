"""Runs and samples tables → results/<name>.json, a part at a time.

python experiments/2025_yue_pass_at_k/run.py cpu2 chain runs/yue/*
python experiments/2025_yue_pass_at_k/run.py cpu2 sampled runs/yue/rho0.03-seed0
python experiments/2025_yue_pass_at_k/run.py cpu2 smollm2 runs/demo/grpo/measure

chain     exact chances of every prompt before and after, and what the nulls come to;
          runs that are there already stay
sampled   256 samples a prompt of one of those runs: does the instrument see the same?
smollm2   a table that `python -m educe measure` has drawn
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import exact
import numpy as np

from educe import measure, policies
from educe.environments import answers
from educe.measurement import majority, pass_at_k, sharpening, table
from educe.training import checkpoint

HERE = pathlib.Path(__file__).parent
STAGES = {'base': 'pretrain', 'rl': 'grpo', 'imitated': 'imitate'}
SAMPLES = 256
VOTES = (1, 4, 16)
KS = pass_at_k.ladder(2**20)
TEMPERATURES = tuple(2.0 ** (np.arange(-8, 9) / 4))  # 1/4 … 4


def chain_run(run: pathlib.Path) -> dict[str, Any]:
  """One exposure and seed: log p(C|x) of all prompts under every policy, and the nulls."""
  config = policies.read_config(run / 'grpo' / 'config.json')
  sets = exact.prompt_sets()
  rows = config['steps'] * config['rollouts']['prompts']
  out: dict[str, Any] = {
    'exposure': policies.read_config(run / 'pretrain' / 'config.json')['source'][
      'exposure'
    ],
    'seed': config['seed'],
    'group': config['rollouts']['group'],
    'visits': rows / len(sets['trained']),
    'logp': {name: {} for name in sets},
  }
  for stage, folder in STAGES.items():
    if not (run / folder).is_dir():  # imitation has nothing to imitate at ρ = 0
      continue
    model, params, words = policies.open_policy(str(run / folder))
    for name, records in sets.items():
      logp = exact.right_logp(model, params, words, records)
      out['logp'][name][stage] = logp.round(5).tolist()
    if stage == 'base':
      out |= nulls(model, params, words, sets['trained'], config['seed'])
      continue
    if stage == 'rl':
      where = run / folder / 'checkpoints'
      out['steps'] = []
      for step in sorted(int(x.name) for x in where.iterdir() if x.name.isdigit()):
        then = checkpoint.saved_params(where, params, step)
        logp = exact.right_logp(model, then, words, sets['trained'])
        rate = pass_at_k.exact(np.exp(logp)[:, None], KS).mean(0)
        out['steps'].append([step, *rate.round(6).tolist()])
  return out


def nulls(model, params, words, records, seed: int) -> dict[str, Any]:
  """The base sharpened: as whole sequences (power), and a token at a time (temperature).

  α and T are the best at k = 1 on a random half of the prompts, and pass@k is of the
  other half.
  """
  p0, correct = exact.distribution(model, params, words, records)
  power = sharpening.sharpened_exact(p0, correct, KS, seed=seed)
  rest = power.prompts
  development = ~np.isin(np.arange(len(p0)), rest)
  tempered = np.array(
    [
      np.exp(exact.right_logp(model, params, words, records, temperature=t))
      for t in TEMPERATURES
    ]
  )
  best = int(tempered[:, development].mean(1).argmax())
  rate = pass_at_k.exact(tempered[best, rest][:, None], KS).mean(0)
  vote = majority.exact(*listed(p0, correct), VOTES)
  return {
    'others': rest.tolist(),
    'power': {
      'alpha': power.alpha,
      'first': power.values[:, 0].round(6).tolist(),
      'rate': power.curve.rate.round(6).tolist(),
    },
    'tempered': {
      'temperature': TEMPERATURES[best],
      'first': tempered[best, rest].round(6).tolist(),
      'rate': rate.round(6).tolist(),
    },
    'majority': {'k': list(VOTES), 'rate': vote.mean(0).round(6).tolist()},
  }


def listed(p0: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The 15 likeliest responses and the right one, alone: what is left out, shared out.

  Votes for thousands of rare responses would be long to count, and elect nobody.
  """
  likely = p0 >= np.sort(p0, -1)[:, [-15]]
  p = np.where(likely | (correct > 0), p0, 0)
  return p / p.sum(-1, keepdims=True), correct


def sampled(run: pathlib.Path) -> dict[str, Any]:
  """What the samples table of the pairs that RL trained on says of one run."""
  measure.measure(
    str(run / 'grpo'),
    base=str(run / 'pretrain'),
    environment=dict(name='chain', depth=2, part='train'),
    samples=SAMPLES,
    max_new_tokens=3,
    batch_size=1024,
    workers=0,
  )
  drawn = table.load(run / 'grpo' / 'measure', SAMPLES)
  records = exact.prompt_sets()['trained']
  assert drawn.prompts == [record['prompt'] for record in records]
  policy = policies.read_config(run / 'grpo' / 'config.json')
  out = {'seed': policy['seed'], **counted(drawn)}
  for side, folder in (('base', 'pretrain'), ('policy', 'grpo')):
    logp = exact.right_logp(*policies.open_policy(str(run / folder)), records)
    error = 0.0
    for drawn_from in (drawn.base, drawn.policy):
      said = getattr(drawn_from, f'logp_{side}') - logp[:, None]
      right = drawn_from.rewards >= pass_at_k.CORRECT
      error = max(error, float(np.abs(said[right]).max(initial=0)))
    out[side]['logp_error'] = error
  out['exposure'] = policies.read_config(run / 'pretrain' / 'config.json')['source'][
    'exposure'
  ]
  return out


def counted(drawn: table.Table) -> dict[str, Any]:
  """Of both sides: samples scored and correct of each prompt, tokens, and majorities."""
  out: dict[str, Any] = {}
  for name in table.SIDES:
    side: table.Side = getattr(drawn, name)
    n, c = pass_at_k.counts(side.rewards)
    votes = [k for k in VOTES if k <= n.min()]
    said = [
      [(answers.visible(x) or '').strip() or None for x in row] for row in side.texts
    ]
    out[name] = {
      'samples': n.tolist(),
      'correct': c.tolist(),
      'tokens': float(side.lengths.mean()),
      'majority': {
        'k': votes,
        'rate': majority.estimates(said, side.rewards, votes).mean(0).tolist(),
      },
    }
  return out


def smollm2(folder: pathlib.Path) -> dict[str, Any]:
  """A table of two policies of a language model, and its base sharpened."""
  drawn = table.load(folder)
  header = drawn.header
  ks = pass_at_k.ladder(drawn.base.rewards.shape[1])
  power = sharpening.sharpened(drawn.base.rewards, drawn.base.logp_base, ks)
  ours = pass_at_k.estimates(drawn.policy.rewards[power.prompts], ks)
  gap = pass_at_k.compare(ours, power.values, ks)
  return {
    'environment': header['environment'],
    'decoding': header['decoding'],
    **counted(drawn),
    'power': {
      'alpha': power.alpha,
      'effective': power.effective,
      'rate': power.curve.rate.tolist(),
      'policy_minus_power': [float(x[0]) for x in (gap.difference, gap.low, gap.high)],
    },
  }


def merged(
  old: list[dict[str, Any]], new: list[dict[str, Any]]
) -> list[dict[str, Any]]:
  """One entry for each exposure and seed, the new in place of the old."""
  runs = {(run['exposure'], run['seed']): run for run in [*old, *new]}
  return [runs[key] for key in sorted(runs)]


PARTS = {'chain': chain_run, 'sampled': sampled, 'smollm2': smollm2}


if __name__ == '__main__':
  name, part, *folders = sys.argv[1:]
  out = HERE / 'results' / f'{name}.json'
  out.parent.mkdir(exist_ok=True)
  results = json.loads(out.read_text()) if out.exists() else {}
  new = [PARTS[part](pathlib.Path(folder)) for folder in folders]
  results[part] = merged(results.get(part, []), new) if part == 'chain' else new[0]
  out.write_text(json.dumps(results) + '\n')
  print(out)
