"""How stages are named, and when one is done; test_runs.py runs them."""

import json
import pathlib

import pytest

from educe import stages
from educe.config import ConfigError


def test_a_stage_is_named_by_its_folder():
  folders = {'sft': pathlib.Path('runs/a/sft')}
  config = {'judge': {'path': 'stage://sft'}, 'steps': 3, 'init_from': None}
  assert stages.with_stages(config, folders) == {
    'judge': {'path': 'runs/a/sft'}, 'steps': 3, 'init_from': None
  }  # fmt: skip
  with pytest.raises(
    ConfigError, match=r"stage://stf: no such stage before it; did you mean 'sft'\?"
  ):
    stages.with_stages({'value_from': 'stage://stf'}, folders)


def test_a_stage_is_done_once_its_last_step_is_measured(tmp_path):
  (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
  config = {'steps': 3, 'evaluation': {}}
  lines = [
    {'step': 0, 'accuracy': 0.1}, {'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.5},
    {'step': 3, 'loss': 1.0}, {'step': 3, 'accuracy': 0.4},
  ]  # fmt: skip

  def write(records):
    text = ''.join(json.dumps(record) + '\n' for record in records)
    (tmp_path / 'metrics.jsonl').write_text(text)

  write(lines)
  assert stages.is_done(tmp_path, config)
  write(lines[:-1])
  assert not stages.is_done(tmp_path, config)
  assert stages.is_done(tmp_path, {'steps': 3, 'evaluation': None})
  assert not stages.is_done(tmp_path, {'steps': 4, 'evaluation': None})


def test_a_sequence_that_was_moved_is_still_done(tmp_path):
  """Where stages name each other; any other difference is one."""
  old = {'judge': {'path': 'runs/a/reward'}, 'value_from': 'runs/a/sft', 'steps': 3}
  folders = [tmp_path / name for name in ('sft', 'reward', 'best')]
  folders[2].mkdir()
  (folders[2] / 'config.json').write_text(json.dumps(old))
  new = {
    'judge': {'path': str(folders[1])}, 'value_from': str(folders[0]), 'steps': 3
  }  # fmt: skip
  stages.check_same(folders[2], new, folders)
  for wrong in (
    {**new, 'steps': 4},
    {**new, 'value_from': str(folders[1])},
    {**new, 'value_from': 'elsewhere/sft'},
  ):
    with pytest.raises(ConfigError, match='is done with'):
      stages.check_same(folders[2], wrong, folders)
