import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from educe.measurement.curves import _read, draw, smooth


def write(folder, rows):
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'metrics.jsonl').write_text(text)


def losses(count):
  return [dict(step=s + 1, loss=3 / (s + 1)) for s in range(count)]


def test_a_picture_with_both_panels_is_taller_than_one_without(tmp_path):
  write(tmp_path, losses(30))
  path = draw(tmp_path)
  assert path == tmp_path / 'curves.png'
  alone = imread(path)
  bounds = {'accuracy/low': 0.1, 'accuracy/high': 0.6}
  write(tmp_path, [dict(step=0, accuracy=0.3, **bounds), *losses(30)])
  both = imread(draw(tmp_path, title='a run'))
  assert both.shape[0] > 1.5 * alone.shape[0]
  assert both.shape[1] == alone.shape[1] == 1080
  orange = np.abs(both[..., :3] - np.array([0xC2, 0x41, 0x0C]) / 255).max(-1) < 0.02
  assert orange.sum() > 300
  blue = np.abs(both[..., :3] - np.array([0x15, 0x65, 0xC0]) / 255).max(-1) < 0.02
  assert blue.sum() > 300


def test_rows_are_read_in_order_with_gaps_and_a_torn_end(tmp_path):
  rows = [
    dict(step=2, loss=None),  # a loss that was not finite
    dict(step=1, loss=2.0),
    dict(step=2, accuracy=0.5),
    {'step': 0, 'accuracy': 0.0, 'accuracy/low': 0.0, 'accuracy/high': 0.2},
  ]
  write(tmp_path, rows)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 3, "lo')
  steps, values, points = _read(tmp_path / 'metrics.jsonl')
  assert steps.tolist() == [1, 2]
  assert values[0] == 2
  assert np.isnan(values[1])
  assert points == [(0, 0.0, 0.0, 0.2), (2, 0.5, 0.5, 0.5)]
  draw(tmp_path)


@pytest.mark.parametrize('rows', [[], [dict(step=0, accuracy=1.0)]])
def test_no_loss_is_one_clear_line(tmp_path, rows):
  write(tmp_path, rows)
  with pytest.raises(ValueError, match='holds no loss'):
    draw(tmp_path)


def test_smoothing_keeps_constants_and_lines_and_skips_gaps():
  np.testing.assert_allclose(smooth(np.full(20, 3.0), 2), 3.0)
  line = np.arange(50.0)
  np.testing.assert_allclose(smooth(line, 2)[15:35], line[15:35], atol=1e-6)
  gap = np.full(20, 3.0)
  gap[[0, 4, 19]] = np.nan, np.inf, np.nan
  np.testing.assert_allclose(smooth(gap, 2), 3.0)
  noise = np.random.default_rng(0).normal(size=400)
  assert smooth(noise, 10).std() < 0.3 * noise.std()


def test_matplotlib_is_imported_late_and_without_pyplot(tmp_path):
  write(tmp_path, losses(3))
  code = f"""
import sys
from educe.measurement.curves import draw
assert 'matplotlib' not in sys.modules
draw({str(tmp_path)!r})
assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules
"""
  subprocess.run([sys.executable, '-c', code], check=True)
