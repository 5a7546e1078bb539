"""Runs whose rewards a judge gives: one that is down for a while, and a reward model."""

import json
import re

import numpy as np
import pytest

from educe import cli, policies
from educe.rollouts import judges, transcripts
from educe.training import metrics

HEAD = """
import ml_collections

def stage(**sections):
  return dict(
    seed=0, model=dict(name='scratch', preset='chain'),
    tokenizer=dict(path='characters:012345abcdefgh='), mesh=dict(data=-1), **sections,
  )

PROMPTS = [{'prompt': f'{i}{c}='} for i in range(6) for c in 'abcd']
PAIRS = [
  {'prompt': f'{i}{c}=', 'chosen': 'a' * n + 'b', 'rejected': 'c' * n + 'd'}
  for i in range(6) for c in 'abcd' for n in (1, 2, 3)
]
ASK = dict(name='prompts', source=dict(name='memory', records=PROMPTS))
SAMPLE = dict(prompts=8, group=4, max_new_tokens=4, workers=0, show_every=0)
"""
ONLINE = (
  HEAD
  + """
def get_config():
  return ml_collections.ConfigDict(stage(
    steps=4, save_every=100, environment=ASK, rollouts=SAMPLE,
    judge=dict(name='endpoint', url=URL, model='m', backoff=0.0, retries=0),
    algorithm=dict(name='online_dpo', batch_size=8), loss=dict(name='dpo'),
    optimizer=dict(name='adamw', learning_rate=1e-2, schedule='constant'),
  ))
"""
)
BEST = (
  HEAD
  + """
def get_config():
  base = stage(
    steps=2, source=dict(name='memory', records=[dict(r, completion='a') for r in PROMPTS]),
    data=dict(batch_size=8, max_length=8), algorithm=dict(name='sft'),
    loss=dict(name='sft'), optimizer=dict(name='adamw', learning_rate=1e-4),
  )
  reward = stage(
    steps=40, value=dict(trunk='shared'), source=dict(name='memory', records=PAIRS),
    data=dict(records='pairs', batch_size=16, max_length=12),
    algorithm=dict(name='reward_model'), loss=dict(name='reward_model'),
    optimizer=dict(name='adamw', learning_rate=3e-3, schedule='constant'),
  )
  best = stage(
    steps=2, init_from='stage://base', environment=ASK, rollouts=SAMPLE,
    judge=dict(name='reward_model', path='stage://reward'),
    algorithm=dict(name='expert_iteration', batch_size=8, keep='best'),
    loss=dict(name='sft'), optimizer=dict(name='adamw', learning_rate=1e-3),
  )
  return ml_collections.ConfigDict(dict(
    stages=('base', 'reward', 'best'), base=base, reward=reward, best=best,
  ))
"""
)


def train(folder, config, name='run'):
  (folder / 'config.py').write_text(config)
  return cli.main(
    ['train', f'--config={folder}/config.py', f'--run_dir={folder}/{name}']
  )


def grade(question):
  """Any fixed opinion."""
  said = re.search(r'\[Answer\]\n(.*?)\n\nExplain', question, re.S)[1]
  return f'Grade: {1 + sum(map(ord, said)) % 9}'


def test_a_judge_that_goes_down_costs_one_line_and_no_step(server, tmp_path, capsys):
  down = []
  answer = lambda question, count: (503, {}, b'tired') if down else grade(question)  # noqa: E731
  url, asked = server(answer)
  config = ONLINE.replace('URL', repr(url))
  assert train(tmp_path, config, 'whole') == 0
  whole = [r for r in metrics.read(tmp_path / 'whole/metrics.jsonl') if 'loss' in r]
  assert [r['step'] for r in whole] == [1, 2, 3, 4]
  assert whole[0]['pairs/kept'] >= 4
  assert whole[0]['rewards/judge/mean'] == pytest.approx(whole[0]['reward'])

  honest, limit = len(asked), len(asked) // 2

  def failing(question, count):
    if len(asked) > honest + limit:
      down.append(1)
    return answer(question, count)

  url, asked = server(failing)
  honest = 0
  config = ONLINE.replace('URL', repr(url))
  capsys.readouterr()
  assert train(tmp_path, config) == 1
  said = capsys.readouterr().err.strip().splitlines()[-1]
  assert said.startswith(f'educe: judge m at {url}: ')
  assert 'HTTP 503 tired' in said
  before = len([r for r in metrics.read(tmp_path / 'run/metrics.jsonl') if 'loss' in r])
  assert 1 <= before < 4
  down.clear()
  limit = 10**9
  assert train(tmp_path, config) == 0
  again = [r for r in metrics.read(tmp_path / 'run/metrics.jsonl') if 'loss' in r]
  assert [r['step'] for r in again] == [1, 2, 3, 4]
  for a, b in zip(again, whole, strict=True):
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-6)
  names = [f'{i:06}.jsonl' for i in range(4)]
  for name in sorted(p.name for p in (tmp_path / 'whole' / 'rollouts').iterdir()):
    assert name in names
    assert transcripts.load(tmp_path / 'run/rollouts' / name) == transcripts.load(
      tmp_path / 'whole/rollouts' / name
    )


def test_the_best_of_n_by_a_reward_model_that_a_stage_before_trained(tmp_path):
  assert train(tmp_path, BEST) == 0
  folder = tmp_path / 'run'
  saved = json.loads((folder / 'best' / 'config.json').read_text())
  assert saved['judge']['path'] == str(folder / 'reward')
  assert saved['init_from'] == str(folder / 'base')
  judge = judges.reward_model(policies.open_values, path=str(folder / 'reward'))
  records = [{'prompt': f'{i}a='} for i in range(6)]
  good, bad = (np.array(judge(records, [text] * 6)) for text in ('ab', 'cd'))
  assert (good > bad).all()  # it learned what the pairs say
  rows = transcripts.load(folder / 'best' / 'rollouts' / '000000.jsonl')
  want = judge(rows, [row['completion'] for row in rows])
  np.testing.assert_allclose(
    [row['reward'] for row in rows], want, rtol=1e-4, atol=1e-4
  )
  for at in range(0, len(rows), 4):
    group = rows[at : at + 4]
    kept = [row['reward'] for row in group if row['kept']]
    assert kept == [max(row['reward'] for row in group)]


def test_a_stage_that_comes_later_is_told_before_anything_is_trained(tmp_path, capsys):
  """Not after an hour of the stages before."""
  order = "stages=('base', 'reward', 'best')"
  assert order in BEST
  late = BEST.replace(order, "stages=('base', 'best', 'reward')")
  assert train(tmp_path, late) == 1
  said = ' '.join(capsys.readouterr().err.split())
  assert 'config.best.judge.path=stage://reward: no such stage before it' in said
  assert not (tmp_path / 'run').exists()


MOVING = (
  HEAD
  + """
def get_config():
  return ml_collections.ConfigDict(stage(
    steps=6, source=dict(name='memory', records=PAIRS),
    data=dict(records='pairs', batch_size=16, max_length=12),
    algorithm=dict(name='dpo', reference_every=1), loss=dict(name='dpo'),
    optimizer=dict(name='adamw', learning_rate=3e-2, schedule='constant'),
    evaluation=dict(
      name='judged', environment=ASK, judge=dict(name='length', target=2),
      max_new_tokens=3,
    ),
  ))
"""
)


def test_a_reference_that_follows_is_not_where_the_run_started(tmp_path):
  assert train(tmp_path, MOVING) == 0
  rows = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  first, last = (row['judged/kl'] for row in rows if 'win_rate' in row)
  assert abs(first) < 1e-4  # two float32 programs
  assert last > 0.05


@pytest.mark.parametrize(
  ('algorithm', 'loss', 'more'),
  [
    ("'grpo'", 'grpo', "advantage=dict(name='rloo')"),
    ("'ppo'", 'ppo', "value=dict(trunk='shared')"),
    ("'online_dpo', batch_size=8", 'dpo', ''),
    ("'expert_iteration', batch_size=8", 'sft', ''),
  ],
)
def test_answers_that_nobody_judges_are_told_before_any_is_sampled(
  tmp_path, capsys, algorithm, loss, more
):
  config = re.sub(r'judge=.*\n', f'{more},\n' if more else '\n', ONLINE)
  config = config.replace("'online_dpo', batch_size=8", algorithm)
  assert train(tmp_path, config.replace("name='dpo'", f"name='{loss}'")) == 1
  said = capsys.readouterr().err.splitlines()[-1]
  assert "'prompts' only asks, and nobody judges the answers: add config.judge" in said
