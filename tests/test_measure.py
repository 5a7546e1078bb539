"""`educe measure` of a run that was just made."""

import json
import pathlib

import numpy as np
import pytest

from educe import cli
from educe.measurement import table

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
import ml_collections

def stage(**sections):
  return dict(
    seed=0, model=dict(name='scratch', preset='chain'),
    tokenizer=dict(path='characters:012345abcdefgh='), mesh=dict(data=-1), **sections,
  )

def get_config():
  exam = dict(
    name='accuracy', environment=dict(name='chain', depth=1, size=8), max_new_tokens=2,
  )
  base = stage(
    steps=60,
    source=dict(
      name='educe.environments.chain:records', size=256, exposure=1.0, shares=(1.0,),
    ),
    data=dict(batch_size=16, max_length=8), algorithm=dict(name='sft'),
    loss=dict(name='sft'), optimizer=dict(name='adamw', learning_rate=3e-2),
    evaluation=exam,
  )
  more = dict(base, steps=20)
  return ml_collections.ConfigDict(dict(stages=('base', 'more'), base=base, more=more))
"""


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('measure')
  (folder / 'config.py').write_text(CONFIG)
  flags = [f'--config={folder}/config.py', f'--run_dir={folder}/run']
  assert cli.main(['train', *flags]) == 0
  return folder / 'run'


def go(*flags):
  return cli.main(['measure', '--workers=0', *map(str, flags)])


def test_a_run_is_measured_against_its_start_on_what_it_was_evaluated_on(runs):
  assert go(f'--policy={runs}/more', '--samples=4') == 0
  got = table.load(runs / 'more' / 'measure')
  assert got.header['base'] == str(runs / 'base')
  assert got.header['environment']['depth'] == 1
  assert got.header['decoding']['max_new_tokens'] == 2
  assert got.base.rewards.shape == (8, 4)
  assert np.isfinite(got.policy.logp_base).all()
  assert got.base.texts != got.policy.texts


def test_everything_may_be_said(runs, tmp_path):
  flags = ['--environment=chain', '--environment.depth=1', '--size=3', '--samples=6']
  flags += [f'--base={runs}/more', f'--to={tmp_path}', '--max_new_tokens=4']
  assert go(f'--policy={runs}/more', *flags) == 0
  got = table.load(tmp_path)
  assert len(got.ids) == 3
  assert got.header['environment'] == {'name': 'chain', 'depth': 1}
  # Two samplings of one policy: the same log-probs under both.
  np.testing.assert_allclose(got.base.logp_base, got.base.logp_policy, atol=1e-5)
  assert got.base.texts != got.policy.texts


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--policy={runs}/base'], '--base is missing: {runs}/base started from random'),
    (['--policy={runs}/more', '--base={bytes}'], 'have different tokenizers'),
    (['--policy={runs}/more', '--environment.depth=2'], '--environment does not name'),
    (['--policy={runs}/mroe'], '--policy={runs}/mroe: no such file'),
    (['--policy={runs}'], '--policy={runs} holds the runs base, more; name one'),
    (
      ['--policy={runs}/more', '--base={runs}/bsae'],
      '--base={runs}/bsae: no such file',
    ),
    (['--policy={runs}/more', '--depth=2'], "unknown argument '--depth=2'"),
    (['--policy={runs}/more', '--size=9'], '--size=9: the environment has 8 prompts'),
    (['--policy={runs}/more', '--environment=chian'], "did you mean 'chain'?"),
  ],
)
def test_bad_input_is_one_line(runs, tmp_path, capsys, flags, message):
  text = CONFIG.replace('characters:012345abcdefgh=', 'characters:012345hgfedcba=')
  (tmp_path / 'config.py').write_text(text)
  known = dict(runs=runs, bytes=tmp_path / 'run' / 'base')
  if '{bytes}' in ''.join(flags):
    command = ['train', f'--config={tmp_path}/config.py', f'--run_dir={tmp_path}/run']
    assert cli.main(command) == 0
  assert go(*(flag.format(**known) for flag in flags), f'--to={tmp_path}/t') == 1
  said = capsys.readouterr().err.splitlines()[-1]
  assert message.format(**known) in said


def test_the_report_lies_beside_the_table_and_what_it_says_is_printed(runs, capsys):
  assert go(f'--policy={runs}/more', '--samples=4', '--budget=2') == 0
  folder = runs / 'more' / 'measure'
  printed = capsys.readouterr().err
  found = json.loads((folder / 'findings.json').read_text())
  assert found['budget'] == 2
  assert found['verdict']['sentence'] in printed
  assert f'{folder}/report.html' in printed
  assert f'{folder}/verdict.png' in printed
  assert (folder / 'verdict.png').read_bytes().startswith(b'\x89PNG')
