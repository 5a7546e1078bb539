"""One world, known exactly and from samples of it: the two must say the same."""

import numpy as np
import pytest

from educe.environments import tabular
from educe.measurement import findings, verdict
from educe.measurement.table import Side, Table

PROMPTS, OUTPUTS, SAMPLES = 40, 24, 256


def world(seed=0, right=4):
  """(base `[P, Y]`, correct `[P, Y]`): p0(C) from 2 % to 60 %, in `right` answers."""
  rng = np.random.default_rng(seed)
  base = rng.dirichlet(np.ones(OUTPUTS), PROMPTS)
  correct = np.zeros(base.shape, bool)
  correct[:, :right] = True
  mass = np.geomspace(0.02, 0.6, PROMPTS)[:, None]
  inside = base * correct / (base * correct).sum(-1, keepdims=True)
  outside = base * ~correct / (base * ~correct).sum(-1, keepdims=True)
  return mass * inside + (1 - mass) * outside, correct


def sample(policy, base, correct, seed=0, samples=SAMPLES):
  """The table that `measure` would draw."""
  rng = np.random.default_rng(seed)

  def side(p):
    drawn = np.stack([rng.choice(p.shape[1], samples, p=row) for row in p])
    at = np.arange(len(p))[:, None]
    with np.errstate(divide='ignore'):
      log_base, log_policy = np.log(base)[at, drawn], np.log(policy)[at, drawn]
    texts = [[str(x) for x in row] for row in drawn]
    return Side(
      rewards=correct[at, drawn].astype(float),
      logp_base=log_base,
      logp_policy=log_policy,
      lengths=np.ones(drawn.shape),
      stopped=np.ones(drawn.shape),
      texts=texts,
      outcomes=[['verified'] * samples] * len(p),
      parsed=texts,
    )

  names = [f'prompt {i}' for i in range(len(policy))]
  return Table({}, names, names, names, side(base), side(policy))


def tilt(base, correct):
  return tabular.gibbs(base, correct.astype(float), 0.5)


def taught(base, correct):
  """Where the base is right least often it now is, by answers that it never gave."""
  base = base.copy()
  base[:10] = np.where(correct[:10], 0, base[:10])
  base[:10] /= base[:10].sum(-1, keepdims=True)
  new = base.copy()
  new[:10] = 0.1 * base[:10] + 0.9 * correct[:10] / correct[:10].sum(-1, keepdims=True)
  return new, base


def collapsed(base, correct):
  """As often right, and always by one answer: the base's likeliest right one."""
  right = base * correct
  best = right == right.max(-1, keepdims=True)
  return np.where(correct, best * right.sum(-1, keepdims=True), base)


def planted(name):
  base, correct = world()
  if name == 'tilt':
    return tilt(base, correct), base, correct
  if name == 'same':
    return base, base, correct
  if name == 'collapse':
    return collapsed(base, correct), base, correct
  return *taught(base, correct), correct


@pytest.mark.parametrize(
  ('name', 'word', 'lost'),
  [
    ('tilt', 'elicitation', False),
    ('taught', 'creation', False),
    ('same', 'no change', False),
    ('collapse', 'no gain', True),
  ],
)
def test_exact_and_sampled_verdicts_of_planted_cases(name, word, lost):
  policy, base, correct = planted(name)
  budget = findings.deniable(SAMPLES // 2)
  exact = verdict.judge(findings.exact(policy, base, correct, budget=budget))
  assert (exact.word, exact.lost) == (word, lost)
  for seed in range(3):
    found = findings.of_table(sample(policy, base, correct, seed))
    got = verdict.judge(found)
    assert (got.word, got.lost) == (word, lost), (seed, str(got))
    assert found.budget == budget
