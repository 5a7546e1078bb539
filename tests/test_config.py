"""The signature is the schema: what binds, what is refused, and how it is said."""

import functools
import json
import pathlib
import subprocess
import sys

import pytest

from educe import config, recipes, runs
from educe.config import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
DEMO = str(ROOT / 'configs' / 'sft.py')


def load(*overrides, recipe='demo,debug'):
  values = recipes.load([f'--config={DEMO}:{recipe}', *overrides])
  return config.expand(values, runs.train)


def test_defaults_of_every_section_are_filled_in():
  full = load()
  assert full['loss'] == {
    'name': 'sft', 'label_smoothing': 0.0, 'aggregate': 'token_mean',
  }  # fmt: skip
  assert full['data']['overlong'] == 'truncate'
  assert full['data']['shuffle'] is True  # pipeline.make's own default
  assert full['keep'] == 2  # runs.train's
  json.dumps(full)


def test_a_module_of_ones_own_is_told_how_to_be_named(tmp_path, monkeypatch):
  (tmp_path / 'ownworld.py').write_text('def make():\n  pass\n')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ConfigError, match='choose one of') as caught:
    config.resolve('environment', 'ownworld')
  assert "'my_file:make'" in str(caught.value)
  assert 'math_qa' in str(caught.value)
  assert 'verifiers' not in str(caught.value)  # stands beside it, and makes none
  assert config.resolve('environment', 'ownworld:make').__module__ == 'ownworld'


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('--config.loss.label_smothing=0.1', "did you mean 'label_smoothing'"),
    ('--config.stepz=3', "did you mean 'steps'"),
    ('--config.loss.name=sfft', "no educe/losses/sfft.py; did you mean 'sft'"),
    ('--config.source.name=jsonll', "no function 'jsonll'; did you mean 'jsonl'"),
    ('--config.data.batch_size=x', 'batch_size'),
    ('--config.data.epochs=True', r'epochs=True should be'),
    ('--config.data.epochs=2.5', r'config.data.epochs=2.5 should be int \| None'),
    ('--config.data.shuffle=3', 'shuffle'),
    ('--config.loss.name=no.such.module', 'no such.module|no no/such/module.py'),
    ('--config.evaluation.every=3', "accuracy.evaluate takes no 'every'"),
    ('--config.optimizer.learning_rate=None', 'learning_rate'),
    (
      '--config.offload=opt_state',
      r"config.offload='opt_state' should be tuple; write \('opt_state',\)$",
    ),
    ('--config.offload=None', 'config.offload=None should be tuple$'),
    ('--config.optimizer.freeze=norm', r"freeze='norm' should be .*\('norm',\)$"),
  ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_mend(override, message):
  with pytest.raises(ConfigError, match=message) as caught:
    load(override)
  assert '\n' not in str(caught.value)


def test_a_missing_value_is_named():
  values = recipes.load([f'--config={DEMO}:demo'])
  del values['optimizer']['learning_rate']
  with pytest.raises(ConfigError, match=r'config.optimizer.learning_rate is missing'):
    config.expand(values, runs.train)


def test_a_section_is_named_in_front_of_what_its_function_says():
  with pytest.raises(ConfigError, match=r'^config.model: remat = .dotz. is none of'):
    config.call('model', {'name': 'scratch', 'preset': 'debug', 'remat': 'dotz'})
  with pytest.raises(ConfigError, match=r'^config.model: nowhere.gguf: no such file'):
    config.call('model', {'name': 'gguf', 'path': 'nowhere.gguf'})
  with pytest.raises(
    ConfigError, match=r'^config.optimizer.learning_rate=-1.0 must be'
  ):
    config.call('optimizer', {'learning_rate': -1.0}, steps=3)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'max_new_tokens': 0}, r'config.evaluation.max_new_tokens=0 must be at least 1'),
    ({'batch_size': 0}, r'config.evaluation.batch_size=0 must'),
    ({'repeats': 0}, r'config.evaluation.repeats=0 must'),
    ({'repeats': 2}, r'repeats=2 greedy completions would be equal'),
    ({'temperature': -1.0}, r'temperature=-1.0 must be a number ≥ 0'),
    ({'workers': -1}, r'workers=-1 must be at least 0'),
    ({'time_limit': 0.0}, r'time_limit=0.0 must be more than 0'),
  ],
)
def test_numbers_of_an_evaluation_are_checked_without_a_model(change, message):
  full = load()['evaluation']
  config.check('evaluation', full)
  with pytest.raises(ConfigError, match=message):
    config.check('evaluation', full | change)


def test_a_section_without_a_check_passes():
  config.check('loss', {'name': 'sft'})


def test_a_dotted_name_is_an_import_path(tmp_path, monkeypatch):
  (tmp_path / 'mine').mkdir()
  own = 'def loss(scores, batch, *, label_smoothing=0., aggregate="", tau: float=2.): 1'
  (tmp_path / 'mine' / 'own.py').write_text(f'{own}\n{own.replace("loss(", "f(")}')
  monkeypatch.syspath_prepend(tmp_path)
  assert load('--config.loss.name=mine.own')['loss']['tau'] == 2.0
  full = load('--config.loss.name=mine.own:f', '--config.loss.tau=3.5')
  assert full['loss']['tau'] == 3.5
  assert config.bound('loss', full['loss']).func.__name__ == 'f'
  with pytest.raises(ConfigError, match=r"mine.own has no function 'g'"):
    config.resolve('loss', 'mine.own:g')


def test_call_supplies_by_name_and_says_what_is_missing():
  steps = {'learning_rate': 0.1}
  assert config.call('optimizer', steps, steps=3, unused=1).learning_rate(0) > 0
  with pytest.raises(
    ConfigError, match=r'config.optimizer needs a section config.steps'
  ):
    config.call('optimizer', steps)


def test_a_mistake_is_found_before_any_device_is_touched(tmp_path):
  """In a fresh process: JAX has no backend yet when the message appears."""
  program = f"""
import sys
from educe import cli
code = cli.main(['train', '--config={DEMO}:demo', '--run_dir={tmp_path}/run',
                 '--config.loss.label_smothing=1'])
from jax._src import xla_bridge
print(code, xla_bridge.backends_are_initialized())
"""
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, timeout=120
  )
  assert done.stdout.split() == ['1', 'False'], done.stderr
  assert 'label_smoothing' in done.stderr
  assert not (tmp_path / 'run').exists()


def test_a_function_is_no_value_of_a_config():
  def short(prompt, completion, columns):
    return 1.0

  section = dict(name='reward_functions', prompts=[{'prompt': 'a'}], functions=short)
  message = r'config\.environment\.functions=<function .*a config holds plain values'
  with pytest.raises(config.ConfigError, match=message):
    config.expand_section('environment', section, 'config.environment')


def test_a_file_of_several_functions_needs_the_function():
  with pytest.raises(
    config.ConfigError, match=r'the function too, as educe\.losses\.advantages:'
  ):
    config.resolve('advantage', 'educe.losses.advantages')


def test_what_has_a_default_is_supplied_where_there_is_any(monkeypatch):
  """A section before the * may be left out if the function says what stands for it."""

  def make(model, rollouts=None, size=3, *, knob: int = 1):
    return model, rollouts, size, knob

  monkeypatch.setattr(config, 'resolve', lambda *_: make)
  call = functools.partial(config.call, 'optimizer', {'knob': 2})
  assert call(model='m') == ('m', None, 3, 2)
  assert call(model='m', rollouts='r', size=0) == ('m', 'r', 0, 2)
  with pytest.raises(config.ConfigError, match=r'needs a section config\.model'):
    call(rollouts='r')
