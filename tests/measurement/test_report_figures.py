"""Every panel is drawn from every kind of findings; pictures are looked at by people."""

import numpy as np
import pytest

from educe.measurement import findings, report_figures
from educe.measurement.findings import LADDER

BASE = np.array([[0.90, 0.10, 0.0], [0.4, 0.5, 0.1], [0.999, 0.0005, 0.0005]])
RIGHT = np.array([[False, True, True]] * 3)
POLICIES = {
  'gain': np.array([[0.5, 0.5, 0.0], [0.1, 0.8, 0.1], [0.2, 0.4, 0.4]]),
  'loss': np.array([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [1.0, 0.0, 0.0]]),
  'beyond': np.array([[0.1, 0.0, 0.9], [0.4, 0.5, 0.1], [0.2, 0.4, 0.4]]),
}


@pytest.fixture(scope='module', params=POLICIES)
def found(request):
  return findings.exact(POLICIES[request.param], BASE, RIGHT)


def test_all_panels_become_files(found, tmp_path):
  whole = report_figures.draw(found, tmp_path / 'new', title='a title')
  names = {f'{name}.png' for name in report_figures.PANELS} | {'verdict.png'}
  assert {file.name for file in whole.parent.iterdir()} == names
  assert whole.name == 'verdict.png'
  assert whole.stat().st_size > 50_000


def lines(found, name):
  (axes,) = report_figures._figure([name], found, columns=1).axes
  return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_curves_are_those_of_the_findings(found):
  drawn = lines(found, 'pass_at_k')
  for name, curve in (('base', found.base), ('policy', found.policy)):
    np.testing.assert_allclose(drawn[name], np.stack([curve.k, curve.rate], -1))
  kept = lines(found, 'support')['kept, of prompts the base solves']
  np.testing.assert_allclose(kept[:, 1], [x.srr.value for x in found.dynamics])


def test_the_run_stands_where_it_was_measured():
  found = findings.exact(POLICIES['gain'], BASE, RIGHT)
  drawn = lines(found, 'frontier')
  (label,) = (x for x in drawn if x.startswith('policy'))
  run = found.spending.efficiency
  np.testing.assert_allclose(drawn[label], [[run.kl, run.reward]])
  assert f'{run.eta.mean:.0%}' in label


def test_shares_are_stacked_to_the_whole():
  found = findings.exact(POLICIES['gain'], BASE, RIGHT)
  (axes,) = report_figures._figure(['gains'], found, columns=1).axes
  top = axes.collections[-1].get_paths()[0].vertices
  np.testing.assert_allclose(top[:, 1].max(), 1)
  assert set(LADDER) <= set(top[:, 0].round().astype(int))
