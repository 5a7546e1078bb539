"""The three commands, called as a user calls them."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from educe import cli
from educe.data import tfds_builder
from educe.models import policy, safetensors, scratch
from educe.training import metrics

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
import ml_collections

def get_config(recipe='own'):
  return ml_collections.ConfigDict(dict(
    steps=3, save_every=2,
    model=dict(name='scratch', preset='debug'),
    tokenizer=dict(path='byte'),
    algorithm=dict(name='sft'),
    loss=dict(name='sft'),
    source=dict(name='jsonl', path={data!r}),
    data=dict(batch_size=8, max_length=24),
    optimizer=dict(name='adamw', learning_rate=1e-2),
    mesh=dict(data=-1),
  ))

def sweep():
  for learning_rate in (1e-2, 1e-3):
    yield {{'optimizer.learning_rate': learning_rate}}
"""


@pytest.fixture
def config(tmp_path):
  data = tmp_path / 'data.jsonl'
  rows = [{'prompt': f'{i}+1=', 'completion': str(i + 1)} for i in range(20)]
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (tmp_path / 'config.py').write_text(CONFIG.format(data=str(data)))
  return f'--config={tmp_path / "config.py"}'


def losses(folder):
  return [record['loss'] for record in metrics.read(folder / 'metrics.jsonl')]


def test_train_then_sample_then_convert(config, tmp_path, capsys):
  run = tmp_path / 'run'
  assert cli.main(['train', config, f'--run_dir={run}']) == 0
  assert len(losses(run)) == 3
  saved = json.loads((run / 'config.json').read_text())
  assert saved['optimizer']['clip_norm'] == 1.0  # defaults are in it
  assert (run / 'curves.png').read_bytes().startswith(b'\x89PNG')

  ask = ['sample', f'--model={run}', '--prompt=1+1=', '--raw', '--max_new_tokens=3']
  assert cli.main(ask) == 0
  assert capsys.readouterr().out.startswith('> 1+1=\n')

  to = tmp_path / 'exported'
  assert cli.main(['convert', f'--model={run}', f'--to={to}']) == 0
  assert 'lm_head.weight' in capsys.readouterr().out  # the report of every name
  _, params = safetensors.load(path=str(to))
  _, fresh = scratch.load(preset='debug')
  trained = cli.open_policy(str(run))[1]
  assert policy.count(params) == policy.count(fresh)
  np.testing.assert_array_equal(params['head'], trained['head'])
  assert not np.array_equal(params['head'], fresh['head'])  # … and not the initial ones
  assert cli.main(['sample', f'--model={to}', *ask[2:]]) == 0


def test_a_run_that_began_from_a_file_is_sampled_with_its_own_weights(
  config, tmp_path, capsys
):
  """Loaders of files give host arrays; a run folder must not come back as its base."""
  base = tmp_path / 'base'
  model, params = scratch.load(preset='debug')
  safetensors.export(base, model.architecture, params)
  run = tmp_path / 'run'
  files = ['--config.model.name=safetensors', f'--config.model.path={base}']
  text = (tmp_path / 'config.py').read_text()
  (tmp_path / 'config.py').write_text(text.replace(", preset='debug'", ", path=''"))
  assert cli.main(['train', config, f'--run_dir={run}', *files]) == 0
  assert cli.main(['sample', f'--model={run}', '--prompt=1+1=', '--raw']) == 0
  trained = cli.open_policy(str(run))[1]
  assert not np.array_equal(trained['head'], params['head'])


def test_bfloat16_export_says_so(tmp_path, config, capsys):
  run = tmp_path / 'run'
  cli.main(['train', config, f'--run_dir={run}'])
  to = tmp_path / 'exported'
  cli.main(['convert', f'--model={run}', f'--to={to}', '--dtype=bfloat16'])
  assert json.loads((to / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
  architecture = safetensors.load(path=str(to), param_dtype='bfloat16')[0].architecture
  want = scratch.load(preset='debug')[0].architecture
  assert architecture == dataclasses.replace(want, param_dtype='bfloat16')


def test_a_sweep_runs_every_point_in_its_own_folder(config, tmp_path):
  assert cli.main(['train', config, f'--run_dir={tmp_path / "s"}', '--sweep']) == 0
  a, b = (losses(tmp_path / 's' / f'learning_rate={x}') for x in (0.01, 0.001))
  assert a[0] == b[0]
  assert a[2] != b[2]


def test_going_on_with_another_config_says_what_changed(config, tmp_path, capsys):
  run = f'--run_dir={tmp_path / "run"}'
  cli.main(['train', config, run])
  capsys.readouterr()
  assert cli.main(['train', config, run, '--config.steps=4']) == 0
  said = capsys.readouterr().err
  assert 'steps was 3, is now 4' in said
  assert 'from step 3' in said
  assert len(losses(tmp_path / 'run')) == 4


@pytest.mark.parametrize(
  ('extra', 'message'),
  [
    (['--config.loss.label_smothing=0.1'], "did you mean 'label_smoothing'"),
    (['--config.data.batch_size=6'], 'make it a multiple of 8'),
    (['--config.tokenizer.path=nowhere.json'], 'nowhere.json: no such file'),
    (['--config.source.path=nowhere.jsonl'], 'nowhere.jsonl: no such file'),
    (['--config.mesh.fsdp=3'], 'mesh'),
    (['--config.model.preset=debugg'], 'debugg'),
    (['--configg=3'], "unknown argument '--configg=3'"),
    (['--config.aggregate=3'], "takes no 'aggregate'"),
    (['--config.data.max_length=4'], 'max_length'),
    (['--config.save_every=0'], 'save_every=0 must be at least 1'),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
  config, tmp_path, capsys, extra, message
):
  assert cli.main(['train', config, f'--run_dir={tmp_path / "run"}', *extra]) == 1
  said = capsys.readouterr().err.strip().splitlines()
  lines = [line for line in said if 'step/s]' not in line]  # the bar at step 0
  assert len(lines) == 1
  assert lines[0].startswith('educe: ')
  assert message in lines[0]


def test_a_checkpoint_of_another_model_is_refused_and_left_alone(
  config, tmp_path, capsys
):
  run = tmp_path / 'run'
  cli.main(['train', config, f'--run_dir={run}'])
  before = sorted(p.name for p in (run / 'checkpoints').iterdir())
  capsys.readouterr()
  other = ['--config.model.preset=stories260k', '--config.steps=5']
  assert cli.main(['train', config, f'--run_dir={run}', *other]) == 1
  assert 'belongs to another model: params/' in capsys.readouterr().err
  assert sorted(p.name for p in (run / 'checkpoints').iterdir()) == before


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, capsys):
  run = tmp_path / 'hf'
  model, _ = scratch.load(preset='debug')
  small = dataclasses.replace(model.architecture, vocab_size=200)
  safetensors.export(run, small, policy.build(small).init(jax.random.key(0)))
  assert cli.main(['sample', f'--model={run}', '--tokenizer=byte', '--prompt=x']) == 1
  assert 'the tokenizer has 261 tokens, the model 200' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--model=nowhere.gguf'], 'nowhere.gguf: no such file'),
    (['--model=README.md'], 'README.md: not a .gguf'),
    (['--temperatur=1'], "unknown argument '--temperatur=1'"),
  ],
)
def test_sample_names_what_is_wrong(argv, message, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert cli.main(['sample', '--prompt=x', *argv]) == 1
  assert message in capsys.readouterr().err


def test_a_tfds_data_set_trains_from_a_config(config, tmp_path):
  data = str(tmp_path / 'data.jsonl')
  tfds_builder.build(splits={'train': data}, name='sums', data_dir=str(tmp_path / 'd'))
  text = (tmp_path / 'config.py').read_text()
  source = f"source=dict(name='tfds', dataset='sums', data_dir={str(tmp_path / 'd')!r})"
  text = re.sub(r'source=dict\(.*\)', source, text)
  (tmp_path / 'config.py').write_text(text)
  assert cli.main(['train', config, f'--run_dir={tmp_path / "run"}']) == 0
  assert len(losses(tmp_path / 'run')) == 3


# Orbax abandons coroutines of the read that failed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('break_it', ['state', 'data', 'config'])
def test_a_damaged_run_is_one_line_naming_the_file(config, tmp_path, capsys, break_it):
  run = tmp_path / 'run'
  cli.main(['train', config, f'--run_dir={run}'])
  if break_it == 'config':
    (run / 'config.json').write_text('{"seed": ')
  else:
    for file in (run / 'checkpoints' / '3' / break_it).rglob('*'):
      if file.is_file():
        file.write_bytes(file.read_bytes()[:7])
  capsys.readouterr()
  command = ['sample', f'--model={run}', '--prompt=x']
  if break_it == 'data':
    command = ['train', config, f'--run_dir={run}', '--config.steps=9']
  assert cli.main(command) == 1
  said = capsys.readouterr().err.strip().splitlines()[-1]
  assert said.startswith('educe: ')
  assert 'is damaged' in said
  assert break_it in said
