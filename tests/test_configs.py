"""Every recipe binds; every recipe takes its two `:debug` steps."""

import pathlib
import re

import pytest

from educe import cli, config, paths
from educe.training import metrics

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 'configs').glob('*.py'))
# The recipes that a file's docstring promises.
RECIPES = [
  (path, recipe)
  for path in FILES
  for recipe in re.findall(r'^  (\w+) {2,}\S', path.read_text(), re.M)
]


def test_there_are_recipes():
  assert {recipe for _, recipe in RECIPES} == {'demo', 'gsm8k'}


@pytest.mark.parametrize(('path', 'recipe'), RECIPES, ids=[r for _, r in RECIPES])
def test_a_recipe_binds_and_its_optimizer_is_real(path, recipe):
  full = config.expand(config.load([f'--config={path}:{recipe}']), cli.train)
  config.call('optimizer', full['optimizer'], steps=full['steps'])
  assert f'{recipe}' in path.read_text().split('"""')[1]


@pytest.mark.parametrize(('path', 'recipe'), RECIPES, ids=[r for _, r in RECIPES])
def test_a_recipe_takes_its_debug_steps(path, recipe, tmp_path, capsys):
  source = config.load([f'--config={path}:{recipe}'])['source']
  if source.get('path', '').startswith('data://') and paths.data_root() is None:
    pytest.skip('its data are not on this machine')
  argv = ['train', f'--config={path}:{recipe},debug', f'--run_dir={tmp_path}']
  one_device = ['--config.data.batch_size=8']  # the suite has eight virtual devices
  assert cli.main([*argv, *one_device]) == 0, capsys.readouterr().err
  steps = [r['step'] for r in metrics.read(tmp_path / 'metrics.jsonl') if 'loss' in r]
  assert steps == [1, 2]
