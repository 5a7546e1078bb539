"""Every notebook runs from top to bottom, as the code of its cells, and is right."""

import json
import linecache
import pathlib

import matplotlib
import matplotlib.style
import numpy as np
import pytest

from educe.measurement import curves

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / 'notebooks').glob('*.ipynb'))


def a_loss_was_edited(names):
  for name, p in names['learned'].items():
    far = {k: names['tabular'].kl(q, p).mean() for k, q in names['predicted'].items()}
    # A third of the way to the other prediction would be no confirmation.
    assert all(far[name] < other / 3 for k, other in far.items() if k != name)
  assert names['same']


def a_checkpoint_was_measured(names):
  sampled, truth = names['sampled'], names['truth']
  for side in ('base', 'policy'):
    ours, exact = getattr(sampled, side), getattr(truth, side)
    rate = exact.rate[: len(ours.k)]
    # The intervals are over prompts, and these prompts are the same: well inside.
    assert (np.abs(ours.rate - rate) < (ours.high - ours.low) / 2).all()
  for name in ('total', 'price', 'drift'):
    ours, exact = (getattr(x.spending, name) for x in (sampled, truth))
    assert abs(ours.mean - exact.mean) < 1.96 * exact.error
  words = {said.word for said in names['judged'].values()}
  assert words == {'elicitation'}
  assert names['page'].stat().st_size > 100_000  # its pictures are in it


def thermodynamics_holds(names):
  assert names['error'] < 1e-12  # the gap identity, float64
  assert names['distance']['all answers compared'] < 1e-9
  assert names['distance']['only some compared'] > 0.1
  for name, off in names['landed'].items():
    # k1 in the loss is on its way to a corner, where a gradient fades: 1/steps.
    assert off < (1e-3 if name == 'k1 in the loss' else 1e-9), name
  versus, moved = names['versus'], names['moved']
  assert versus['table'].crossing is None
  assert versus['tilt, equal reward'].crossing is None
  assert versus['shared weights'].crossing_high < 1024
  assert (moved['table'].lost, moved['shared weights'].lost > 5) == (0, True)


def the_kernel_was_toured(names):
  errors, held, chunks = names['errors'], names['megabytes'], names['CHUNKS']
  assert {'all logits', 'tiles, by hand', 'Pallas, interpreted'} < set(errors)
  assert max(errors.values()) < 2e-5  # float32, of what is compared with float64
  assert names['overflowed'] > 0
  logits = 4 * names['N'] * names['V'] / 1e6
  assert held['all logits'] > 2 * logits
  for way in ('{} tokens at a time', 'one pass, {}'):
    cut = [held[way.format(rows)] for rows in chunks]
    assert cut == sorted(cut)
    assert cut[0] < logits / 4
  assert list(names['allowed'].values()) == [True, True, False, False]
  assert names['mistaken'] > 0.1
  assert names['times'].keys() | {'Pallas, interpreted'} == held.keys()


CHECKS = {
  'edit_a_loss': a_loss_was_edited,
  'kernel_tour': the_kernel_was_toured,
  'measure_a_checkpoint': a_checkpoint_was_measured,
  'thermodynamics_of_post_training': thermodynamics_holds,
}


def test_every_notebook_is_checked():
  assert {path.stem for path in NOTEBOOKS} == set(CHECKS)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path):
  matplotlib.use('Agg')
  cells = json.loads(path.read_text())['cells']
  assert all(not c.get('outputs') for c in cells), 'commit notebooks without outputs'
  names = {'__name__': path.stem}
  with matplotlib.rc_context():  # a notebook chooses a style
    for number, cell in enumerate(cells):
      if cell['cell_type'] == 'code':
        text, name = ''.join(cell['source']), f'{path.name}[{number}]'
        # As in Jupyter, where inspect finds the source of a cell.
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        exec(compile(text, name, 'exec'), names)
  matplotlib.pyplot.close('all')
  CHECKS[path.stem](names)


def test_the_style_has_the_colours_of_the_curves():
  with matplotlib.rc_context():
    matplotlib.style.use('educe.measurement.pictures')
    cycle = [x['color'] for x in matplotlib.rcParams['axes.prop_cycle']]
    assert cycle[:2] == [curves.BLUE, curves.ORANGE]
    for key, colour in (('text.color', 'INK'), ('grid.color', 'GRID')):
      assert matplotlib.rcParams[key] == getattr(curves, colour)
