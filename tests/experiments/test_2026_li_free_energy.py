"""The Gibbs audit can fail: its tables, its measurements and each line of its judge."""

import copy
import pathlib

import numpy as np
import pytest

from educe import config as config_lib
from educe import recipes
from educe.environments import tabular
from educe.runs import READ, train

ROOT = pathlib.Path(__file__).parents[2]
HERE = ROOT / 'experiments' / '2026_li_free_energy'
RNG = np.random.default_rng(0)
P0 = RNG.dirichlet(np.full(32, 0.5), size=3) + 1e-6
P0 /= P0.sum(-1, keepdims=True)
CORRECT = np.zeros(P0.shape, bool)
CORRECT[np.arange(3)[:, None], [[1, 2, 9], [4, 5, 6], [7, 8, 31]]] = True
BETA = 0.3


@pytest.fixture(scope='module')
def of(scripts):
  scripts(ROOT)
  return scripts(HERE, 'config', 'tables', 'run', 'judge', 'summary')


def test_every_arm_is_a_config_that_can_run(of):
  for arm in of['config'].ARMS:
    values = recipes.load([f'--config={HERE / "config.py"}:{arm}'])
    assert values.pop('stages') == ('base', arm)
    for stage in values.values():
      config_lib.check_used(config_lib.expand(stage, train), READ)
  with pytest.raises(ValueError, match='no arm'):
    of['config'].get_config('rlo')


def test_the_tables_reach_what_theory_says_and_each_has_to_move(of):
  rows = of['tables'].exact(P0, CORRECT, BETA)
  assert len({row.name for row in rows}) == 9
  for row in rows:
    assert tabular.total_variation(row.reached, row.predicted).max() < 1e-6, row.name
    assert tabular.total_variation(P0, row.predicted).min() > 1e-3, row.name
  named = {row.name: row.reached for row in rows}
  k1, k3 = named['k1 in the reward'], named['k3 in the loss']
  assert tabular.total_variation(k1, tabular.gibbs(P0, CORRECT, BETA)).max() < 1e-6
  assert tabular.total_variation(k1, k3).min() > 0.01


def test_a_table_that_is_sampled_waits_for_its_first_success(of):
  p = np.array([1 - 1e-9, 0.3, 0.03, 0.003])
  p0 = np.stack([p, 1 - p], 1)
  correct = np.array([[True, False]] * 4)
  how = dict(visits=150, early=1, group=4, rate=0.0, copies=60, seed=0)
  out = of['tables'].sampled(p0, correct, **how)
  np.testing.assert_allclose(out.final, np.broadcast_to(p0, (60, 4, 2)), atol=1e-6)
  chance = 1 - (1 - p) ** 4
  hoped = (chance * np.where(out.first > 0, out.first, 150)).sum(0)
  # Found less hoped is a sum of martingales: its variance is at most what was hoped.
  assert (np.abs((out.first > 0).sum(0) - hoped) < 4 * np.sqrt(hoped)).all()
  assert (out.first[:, 0] == 1).all()  # what is certain, at once
  assert (out.half == [1, 0, 0, 0]).all()  # at a rate of 0 nothing is learned
  learned = of['tables'].sampled(p0, correct, **how | dict(rate=4.0, copies=4))
  assert (learned.final[:, 1, 0] > 0.9).all()
  assert (learned.half[:, 1] >= learned.first[:, 1]).all()
  still = learned.first == 0  # what was never found is what it was
  np.testing.assert_allclose(
    learned.final[still], np.broadcast_to(p0, (4, 4, 2))[still], atol=1e-6
  )


def test_the_plain_gradient_is_that_of_the_expected_reward(of):
  """One step of a table from many draws, against π·(r − E r)."""
  how = dict(visits=1, early=1, group=20_000, rate=0.1, copies=1, seed=1)
  out = of['tables'].sampled(P0, CORRECT, **how)
  assert (out.first == 1).all()
  logits = np.log(P0) + 0.1 * tabular.policy_gradient(P0, CORRECT * 1.0)
  want = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  moved = tabular.total_variation(want, P0)
  right = (P0 * CORRECT).sum(-1)
  noise = np.sqrt((1 - right) / right / how['group'])  # of the share that is right
  assert (tabular.total_variation(out.final[0], want) < 4 * noise * moved + 1e-6).all()
  assert noise.max() < 0.05


def test_a_tilt_is_measured_as_one(of):
  run = of['run']
  tilt = tabular.gibbs(P0, CORRECT * 1.0, BETA)
  rows = run.numbers(tilt, P0, CORRECT, np.array([True, True, False]), BETA)
  for part, at in (('train', [0, 1]), ('heldout', [2])):
    row = rows[part]
    assert row['reward'] == pytest.approx((tilt * CORRECT).sum(-1)[at].mean())
    assert row['total'] == pytest.approx(row['price'])
    assert row['collapse'] == pytest.approx(0, abs=1e-12)
    assert row['drift'] == pytest.approx(0, abs=1e-12)
    assert row['gibbs'] == pytest.approx(0, abs=1e-12)
    assert row['k3'] > 0.01
    assert row['eta'] == pytest.approx(1, abs=1e-6)
    assert row['total'] == pytest.approx(tabular.kl(tilt, P0)[at].mean())
    assert row['outside'] == pytest.approx(tilt[at, -1].mean())
  end = run.ending(tilt, CORRECT)
  right = (P0 * CORRECT).sum(-1)
  # Every correct output gains the one factor e^{1/β}/Z.
  scale = np.exp(1 / BETA) / (1 - right + right * np.exp(1 / BETA))
  np.testing.assert_allclose(end['solved'], right * scale)
  np.testing.assert_allclose(end['right'], (P0 * scale[:, None])[CORRECT])
  collapsed = np.where((P0 * CORRECT).max(-1, keepdims=True) == P0, 1.0, 1e-9)
  collapsed = (collapsed / collapsed.sum(-1, keepdims=True) + P0) / 2
  row = run.numbers(collapsed, P0, CORRECT, np.array([True, True, False]), 0.0)['train']
  assert row['collapse'] > 0.02
  assert row['eta'] < 0.99
  assert 'gibbs' not in row


def test_json_has_six_digits_and_no_nan(of):
  given = {'a': np.array([1 / 3, np.nan]), 'b': (np.int64(3), True)}
  assert of['run'].rounded(given) == {'a': [0.333333, None], 'b': [3, True]}


def planted(seed=0):
  """What an audit would say in which all of the theory holds."""
  rng = np.random.default_rng(seed)
  start = np.logspace(-5.2, -0.6, 60)
  tilted = start * 100 / (1 + 99 * start)
  chance = 1 - (1 - start) ** 16
  first = rng.geometric(chance, size=(4, 60))
  first = np.where(first > 6000, 0, first)
  half = np.round(2 / start / 16).astype(int) + 1
  half = np.where(half > 6000, 0, half)
  table = {'solved': tilted.tolist(), 'right': tilted.tolist()}
  row = dict(reward=0.9, total=1.0, price=0.8, collapse=0.1, drift=0.1, eta=0.7)
  row |= dict(gibbs=0.2, k3=0.3, outside=0.1)
  end = np.where(np.arange(60) % 7 == 0, start / 10, tilted)
  arm = dict(beta=0.2, solved=end.tolist(), gibbs=[0.2] * 60, log_ratio=[5.0] * 60)
  arm['curve'] = [{'train': row, 'heldout': dict(row)}]
  return {
    'seed': seed,
    'group': 16,
    'rounds': 200,
    'train': [True] * 45 + [False] * 15,
    'base': dict(
      solved=start.tolist(),
      right=start.tolist(),
      outside=[0.001] * 60,
      data_kl=[0.004] * 60,
      data_entropy=7.0,
    ),
    'arms': {'rloo': arm},
    'exact': [dict(name='k1', tv=[1e-6] * 60, moved=[0.3] * 60, **table)],
    'sampled': {
      'rloo': dict(
        visits=6000,
        first=first.tolist(),
        half=np.broadcast_to(half, (4, 60)).tolist(),
        early=[{'solved': start.tolist()}] * 4,
        final=[table] * 4,
      ),
      'rloo_k1_reward': dict(
        visits=1000,
        early=[{'solved': start.tolist(), 'gibbs': [0.09] * 60}] * 2,
        final=[table] * 2,
      ),
    },
  }


def failing(judge, results):
  return {name for name, (ok, _) in judge.judge(results).items() if not ok}


def test_a_world_that_follows_the_theory_passes(of):
  assert failing(of['judge'], [planted(0), planted(1)]) == set()


def change(results, *path, to):
  for key in path[:-1]:
    results = results[key]
  results[path[-1]] = to(results[path[-1]])


@pytest.mark.parametrize(
  ('criterion', 'path', 'to'),
  [
    ('base', ('base', 'data_kl'), lambda x: [0.011] * len(x)),
    ('fixed_points', ('exact', 0, 'tv'), lambda x: [*x[1:], 0.02]),
    # Small, and yet most of the way to a fixed point that is near.
    ('fixed_points', ('exact', 0, 'moved'), lambda x: [*x[1:], 4e-5]),
    ('monotone', ('exact', 0, 'solved'), lambda x: [x[0] / 150, *x[1:]]),
    (
      'first_success',
      ('sampled', 'rloo', 'first'),
      lambda x: (3 * np.array(x)).tolist(),
    ),
    (
      'first_success',
      ('sampled', 'rloo', 'first'),
      lambda x: (0 * np.array(x)).tolist(),
    ),
    (
      'halves',
      ('sampled', 'rloo', 'half'),
      lambda x: np.random.default_rng(0).permuted(x, axis=1).tolist(),
    ),
  ],
)
def test_one_number_in_one_seed_fails(of, criterion, path, to):
  results = [planted(0), copy.deepcopy(planted(1))]
  change(results[1], *path, to=to)
  assert criterion in failing(of['judge'], results)


def test_what_would_falsify_the_theory_is_seen(of):
  judge, results = of['judge'], [planted(0)]
  results[0]['base']['solved'][0] = 1e-9
  assert judge.hidden(results)[0]
  results[0]['exact'][0]['solved'][0] = 1.0
  for time in ('early', 'final'):
    results[0]['sampled']['rloo'][time] = [{'solved': [1.0] * 60}] * 4
  assert not judge.hidden(results)[0]
  results[0]['base']['solved'] = [0.01] * 60
  passed, said = judge.hidden(results)
  assert not passed  # of nobody nothing is seen
  assert said.startswith('0 of 0')


def test_an_arm_that_is_an_exact_tilt_of_what_it_was_trained_on_is_seen(of):
  """Prompts that were never rewarded stay as they were: far from Gibbs, and no matter."""
  judge, results = of['judge'], [planted(0)]
  arm, start = results[0]['arms']['rloo'], results[0]['base']['solved']
  train = np.array(results[0]['train'])
  arm['gibbs'] = np.where(train, 0.01, 0.6).tolist()
  assert judge.interferes(results)[0]  # near, but prompts lose
  arm['solved'] = np.where(train, np.minimum(1, 2 * np.array(start)), start).tolist()
  assert not judge.interferes(results)[0]
  arm['gibbs'] = np.where(train, 0.08, 0.6).tolist()  # a table is no nearer
  assert not judge.interferes(results)[0]
  arm['gibbs'] = np.where(train, 0.1, 0.6).tolist()
  assert judge.interferes(results)[0]


def test_what_sharing_adds_is_told_of_prompts_that_no_table_finds(of):
  results = [planted(0)]
  start = np.array(results[0]['base']['solved'])
  below = start < 1 - 0.05 ** (1 / 3200)
  end = np.where(below, start + 0.25, start)
  end[1] = 0.75
  results[0]['arms']['rloo']['solved'] = end.tolist()
  said = of['summary'].sharing(results)
  rise = 0.25 + (0.5 - start[1]) / below[:45].sum()
  assert said.startswith(f'{rise:+.4f}')
  assert f'{below[:45].sum()} prompts' in said
  header, rule, arm, *tables = of['summary'].reached(results).splitlines()
  assert header.count('|') == rule.count('|') == arm.count('|') == tables[0].count('|')
  count = below[:45].sum()
  assert arm.split(' | ')[1:4] == [f'{rise:+.4f}', f'{count} of {count}', '1']
  assert '+0.0000 | 0 of 104 | 0' in tables[0].replace(f'{4 * count}', '104')
  results[0]['base']['solved'] = [0.5] * 60
  assert of['summary'].sharing(results) == 'no trained prompt begins below ε_train'


def test_the_table_of_the_arms_has_means_over_seeds_and_who_lost(of):
  results = [planted(0), planted(1)]
  results[1]['arms']['rloo']['curve'][-1]['train']['reward'] = 0.7
  lines = of['summary'].ends(results).splitlines()
  header, _, base, row = lines
  assert len({line.count('|') for line in lines}) == 1
  cells = dict(zip(header.split(' | '), row.split(' | '), strict=True))
  assert cells['reward'] == '0.80'  # of 0.9 and 0.7
  assert cells['never trained'] == '0.90'
  assert cells['lose'] == cells['halved'] == '16%'  # 7 of 45
  assert cells['of never trained'] == '13%'  # 2 of 15
  assert cells['TV to Gibbs'] == '0.20'
  assert 1e4 < float(cells['k*'].replace(',', '')) < 1e6
  start = np.array(results[0]['base']['solved'])
  assert f'| {start[:45].mean():.2f} | {start[45:].mean():.2f} | 0.00 |' in base
  for r in results:
    r['arms']['rloo']['solved'] = (start * 100 / (1 + 99 * start)).tolist()
  row = of['summary'].ends(results).splitlines()[-1]
  cells = dict(zip(header.split(' | '), row.split(' | '), strict=True))
  assert (cells['lose'], cells['halved'], cells['k*']) == ('0%', '0%', 'none')


def test_outputs_are_counted_one_by_one(of):
  results = [planted(0)]
  results[0]['sampled']['rloo']['final'] = [{'right': [0.9, *[0.0] * 59]}]
  assert of['summary'].outputs(results) == (
    'rloo -59 to -59, rloo_k1_reward 0 to 0, of 60 to 60'
  )


def test_what_nobody_reached_has_no_correlation(of):
  results = [planted(0)]
  change(results[0], 'sampled', 'rloo', 'half', to=lambda x: (0 * np.array(x)).tolist())
  assert of['judge'].halves(results) == (False, 'seed 0: 0 prompts reached ½, of 47')
