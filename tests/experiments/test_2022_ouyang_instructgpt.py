"""What the script says of a run can fail, and what it reads of a run is what is there."""

import copy
import pathlib

import numpy as np
import pytest

from educe.rollouts import transcripts

HERE = pathlib.Path(__file__).parents[2] / 'experiments' / '2022_ouyang_instructgpt'


@pytest.fixture(scope='module')
def of(scripts):
  return scripts(HERE, 'judge', 'results')


def test_scores_are_means_of_each_prompt(of, tmp_path):
  rows = [
    {'id': name, 'prompt': 'p', 'completion': text, 'reward': gold}
    for name, text, gold in (('a', 'x', 1.0), ('a', 'xxx', 2.0), ('b', 'xx', 5.0))
  ]
  transcripts.save(rows, tmp_path / 'rows.jsonl')
  found = of['results'].scores(
    tmp_path / 'rows.jsonl', lambda _, texts: [float(len(text)) for text in texts]
  )
  assert found == {'gold': [1.5, 5.0], 'proxy': [2.0, 2.0]}


def world(proxy, gold, low=0.6, even=0.55):
  """Twenty prompts, whose two scores move by so many of their standard deviations."""
  start = np.linspace(-3, 3, 20)
  noise = 0.01 * np.random.default_rng(0).normal(size=(2, 20))

  def at(kl, by):
    moved = start + noise + np.array(by)[:, None] * start.std()
    return {
      'kl': kl,
      'win_rate': [low + 0.1, low, low + 0.2],
      'win_rate_at_equal_length': [0.6, even, 0.7],
      'proxy': (start if kl == 0 else moved[0]).tolist(),
      'gold': (start if kl == 0 else moved[1]).tolist(),
    }

  exam = {'accuracy': low + 0.1, 'accuracy/low': low, 'accuracy/high': low + 0.2}
  curve = [at(0.0, (0, 0)), at(4.0, (proxy, gold))]
  return {
    'reward_models': {'gold': exam, 'reward_model': copy.deepcopy(exam)},
    'policies': {'ppo': curve, 'dpo': copy.deepcopy(curve)},
  }


def test_how_far_the_scores_moved_is_told_in_standard_deviations(of):
  first, last = of['judge'].moved(world(proxy=2.0, gold=0.5), 'ppo')
  assert first == {'root_kl': 0.0, 'gold': (0, 0), 'proxy': (0, 0), 'gap': (0, 0)}
  assert last['root_kl'] == 2.0
  for name, want in (('proxy', 2.0), ('gold', 0.5), ('gap', 1.5)):
    assert last[name][0] == pytest.approx(want, abs=0.01)
    assert 0 < last[name][1] < 0.01  # paired: the spread of prompts is not in it


@pytest.mark.parametrize(
  ('run', 'failing'),
  [
    (dict(proxy=2.0, gold=0.5), set()),
    (dict(proxy=2.0, gold=2.1), {'over_optimised'}),
    (
      dict(proxy=2.0, gold=0.5, even=0.45),
      {'ppo_wins_at_equal_length', 'dpo_wins_at_equal_length'},
    ),
    (dict(proxy=-1.0, gold=-2.0), {'proxy_rises'}),
    (
      dict(proxy=2.0, gold=0.5, low=0.45),
      {'reward_model_learns', 'gold_learns', 'ppo_wins', 'dpo_wins'},
    ),
  ],
)
def test_every_claim_can_fail(of, run, failing):
  verdicts = of['judge'].judge(world(**run))
  assert {key for key, (ok, _) in verdicts.items() if not ok} == failing
