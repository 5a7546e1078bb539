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


def lines(name, found):
  (axes,) = report_figures._figure([name], found, columns=1).axes
  return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_curves_are_those_of_the_findings(found):
  drawn = lines('pass_at_k', found)
  for name, curve in (('base', found.base), ('policy', found.policy)):
    np.testing.assert_allclose(drawn[name], np.stack([curve.k, curve.rate], -1))
  sets = lines('support', found)
  for label, name in (
    ('kept, of prompts the base solves', 'srr'),
    ('new, of prompts the policy solves', 'ndr'),
  ):
    values = [getattr(x, name).value for x in found.dynamics]
    np.testing.assert_allclose(sets[label][:, 1], values)
  np.testing.assert_allclose(
    sets['the base sampled twice'][:, 1], [x.srr.value for x in found.twice]
  )


def test_the_run_stands_where_it_was_measured():
  found = findings.exact(POLICIES['gain'], BASE, RIGHT)
  drawn = lines('frontier', found)
  (label,) = (x for x in drawn if x.startswith('policy'))
  run = found.spending.efficiency
  np.testing.assert_allclose(drawn[label], [[run.kl, run.reward]])
  assert f'{run.eta.mean:.0%}' in label


def axes_of(name, found):
  (axes,) = report_figures._figure([name], found, columns=1).axes
  return axes


def test_shares_are_stacked_in_their_order_to_the_whole():
  often = [np.tile(x, (8, 1)) for x in (POLICIES['gain'], BASE, RIGHT)]
  found = findings.exact(*often)
  areas = axes_of('gains', found).collections
  assert [area.get_label() for area in areas] == ['elicited', 'undecided', 'created']
  shares = [[x.elicited.value, x.undecided, x.created.value] for x in found.gains]
  tops = np.cumsum(np.clip(shares, 0, None), axis=1)
  assert tops[0, 0] < tops[-1, 0]  # more is elicited within more samples
  for area, top in zip(areas, tops.T, strict=True):
    corners = {(int(x), round(y, 9)) for x, y in area.get_paths()[0].vertices}
    assert {(k, round(y, 9)) for k, y in zip(LADDER, top, strict=True)} <= corners


def test_prompts_have_the_colour_of_their_status():
  found = findings.exact(POLICIES['gain'], BASE, RIGHT, budget=64)
  assert found.status.tolist() == [1, 1, -1]
  drawn = lines('prompts', found)
  (beyond,) = (drawn[x] for x in drawn if x.startswith('beyond 64'))
  np.testing.assert_allclose(beyond, [[0.001, 0.8]])
  (within,) = (drawn[x] for x in drawn if x.startswith('within 64'))
  np.testing.assert_allclose(within, [[0.1, 0.5], [0.6, 0.9]])


def test_the_ledger_has_a_bar_a_term_as_long_as_it_is():
  policy = np.array([[0.4, 0.5, 0.1], [0.5, 0.4, 0.1]])
  base = np.array([[0.6, 0.2, 0.2], [0.5, 0.3, 0.2]])
  found = findings.exact(policy, base, np.array([[False, True, True]] * 2))
  spent = found.spending
  bars = axes_of('ledger', found).containers
  sizes = {bar.get_label().split(':')[0]: bar.patches[0].get_width() for bar in bars}
  np.testing.assert_allclose(sizes['right more often'], spent.price.mean)
  np.testing.assert_allclose(sizes['fewer right answers'], spent.collapse.mean)
  np.testing.assert_allclose(sizes['drift elsewhere'], spent.drift.mean, atol=1e-12)
  assert spent.price.mean != spent.collapse.mean


def test_what_is_infinitely_far_is_said_to_be():
  base = np.array([[1.0, 0.0], [0.5, 0.5]])
  found = findings.exact(np.full((2, 2), 0.5), base, np.array([[False, True]] * 2))
  assert 'policy: KL = ∞' in lines('frontier', found)
  (text, *_) = axes_of('ledger', found).get_legend().get_texts()
  assert text.get_text() == 'right more often: ∞'


def test_without_matplotlib_it_is_said_before_anything_is_drawn(monkeypatch):
  monkeypatch.setattr(report_figures.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='`pip install matplotlib` brings it'):
    report_figures.check()
