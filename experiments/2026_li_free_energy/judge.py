"""results/seed*.json → one line a criterion, PASS or FAIL, with its figure.

  python experiments/2026_li_free_energy/judge.py

Thresholds are those that README.md registers. A criterion passes if it does in every seed.
The last lines are of what no theory determined. Exits 1 on a FAIL.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np

from educe.measurement import pass_at_k, support, support_dynamics
from educe.measurement.intervals import bootstrap

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
EXACT = 0.02  # TV to Gibbs at which a transformer arm counts as one


def load(folder: pathlib.Path = HERE / 'results') -> list[dict]:
  """Raises ValueError without results."""
  files = sorted(folder.glob('seed*.json'))
  if not files:
    raise ValueError(f'{folder}: no seed*.json; run run.py --seed=0 first')
  return [json.loads(file.read_text()) for file in files]


def judge(results: list[dict]) -> dict[str, tuple[bool, str]]:
  """{criterion: (whether it passed, what was seen)}."""
  return {
    'base: cross-entropy within .01 nats of p_data': base(results),
    '(a) tabular, exact: the predicted fixed point': fixed_points(results),
    '(b) tabular: no prompt loses, at any k': monotone(results),
    '(c) first success after 1/(1 − (1 − p0)^G) visits': first_success(results),
    '(d) log10 p0 tells log visits to π(C) = ½': halves(results),
    'not falsified: what p0 hides stays hidden in a table': hidden(results),
    'not falsified: no transformer arm is an exact tilt': interferes(results),
  }


def base(results):
  gaps = [r['base']['data_kl'] for r in results]
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
    change = pass_at_k.exact(end[:, None], KS) - pass_at_k.exact(start[:, None], KS)
    if change.min() < worst:
      worst, who = change.min(), name
    least = min(least, min(nscr for _, _, nscr in curve(start, end)))
  said = (
    f'largest loss of pass@k {max(0.0, -worst):.1e} ({who}); least NSCR {least:+.3f}'
  )
  return bool(worst >= -LOST and least >= 0), said


def curve(start, end):
  """(SRR, NDR, NSCR) of prompts at each of KS; NaN, where nothing is accessible, is 0."""
  out = []
  for k in KS:
    eps = support.sampling(float(k))
    with np.errstate(divide='ignore'):
      table = support_dynamics.fates(np.log(start) >= eps, np.log(end) >= eps)
    kept, gained, lost, _ = table.sum(0)
    out.append(
      (
        kept / (kept + lost) if kept + lost else 1.0,
        gained / (kept + gained) if kept + gained else 0.0,
        (gained - lost) / (kept + gained + lost) if kept + gained + lost else 0.0,
      )
    )
  return out


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
  below = solved = 0
  for r in results:
    arm = r['sampled']['rloo']
    for time, visits in (('early', r['rounds']), ('final', arm['visits'])):
      for end in arm[time]:
        start = np.array(r['base']['solved'])[: len(end['solved'])]
        far = start < UNREACHABLE * np.exp(support.training(r['group'], visits))
        below += far.sum()
        solved += (np.array(end['solved'])[far] > 0.5).sum()
  said = f'{solved} of {below} with p0 < ε_train/100 reached π(C) > ½'
  return bool(solved <= ROUTINELY * below), said if below else 'no such prompt'


def interferes(results):
  """An exact tilt is near Gibbs and lowers no prompt's pass@k."""
  tilts, near = [], []
  for r in results:
    start = np.array(r['base']['solved'])
    for name, arm in r['arms'].items():
      if arm['beta']:
        end = np.array(arm['solved'])
        apart = np.mean(arm['gibbs'])
        lost = pass_at_k.exact(start[:, None], KS) - pass_at_k.exact(end[:, None], KS)
        near.append((apart, (lost.max(-1) > LOST).mean(), name))
        if apart <= EXACT and lost.max() <= LOST:
          tilts.append(name)
  apart, losers, name = min(near)
  said = f'nearest {name}, TV {apart:.3f} to Gibbs, {losers:.0%} of prompts lose'
  return not tilts, said


def sharing(results, arm: str = 'rloo', part: str = 'train') -> str:
  """Creation by sharing: mean π(C) where p0 < ε_train, transformer less table."""
  gaps, there, index = [], 0, []
  for r in results:
    start, end = (np.array(x['solved']) for x in (r['base'], r['arms'][arm]))
    eps = support.training(r['group'], r['rounds'])
    rows = (np.log(start) < eps) & (np.array(r['train']) == (part == 'train'))
    table = start  # of a prompt that is never drawn a table says what it said
    if part == 'train':
      table = np.mean([x['solved'] for x in r['sampled']['rloo']['early']], 0)
    gaps.append((end - table)[rows])
    there += rows.sum()
    mask = np.array(r['train']) == (part == 'train')
    both = start[mask], np.clip(end[mask], 0, 1)
    index.append(support_dynamics.creation(*both, np.log(start[mask]) >= eps).created)
  if not there:
    return 'no prompt begins below ε_train'
  joined = np.concatenate(gaps)
  low, high = bootstrap(lambda x: np.array([x.mean()]), joined, resamples=2000, seed=0)
  said = ', '.join(str(x) for x in index)
  return (
    f'{joined.mean():+.4f} (95 % {float(low[0]):+.4f} to {float(high[0]):+.4f}; median '
    f'{np.median(joined):+.1e}; {there} prompts); creation index by seed {said}'
  )


def ends(results) -> list[str]:
  """A line for each transformer arm: means over seeds, train | held out."""
  lines = []
  for name in results[0]['arms']:
    arms = [r['arms'][name] for r in results if name in r['arms']]
    last = {p: [arm['curve'][-1][p] for arm in arms] for p in ('train', 'heldout')}

    def mean(what, last=last):
      return ' | '.join(
        f'{np.nanmean([np.nan if x[what] is None else x[what] for x in last[p]]):.3f}'
        for p in last
      )

    lost = np.mean(
      [
        (pass_at_k.exact(np.array(arm['solved'])[:, None], KS)
         - pass_at_k.exact(np.array(r['base']['solved'])[:, None], KS)).min(-1) < -LOST
        for r, arm in zip(results, arms, strict=True)
      ]
    )  # fmt: skip
    terms = '; '.join(
      f'{what} {mean(what)}'
      for what in ('reward', 'total', 'price', 'collapse', 'drift', 'eta')
    )
    gibbs = (
      f'; TV to Gibbs {mean("gibbs")}, to k3 {mean("k3")}' if arms[0]['beta'] else ''
    )
    ratio = max(max(arm['log_ratio']) for arm in arms)
    lines.append(
      f'{name} (β={arms[0]["beta"]}): {terms}{gibbs}; {lost:.0%} of prompts lose; '
      f'largest π/p0 e^{ratio:.1f}'
    )
  return lines


def main() -> int:
  results = load()
  print(f'{len(results)} seeds: {", ".join(str(r["seed"]) for r in results)}')
  print(
    'E0: judged by pytest tests/measurement/test_identities.py and the fixed points'
  )
  verdicts = judge(results)
  for name, (ok, said) in verdicts.items():
    print(f'{"PASS" if ok else "FAIL"}  {name}: {said}')
  print(f'creation by sharing, trained prompts: {sharing(results)}')
  print(f'creation by sharing, held-out prompts: {sharing(results, part="heldout")}')
  print('\n'.join(ends(results)))
  return int(not all(ok for ok, _ in verdicts.values()))


if __name__ == '__main__':
  sys.exit(main())
