"""The pictures say the numbers that were kept, and every one kept for a picture has it."""

import json
import pathlib

import matplotlib
import pytest

HERE = pathlib.Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture(scope='module')
def figure(scripts):
  matplotlib.use('Agg')
  return scripts(HERE, 'figure')['figure']


def results(name):
  return json.loads((HERE / 'results' / f'{name}.json').read_text())


def lengths(axes):
  return [bar.get_width() for bar in axes.patches]


def test_bars_are_as_long_as_their_numbers(figure):
  found = results('logprob_cpu')
  speed, memory = figure.logprob(found)[0].axes
  ways = [name for name in found['ways'] if name != 'matmul']
  assert lengths(speed) == [found['ways'][name]['fraction_of_matmul'] for name in ways]
  assert lengths(memory) == [found['ways'][name]['temp_mb'] for name in ways]
  # The first on top, in both panels, which share their axis.
  assert [x.get_text() for x in speed.get_yticklabels()] == ways
  assert speed.yaxis_inverted()

  found = results('shared_prompts_cpu')
  (axes,) = figure.shared_prompts(found)[0].axes
  assert lengths(axes) == [row['tokens_per_second'] for row in found['ways'].values()]

  found = results('rollout_cpu')
  for axes, name in zip(
    figure.rollout(found)[0].axes, ('10M', 'smollm2_135m'), strict=True
  ):
    row = found[name]
    step, products, read = lengths(axes)
    assert step == pytest.approx(1e3 * row['step_seconds'])
    assert max(products, read) / step == pytest.approx(row['fraction_of_bound'])


def test_a_ratio_is_of_its_own_case_and_peer(figure):
  found = results('peers_cpu')
  several = figure.peers(found)[0].axes
  for axes, cases in zip(several, found['ratios'].values(), strict=True):
    over = [
      [case[f'vs_{peer}'] for case in cases.values()] for peer in ('trl', 'tunix')
    ]
    assert lengths(axes) == [*over[0], *over[1]]
  said = [text.get_text() for text in several[0].get_yticklabels()]
  assert said == [case.replace('_', ', ') for case in cases]


def test_a_pods_bar_is_what_a_device_holds(figure):
  found = results('pods')
  drawn = [x for axes in figure.pods(found)[0].axes for x in lengths(axes)]
  programs = [x for run in found['runs'] for x in run['programs'].values()]
  parts = [f'{part}_gb' for part in ('arguments', 'temporaries', 'beside')]
  held = sum(x[part] for x in programs if 'reason' not in x for part in parts)
  assert sum(drawn) == pytest.approx(held)


def test_every_picture_is_drawn_and_committed(figure, tmp_path):
  for name in figure.DRAWN:
    path = figure.draw(name, tmp_path)
    assert path.stat().st_size > 10_000
    assert (HERE / path.name).exists()
    assert f'({path.name})' in (HERE / 'README.md').read_text()
