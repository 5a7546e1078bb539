"""Every notebook runs from top to bottom, as the code of its cells."""

import json
import pathlib

import matplotlib
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / 'notebooks').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path):
  matplotlib.use('Agg')
  cells = json.loads(path.read_text())['cells']
  source = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
  names = {'__name__': path.stem}
  for number, text in enumerate(source):
    exec(compile(text, f'{path.name}[{number}]', 'exec'), names)
  assert all(not c.get('outputs') for c in cells), 'commit notebooks without outputs'
  matplotlib.pyplot.close('all')
  if path.stem == 'edit_a_loss':
    for history in names['curves'].values():
      assert history[-1] < 0.2 * history[0]
