"""Words from figures; the planted worlds are in test_findings.py."""

import numpy as np
import pytest

from educe.measurement import findings, verdict
from educe.measurement.support_dynamics import Estimate


@pytest.fixture(scope='module')
def found():
  base = np.array([[0.9, 0.1], [0.4, 0.6]])
  policy = np.array([[0.5, 0.5], [0.1, 0.9]])
  return findings.exact(policy, base, np.array([[False, True]] * 2), budget=64)


def given(
  found,
  *,
  gain=(0.1, 0.3),
  created=(0, 0.0),
  elicited=(1, 1),
  apart=1.0,
  kept=1.0,
  excess=0.0,
):
  share, drawn = Estimate(0.25, *created), Estimate(0.5, *elicited)
  low, high = (np.full_like(found.comparison.low, x) for x in gain)
  return found._replace(
    creation=found.creation._replace(created=share, elicited=drawn),
    comparison=found.comparison._replace(low=low, high=high),
    apart=apart,
    excess=found.excess._replace(srr=Estimate(excess, excess, excess)),
    outputs=found.outputs._replace(srr=Estimate(kept, kept, kept)),
  )


@pytest.mark.parametrize(
  ('changes', 'word'),
  [
    (dict(apart=0.0009), 'no change'),
    (dict(gain=(-0.3, -0.01)), 'loss'),
    (dict(gain=(-0.1, 0.1)), 'no gain'),
    (dict(elicited=(0.51, 1)), 'elicitation'),
    (dict(elicited=(0.49, 1)), 'undecided'),
    (dict(elicited=(-0.2, 0.1), created=(0.51, 1)), 'creation'),
    (dict(elicited=(0.06, 0.6), created=(0.06, 0.6)), 'elicitation and creation'),
    (dict(elicited=(0.9, 1), created=(0.04, 0.1)), 'elicitation'),
    (dict(elicited=(0, np.nan), created=(0, np.nan)), 'undecided'),
  ],
)
def test_words(found, changes, word):
  got = verdict.judge(given(found, **changes))
  assert got.word == word
  assert got.word in verdict.WORDS
  assert got.sentence.startswith(word.capitalize())


@pytest.mark.parametrize(
  ('changes', 'lost'),
  [
    (dict(kept=0.96), False),
    (dict(kept=0.94), True),
    (dict(kept=np.nan), False),
    (dict(excess=-0.06), True),
    (dict(excess=-0.04), False),
  ],
)
def test_support_is_lost_where_even_the_upper_end_keeps_too_little(
  found, changes, lost
):
  assert verdict.judge(given(found, **changes)).lost is lost


def interval(value, low, high):
  return Estimate(value, low, high)


def test_every_figure_stands_where_it_belongs(found):
  """Word for word: two sides swapped would read as well."""
  creation = found.creation._replace(
    created=interval(0.3, 0.1, 0.4), elicited=interval(0.6, 0.2, 0.7), undecided=0.1
  )
  gap = found.comparison._replace(
    difference=np.array([0.35, -0.2]),
    low=np.array([0.25, -0.3]),
    high=np.array([0.45, -0.1]),
    crossing=12.0,
  )
  terms = [found.spending.total._replace(mean=x) for x in (0.5, 0.25, 0.125, 0.0625)]
  eta = found.spending.efficiency.eta._replace(mean=0.42)
  nulls = found.nulls._replace(
    power=found.nulls.power._replace(alpha=4.0, effective=9.0),
    over_power=found.nulls.over_power._replace(
      difference=np.array([0.11]), low=np.array([0.07]), high=np.array([0.15])
    ),
  )
  got = verdict.judge(
    found._replace(
      samples=64,
      budget=1024,
      denied=25,
      creation=creation,
      comparison=gap,
      spending=found.spending._replace(
        **dict(zip(('total', 'price', 'collapse', 'drift'), terms, strict=True)),
        efficiency=found.spending.efficiency._replace(eta=eta),
      ),
      outputs=found.outputs._replace(
        preserved=6.0, lost=2.0, srr=interval(0.75, 0.4, 0.9)
      ),
      excess=found.excess._replace(srr=interval(-0.02, -0.04, 0.01)),
      excess_k=32,
      nulls=nulls,
    )
  )
  assert got.word == 'elicitation and creation'
  assert got.sentence == (
    'Elicitation and creation: 70.0% of its samples are right, of the base’s 35.0% (+35.0 '
    'points, 95 % interval +25.0 to +45.0, 2 prompts). Of the gain 60% (20% to 70%) is '
    'elicited, from prompts that 1,024 samples of the base solve with a chance of 95%; 30% '
    '(10% to 40%) is created, from prompts that 25 do not; 10% undecided.'
  )
  assert got.evidence == (
    '64 samples of each prompt deny 25 and no more: to deny 1,024, draw 2,524.',
    'The policy is 0.500 nats a sequence from its base: 0.250 for being right more often, '
    '0.125 for fewer of the right answers, 0.062 for what no reward asked for.',
    'It bought 42% of the reward that so much KL can buy.',
    'The pass@k curves cross at k = 12, which no tilt of the base by this reward could '
    'make them do.',
    'Of 8 right answers that the base showed, and would show again in 1,024 samples, the '
    'policy keeps 75% (40% to 90%): support was lost.',
    'Of the prompts that 32 samples of the base solve, what it keeps differs by -2.0 '
    'points, 95 % interval -4.0 to +1.0 from the base sampled a second time.',
    'Over the base merely sharpened (p^4, worth 9 samples) its lead at k = 1 is +11.0 '
    'points, 95 % interval +7.0 to +15.0.',
  )
  assert str(got) == ' '.join([got.sentence, *got.evidence])


def test_a_crossing_that_chance_makes_is_said_to_be_chance(found):
  gap = found.comparison._replace(
    difference=np.array([0.1, -0.1]),
    low=np.array([-0.1, -0.2]),
    high=np.array([0.3, 0.1]),
    crossing=4.0,
  )
  said = ' '.join(verdict.judge(found._replace(comparison=gap)).evidence)
  assert 'cross at k = 4, as chance makes them' in said
  assert 'no tilt' not in said
