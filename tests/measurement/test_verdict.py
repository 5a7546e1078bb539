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
  found, *, gain=(0.1, 0.3), created=(0, 0.0), elicited=(1, 1), kl=1.0, kept=1.0
):
  share, drawn = Estimate(sum(created) / 2, *created), Estimate(0.5, *elicited)
  low, high = (np.full_like(found.comparison.low, x) for x in gain)
  sequence = found.divergence.per_sequence._replace(mean=kl, error=0.0)
  return found._replace(
    creation=found.creation._replace(share=share, elicited=drawn),
    comparison=found.comparison._replace(low=low, high=high),
    divergence=found.divergence._replace(per_sequence=sequence),
    outputs=found.outputs._replace(srr=Estimate(kept, kept, kept)),
  )


@pytest.mark.parametrize(
  ('changes', 'word'),
  [
    (dict(kl=0.0009), 'no change'),
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
  ('kept', 'lost'), [(0.96, False), (0.94, True), (np.nan, False)]
)
def test_support_is_lost_where_even_the_upper_end_keeps_too_little(found, kept, lost):
  assert verdict.judge(given(found, kept=kept)).lost is lost


def test_what_is_said_has_the_figures_it_rests_on(found):
  got = verdict.judge(found)
  assert got.word == 'elicitation'
  assert '70.0%' in got.sentence
  assert '35.0%' in got.sentence
  assert '64 samples' in got.sentence
  spent = found.spending
  whole = ' '.join(got.evidence)
  for term in (spent.total, spent.price, spent.collapse, spent.drift):
    assert f'{abs(term.mean):.3f}' in whole
  assert 'do not cross' in whole
  assert 'sharpened' in whole
  assert str(got).startswith(got.sentence)
