"""What the diagram draws is what was measured."""

import numpy as np
import pytest
from matplotlib.image import imread

from educe.measurement import reliability
from educe.measurement.accuracy import wilson
from educe.measurement.agreement import agreement
from educe.rollouts import transcripts

P = np.array([0.77, 0.77, 0.23, 0.5, 0.96])
MARGINS = np.log(P / (1 - P))


def rows(margins):
  return [
    {'prompt': 'p', 'chosen': 'a', 'rejected': 'b',
     'rewards': {'chosen': float(m), 'rejected': 0.0}}
    for m in margins
  ]  # fmt: skip


def test_points_stand_at_confidence_and_share():
  result = agreement(MARGINS, np.zeros(5))
  upper, lower = reliability.figure(result, title='a run').axes
  diagonal, line = upper.lines[0], upper.containers[0].lines[0]
  np.testing.assert_allclose(diagonal.get_xdata(), diagonal.get_ydata())
  np.testing.assert_allclose(line.get_xdata(), [0.5, 0.77, 0.96])
  np.testing.assert_allclose(line.get_ydata(), [0.5, 2 / 3, 1])
  assert [bar.get_height() for bar in lower.patches] == [1, 3, 1]
  assert '70% of 5 pairs' in upper.get_title(loc='left')
  (whiskers,) = upper.containers[0].lines[2]
  spans = [segment[:, 1] for segment in whiskers.get_segments()]
  assert all(
    low <= y <= high for (low, high), y in zip(spans, line.get_ydata(), strict=True)
  )
  assert all(high - low > 0.3 for low, high in spans)  # so few pairs say little
  want = [wilson(0.5, 1), wilson(2, 3), wilson(1, 1)]
  np.testing.assert_allclose(spans, want, atol=1e-12)


def test_judgements_are_drawn_with_the_sign_of_their_label(tmp_path, monkeypatch):
  seen = []
  figure = reliability.figure
  monkeypatch.setattr(
    reliability,
    'figure',
    lambda result, **o: seen.append(result) or figure(result, **o),
  )
  judged = [
    {'judged': 'a', 'values': [2.0, -1.0], 'labels': [1.0, 1.0]},
    {'judged': 'b', 'values': [-3.0], 'labels': [0.0]},
  ]
  transcripts.save(judged, tmp_path / 'samples' / '4.jsonl')
  assert reliability.draw(tmp_path).exists()
  assert (seen[0].rate, seen[0].total, seen[0].what) == (2 / 3, 3, 'judgements')
  assert seen[0].margin == pytest.approx((2 - 1 + 3) / 3)


def test_the_last_evaluation_is_drawn(tmp_path, monkeypatch):
  seen = []
  figure = reliability.figure
  monkeypatch.setattr(
    reliability,
    'figure',
    lambda result, **o: seen.append(result) or figure(result, **o),
  )
  for step, margins in ((0, [0.0]), (20, MARGINS), (3, [1.0, -1.0])):
    transcripts.save(rows(margins), tmp_path / 'samples' / f'{step}.jsonl')
  path = reliability.draw(tmp_path, title='a run')
  assert path == tmp_path / 'reliability.png'
  want = agreement(MARGINS, np.zeros(5))
  assert (seen[0].total, seen[0].bins) == (
    5,
    want.bins,
  )  # every pair with its own margin
  image = imread(path)
  blue = np.abs(image[..., :3] - np.array([0x15, 0x65, 0xC0]) / 255).max(-1) < 0.02
  assert blue.sum() > 1000


@pytest.mark.parametrize('samples', [None, [], [{'prompt': 'p', 'completion': 'c'}]])
def test_samples_of_something_else_have_no_diagram(samples, tmp_path):
  if samples is not None:
    transcripts.save(samples, tmp_path / 'samples' / '0.jsonl')
  assert reliability.draw(tmp_path) is None
  assert not (tmp_path / 'reliability.png').exists()
