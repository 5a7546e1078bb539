"""results/<name>.json → a line per criterion, PASS or FAIL; exits 1 on a FAIL.

python experiments/2022_gao_overoptimization/judge.py cpu2
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
SAMPLED = {'rloo': 'natural gradient, sampled', 'plain': 'plain gradient, sampled'}


def judge(results) -> dict[str, tuple[bool, str]]:
  """Each criterion: (held, in numbers). README.md says what each of them means."""
  tilts = results['tilt']
  sizes = sorted({row['pairs'] for row in tilts})
  small = [row for row in tilts if row['pairs'] == sizes[0]]
  peaks = [row['peak'] for row in tilts if row['peak']['interior']]
  verdicts = {}

  error = max(row['identity_error'] for row in tilts)
  verdicts['identity'] = error <= 1e-12, f'|dE[gold]/db − Cov| ≤ {error:.1e} σσ'
  turned = [falls(row['gold']) for row in small]
  verdicts['peak'] = (
    all(turned),
    f'at {sizes[0]} pairs gold rises, then loses half of it: {sum(turned)} of '
    f'{len(turned)}',
  )
  corr = np.max([abs(p['corr']) for p in peaks], initial=0)
  miss = np.max([abs(np.log(p['b'] / p['root'])) for p in peaks], initial=0)
  verdicts['covariance'] = (
    bool(peaks) and bool(corr < 0.05 and miss < 1e-4),
    f'at {len(peaks)} peaks |corr| ≤ {corr:.1e}, Cov = 0 within {miss:.1e} of log b',
  )
  mean = [
    float(np.mean([row['peak']['d'] for row in tilts if row['pairs'] == n]))
    for n in sizes
  ]
  verdicts['more_data'] = (
    len(mean) > 1 and all(np.diff(mean) > 0),
    'mean √KL of the peak: '
    + ', '.join(f'{n} pairs {d:.2f}' for n, d in zip(sizes, mean, strict=True)),
  )
  chosen = [
    falls(row['gold']) for row in results['best_of_n'] if row['pairs'] == sizes[0]
  ]
  over = max(row['kl_over_bound'] for row in results['best_of_n'])
  verdicts['best_of_n'] = (
    all(chosen) and over <= 1e-9,
    f'falls as well in {sum(chosen)} of {len(chosen)}; KL − bound ≤ {over:.1e}',
  )
  runs = results['trained']
  everything = [*results['best_of_n'], *runs['natural'], *runs['rloo'], *runs['plain']]
  past = max(row['beyond'] for row in everything)
  verdicts['gibbs_is_best'] = (
    past <= 1e-9,
    f'no policy beats −F in E[proxy] − β·KL: by {past:.1e} at most',
  )
  apart = max(row['apart'] for row in runs['natural'])
  moved = frontier(runs['natural'])
  verdicts['penalty'] = (
    apart <= 1e-9 and moved <= 0.1,
    f'natural gradient: on the tilt at every step and β (TV {apart:.1e}); gold at equal '
    f'KL moved by {moved:.1%} of its peak',
  )
  for kind, optimiser in SAMPLED.items():
    moved = frontier(runs[kind])
    verdicts[f'penalty_{kind}'] = (
      moved <= 0.1,
      f'{optimiser}: gold at equal KL moved by {moved:.0%} of its peak',
    )
  ends = {row['beta']: row['apart'] for row in runs['rloo'] if row['beta']}
  verdicts['rloo'] = (
    falls(runs['rloo'][0]['gold']) and max(ends.values()) <= 0.05,
    'from samples gold falls as well, and with a penalty ends at Gibbs: TV '
    + ', '.join(f'{tv:.3f} (β = {beta:g})' for beta, tv in ends.items()),
  )
  fall = max(peak['fall'] for peak in results['control'])
  verdicts['control'] = fall <= 1e-9, f'with gold for a proxy nothing falls: {fall:.1e}'
  return verdicts


def falls(gold) -> bool:
  """It rises by a tenth of gold's standard deviation or more, then loses half of that."""
  return max(gold) >= 0.1 and gold[-1] <= max(gold) / 2


def frontier(runs) -> float:
  """The most by which gold differs from that of β = 0 at equal KL, of the latter's peak.

  Policies that went further than β = 0 did are in no comparison.
  """
  free, *held = runs
  order = np.argsort(free['d'])
  d, gold = np.array(free['d'])[order], np.array(free['gold'])[order]
  most = 0.0
  for row in held:
    gap = np.array(row['gold']) - np.interp(row['d'], d, gold)
    there = (np.array(row['d']) <= d[-1]) & (np.array(row['d']) >= d[0])
    most = max(most, float(np.abs(gap[there]).max() / gold.max()))
  return most


if __name__ == '__main__':
  name = sys.argv[1] if len(sys.argv) > 1 else 'cpu2'
  verdicts = judge(json.loads((HERE / 'results' / f'{name}.json').read_text()))
  for key, (ok, figures) in verdicts.items():
    print(f'{"PASS" if ok else "FAIL"}  {key:14} {figures}')
  sys.exit(0 if all(ok for ok, _ in verdicts.values()) else 1)
