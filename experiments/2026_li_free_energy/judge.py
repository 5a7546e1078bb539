"""results/seed*.json → one line a criterion, PASS or FAIL, with its figure.

  python experiments/2026_li_free_energy/judge.py

Thresholds are those that README.md registers. A criterion passes if it does in every seed.
Exits 1 on a FAIL. What no theory determined is in summary.py.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np

from educe.measurement import pass_at_k, support

HERE = pathlib.Path(__file__).resolve().parent
KS = 2 ** np.arange(21)
WITHIN = 0.02  # (a) of the way from p0 to the fixed point
LOST = 1e-3  # (b) of pass@k, of any prompt at any k
TIMES = 2.0  # (c) counts against their expectation, in every decade of p0
EXPECTED = 5  # (c) first successes that a decade must expect to be judged
DECADES = 3  # (c) that must be judged
PEARSON = 0.9  # (d)
UNREACHABLE = 1 / 100  # of ε_train; what begins below it should not be solved
ROUTINELY = 0.05  # of such prompts
EXACT = 0.02  # TV to Gibbs that is near enough, though a table were nearer
SEEDS = 3


def load(folder: pathlib.Path = HERE / 'results') -> list[dict]:
  """Raises ValueError for fewer than SEEDS seeds, and for results of --debug."""
  files = sorted(folder.glob('seed*.json'))
  results = [json.loads(file.read_text()) for file in files]
  for file, result in zip(files, results, strict=True):
    if result['debug']:
      raise ValueError(f'{file} is of --debug, a few steps: run its seed without')
  if len(results) < SEEDS:
    raise ValueError(
      f'{folder} has {len(results)} of {SEEDS} seeds; run.py --seed=… writes one'
    )
  return results


def judge(results: list[dict]) -> dict[str, tuple[bool, str]]:
  """{criterion: (whether it passed, what was seen)}."""
  return {
    'base': base(results),
    'fixed_points': fixed_points(results),
    'monotone': monotone(results),
    'first_success': first_success(results),
    'halves': halves(results),
    'hidden': hidden(results),
    'interferes': interferes(results),
  }


def base(results):
  gaps = [np.mean(r['base']['data_kl']) for r in results]
  entropy = np.mean([r['base']['data_entropy'] for r in results])
  said = ', '.join(f'{x:.3f}' for x in gaps)
  return max(gaps) <= 0.01, f'{said} nats an output above {entropy:.2f}'


def fixed_points(results):
  rows = [row for r in results for row in r['exact']]
  share = [np.max(np.array(row['tv']) / np.array(row['moved'])) for row in rows]
  worst = int(np.argmax(share))
  return (
    share[worst] <= WITHIN,
    f'{len(rows)} arms; farthest {max(max(row["tv"]) for row in rows):.1e} TV; '
    f'{share[worst]:.1e} of the way missing ({rows[worst]["name"]})',
  )


def tabular_ends(result) -> list[tuple[str, np.ndarray, np.ndarray]]:
  """(arm, p0(C), π(C)) of every tabular arm, `[P]` each."""
  size = len(result['exact'][0]['solved'])
  start = np.array(result['base']['solved'])
  ends = [
    (row['name'], start[:size], np.array(row['solved'])) for row in result['exact']
  ]
  for name, arm in result['sampled'].items():
    for time in ('early', 'final'):
      ends += [
        (f'{name}, {time}', start[: len(end['solved'])], np.array(end['solved']))
        for end in arm[time]
      ]
  return ends


def monotone(results):
  worst, least, who = np.inf, np.inf, ''
  for name, start, end in (x for r in results for x in tabular_ends(r)):
    change = gains(start, end)
    if change.min() < worst:
      worst, who = change.min(), name
    least = min(least, min(net(start, end)))
  said = (
    f'largest loss of pass@k {max(-worst, 0.0):.1e} ({who}); least net gain {least}'
  )
  return bool(worst >= -LOST and least >= 0), said


def gains(start, end) -> np.ndarray:
  """`[P, K]`: what each prompt's pass@k has risen by, from p0(C) and π(C), `[P]` each."""
  return pass_at_k.exact(end[:, None], KS) - pass_at_k.exact(start[:, None], KS)


def net(start, end) -> list[int]:
  """Prompts gained less prompts lost, accessible at ε(k) for each of KS: NSCR's sign."""
  eps = np.exp([support.sampling(float(k)) for k in KS])[:, None]
  return ((end >= eps).sum(1) - (start >= eps).sum(1)).tolist()


def first_success(results):
  """First successes against how many the visits before them should have brought.

  The chance h = 1 − (1 − p0)^G of each visit up to the first success adds up, over copies
  and prompts, to what is expected of them: so visits that never succeeded count too.
  """
  found, hoped, p = [], [], []
  for r in results:
    arm = r['sampled']['rloo']
    for first in np.array(arm['first']):
      start = np.array(r['base']['solved'])[: len(first)]
      chance = -np.expm1(r['group'] * np.log1p(-start))
      hoped.append(chance * np.where(first > 0, first, arm['visits']))
      found.append(first > 0)
      p.append(start)
  found, hoped, p = map(np.concatenate, (found, hoped, p))
  decade = np.floor(np.log10(p)).astype(int)
  ratios = {
    int(d): found[decade == d].sum() / hoped[decade == d].sum()
    for d in np.unique(decade)
    if hoped[decade == d].sum() >= EXPECTED
  }
  good = all(1 / TIMES <= x <= TIMES for x in ratios.values())
  said = ', '.join(f'1e{d}: {x:.2f}' for d, x in sorted(ratios.items(), reverse=True))
  return good and len(ratios) >= DECADES, f'found/expected by decade of p0: {said}'


def halves(results):
  """Of prompts that the training budget reaches and that are no basin."""
  values, said = [], []
  for r in results:
    arm = r['sampled']['rloo']
    half = np.array(arm['half'])
    start = np.log(np.array(r['base']['solved'])[: half.shape[1]])
    reached = (half > 0).all(0)
    tail = (start >= support.training(r['group'], arm['visits'])) & (
      start < support.BASIN
    )
    rows = tail & reached
    if rows.sum() < 3:
      return False, f'seed {r["seed"]}: {rows.sum()} prompts reached ½, of {tail.sum()}'
    x, y = start[rows] / np.log(10), np.log(half[:, rows]).mean(0)
    values.append(-np.corrcoef(x, y)[0, 1])
    said.append(
      f'−{values[-1]:.3f} ({rows.sum()} of {tail.sum()} prompts, {np.ptp(x):.1f} decades)'
    )
  return min(values) >= PEARSON, 'Pearson ' + '; '.join(said)


def hidden(results):
  """Of copies of prompts, in every sampled table, early and at its end.

  Expected of them: the chance of a single success at p0 in all visits.
  """
  below = solved = expected = 0
  for r in results:
    for arm in r['sampled'].values():
      for time, visits in (('early', r['rounds']), ('final', arm['visits'])):
        for end in arm[time]:
          start = np.array(r['base']['solved'])[: len(end['solved'])]
          far = start < UNREACHABLE * np.exp(support.training(r['group'], visits))
          below += far.sum()
          solved += (np.array(end['solved'])[far] > 0.5).sum()
          expected -= np.expm1(r['group'] * visits * np.log1p(-start[far])).sum()
  said = (
    f'{solved} of {below} with p0 < ε_train/100 reached π(C) > ½; a success was to be '
    f'expected of {expected:.1f}'
  )
  return bool(below > 0 and solved <= ROUTINELY * below), said


def interferes(results):
  """A transformer that were an exact tilt would be as near to Gibbs on its prompts as a
  table after as many visits, and would take nothing from any prompt, trained or not."""
  tilts, near = [], []
  for r in results:
    start, train = np.array(r['base']['solved']), np.array(r['train'])
    copies = [end['gibbs'] for end in r['sampled']['rloo_k1_reward']['early']]
    table = np.mean(copies, 0)[train].mean()
    for name, arm in r['arms'].items():
      if arm['beta']:
        apart = np.array(arm['gibbs'])[train].mean()
        lost = -gains(start, np.array(arm['solved'])).min(-1)
        near.append((apart, table, (lost > LOST).mean(), name))
        if apart <= max(EXACT, table) and lost.max() <= LOST:
          tilts.append(name)
  apart, table, losers, name = min(near)
  said = (
    f'nearest {name}, TV {apart:.3f} to Gibbs (a table after as many visits {table:.3f}), '
    f'{losers:.0%} of prompts lose'
  )
  return not tilts, said


def main() -> int:
  verdicts = judge(load())
  for name, (good, said) in verdicts.items():
    print(f'{"PASS" if good else "FAIL"}  {name:14} {said}')
  return int(not all(good for good, _ in verdicts.values()))


if __name__ == '__main__':
  sys.exit(main())
