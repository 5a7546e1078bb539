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

from educe.measurement.findings import DELTA, REACH, Findings
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
  gain, made, drawn = found.creation.gain, found.creation.share, found.creation.elicited
  if found.divergence.per_sequence.high < UNMOVED:
    return 'no change'
  if gain.high < 0:
    return 'loss'
  if not gain.low > 0:
    return 'no gain'
  if made.low > MATERIAL and drawn.low > MATERIAL:
    return 'elicitation and creation'
  if drawn.low > 0.5:
    return 'elicitation'
  return 'creation' if made.low > 0.5 else 'undecided'


def _lost(found: Findings) -> bool:
  kept, excess = found.outputs.srr, found.excess.srr
  return kept.high < 1 - MATERIAL or excess.high < -MATERIAL


def _sentence(found: Findings, word: str) -> str:
  creation, prompts = found.creation, len(found.rates)
  base, policy = found.rates.mean(0)
  gain = creation.gain
  rates = (
    f'{policy:.1%} of its samples are right where {base:.1%} of the base’s were '
    f'(a gain of {100 * gain.value:+.1f} points, 95 % interval {100 * gain.low:+.1f} to '
    f'{100 * gain.high:+.1f}, {prompts} prompts).'
  )
  start = f'{word.capitalize()}: '
  if word == 'no change':
    kl = found.divergence.per_sequence
    return f'{start}it writes what its base writes (KL {kl.mean:.1e} nats). {rates}'
  if math.isnan(creation.share.value):
    return start + rates
  return (
    f'{start}{rates} Of the gain {_share(creation.elicited)} is elicited, from prompts '
    f'that {found.budget:,} samples of the base solve with a chance of {DELTA:.0%}; '
    f'{_share(creation.share)} is created, from prompts that they do not'
    + (f'; {creation.undecided:.0%} undecided.' if creation.undecided else '.')
  )


def _evidence(found: Findings, lost: bool):
  wide = found.gains[REACH.bit_length() - 1]
  if found.budget != REACH and not math.isnan(wide.elicited.value):
    yield (
      f'At a budget of {REACH:,} samples {_share(wide.elicited)} is elicited'
      + (f' and {wide.undecided:.0%} undecided' if wide.undecided else '')
      + ': what a prompt lacks at few samples it may have at many.'
    )
  spent = found.spending
  yield (
    f'The policy is {spent.total.mean:.3g} nats a sequence from its base: '
    f'{spent.price.mean:.3g} for being right more often, {spent.collapse.mean:.3g} for '
    f'fewer of the right answers, {spent.drift.mean:.3g} for what no reward asked for.'
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
      f'base show it keeps {_share(kept.srr)}' + (': support was lost.' if lost else '.')
    )
  if found.nulls is not None:
    over = found.nulls.over_power
    yield (
      f'Against the base merely sharpened (p^{found.nulls.power.alpha:.3g}) it is '
      f'{100 * over.difference[0]:+.1f} points ahead at k = 1 '
      f'({100 * over.low[0]:+.1f} to {100 * over.high[0]:+.1f}).'
    )


def _share(x: Estimate) -> str:
  return f'{x.value:.0%} ({x.low:.0%} to {x.high:.0%})'
