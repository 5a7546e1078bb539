"""A finished run as a model of another one's config. (test_cli.py opens the rest.)"""

import jax
import numpy as np
import pytest

from educe import cli, config, policies
from educe.models import scratch
from educe.training.checkpoint import CheckpointError

CONFIG = """
import ml_collections

def get_config():
  return ml_collections.ConfigDict(dict(
    seed=0, steps=2, model=dict(name='scratch', preset='chain', seed=3),
    tokenizer=dict(path='characters:012345abcdefgh='), mesh=dict(data=-1),
    source=dict(
      name='educe.environments.chain:records', size=64, exposure=1.0, shares=(1.0,),
    ),
    data=dict(batch_size=8, max_length=8), algorithm=dict(name='sft'),
    loss=dict(name='sft'), optimizer=dict(name='adamw', learning_rate=3e-2),
  ))
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  (folder / 'config.py').write_text(CONFIG)
  argv = ['train', f'--config={folder}/config.py', f'--run_dir={folder}/run']
  assert cli.main(argv) == 0
  return folder / 'run'


def test_a_run_is_a_section_model_with_its_trained_params(run):
  section = dict(name='educe.policies', path=str(run))
  model, params = config.call('teacher', section)
  _, opened, words = policies.open_policy(str(run))
  jax.tree.map(np.testing.assert_array_equal, params, opened)
  start = scratch.load(preset='chain', seed=3)[1]
  moved = np.abs(params['embedding'] - start['embedding']).max()
  assert 1e-3 < moved < 0.2  # two steps of Adam away from where it began
  assert model.architecture.vocab_size == words.vocab_size == 16


def test_a_description_of_a_run_is_of_what_is_loaded(run):
  section = dict(path=str(run))
  known = {}

  def start():
    known['model'], params = policies.describe(**section)
    return params

  def told(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)

  like = jax.eval_shape(start)
  model, params = policies.load(**section)
  assert known['model'].architecture == model.architecture
  assert known['model'].axes == model.axes
  assert told(like) == told(params)


def test_what_is_no_run_says_so(run, tmp_path):
  (tmp_path / 'model.bin').write_bytes(b'x')
  for name in ('model.bin', 'absent'):
    for opened in (policies.open_values, lambda path: policies.load(path=path)):
      with pytest.raises(ValueError, match=f"{name}' is not the folder of a run"):
        opened(str(tmp_path / name))
  with pytest.raises(CheckpointError, match='a run without a value head'):
    policies.open_values(str(run))
  empty = tmp_path / 'empty'
  (empty / 'checkpoints').mkdir(parents=True)
  (empty / 'config.json').write_text((run / 'config.json').read_text())
  with pytest.raises(CheckpointError, match='no finished checkpoint'):
    policies.load(path=str(empty))
  with pytest.raises(CheckpointError, match='no finished checkpoint'):
    jax.eval_shape(lambda: policies.describe(path=str(empty))[1])
  text = (run / 'config.json').read_text()
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'checkpoints').symlink_to(run / 'checkpoints')
  (other / 'config.json').write_text(text.replace('"chain"', '"debug"'))
  with pytest.raises(CheckpointError, match='belongs to another model'):
    jax.eval_shape(lambda: policies.describe(path=str(other))[1])
