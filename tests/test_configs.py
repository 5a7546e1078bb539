"""Every recipe binds; every recipe takes its two `:debug` steps."""

import importlib.util
import pathlib
import re

import pytest

from educe import cli, config, paths, recipes, runs
from educe.training import metrics

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 'configs').glob('*.py'))


def presets(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return [*getattr(module, 'PRESETS', ())]


# The recipes that a file's docstring promises, and for each world each preset.
RECIPES = [
  (path, recipe)
  for path in FILES
  for recipe in re.findall(r'^  (\w+) {2,}\S', path.read_text().split('"""')[1], re.M)
]
RECIPES += [
  (path, f'{world},{preset}')
  for path in FILES
  for preset in presets(path)
  for world in ('chain', 'arithmetic')
]
IDS = [f'{path.stem}:{recipe}' for path, recipe in RECIPES]
# Of a recipe with several stages one preset is run, and not what changes one setting of
# another recipe; all of them bind.
RUN = [
  (path, recipe)
  for path, recipe in RECIPES
  if (not recipe.startswith('chain,') and (path.stem != 'r1' or recipe == 'r1'))
  and recipe not in ('ipo', 'tr_dpo')
]


def stages(values):
  return [values[name] for name in values['stages']] if 'stages' in values else [values]


def test_there_are_recipes():
  assert {recipe for _, recipe in RECIPES if ',' not in recipe} == {
    'demo', 'gsm8k', 'chain', 'arithmetic', 'smollm', 'zero', 'r1', 'offline',
    'xpo', 'judge', 'hh', 'ipo', 'lora', 'simpo', 'tr_dpo', 'kto', 'pandalm', 'verifier',
  }  # fmt: skip
  assert len(presets(ROOT / 'configs' / 'grpo.py')) == 10


@pytest.mark.parametrize(('path', 'recipe'), RECIPES, ids=IDS)
def test_a_recipe_binds_and_its_optimizer_is_real(path, recipe):
  for values in stages(recipes.load([f'--config={path}:{recipe}'])):
    full = config.expand(values, runs.train)
    config.check_used(full, runs.READ)
    config.call('optimizer', full['optimizer'], steps=full['steps'])
    if full['loss'].get('aggregate') == 'constant':
      longest = full['rollouts']['max_new_tokens']
      assert full['loss']['max_completion_length'] == longest


@pytest.mark.parametrize(
  ('path', 'recipe'), RUN, ids=[f'{path.stem}:{recipe}' for path, recipe in RUN]
)
def test_a_recipe_takes_its_debug_steps(path, recipe, tmp_path, capsys):
  values = recipes.load([f'--config={path}:{recipe},debug'])
  for stage in stages(values):
    source = stage.get('source', stage.get('environment', {}).get('source', {}))
    public = 'preference_sources' in source.get('name', '')
    file = 'data://' if public else source.get('path', '')
    if file.startswith('data://') and paths.data_root() is None:
      pytest.skip('its data are not on this machine')
  argv = ['train', f'--config={path}:{recipe},debug', f'--run_dir={tmp_path}']
  # The suite has eight virtual devices: rows in multiples of eight.
  for name in values.get('stages', ['']):
    own, prefix = (values[name], f'{name}.') if name else (values, '')
    sizes = {'data': 'batch_size=8', 'rollouts': 'prompts=4'}
    argv += [f'--config.{prefix}{k}.{v}' for k, v in sizes.items() if k in own]
    if 'batch_size' in own['algorithm']:
      argv += [f'--config.{prefix}algorithm.batch_size=8']
  assert cli.main(argv) == 0, capsys.readouterr().err
  for name in values.get('stages', ['']):
    records = metrics.read(tmp_path / name / 'metrics.jsonl')
    assert [r['step'] for r in records if 'loss' in r] == [1, 2]


def test_the_punishment_of_length_has_room_of_its_own():
  """DAPO's buffer must not lie over the only length that solves the task."""
  for world in ('chain', 'arithmetic'):
    lengths = []
    for preset in ('dr_grpo', 'dapo'):
      path = f'--config={ROOT / "configs" / "grpo.py"}:{world},{preset}'
      lengths.append(stages(recipes.load([path]))[-1])
    plain, dapo = lengths
    buffer = dapo['algorithm']['overlong_buffer']
    assert buffer > 0
    unpunished = dapo['rollouts']['max_new_tokens'] - buffer
    assert unpunished == plain['rollouts']['max_new_tokens']


# As printed, of each paper (PRESETS in configs/grpo.py cites them).
PRINTED = {
  'grpo': {
    'loss.objective': 'clip', 'loss.clip_low': 0.2, 'loss.clip_high': 0.2,
    'loss.aggregate': 'sequence_mean', 'loss.importance': 'token',
    'loss.kl_coef': 0.04, 'loss.kl_estimator': 'k3', 'loss.kl_gradient': 'naive',
    'advantage.name': 'group_relative', 'advantage.std': True,
    'algorithm.reference_every': 0,
  },
  'dr_grpo': {
    'loss.aggregate': 'constant', 'loss.kl_coef': 0.0, 'advantage.std': False,
  },
  'dapo': {
    'loss.clip_low': 0.2, 'loss.clip_high': 0.28, 'loss.aggregate': 'token_mean',
    'loss.kl_coef': 0.0, 'advantage.std': True, 'algorithm.drop_equal': True,
    'algorithm.reference_every': None,
  },
  'gspo': {
    'loss.importance': 'sequence', 'loss.clip_low': 3e-4, 'loss.clip_high': 4e-4,
    'loss.aggregate': 'sequence_mean', 'loss.kl_coef': 0.0,
  },
  'cispo': {
    'loss.objective': 'cispo', 'loss.clip_low': 1.0, 'loss.aggregate': 'token_mean',
    'loss.kl_coef': 0.0,
  },
  'rloo': {
    'advantage.name': 'rloo', 'loss.objective': 'reinforce',
    'loss.aggregate': 'sequence_sum', 'loss.kl_coef': 0.0,
  },
  'reinforce_plus_plus': {
    'advantage.name': 'reinforce_plus_plus', 'advantage.kl_coef': 0.01,
    'loss.objective': 'clip', 'loss.kl_coef': 0.0,
  },
  'sapo': {'loss.objective': 'sapo', 'loss.tau_pos': 1.0, 'loss.tau_neg': 1.05},
  'remax': {'advantage.name': 'remax', 'loss.objective': 'reinforce'},
  'pass_at_k': {'advantage.name': 'pass_at_k', 'loss.aggregate': 'sequence_sum'},
}  # fmt: skip


@pytest.mark.parametrize('preset', presets(ROOT / 'configs' / 'grpo.py'))
def test_a_preset_has_the_numbers_of_its_paper(preset):
  values = recipes.load([f'--config={ROOT / "configs" / "grpo.py"}:{preset}'])
  flat = runs.flat(config.expand(values, runs.train))
  printed = PRINTED[preset]
  assert {key: flat[key] for key in printed} == printed
  assert (flat['rollouts.refills'] > 0) == (preset == 'dapo')
  assert (flat['algorithm.overlong_buffer'] > 0) == (preset == 'dapo')


def test_nobody_whom_instruct_gpt_trains_has_met_its_judge():
  """Else the win rate is the proxy's own opinion."""
  values = recipes.load([f'--config={ROOT / "configs" / "instruct_gpt.py"}'])

  def rows(source):
    low, _, high = source['split'].strip('[]').partition(':')
    return set(range(int(low or 0), int(high or 2308)))

  stages = {name: values[name] for name in values['stages']}
  fed = {
    name: rows(stage['source'] if 'source' in stage else stage['environment']['source'])
    for name, stage in stages.items()
  }
  assert fed['reward_model'] == fed['dpo'] == fed['ppo'] == fed['sft']
  assert not fed['gold'] & fed['sft']
  for name in ('gold', 'reward_model'):
    assert not rows(stages[name]['evaluation']['source']) & (fed['gold'] | fed['sft'])
  for name in ('ppo', 'dpo'):
    exam = stages[name]['evaluation']
    assert exam['judge']['path'] == 'stage://gold'
    assert not rows(exam['environment']['source']) & (fed['gold'] | fed['sft'])
    assert exam == stages['dpo']['evaluation']  # both by the same measure
    assert stages[name]['init_from'] == 'stage://sft'
  ours = stages['ppo']
  assert ours['judge']['path'] == ours['value_from'] == 'stage://reward_model'
  for stage in stages.values():
    trained_on = {key: x for key, x in stage.items() if key != 'evaluation'}
    assert 'stage://gold' not in str(trained_on)
