"""The points of pods.md: configs that are plans, and a page that says what was kept."""

import json
import pathlib

import pytest

from educe import config, plans, recipes, runs
from educe.models import presets

HERE = pathlib.Path(__file__).parents[2] / 'benchmarks'
RUN = {
  'name': 'tiny v5e:2x4 grpo fsdp=-1',
  'preset': 'tiny',
  'recipe': 'grpo',
  'topology': 'v5e:2x4',
  'mesh': {'fsdp': 4, 'tensor': 2},
  'rows': 1024,
  'length': 4096,
  'programs': {
    'train': {
      'peak_gb': 12.34,
      'fits': True,
      'sent_gb': {'all-gather': 1.0, 'all-reduce': 0.25},
      'flops': 4.5e15,
      'seconds': 0.125,
      'bound': 'matmul',
      'tokens_per_second': 123456.0,
      'mfu': 0.75,
    },
    'decode': {'fits': False, 'reason': 'RESOURCE_EXHAUSTED'},
  },
  'largest': {'rows': 2048},
}


@pytest.fixture(scope='module')
def pods(scripts):
  return scripts(HERE, 'pods')['pods']


@pytest.mark.parametrize('recipe', ['sft', 'grpo'])
def test_a_recipe_is_a_plan_of_the_architecture(pods, recipe, mesh_of):
  values = recipes.load([f'--config={pods.__file__}:{recipe}'])
  full = config.expand(values, runs.train)
  config.check_used(full, runs.READ)
  if recipe == 'grpo':  # as much as the small model has room for
    full['rollouts']['max_new_tokens'] = 8
  plan = plans.plan(full, mesh_of(1, 8), preset='debug', prompt=8, rows=64)
  a = plan.model.architecture
  assert (a.compute_dtype, a.remat, a.logprob) == ('bfloat16', 'full', 'pallas_tpu')
  assert plan.rows == 64
  assert (plan.state.reference is not None) == (recipe == 'grpo')


def test_every_point_is_of_an_architecture_that_has_room_for_it(pods):
  assert len({point.name for point in pods.POINTS}) == len(pods.POINTS)
  for point in pods.POINTS:
    assert presets.get(point.preset).max_length >= max(
      pods.LENGTH, pods.PROMPT + pods.NEW
    )
    pods.get_config(point.recipe)
  with pytest.raises(ValueError, match='no recipe'):
    pods.get_config('dpo')


def test_a_row_of_the_table_is_what_was_found(pods):
  train, decode = pods.table([RUN]).splitlines()[2:]
  assert [cell.strip() for cell in train.split('|')[1:-1]] == [
    'tiny, grpo train',
    'v5e:2x4',
    'fsdp 4 × tensor 2',
    '1024 × 4,096',
    '12.3',
    '1.25',
    '4,500.0',
    '0.1250',
    'matmul',
    '123,456',
    '0.75',
    '2,048',
  ]
  assert decode.split('|')[1].strip() == 'decode'
  assert 'does not fit' in decode
  assert train.count('|') == decode.count('|') == pods.table([]).count('|') // 2


def test_the_page_says_what_is_kept(pods):
  kept = json.loads(pods.RESULTS.read_text())['runs']
  known = {point.name for point in pods.POINTS}
  assert {run['name'] for run in kept} <= known
  assert pods.table(kept) in pods.PAGE.read_text()


def test_what_is_compiled_is_added_to_what_was(pods, monkeypatch, tmp_path):
  page, results = tmp_path / 'pods.md', tmp_path / 'pods.json'
  page.write_text('# Pods\n\n<!-- table -->\n<!-- end -->\nAfter.\n')
  monkeypatch.setattr(pods, 'PAGE', page)
  monkeypatch.setattr(pods, 'RESULTS', results)
  asked = []

  def compiled(argv, topology, **options):
    asked.append((topology, options['preset'], options['rows'], options['largest']))
    return {name: x for name, x in RUN.items() if name != 'name'}

  monkeypatch.setattr(pods, 'compile_config', compiled)
  first, second = (
    p for p in pods.POINTS if p.preset == 'llama3_8b' and 'v6e:4x4' in p.name
  )
  pods.main([f'--only={first.preset},{first.topology},{first.recipe}', '--largest'])
  assert asked == [(first.topology, first.preset, first.rows, True)]
  pods.main([f'--only={first.preset},{first.topology}'])
  kept = json.loads(results.read_text())['runs']
  assert [run['name'] for run in kept] == [first.name, second.name]
  text = page.read_text()
  assert pods.table(kept) in text
  assert text.endswith('<!-- end -->\nAfter.\n')
