import itertools
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from matplotlib.image import imread

from educe.measurement import curves
from educe.measurement.curves import BLUE, SOLVED, draw, figure, smooth


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


def pictured(monkeypatch, folder, rows, torn=''):
  """The axes that draw() printed, by title, and the picture."""
  kept = []

  def keep(*arguments, **options):
    kept.append(figure(*arguments, **options))
    return kept[-1]

  monkeypatch.setattr(curves, 'figure', keep)
  write(folder, rows)
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write(torn)
  image = imread(draw(folder))
  return {axes.get_title(loc='left'): axes for axes in kept[-1].axes}, image


def test_one_point_is_seen(tmp_path, monkeypatch):
  panels, _ = pictured(monkeypatch, tmp_path, reinforcement(1))
  for title, axes in panels.items():
    marks = [line.get_marker() for line in axes.lines]
    areas = [len(c.get_paths()[0].vertices) for c in axes.collections]
    assert 'o' in marks or (title == 'solved' and min(areas) > 4), title


def reinforcement(count):
  """Metrics of which every number says which it is and where."""
  rows = []
  for s in range(1, count + 1):
    rows.append(
      {
        'step': s,
        'reward': s / count,
        'reward_std': 0.25,
        'loss': -0.01 * s,
        'completions/mean_length': 100.0 + s,
        'completions/clipped_ratio': 0.5,
        'kl': 0.001 * s,
        'entropy': 1.5,
        'clip_ratio/low': 0.002,
        'clip_ratio/high': 0.006,
        'groups/solved_none': 0.5,
        'groups/solved_some': 0.3,
        'groups/solved_all': 0.2,
      }
    )
  bounds = {'accuracy/low': 0.1, 'accuracy/high': 0.4}
  return [*rows, {'step': 0, 'accuracy': 0.2, **bounds}]


RL_TITLES = [
  'reward (band: ± reward_std)',
  'held-out accuracy',
  'solved',
  'completion length (tokens)',
  'completions cut off',
  'KL (nats per token)',
  'entropy (nats per token)',
  'clipped',
  'loss',
]


def test_rows_are_drawn_in_order_with_gaps_and_a_torn_end(tmp_path, monkeypatch):
  rows = [
    dict(step=2, loss=None),  # a loss that was not finite
    dict(step=1, loss=2.0, entropy=1.0),
    dict(step=2, accuracy=0.5),
    {'step': 0, 'accuracy': 0.0, 'accuracy/low': 0.0, 'accuracy/high': 0.2},
  ]
  panels, _ = pictured(monkeypatch, tmp_path, rows, torn='{"step": 3, "lo')
  assert list(panels) == ['loss (nats per token)', 'held-out accuracy']
  logged = panels['loss (nats per token)'].lines[0].get_xydata()
  np.testing.assert_array_equal(logged, [[1, 2], [2, np.nan]])
  [bars] = panels['held-out accuracy'].containers
  np.testing.assert_array_equal(bars[0].get_xydata(), [[0, 0], [2, 0.5]])
  segments = bars[2][0].get_segments()
  np.testing.assert_allclose(segments[0], [[0, 0], [0, 0.2]])
  np.testing.assert_allclose(segments[1], [[2, 0.5], [2, 0.5]])


def test_reinforcement_learning_has_a_panel_for_each_thing_watched(
  tmp_path, monkeypatch
):
  panels, image = pictured(monkeypatch, tmp_path, reinforcement(40))
  assert list(panels) == RL_TITLES
  assert image.shape[1] == 1080
  names = {
    'completion length (tokens)': lambda s: 100 + s,
    'completions cut off': lambda s: 0 * s + 0.5,
    'KL (nats per token)': lambda s: 0.001 * s,
    'entropy (nats per token)': lambda s: 0 * s + 1.5,
    'loss': lambda s: -0.01 * s,
    RL_TITLES[0]: lambda s: s / 40,
  }
  steps = np.arange(1, 41)
  for title, expected in names.items():
    light, bold = panels[title].lines
    np.testing.assert_allclose(light.get_xydata().T, [steps, expected(steps)])
    middle = slice(10, 30)  # a Gaussian mean keeps a line, away from the ends
    np.testing.assert_allclose(bold.get_ydata()[middle], expected(steps)[middle])
  low, high = panels['clipped'].lines[1::2]
  assert (low.get_label(), high.get_label()) == ('low', 'high')
  np.testing.assert_allclose(low.get_ydata(), 0.002)
  np.testing.assert_allclose(high.get_ydata(), 0.006)
  assert low.get_color() != high.get_color()
  assert low.get_linestyle() != high.get_linestyle()
  # Tall first panel aside, two columns; only the lowest line names its axis.
  widths = [axes.get_position().width for axes in panels.values()]
  assert widths[0] > 1.9 * max(widths[1:])
  places = [axes.get_position() for axes in panels.values()]
  for one, other in itertools.combinations(places, 2):
    assert not one.overlaps(other)
  labels = [axes.get_xlabel() for axes in panels.values()]
  assert labels == [''] * 7 + ['optimizer step'] * 2


def test_the_bold_line_is_smoothed_and_the_light_one_is_not(tmp_path, monkeypatch):
  rows = reinforcement(80)
  for row in rows[:-1]:
    row['kl'] = row['reward'] = float(row['step'] % 2)
  panels, _ = pictured(monkeypatch, tmp_path, rows)
  for title in ('KL (nats per token)', RL_TITLES[0]):
    light, bold = (line.get_ydata()[10:70] for line in panels[title].lines)
    np.testing.assert_array_equal(light, (1 + np.arange(10, 70)) % 2)
    # A Gaussian of 2 steps leaves e^(−2π²) ≈ 3e-9 of it; cut at 4 widths, 3e-4.
    np.testing.assert_allclose(bold, 0.5, atol=1e-3)


def test_the_band_is_the_reward_and_its_deviation_to_both_sides(tmp_path, monkeypatch):
  panels, _ = pictured(monkeypatch, tmp_path, reinforcement(40))
  axes = panels[RL_TITLES[0]]
  [band] = axes.collections
  heights = band.get_paths()[0].vertices
  at_20 = heights[heights[:, 0] == 20][:, 1]
  np.testing.assert_allclose([at_20.min(), at_20.max()], [0.25, 0.75])
  assert axes.get_ylim()[0] < -0.2  # the band's lower end is inside the picture
  rows = [{k: v for k, v in r.items() if k != 'reward_std'} for r in reinforcement(9)]
  panels, _ = pictured(monkeypatch, tmp_path, rows)
  assert not panels['reward'].collections


def test_solved_shares_stand_on_each_other_in_their_colours(tmp_path, monkeypatch):
  panels, _ = pictured(monkeypatch, tmp_path, reinforcement(40))
  stack = panels['solved'].collections
  spans = {}
  for area in stack:
    heights = area.get_paths()[0].vertices
    at_20 = heights[heights[:, 0] == 20][:, 1]
    spans[area.get_label()] = at_20.min(), at_20.max()
  expected = {'all': (0, 0.2), 'some': (0.2, 0.5), 'none': (0.5, 1)}
  assert list(spans) == list(expected)
  for name, span in expected.items():
    np.testing.assert_allclose(spans[name], span, atol=1e-12)
  assert panels['solved'].get_ylim() == (0, 1)
  assert panels['solved'].get_legend() is not None


@pytest.mark.parametrize('gone', sorted(reinforcement(1)[0].keys() - {'step'}))
def test_what_was_not_logged_has_no_panel(tmp_path, monkeypatch, gone):
  rows = [{k: v for k, v in row.items() if k != gone} for row in reinforcement(6)]
  panels, _ = pictured(monkeypatch, tmp_path, rows)
  lost = {
    'reward_std': {RL_TITLES[0]},
    'loss': {'loss'},
    'completions/mean_length': {'completion length (tokens)'},
    'completions/clipped_ratio': {'completions cut off'},
    'kl': {'KL (nats per token)'},
    'entropy': {'entropy (nats per token)'},
    'groups/solved_none': {'solved'},
    'groups/solved_some': {'solved'},
    'groups/solved_all': {'solved'},
  }.get(gone, set())
  if gone == 'reward':
    assert list(panels) == ['loss (nats per token)', 'held-out accuracy']
  else:
    assert set(RL_TITLES) - panels.keys() == lost
  if gone == 'clip_ratio/low':
    assert [line.get_label() for line in panels['clipped'].lines][1:] == ['high']


def test_a_metric_that_was_never_finite_has_no_panel_and_a_gap_is_a_gap(
  tmp_path, monkeypatch
):
  rows = reinforcement(30)
  for row in rows[:-1]:
    row['kl'] = None
    if row['step'] == 7:
      row['reward'] = row['reward_std'] = row['groups/solved_all'] = None
  panels, _ = pictured(monkeypatch, tmp_path, rows)
  assert 'KL (nats per token)' not in panels
  logged = panels[RL_TITLES[0]].lines[0].get_ydata()
  assert np.isnan(logged[6])
  assert np.isfinite(np.delete(logged, 6)).all()


def test_an_early_spike_does_not_flatten_the_rest(tmp_path, monkeypatch):
  rows = reinforcement(200)
  for row in rows[:-1]:
    row['kl'] = 0.01
  rows[0]['kl'] = 10.0  # smoothed, it is still 0.8 at its place
  panels, _ = pictured(monkeypatch, tmp_path, rows)
  bottom, top = panels['KL (nats per token)'].get_ylim()
  assert bottom == 0
  assert top < 2
  rows[0]['kl'] = -10.0
  panels, _ = pictured(monkeypatch, tmp_path, rows)
  bottom, top = panels['KL (nats per token)'].get_ylim()
  assert -2 < bottom < 0 < 0.01 < top


def test_colours_differ_in_lightness_so_that_grey_tells_them_apart():
  def lightness(colour):
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue

  assert list(SOLVED) == ['all', 'some', 'none']
  assert SOLVED['all'] == BLUE
  # `none` is told from `some` by hue: blue against orange.
  assert lightness(SOLVED['some']) - lightness(SOLVED['all']) > 60
  red, _, blue = (int(SOLVED['none'][i : i + 2], 16) for i in (1, 3, 5))
  assert red - blue > 80
  red, _, blue = (int(SOLVED['some'][i : i + 2], 16) for i in (1, 3, 5))
  assert blue - red > 60


@pytest.mark.parametrize(
  'rows', [[], [dict(step=0, accuracy=1.0)], [dict(step=1, loss=None)]]
)
def test_no_loss_is_one_clear_line(tmp_path, rows):
  write(tmp_path, rows)
  with pytest.raises(ValueError, match='holds no loss'):
    draw(tmp_path)


def test_smoothing_is_the_normalised_gaussian_mean():
  values = np.random.default_rng(1).normal(size=60)
  values[[3, 30]] = np.nan
  for width in (0.4, 2.0, 30.0):
    expected = np.zeros(60)
    for i in range(60):
      top = bottom = 0.0
      for j in range(60):
        if np.isfinite(values[j]):
          weight = np.exp(-0.5 * ((i - j) / width) ** 2)
          top, bottom = top + weight * values[j], bottom + weight
      expected[i] = top / bottom
    # Weights beyond four widths, left out, are 6e-5 of the whole.
    np.testing.assert_allclose(smooth(values, width), expected, atol=6e-4)


def test_smoothing_of_a_long_run_needs_no_square_of_it():
  values = np.ones(20_000)  # as a square in float64: 3.2 GB
  tracemalloc.start()
  np.testing.assert_allclose(smooth(values, 500.0), 1.0)
  assert tracemalloc.get_traced_memory()[1] < 50e6
  tracemalloc.stop()


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
from educe.measurement import curves
from educe.measurement.curves import draw
assert 'matplotlib' not in sys.modules
draw({str(tmp_path)!r})
assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules
"""
  subprocess.run([sys.executable, '-c', code], check=True)


def test_preferences_have_panels_of_their_own(tmp_path, monkeypatch):
  names = (
    'loss', 'rewards/chosen', 'rewards/rejected', 'rewards/margins',
    'rewards/accuracies', 'logps/chosen', 'logps/rejected',
  )  # fmt: skip
  rows = [
    {'step': s, **{name: (i + 1) / s for i, name in enumerate(names)}}
    for s in range(1, 31)
  ]
  exam = {'accuracy': 0.3, 'accuracy/low': 0.1, 'accuracy/high': 0.6}
  panels, _ = pictured(monkeypatch, tmp_path, [{'step': 0, **exam}, *rows])
  assert list(panels) == [
    'loss (nats per pair)', 'held-out accuracy', 'rewards', 'reward margin',
    'pairs the right way round', 'log-probs (nats)',
  ]  # fmt: skip
  first = {title: [line.get_ydata()[0] for line in axes.lines if line.get_alpha()]
           for title, axes in panels.items()}  # fmt: skip
  assert first['rewards'] == [2, 3]
  assert first['reward margin'] == [4]
  assert first['log-probs (nats)'] == [6, 7]
  # Of single completions there are no margins; a judge may have compared with the start.
  exam = {'win_rate': 0.5, 'win_rate/low': 0.4, 'win_rate/high': 0.7}
  single = [{k: v for k, v in row.items() if 'marg' not in k and 'accu' not in k}
            for row in rows]  # fmt: skip
  panels, _ = pictured(monkeypatch, tmp_path, [{'step': 0, **exam}, *single])
  assert list(panels) == [
    'loss', 'preferred to its start', 'rewards', 'log-probs (nats)'
  ]  # fmt: skip
  without = [{k: v for k, v in row.items() if 'logps' not in k} for row in rows]
  panels, _ = pictured(monkeypatch, tmp_path, without)
  assert 'log-probs (nats)' not in panels
