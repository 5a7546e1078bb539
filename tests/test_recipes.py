"""What a file, its argument and flags come to, and what is said where they do not."""

import pathlib
import re

import pytest

from educe import config, recipes, runs
from educe.config import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
DEMO = str(ROOT / 'configs' / 'sft.py')
GRPO = str(ROOT / 'configs' / 'grpo.py')


def load(*overrides, recipe='demo,debug'):
  values = recipes.load([f'--config={DEMO}:{recipe}', *overrides])
  return config.expand(values, runs.train)


@pytest.mark.parametrize(
  ('override', 'path', 'want'),
  [
    ('--config.optimizer.learning_rate=1e-5', ('optimizer', 'learning_rate'), 1e-5),
    ('--config.data.shuffle=False', ('data', 'shuffle'), False),
    ('--config.data.epochs=3', ('data', 'epochs'), 3),
    ('--config.data.epochs=None', ('data', 'epochs'), None),
    ('--config.optimizer.clip_norm=2', ('optimizer', 'clip_norm'), 2.0),
    ('--config.optimizer.b1=0.8', ('optimizer', 'b1'), 0.8),
    ("--config.optimizer.freeze=('embed',)", ('optimizer', 'freeze'), ('embed',)),
    ('--config.seed=7', ('seed',), 7),
  ],
)
def test_flags_override_what_the_recipe_says_and_what_it_leaves_out(
  override, path, want
):
  value = load(override)
  for key in path:
    value = value[key]
  assert value == want
  assert type(value) is type(want)


def test_an_overridden_reference_carries_its_followers():
  full = load('--config.model.path=elsewhere.gguf', recipe='demo')
  assert full['tokenizer']['path'] == 'elsewhere.gguf'


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    (
      '--config.lossy.name=sft',
      r"lossy.name=sft: the config has no section 'lossy'; did you mean 'loss'\?$",
    ),
    (
      '--config.evaluation.environmnt.size=3',
      "has no section 'environmnt'; did you mean 'environment'",
    ),
    (
      '--config.evaluation.environment.name=tabular',
      r"environment.\w+=.* still there from evaluation.environment.name='reasoning_gym', "
      r"and 'tabular' takes no '\w+'; write the whole section",
    ),
    ('--config.model.name=scratch', "model.path=.* still there from model.name='gguf'"),
    (
      '--config.adapter.rank=4',
      r"adapter.rank=4: the config has no section 'adapter', which flags do not add; "
      r'write it in the file: config\.adapter = dict\(rank=4\)$',
    ),
    (
      '--config.judge.batch_size=4',
      r"no section 'judge', .*config\.judge = dict\(name=…, batch_size=4\)$",
    ),
    (
      '--config.judge.name=length',
      r"no section 'judge', .*config\.judge = dict\(name='length'\)$",
    ),
  ],
)
def test_a_flag_that_the_file_has_no_place_for_is_named(override, message):
  with pytest.raises(ConfigError, match=message) as caught:
    load(override)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config=nowhere.py', 'nowhere.py'),
    (f'--config={DEMO}:demmo', r":demmo: no recipe 'demmo'; did you mean 'demo'\?$"),
    (f'--config={DEMO}:demo,debgu', r"no recipe 'debgu'; did you mean 'debug'\?$"),
    (f'--config={DEMO}:x', r"'x'; choose one of \['debug', 'demo', 'gsm8k', 'lora'\]$"),
    (f'--config={GRPO}:chain,gspoo', r"no recipe 'gspoo'; did you mean 'gspo'\?$"),
    (f'--config={GRPO}:chain,debgu', r"no recipe 'debgu'; did you mean 'debug'\?$"),
  ],
)
def test_a_wrong_file_or_recipe_is_named(flag, message):
  with pytest.raises(ConfigError, match=message):
    recipes.load([flag])


def test_debug_shrinks_but_yields_to_flags():
  full = load()
  assert (full['steps'], full['model']['preset']) == (2, 'debug')
  assert full['evaluation']['environment']['size'] == 2
  assert load('--config.steps=5')['steps'] == 5


def test_a_flag_of_how_a_model_runs_leaves_it_small():
  small = load('--config.model.attention=portable', '--config.model.remat=full')[
    'model'
  ]
  assert (small['name'], small['preset']) == ('scratch', 'debug')
  assert (small['attention'], small['remat']) == ('portable', 'full')
  # One that says which model it is is obeyed.
  assert load('--config.model.path=mine.gguf')['model']['name'] == 'gguf'
  staged = recipes.load(
    [f'--config={GRPO}:chain,debug', '--config.grpo.model.logprob=chunked']
  )
  assert staged['grpo']['model']['preset'] == 'debug'
  assert staged['grpo']['model']['logprob'] == 'chunked'


def test_debug_adds_what_a_section_takes_and_no_section():
  full = load()  # the recipe itself names neither of these
  assert (full['data']['workers'], full['data']['overlong']) == (0, 'truncate')
  assert full['rollouts'] is None
  # `size` is unwritten in the chain world, where None is all; a debug run asks for few.
  stages = recipes.load([f'--config={GRPO}:chain,debug'])
  assert stages['grpo']['environment']['size'] == 4
  assert stages['pretrain']['data']['batch_size'] == 2
  assert 'size' not in stages['pretrain']['data']


def test_another_name_with_all_its_keys_is_no_mistake():
  same = load('--config.loss.name=sft', '--config.loss.label_smoothing=0.1')
  assert same['loss']['label_smoothing'] == 0.1


@pytest.mark.parametrize(('preset', 'minibatches'), [('dr_grpo', 1), ('gspo', 2)])
def test_debug_adds_no_minibatches(preset, minibatches):
  values = recipes.load([f'--config={GRPO}:{preset},debug'])
  assert config.expand(values, runs.train)['algorithm']['minibatches'] == minibatches


def test_a_config_of_ones_own_imports_a_recipe(tmp_path, monkeypatch):
  """As CONTRIBUTING shows it."""
  text = (ROOT / 'CONTRIBUTING.md').read_text()
  (own,) = re.findall(r'```python\n(from configs import .*?)```', text, re.S)
  (vowels,) = re.findall(r'```python\n(from educe.environments .*?)```', text, re.S)
  mine = tmp_path / 'experiments' / 'mine'
  mine.mkdir(parents=True)
  (mine / 'config.py').write_text(own)
  (mine / 'vowels.py').write_text(vowels)
  for folder in (ROOT, tmp_path):
    monkeypatch.syspath_prepend(folder)
  values = recipes.load([f'--config={mine / "config.py"}:arithmetic,debug'])
  full = config.expand(values, runs.train)
  assert full['evaluation']['environment'] == dict(
    name='experiments.mine.vowels', size=2
  )
  world = config.call('environment', full['environment'])
  assert len(world.prompts) == 4
  assert world.respond(world.prompts[0], ['queue']).reward == 0.8


def test_a_file_that_imports_recipes_says_from_where(tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text('from experiments import nothing_of_this_name_anywhere\n')
  with pytest.raises(ConfigError, match='run from the repository') as error:
    recipes.load([f'--config={file}'])
  assert '\n' not in str(error.value)


def test_debug_leaves_a_judge_that_needs_no_server(tmp_path):
  file = tmp_path / 'mine.py'
  for judge, kept in ((dict(name='reward_model', path='r'), True),
                      (dict(name='endpoint', url='u'), False)):  # fmt: skip
    file.write_text(
      'import ml_collections\ndef get_config():\n'
      f'  return ml_collections.ConfigDict(dict(judge={judge}))\n'
    )
    (got,) = [recipes.load([f'--config={file}:debug'])['judge']]
    assert got == (judge if kept else recipes.DEBUG['judge'])


@pytest.mark.parametrize('debug', ['', ':debug'])
def test_a_stage_without_a_section_is_named(tmp_path, debug):
  file = tmp_path / 'mine.py'
  file.write_text(
    'import ml_collections\ndef get_config():\n'
    "  return ml_collections.ConfigDict(dict(stages=('golden',), gold=dict(steps=1)))\n"
  )
  with pytest.raises(ConfigError, match=r"no section 'golden'; did you mean 'gold'\?"):
    recipes.load([f'--config={file}{debug}'])


def test_a_sweep_names_its_points():
  points = list(recipes.sweep([f'--config={DEMO}:demo,debug']))
  assert points[0] == (
    'learning_rate=3e-05', ['--config.optimizer.learning_rate=3e-05'],
  )  # fmt: skip
  assert len(points) == 3
