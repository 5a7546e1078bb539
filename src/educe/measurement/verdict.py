"""What a run did, in a word, and the sentences that stand behind it.

  no change                 it writes what its base writes: the log-probs of what either of
                            them writes differ by less than UNMOVED nats on average
  elicitation               it is right more often, and over half of that gain is elicited
  creation                  … is created
  elicitation and creation  each is a share of the gain above MATERIAL
  undecided                 it is right more often, and the samples cannot tell from where
  no gain                   it writes something else, and is not right more often
  loss                      it is right less often

(findings.py says what is elicited: gained where `budget` samples of the base show a right
answer almost surely; and created: gained where `denied` of them do not, and nothing shows
that `budget` would.) Every share, and the gain, is held against the end of its 95 %
interval that speaks against the word. Beside the word, `lost` says whether it can no longer
write right answers of the base: fewer than 1 − MATERIAL are kept, of those that REACH
samples of the base show; or of prompts, more are lost than the base sampled twice would
seem to lose.

A word is relative to its budget: with more samples of the base, what was out of reach may
be within it. The thresholds are this project's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from educe.measurement import free_energy
from educe.measurement.findings import REACH, Findings, deniable, needed
from educe.measurement.support import DELTA
from educe.measurement.support_dynamics import Estimate

UNMOVED = 1e-3  # nats per sequence, mean over prompts
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
  return Verdict(
    word, lost, _sentence(found, word), tuple(_evidence(found, word, lost))
  )


def _word(found: Findings) -> str:
  made, drawn = found.creation.created, found.creation.elicited
  if found.apart < UNMOVED:
    return 'no change'
  if found.comparison.high[0] < 0:
    return 'loss'
  if not found.comparison.low[0] > 0:
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
    return (
      f'{start}it writes what its base writes (their log-probs are {found.apart:.1e} nats '
      f'apart). {rates}'
    )
  if word in ('no gain', 'loss') or math.isnan(creation.created.value):
    return start + rates
  return (
    f'{start}{rates} Of the gain {_share(creation.elicited)} is elicited, from prompts '
    f'that {found.budget:,} samples of the base solve with a chance of {DELTA:.0%}; '
    f'{_share(creation.created)} is created, from prompts that {found.denied:,} do not'
    + (f'; {creation.undecided:.0%} undecided.' if creation.undecided else '.')
  )


def _evidence(found: Findings, word: str, lost: bool) -> Iterator[str]:
  if found.samples is not None and found.denied < found.budget:
    yield (
      f'{found.samples} samples of each prompt deny {deniable(found.samples // 2)} and no '
      f'more: to deny {found.budget:,}, draw {needed(found.budget):,}.'
    )
  spent = found.spending
  yield (
    f'The policy is {_nats(spent.total)} nats a sequence from its base: '
    f'{_nats(spent.price)} for being right more often, {_nats(spent.collapse)} for fewer '
    f'of the right answers, {_nats(spent.drift)} for what no reward asked for.'
  )
  eta = spent.efficiency.eta
  if word not in ('no change', 'no gain', 'loss') and math.isfinite(spent.total.mean):
    yield f'It bought {eta.mean:.0%} of the reward that so much KL can buy.'
  yield _crossing(found)
  kept = found.outputs
  if kept.preserved + kept.lost:
    yield (
      f'Of {kept.preserved + kept.lost:.0f} right answers that the base showed, and would '
      f'show again in {REACH:,} samples, the policy keeps {_share(kept.srr)}'
      + (': support was lost.' if lost else '.')
    )
  else:
    yield f'No single right answer of the base is likely enough for {REACH:,} samples.'
  noise = found.excess.srr
  if not math.isnan(noise.value):
    yield (
      f'Of the prompts that {found.excess_k:,} samples of the base solve, what it keeps '
      f'differs by {_points(*noise)} from the base sampled a second time.'
    )
  if found.nulls is not None:
    over, power = found.nulls.over_power, found.nulls.power
    worth = '' if power.effective is None else f', worth {power.effective:.0f} samples'
    yield (
      f'Over the base merely sharpened (p^{power.alpha:.3g}{worth}) its lead at k = 1 is '
      f'{_points(over.difference[0], over.low[0], over.high[0])}.'
    )


def _crossing(found: Findings) -> str:
  """A tilt never crosses its base, but chance does."""
  gap, k = found.comparison, int(found.base.k[-1])
  if gap.crossing is None:
    return f'The pass@k curves do not cross up to k = {k:,}.'
  at = f'The pass@k curves cross at k = {gap.crossing:.3g}, '
  if gap.high[-1] < 0 < gap.low[0]:
    return at + 'which no tilt of the base by this reward could make them do.'
  return at + 'as chance makes them: one end or the other is no sure lead.'


def _points(value: float, low: float, high: float) -> str:
  shown = [f'{round(100 * x, 1) + 0.0:+.1f}' for x in (value, low, high)]  # no −0.0
  return f'{shown[0]} points, 95 % interval {shown[1]} to {shown[2]}'


def _nats(x: free_energy.Estimate) -> str:
  # Rounding may leave −1e−18. ∞: the policy writes what its base never does.
  return f'{abs(x.mean):.3f}' if math.isfinite(x.mean) else '∞'


def _share(x: Estimate) -> str:
  return f'{x.value:.0%} ({x.low:.0%} to {x.high:.0%})'
