"""One world, known exactly and from samples of it: the two must say the same."""

import numpy as np
import pytest

from educe.environments import tabular
from educe.measurement import findings, support, verdict
from educe.measurement.table import Side, Table

PROMPTS, OUTPUTS, SAMPLES = 24, 16, 256


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
  base[:6] = np.where(correct[:6], 0, base[:6])
  base[:6] /= base[:6].sum(-1, keepdims=True)
  new = base.copy()
  new[:6] = 0.1 * base[:6] + 0.9 * correct[:6] / correct[:6].sum(-1, keepdims=True)
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
  for seed in (1, 2):  # of a world that did not move, one in twenty is said to have
    found = findings.of_table(sample(policy, base, correct, seed))
    got = verdict.judge(found)
    assert (got.word, got.lost) == (word, lost), (seed, str(got))
    assert found.budget == budget
    if name == 'tilt':
      assert found.creation.share.low <= 0 <= found.creation.share.high


def covers(low, value, high):
  return np.asarray(low) - 1e-9 <= value <= np.asarray(high) + 1e-9


def test_samples_say_what_is_known_exactly():
  """Each figure of the tilt, within the interval that goes with it."""
  policy, base, correct = planted('tilt')
  true = findings.exact(policy, base, correct, budget=findings.deniable(SAMPLES // 2))
  got = findings.of_table(sample(policy, base, correct, 3))
  shared = np.isin(true.base.k, got.base.k)
  for mine, theirs in ((got.base, true.base), (got.policy, true.policy)):
    rates = theirs.rate[shared]
    np.testing.assert_allclose(mine.rate, rates, atol=0.05)  # the same prompts
    assert ((mine.low - 0.02 <= rates) & (rates <= mine.high + 0.02)).all()
  assert covers(*got.creation.elicited[1:][:1], true.creation.elicited.value, 1.0)
  kl, exact_kl = got.divergence.per_sequence, true.divergence.per_sequence
  np.testing.assert_allclose(kl.mean, exact_kl.mean, rtol=0.1)
  for mine, theirs in zip(got.spending[:4], true.spending[:4], strict=True):
    np.testing.assert_allclose(mine.mean, theirs.mean, atol=0.03)
  np.testing.assert_allclose(got.spending.efficiency.eta.mean, 1, atol=1e-6)
  np.testing.assert_allclose(got.log_ratio, true.log_ratio, atol=1e-9)
  np.testing.assert_allclose(got.outputs.srr.value, true.outputs.srr.value)
  decided = true.reach.accessible
  assert ((got.reach.low - 0.05 <= decided) & (decided <= got.reach.high + 0.05)).all()


def test_a_budget_that_is_deniable_is_denied_and_the_next_is_not():
  for samples in (3, 10, 32, 500):
    k = findings.deniable(samples)
    denied = [
      support.decide([0], [samples], support.sampling(x))[0] for x in (k, k + 1)
    ]
    assert denied == [-1, 0]


def test_what_the_policy_wrote_proves_what_the_base_can():
  """At 0 of n samples of the base; the log-prob of the policy's text is evidence."""
  base = np.tile([0.97, 0.03], (4, 1))
  policy = np.tile([0.1, 0.9], (4, 1))
  correct = np.tile([False, True], (4, 1))
  data = sample(policy, base, correct, samples=16)
  side = data.base
  wrong = side._replace(
    rewards=np.zeros((4, 16)),
    logp_base=np.full((4, 16), np.log(0.97)),
    logp_policy=np.full((4, 16), np.log(0.1)),
    texts=[['0'] * 16] * 4,
  )
  found = findings.of_table(data._replace(base=wrong), budget=1024)
  np.testing.assert_allclose(found.creation.elicited.value, 1)
  assert found.creation.share.value == 0
  near = findings.of_table(data._replace(base=wrong), budget=50)  # ε = 0.058
  assert near.creation.elicited.value == 0
  assert near.creation.undecided == 1


def test_half_of_the_samples_decides_and_the_other_half_rates():
  """Right only in the half that decides: nothing was gained by the other."""
  policy, base, correct = planted('same')
  data = sample(policy, base, correct, samples=8)
  rewards = np.zeros_like(data.policy.rewards)
  rewards[:, :4] = 1
  found = findings.of_table(
    data._replace(policy=data.policy._replace(rewards=rewards)), budget=3
  )
  kept = data.base.rewards[:, 4:].mean()
  np.testing.assert_allclose(found.creation.gain.value, -kept)


def test_prompts_that_nobody_scored_are_left_out():
  policy, base, correct = planted('tilt')
  data = sample(policy, base, correct, samples=8)
  rewards = data.base.rewards.copy()
  rewards[2] = np.nan
  found = findings.of_table(data._replace(base=data.base._replace(rewards=rewards)))
  assert found.left_out == 1
  assert len(found.ids) == PROMPTS - 1
  assert 'prompt 2' not in found.ids


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      dict(rewards=lambda x: x * 0),
      'no sample of either policy is right at any of the 24',
    ),
    (
      dict(rewards=lambda x: x * np.nan),
      'no prompt has two scored samples of each policy',
    ),
    (dict(logp_base=lambda x: x * np.nan), 'log-probs of the base are missing'),
  ],
)
def test_bad_input_is_one_line(change, message):
  data = sample(*planted('tilt'), samples=4)
  ((name, function),) = change.items()
  sides = {
    side: getattr(data, side)._replace(
      **{name: function(getattr(getattr(data, side), name))}
    )
    for side in ('base', 'policy')
  }
  with pytest.raises(ValueError, match=message):
    findings.of_table(data._replace(**sides))


def test_a_single_prompt_has_no_nulls():
  base, correct = np.array([[0.8, 0.2]]), np.array([[False, True]])
  found = findings.exact(np.array([[0.5, 0.5]]), base, correct)
  assert found.nulls is None
  assert 'sharpened' not in str(verdict.judge(found))
