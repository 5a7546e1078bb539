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
from educe.data import tokenizer as tokenizers
from educe.models import policy, safetensors, scratch
from educe.policies import check_vocabulary
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
  assert said.count(' was ') == 1
  assert 'from step 3' in said
  assert len(losses(tmp_path / 'run')) == 4


@pytest.mark.parametrize(
  ('extra', 'message'),
  [
    (['--config.loss.label_smothing=0.1'], "did you mean 'label_smoothing'"),
    (['--config.data.batch_size=6'], 'make its rows a multiple of 8'),
    (['--config.tokenizer.path=nowhere.json'], 'nowhere.json: no such file'),
    (['--config.source.path=nowhere.jsonl'], 'nowhere.jsonl: no such file'),
    (['--config.mesh.fsdp=3'], 'mesh'),
    (['--config.model.preset=debugg'], 'debugg'),
    (['--configg=3'], "unknown argument '--configg=3'"),
    (['--config.aggregate=3'], "takes no 'aggregate'"),
    (['--config.data.max_length=4'], 'max_length'),
    (['--config.save_every=0'], 'config.save_every=0 must be at least 1'),
    (['--config.evaluate_every=-1'], 'config.evaluate_every=-1 must be at least 0'),
    (['--config.steps=-1'], 'config.steps=-1 must be at least 1'),
    (['--config.microbatches=0'], 'config.microbatches=0 must'),
    (['--config.abort_after=0'], 'config.abort_after=0 must'),
    (['--config.optimizer.learning_rate=-1.0'], 'optimizer.learning_rate=-1.0 must be'),
    (['--config.model.remat=dotz'], "config.model: remat = 'dotz' is none of"),
    (['--run_dir='], '--run_dir= is empty; name a folder'),
    (['--run_dir=FILE'], 'is a file; name a folder'),
    (['--run_dir=FILE/below'], 'is a file; name a folder'),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
  config, tmp_path, capsys, monkeypatch, extra, message
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'FILE').write_text('')
  before = {p.name for p in tmp_path.iterdir()}
  assert cli.main(['train', config, f'--run_dir={tmp_path / "run"}', *extra]) == 1
  said = capsys.readouterr().err.strip().splitlines()
  assert said[-1].startswith('educe: ')
  assert message in said[-1]
  own = (f'{tmp_path / "run"}: 3 steps', 'starting at step 0')  # what it set out to do
  rest = [x for x in said[:-1] if x and not x.startswith(own) and 'step/s]' not in x]
  assert not rest
  # Python keeps what it compiled of config.py, unless it is told not to.
  assert {p.name for p in tmp_path.iterdir()} - {'run', '__pycache__'} == before


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
    (['--model=nowhere.gguf'], 'educe: --model=nowhere.gguf: no such file'),
    (['--model=README.md'], '--model=README.md: not a .gguf'),
    (['--prompt='], "--prompt='' is empty"),
    (['--prompt= \n'], r"--prompt=' \n' is empty"),
    (['--prompt=', '--raw'], "--prompt='' is empty"),
    (['--temperatur=1'], "unknown argument '--temperatur=1'"),
  ],
)
def test_sample_names_what_is_wrong(argv, message, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert cli.main(['sample', '--prompt=x', *argv]) == 1
  assert message in capsys.readouterr().err


def test_the_folder_of_several_runs_names_them(tmp_path, capsys):
  for name in ('cold', 'grpo'):
    (tmp_path / name / 'checkpoints').mkdir(parents=True)
  assert cli.main(['sample', f'--model={tmp_path}', '--prompt=x']) == 1
  said = ' '.join(capsys.readouterr().err.split())
  assert f'holds the runs cold, grpo; name one, as --model={tmp_path}/grpo' in said


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
  file = run / ('config.json' if break_it == 'config' else 'checkpoints/3')
  assert str(file) in said


def test_only_what_differs_of_a_section_is_said(config, tmp_path, capsys):
  run = f'--run_dir={tmp_path / "run"}'
  cli.main(['train', config, run])
  capsys.readouterr()
  changed = ['--config.optimizer.learning_rate=0.5', '--config.data.seed=0']
  assert cli.main(['train', config, run, *changed, '--config.steps=9']) == 0
  said = [line for line in capsys.readouterr().err.splitlines() if ' was ' in line]
  rate, steps = said
  assert rate.endswith('config.json: optimizer.learning_rate was 0.01, is now 0.5')
  assert steps.endswith('is now 9')


def test_a_run_says_first_what_it_is(config, tmp_path, capsys):
  run = tmp_path / 'run'
  assert cli.main(['train', config, f'--run_dir={run}']) == 0
  said = capsys.readouterr().err.splitlines()
  assert said[0].startswith(
    f'{run}: 3 steps of sft; model scratch debug, source jsonl '
  )
  assert said[0].endswith('data.jsonl')
  assert said[1].startswith('starting at step 0 of 3: ')
  size = policy.count(scratch.load(preset='debug')[1])
  assert f'{size:,} parameters' in said[1]


LOAD = scratch.load


def broken_model(*, preset: str = 'debug'):
  """One weight of the model is NaN, as from a file that was damaged."""
  model, params = LOAD(preset=preset)
  scale = params['norm']['scale'].at[3].set(float('nan'))
  return model, {**params, 'norm': {'scale': scale}}


def test_nan_weights_are_said_at_the_first_step(config, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(scratch, 'load', broken_model)
  run = tmp_path / 'run'
  assert cli.main(['train', config, f'--run_dir={run}']) == 1
  said = capsys.readouterr().err.strip().splitlines()[-1]
  assert said.startswith('educe: loss nan and gradients that are not finite before any')
  assert 'config.model' in said
  assert len(metrics.read(run / 'metrics.jsonl')) == 1
  assert not (run / 'checkpoints' / '3').exists()
  assert not (run / 'curves.png').exists()


def test_nan_weights_are_said_by_an_evaluation(config, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(scratch, 'load', broken_model)
  file = tmp_path / 'config.py'
  exam = "evaluation=dict(name='accuracy', max_new_tokens=2, environment=dict(name='tabular', size=2))"  # fmt: skip # noqa: E501
  file.write_text(file.read_text().replace('steps=3,', f'steps=3, {exam},'))
  assert cli.main(['train', config, f'--run_dir={tmp_path / "run"}']) == 1
  assert 'educe: the model gives probabilities that are not finite' in (
    capsys.readouterr().err
  )


def test_settings_of_an_evaluation_are_refused_before_the_model_is_loaded(
  config, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(scratch, 'load', lambda **_: pytest.fail('loaded the model'))
  file = tmp_path / 'config.py'
  exam = "evaluation=dict(name='accuracy', max_new_tokens=0, environment=dict(name='tabular', size=2))"  # fmt: skip # noqa: E501
  file.write_text(file.read_text().replace('steps=3,', f'steps=3, {exam},'))
  assert cli.main(['train', config, f'--run_dir={tmp_path / "run"}']) == 1
  assert 'config.evaluation.max_new_tokens=0 must be' in capsys.readouterr().err


def test_a_tokenizer_path_that_follows_the_models_says_so(config, tmp_path, capsys):
  file = tmp_path / 'config.py'
  odd = tmp_path / 'odd.xyz'
  odd.write_text('')
  text = file.read_text().replace("path='byte'", f'path={str(odd)!r}')
  file.write_text(text.replace("preset='debug'", f'path={str(odd)!r}'))
  more = ['--config.model.name=gguf']
  assert cli.main(['train', config, f'--run_dir={tmp_path / "run"}', *more]) == 1
  said = capsys.readouterr().err
  assert 'config.tokenizer' in said
  assert 'it is config.model.path, which config.tokenizer.path follows' in said


def test_convert_refuses_a_file_before_it_loads_the_model(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(cli, 'open_policy', lambda *_: pytest.fail('loaded the model'))
  file = tmp_path / 'file'
  file.write_text('kept')
  for to, message in ((file, f'--to={file}: {file} is a file'), ('', '--to= is empty')):
    assert cli.main(['convert', f'--to={to}']) == 1
    assert message in capsys.readouterr().err
  assert file.read_text() == 'kept'


def test_help_names_the_default_model(capsys):
  with pytest.raises(SystemExit):
    cli.main(['sample', '--help'])
  assert cli.SMOLLM2 in ''.join(capsys.readouterr().out.split())


def test_a_vocabulary_that_just_fits_passes_and_one_more_does_not():
  model, _ = scratch.load(preset='debug')
  words = tokenizers.load(path='byte')
  for spare, fits in ((0, True), (-1, False)):
    size = dataclasses.replace(model.architecture, vocab_size=words.vocab_size + spare)
    small = policy.build(size)
    params = small.init(jax.random.key(0))
    if fits:
      check_vocabulary(small, params, words)
    else:
      with pytest.raises(ValueError, match='has 261 tokens, the model 260 embeddings'):
        check_vocabulary(small, params, words)


@pytest.mark.parametrize(
  ('error', 'text', 'trace'),
  [
    (ValueError('wrong'), 'educe: process 1: wrong', False),
    (
      jax.errors.JaxRuntimeError('INTERNAL: connection closed\nby peer'),
      'educe: process 1: INTERNAL: connection closed by peer (if another process has '
      'ended, it has said why)',
      False,
    ),
    (KeyError('ours'), "educe: process 1: 'ours'", True),
  ],
)
def test_a_process_of_several_says_what_failed_and_leaves(
  tmp_path, monkeypatch, capsys, error, text, trace
):
  """Whatever it is: for the others wait in a collective for as long as it lives."""

  def fail(*_, **__):
    raise error

  left = []
  monkeypatch.setattr(cli, 'run_all', fail)
  monkeypatch.setattr(cli.hosts, 'count', lambda: 2)
  monkeypatch.setattr(cli.hosts, 'index', lambda: 1)
  monkeypatch.setattr(cli.hosts, 'leave', lambda code: left.append(code) or code)
  assert cli.main(['train', '--config=x.py', f'--run_dir={tmp_path}']) == 1
  said = capsys.readouterr().err
  assert said.strip().endswith(text)
  assert ('Traceback' in said) == trace
  assert left == [1]
  monkeypatch.undo()
  monkeypatch.setattr(cli, 'run_all', fail)
  if not isinstance(error, ValueError):  # alone, what is our bug keeps its trace
    with pytest.raises(type(error)):
      cli.main(['train', '--config=x.py', f'--run_dir={tmp_path}'])


def test_flags_of_several_hosts_come_before_the_config_is_read(tmp_path, capsys):
  command = ['train', '--config=none.py', f'--run_dir={tmp_path}', '--processes=2']
  assert cli.main(command) == 1
  assert '--process=0 belong together' in capsys.readouterr().err
  assert cli.main(['measure', '--policy=x', '--multihost', '--process=1']) == 1
  assert '--multihost finds the other processes by itself' in capsys.readouterr().err


def test_an_unknown_program_is_refused_before_any_file_is_read(capfd):
  argv = [
    'compile',
    '--config=nowhere.py',
    '--topology=v5e:2x4',
    '--programs=tran,decode',
  ]
  assert cli.main(argv) == 1
  assert capfd.readouterr().err.splitlines() == [
    'educe: --programs=tran is none of train, score, prefill, decode; did you mean '
    "'train'?"
  ]
