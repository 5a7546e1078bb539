"""Every recipe binds; every recipe takes its two `:debug` steps."""

import pathlib
import re

import pytest

from educe import cli, config, paths, runs
from educe.training import metrics

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 'configs').glob('*.py'))


def promised(path):
  """The recipes in a file's docstring, and the presets in its table."""
  text = path.read_text()
  return [
    *re.findall(r'^  (\w+) {2,}\S', text, re.M),
    *re.findall(r"^  '(\w+)': dict\(", text, re.M),
  ]


ALL = [(path, recipe) for path in FILES for recipe in promised(path)]
WORLDS = {'demo', 'gsm8k', 'chain', 'arithmetic'}
RUN = [(path, recipe) for path, recipe in ALL if recipe in WORLDS]


def sections(values, *, bind=True):
  """{stage, or '': its run}."""
  stages = values.get('stages')
  named = {stage: values[stage] for stage in stages} if stages else {'': values}
  return {n: config.expand(v, runs.train) if bind else v for n, v in named.items()}


def test_there_are_recipes():
  presets = {
    'grpo', 'dr_grpo', 'dapo', 'gspo', 'cispo', 'rloo', 'reinforce_plus_plus', 'sapo',
    'remax', 'pass_at_k',
  }  # fmt: skip
  assert {recipe for _, recipe in ALL} == WORLDS | presets


@pytest.mark.parametrize(('path', 'recipe'), ALL, ids=[r for _, r in ALL])
def test_a_recipe_binds_and_its_optimizer_is_real(path, recipe):
  for full in sections(config.load([f'--config={path}:{recipe}'])).values():
    config.call('optimizer', full['optimizer'], steps=full['steps'])
    config.bound('loss', full['loss'])
    used = {name: full[name] for name in ('data', 'rollouts', 'advantage')}
    config.check_used('algorithm', full['algorithm'], used)
    if full['evaluation']:
      config.check('evaluation', full['evaluation'])


@pytest.mark.parametrize(('path', 'recipe'), RUN, ids=[r for _, r in RUN])
def test_a_recipe_takes_its_debug_steps(path, recipe, tmp_path, capsys):
  argv = [f'--config={path}:{recipe},debug']
  parts = sections(config.load(argv), bind=False)
  for name, values in parts.items():
    if 'data' in values:  # the suite has eight virtual devices
      own = f'{name}.' if name else ''
      argv.append(f'--config.{own}data.batch_size=8')
    source = values.get('source', {}).get('path', '')
    if source.startswith('data://') and paths.data_root() is None:
      pytest.skip('its data are not on this machine')
  assert cli.main(['train', *argv, f'--run_dir={tmp_path}']) == 0, (
    capsys.readouterr().err
  )
  for name in parts:
    rows = metrics.read(tmp_path / name / 'metrics.jsonl')
    assert [r['step'] for r in rows if 'loss' in r] == [1, 2]
