"""Both criteria can fail."""

import copy
import json
import pathlib
import runpy

import pytest

HERE = pathlib.Path(__file__).parents[2] / 'experiments' / 'chain_rl'
COMMITTED = json.loads((HERE / 'results' / 'cpu2.json').read_text())
judge = runpy.run_path(str(HERE / 'judge.py'))['judge']


@pytest.mark.parametrize(
  ('stage', 'rate', 'criterion'),
  [
    ('pretrain', 0.071, 'calibrated'),
    ('pretrain', 0.029, 'calibrated'),
    ('grpo', 0.89, 'reached'),
  ],
)
def test_one_seed_that_is_off_fails(stage, rate, criterion):
  runs = copy.deepcopy(COMMITTED)
  runs[1][stage]['accuracy'][-1][1] = rate
  assert [key for key, (ok, _) in judge(runs).items() if not ok] == [criterion]


def test_one_seed_three_times_is_one_seed():
  assert not judge([COMMITTED[0]] * 3)['reached'][0]
