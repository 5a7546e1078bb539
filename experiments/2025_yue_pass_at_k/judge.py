"""results/<name>.json → a line per criterion, PASS or FAIL; exits 1 on a FAIL.

python experiments/2025_yue_pass_at_k/judge.py cpu2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import analysis
import numpy as np
from analysis import Run, logp
from scipy import stats

from educe.measurement import intervals, pass_at_k
from educe.measurement import support_dynamics as moves

SEEN = 0.01  # the least ρ at which a run is expected to learn
COVERED = (1, 8, 64)  # k of the sampled sets
SIDES = ('base', 'policy')
Verdicts = dict[str, tuple[bool, str]]


def judge(results: dict[str, Any]) -> Verdicts:
  """Each criterion: (held, in numbers). README.md says what each of them means."""
  runs = results['chain']
  shown = [run for run in runs if run['exposure'] >= SEEN]
  unseen = [run for run in runs if run['exposure'] == 0]
  verdicts: Verdicts = {}

  ratios = [pairs(run, 'base') / run['exposure'] for run in shown]
  verdicts['calibrated'] = (
    all(abs(x - 1) <= 0.2 for x in ratios),
    'p0/ρ = ' + by_exposure(shown, ratios, '.2f'),
  )
  ends = [rate(run, 'rl') for run in shown]
  verdicts['learned'] = min(ends) >= 0.9, 'π(C) = ' + by_exposure(shown, ends, '.3f')
  grown = [rate(run, 'rl') / rate(run, 'base') for run in unseen]
  verdicts['unseen'] = (
    most([x <= 10 for x in grown]),
    'ρ = 0: π/p0 = ' + listed(grown, '.3g'),
  )
  for exposure, some in analysis.by_exposure({'chain': shown}).items():
    found = [analysis.compare(run) for run in some]
    once = [analysis.crosses_once(x.difference) for x in found]
    verdicts[f'crossover_{exposure:g}'] = (
      most(once) and len(some) >= 3,
      f'{sum(once)} of {len(some)}: k* = '
      + ', '.join('none' if x.crossing is None else f'{x.crossing:.0f}' for x in found)
      + '; least difference '
      + listed([x.difference.min() for x in found], '+.2g'),
    )
    shares = [analysis.lost(run, 10) for run in some]
    verdicts[f'interference_{exposure:g}'] = (
      most([x >= 0.05 for x in shares]) and len(some) >= 3,
      'lose a factor of 10: ' + listed(shares, '.1%'),
    )
  gains = [tilt_gain(run) for run in shown]
  verdicts['tilt'] = (
    min(gains) >= -pass_at_k.ROUNDING,
    f'the least that a tilt gains for any prompt at any k: {min(gains):.1e}',
  )
  verdicts['sharpening'] = sharpening(shown)
  verdicts['sampled'] = sampled(results)
  if 'smollm2' in results:
    verdicts |= smollm2(results['smollm2'])
  return verdicts


def listed(numbers: Sequence[float], form: str) -> str:
  return ', '.join(format(x, form) for x in numbers)


def rate(run: Run, stage: str, part: str = 'trained') -> float:
  return float(np.exp(logp(run, stage, part)).mean())


def pairs(run: Run, stage: str) -> float:
  """Mean chance over all compositions of two."""
  both = [logp(run, stage, part) for part in ('trained', 'heldout')]
  return float(np.exp(np.concatenate(both)).mean())


def most(held: list[bool]) -> bool:
  return bool(held) and sum(held) >= 2 / 3 * len(held)


def by_exposure(runs: list[Run], numbers: list[float], form: str) -> str:
  grouped: dict[float, list[float]] = {}
  for run, number in zip(runs, numbers, strict=True):
    grouped.setdefault(run['exposure'], []).append(number)
  return '; '.join(f'{listed(x, form)} (ρ = {rho:g})' for rho, x in grouped.items())


def tilt_gain(run: Run) -> float:
  """The least change of pass@k, over prompts and k, in the tilt to RL's mean rate."""
  before = logp(run, 'base')
  after = analysis.tilt(before, rate(run, 'rl'))
  return float((analysis.values(after) - analysis.values(before)).min())


def sharpening(runs: list[Run]) -> tuple[bool, str]:
  """RL against the base sharpened, on prompts where no exponent was chosen."""
  held, least = [], []
  for run in runs:
    ours = np.exp(logp(run, 'rl'))[run['others']]
    for null in ('power', 'tempered'):
      gap = ours - np.array(run[null]['first'])
      low, _ = intervals.mean_interval(gap, least=-1.0)
      held.append(bool(low > 0))
      least.append(float(low))
  nulls = [run[null]['rate'][0] for run in runs for null in ('power', 'tempered')]
  return all(held), (
    f'sharpened bases reach {min(nulls):.2g} to {max(nulls):.2g} at k = 1; RL is ahead '
    f'by {min(least):.2g} or more (lower ends)'
  )


def sampled(results: dict[str, Any]) -> tuple[bool, str]:
  """Estimates from samples against what they estimate."""
  table = results['sampled']
  (run,) = [
    run
    for run in results['chain']
    if (run['seed'], run['exposure']) == (table['seed'], table['exposure'])
  ]
  worst = max(
    float(np.abs(errors(table[side], logp(run, stage))).max())
    for side, stage in (('base', 'base'), ('policy', 'rl'))
  )
  inside = []
  for k in COVERED:
    exact, _ = analysis.seen_sets(run, k)
    truth = moves.dynamics(exact)
    found = moves.dynamics(moves.fates(*(rates(table[x], [k])[:, 0] for x in SIDES)))
    for name in ('srr', 'ndr', 'nscr'):
      estimate, value = getattr(found, name), getattr(truth, name).value
      inside.append(estimate.low <= value <= estimate.high)
  return worst <= 3 and all(inside), (
    f'pass@k within {worst:.1f} standard errors at every k; SRR, NDR, NSCR in '
    f'{sum(inside)} of {len(inside)} intervals; log-probs within '
    f'{max(table[side]["logp_error"] for side in SIDES):.0e} nats'
  )


def rates(side: dict[str, Any], ks) -> np.ndarray:
  n, c = (np.array(side[x])[:, None] for x in ('samples', 'correct'))
  return pass_at_k.pass_at_k(n, c, np.asarray(ks)[None])


def errors(side: dict[str, Any], log_p: np.ndarray) -> np.ndarray:
  """Of mean pass@k at every k, in standard errors of binomial counts, `[K]`."""
  (n,) = set(side['samples'])
  ks = pass_at_k.ladder(n)
  p = np.exp(log_p)
  count = np.arange(n + 1)
  chance = stats.binom.pmf(count, n, p[:, None])  # [P, N+1]
  value = pass_at_k.pass_at_k(n, count[:, None], ks[None])  # [N+1, K]
  mean = chance @ value
  variance = np.maximum(chance @ value**2 - mean**2, 0).sum(0) / len(p) ** 2
  off = rates(side, ks).mean(0) - pass_at_k.exact(p[:, None], ks[None]).mean(0)
  return off / np.sqrt(np.maximum(variance, 1e-24))


def smollm2(table: dict[str, Any]) -> Verdicts:
  """What a language model's table says of Yue et al.'s two ends."""
  ks = pass_at_k.ladder(min(min(table[side]['samples']) for side in SIDES))
  base, policy = (rates(table[side], ks) for side in SIDES)
  gap = pass_at_k.compare(policy, base, ks)
  said = [
    f'{gap.difference[i]:+.1%} [{gap.low[i]:+.1%}, {gap.high[i]:+.1%}] at k = {ks[i]}'
    for i in (0, -1)
  ]
  return {
    'smollm2_first': (bool(gap.low[0] > 0), f'RL − base: {said[0]}'),
    'smollm2_last': (bool(gap.high[-1] < 0), f'RL − base: {said[1]}'),
  }


if __name__ == '__main__':
  verdicts = judge(analysis.load(sys.argv[1] if len(sys.argv) > 1 else 'cpu2'))
  for key, (ok, figures) in verdicts.items():
    print(f'{"PASS" if ok else "FAIL"}  {key:17} {figures}')
  sys.exit(0 if all(ok for ok, _ in verdicts.values()) else 1)
