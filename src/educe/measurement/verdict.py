"""What a run did, in a word, and the sentences that stand behind it.

  no change                 it wrote what its base writes: KL < UNMOVED nats a sequence
  elicitation               it is right more often, and over half of that gain comes from
                            prompts that were accessible to the base
  creation                  … from prompts that were not
  elicitation and creation  each gave a share of the gain above MATERIAL
  undecided                 it is right more often, and the samples cannot tell from where
  no gain                   it writes something else, and is not right more often
  loss                      it is right less often

Every share, and the gain, is held against the end of its 95 % interval that speaks against
the word. Beside the word, `lost` says whether it can no longer write right answers of the
base: fewer than 1 − MATERIAL of them kept, of those that REACH samples of the base show;
or of prompts, more lost than the same policy sampled twice would seem to lose.

A word is relative to its budget: with k samples more of the base, what was out of reach
may be within it. The thresholds are this project's own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from educe.measurement import free_energy
from educe.measurement.findings import DELTA, LADDER, REACH, Findings
from educe.measurement.support_dynamics import Estimate

UNMOVED = 1e-3  # nats per sequence: no event's probability differs by over 2.3 points
MATERIAL = 0.05  # a share that is worth a word

WORDS = (
  'no change',
  'elicitation',
  'creation',
  'elicitation and creation',
  'undecided',
  'no gain',
  'loss',
)


class Verdict(NamedTuple):
  word: str  # one of WORDS
  lost: bool  # right answers that the base shows and the policy does not
  sentence: str  # the word, its figures, its budget
  evidence: tuple[str, ...]  # sentences

  def __str__(self) -> str:
    return ' '.join([self.sentence, *self.evidence])


def judge(found: Findings) -> Verdict:
  """The verdict on `findings.of_table(…)` or `findings.exact(…)`."""
  word, lost = _word(found), _lost(found)
  return Verdict(word, lost, _sentence(found, word), tuple(_evidence(found, lost)))


def _word(found: Findings) -> str:
  made, drawn = found.creation.share, found.creation.elicited
  low, high = found.comparison.low[0], found.comparison.high[0]
  if found.divergence.per_sequence.high < UNMOVED:
    return 'no change'
  if high < 0:
    return 'loss'
  if not low > 0:
    return 'no gain'
  if made.low > MATERIAL and drawn.low > MATERIAL:
    return 'elicitation and creation'
  if drawn.low > 0.5:
    return 'elicitation'
  return 'creation' if made.low > 0.5 else 'undecided'


def _lost(found: Findings) -> bool:
  kept, excess = found.outputs.srr, found.excess.srr
  return bool(kept.high < 1 - MATERIAL or excess.high < -MATERIAL)


def _sentence(found: Findings, word: str) -> str:
  creation, gain = found.creation, found.comparison
  base, policy = found.rates.mean(0)
  rates = (
    f'{policy:.1%} of its samples are right, of the base’s {base:.1%} '
    f'({_points(gain.difference[0], gain.low[0], gain.high[0])}, {gain.prompts} prompts).'
  )
  start = f'{word.capitalize()}: '
  if word == 'no change':
    kl = found.divergence.per_sequence
    return f'{start}it writes what its base writes (KL {kl.mean:.1e} nats). {rates}'
  if word in ('no gain', 'loss') or math.isnan(creation.share.value):
    return start + rates
  return (
    f'{start}{rates} Of the gain {_share(creation.elicited)} is elicited, from prompts '
    f'that {found.budget:,} samples of the base solve with a chance of {DELTA:.0%}; '
    f'{_share(creation.share)} is created, from prompts that they do not'
    + (f'; {creation.undecided:.0%} undecided.' if creation.undecided else '.')
  )


def _evidence(found: Findings, lost: bool):
  wide = found.gains[LADDER.index(REACH)]
  if found.budget != REACH and not math.isnan(found.creation.share.value):
    yield (
      f'Of {REACH:,} samples instead, {_share(wide.elicited)} would be elicited, '
      f'{_share(wide.share)} created and {wide.undecided:.0%} undecided.'
    )
  spent = found.spending
  yield (
    f'The policy is {_nats(spent.total)} nats a sequence from its base: '
    f'{_nats(spent.price)} for being right more often, {_nats(spent.collapse)} for fewer '
    f'of the right answers, {_nats(spent.drift)} for what no reward asked for.'
  )
  eta = spent.efficiency.eta
  if not math.isnan(eta.mean):
    yield f'It bought {eta.mean:.0%} of the reward that so much KL can buy.'
  crossing, k = found.comparison.crossing, int(found.base.k[-1])
  if crossing is not None:
    yield (
      f'The pass@k curves cross at k = {crossing:.3g}, in {found.comparison.crossed:.0%} '
      'of resamples; no tilt of the base by this reward could.'
    )
  else:
    yield f'The pass@k curves do not cross up to k = {k:,}.'
  kept = found.outputs
  if kept.preserved + kept.lost:
    yield (
      f'Of {kept.preserved + kept.lost:.0f} right answers that {REACH:,} samples of the '
      f'base show it keeps {_share(kept.srr)}'
      + (': support was lost.' if lost else '.')
    )
  noise = found.excess.srr
  if not math.isnan(noise.value):
    yield (
      f'Of prompts that {found.excess_k:,} samples of the base solve it solves '
      f'{_points(*noise)} more than the base sampled a second time.'
    )
  if found.nulls is not None:
    over = found.nulls.over_power
    yield (
      f'Of the base merely sharpened (p^{found.nulls.power.alpha:.3g}) it is ahead by '
      f'{_points(over.difference[0], over.low[0], over.high[0])} at k = 1.'
    )


def _points(value: float, low: float, high: float) -> str:
  return (
    f'{100 * value:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}'
  )


def _nats(x: free_energy.Estimate) -> str:
  return f'{abs(x.mean):.3f}'  # rounding may leave −1e−18


def _share(x: Estimate) -> str:
  return f'{x.value:.0%} ({x.low:.0%} to {x.high:.0%})'
