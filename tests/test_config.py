"""The signature is the schema: what binds, what is refused, and how it is said."""

import json
import pathlib
import subprocess
import sys

import pytest

from educe import config, runs
from educe.config import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
DEMO = str(ROOT / 'configs' / 'sft.py')


def load(*overrides, recipe='demo,debug'):
  values = config.load([f'--config={DEMO}:{recipe}', *overrides])
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
  ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_mend(override, message):
  with pytest.raises(ConfigError, match=message) as caught:
    load(override)
  assert '\n' not in str(caught.value)


def test_a_missing_value_is_named():
  values = config.load([f'--config={DEMO}:demo'])
  del values['optimizer']['learning_rate']
  with pytest.raises(ConfigError, match=r'config.optimizer.learning_rate is missing'):
    config.expand(values, runs.train)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config=nowhere.py', 'nowhere.py'),
    (f'--config={DEMO}:demmo', r"demmo is not one of \['demo', 'gsm8k'\]"),
  ],
)
def test_a_wrong_file_or_recipe_is_named(flag, message):
  with pytest.raises(ConfigError, match=message):
    config.load([flag])


def test_debug_shrinks_but_yields_to_flags():
  full = load()
  assert (full['steps'], full['model']['preset']) == (2, 'debug')
  assert full['evaluation']['environment']['size'] == 2
  assert load('--config.steps=5')['steps'] == 5


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


def test_a_sweep_names_its_points():
  points = list(config.sweep([f'--config={DEMO}:demo,debug']))
  assert points[0] == (
    'learning_rate=3e-05', ['--config.optimizer.learning_rate=3e-05'],
  )  # fmt: skip
  assert len(points) == 3


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
