"""One world, known exactly and from samples of it: the two must say the same."""

import numpy as np
import pytest

from educe.environments import tabular
from educe.measurement import (
  findings,
  support,
  support_dynamics,
  support_evidence,
  verdict,
)
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


def first_of(side, samples):
  """Of each prompt so many samples."""
  return Side(
    *(
      x[:, :samples] if isinstance(x, np.ndarray) else [row[:samples] for row in x]
      for x in side
    )
  )


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
@pytest.mark.parametrize('samples', [SAMPLES, 64])
def test_exact_and_sampled_verdicts_of_planted_cases(name, word, lost, samples):
  """At their defaults: the exact one needs no samples to deny a budget."""
  policy, base, correct = planted(name)
  exact = verdict.judge(findings.exact(policy, base, correct))
  assert (exact.word, exact.lost) == (word, lost)
  for seed in (1, 2):  # of a world that did not move, one in twenty is said to have
    found = findings.of_table(sample(policy, base, correct, seed, samples))
    got = verdict.judge(found)
    assert (got.word, got.lost) == (word, lost), (seed, str(got))
    assert (found.budget, found.denied) == (1024, findings.deniable(samples // 2))
    if name == 'tilt':
      assert found.creation.created.low <= 0 <= found.creation.created.high


@pytest.mark.parametrize('samples', [16, 64])
@pytest.mark.parametrize('mass', [0.005, 0.02, 0.2])
def test_a_tilt_of_rare_answers_is_never_called_creation(mass, samples):
  """What the policy writes proves what the base can, long before the base writes it."""
  base, correct = world()
  right = np.where(correct, base, 0)
  rest = np.where(correct, 0, base)
  base = mass * right / right.sum(-1, keepdims=True)
  base = base + (1 - mass) * rest / rest.sum(-1, keepdims=True)
  policy = tabular.gibbs(base, correct.astype(float), 0.15)
  found = findings.of_table(sample(policy, base, correct, 1, samples))
  assert verdict.judge(found).word == 'elicitation'
  assert verdict.judge(findings.exact(policy, base, correct)).word == 'elicitation'
  assert found.creation.created.value == 0


def mixed():
  """Half of the gain elicited, half created: 12 prompts tilted, 12 taught."""
  base, correct = world()
  base[:12] = np.where(correct[:12], 0, base[:12])
  base[:12] /= base[:12].sum(-1, keepdims=True)
  policy = tilt(base, correct)
  gain = ((policy - base) * correct).sum(-1)[12:].mean()
  new = correct[:12] / correct[:12].sum(-1, keepdims=True)
  policy[:12] = (1 - gain) * base[:12] + gain * new
  return policy, base, correct


def test_shares_cover_those_that_are_known_exactly():
  policy, base, correct = mixed()
  true = findings.exact(policy, base, correct).creation
  np.testing.assert_allclose(true.created.value, 0.5, atol=1e-9)
  covered = np.zeros(2)
  for seed in range(20):
    data = sample(policy, base, correct, seed)
    # The shares alone: all else takes long.
    found = shares(data)
    for at, name in enumerate(('created', 'elicited')):
      ours, exact = getattr(found, name), getattr(true, name)
      covered[at] += ours.low <= exact.value <= ours.high
  assert (covered >= 17).all(), covered
  got = verdict.judge(findings.of_table(sample(policy, base, correct, 1)))
  assert got.word == 'elicitation and creation'


def shares(data):
  """As findings.of_table splits the gain, written out: fold by fold, prompt by prompt."""
  sides, half = (data.base, data.policy), SAMPLES // 2
  log_eps = support.sampling(1024), support.sampling(findings.deniable(half))
  folds = []
  for decides, rates in (
    (slice(half), slice(half, None)),
    (slice(half, None), slice(half)),
  ):
    status = []
    for row in range(PROMPTS):
      texts = {}
      for side in sides:
        for at in range(SAMPLES)[decides]:
          if side.rewards[row, at] >= 1:
            texts[side.texts[row][at]] = side.logp_base[row, at]
      proof = np.logaddexp.reduce([-np.inf, *texts.values()])
      c = int(data.base.rewards[row, decides].sum())
      within, beyond = (support.decide([c], [half], x)[0] for x in log_eps)
      inside = proof >= log_eps[0] or within == 1
      outside = beyond == -1 and proof < log_eps[1]
      status.append(1 if inside else -1 if outside else 0)
    folds.append((*(side.rewards[:, rates].mean(1) for side in sides), status))
  before, after, status = (np.array(x) for x in zip(*folds, strict=True))
  return support_dynamics.creation(before, after, status, resamples=400)


def test_each_half_decides_for_the_rates_of_the_other():
  policy, base, correct = mixed()
  data = sample(policy, base, correct, 4)
  found, by_hand = findings.of_table(data).creation, shares(data)
  for name in ('created', 'elicited', 'gain', 'created_gain'):
    ours, theirs = getattr(found, name), getattr(by_hand, name)
    np.testing.assert_allclose(ours.value, theirs.value, rtol=1e-12)
  assert found.prompts.tolist() == by_hand.prompts.tolist()
  rates = data.policy.rewards.mean() - data.base.rewards.mean()
  np.testing.assert_allclose(found.gain.value, rates, rtol=1e-12)


def test_samples_say_what_is_known_exactly():
  policy, base, correct = planted('tilt')
  true = findings.exact(policy, base, correct, length=3)
  data = sample(policy, base, correct, 3)
  got = findings.of_table(data)
  shared = np.isin(true.base.k, got.base.k)
  for mine, theirs in ((got.base, true.base), (got.policy, true.policy)):
    # The same prompts: within the error of 256 samples, well inside the interval.
    np.testing.assert_allclose(mine.rate, theirs.rate[shared], atol=0.05)
  np.testing.assert_allclose(got.rates, true.rates, atol=0.13)  # 4 standard errors
  kl, exact_kl = got.divergence, true.divergence
  np.testing.assert_allclose(kl.per_sequence.mean, exact_kl.per_sequence.mean, rtol=0.1)
  np.testing.assert_allclose(exact_kl.per_sequence.mean, 3 * exact_kl.per_token.mean)
  for mine, theirs in zip(got.spending[:4], true.spending[:4], strict=True):
    np.testing.assert_allclose(mine.mean, theirs.mean, atol=0.03)
  np.testing.assert_allclose(got.spending.beta, 0.5, rtol=0.1)
  np.testing.assert_allclose(true.spending.beta, 0.5, rtol=1e-9)
  np.testing.assert_allclose(got.apart, true.apart, rtol=0.1)
  np.testing.assert_allclose(
    got.certificate.log_ratio, true.certificate.log_ratio, atol=1e-9
  )
  assert got.outputs.srr.value == true.outputs.srr.value == 1
  ours, theirs = got.reach, true.reach
  assert (ours.accessible <= theirs.accessible + 0.05).all()
  assert (theirs.accessible <= ours.accessible + ours.undecided + 0.05).all()
  labels = data.base.texts
  assert got.missing.rate == support_evidence.missing_mass(labels).rate
  assert got.unseen == (data.base.rewards.sum(1) == 0).mean()


def test_what_was_lost_is_asked_of_answers_that_the_base_showed():
  """By answers that either showed, more would seem kept than is."""
  rng = np.random.default_rng(0)
  base = np.full((2, 101), 0.006)
  base[:, 100] = 1 - base[:, :100].sum(-1)
  correct = np.broadcast_to(np.arange(101) < 100, base.shape)
  policy = base.copy()
  lost = rng.permuted(np.tile(np.arange(100) < 50, (2, 1)), axis=1)
  policy[:, :100] = np.where(lost, 1e-5, 2 * 0.006)
  policy[:, 100] = 1 - policy[:, :100].sum(-1)
  found = findings.of_table(sample(policy, base, correct, 1, 64))
  assert found.outputs.srr.low <= 0.5 <= found.outputs.srr.high
  assert found.outputs.gained == 0


def test_rounding_beyond_one_is_no_error():
  p = np.array([[0.1, 0.2, 0.7000000000000002], [0.5, 0.5, 0.0]])
  right = np.array([[True, True, True], [True, False, False]])
  found = findings.exact(p * (1 + 2e-7), p, right)
  assert found.rates.max() <= 1


def test_one_prompt_that_did_not_change_did_not_change():
  base, right = np.array([[0.8, 0.2]]), np.array([[False, True]])
  assert verdict.judge(findings.exact(base, base, right)).word == 'no change'


def test_log_probs_that_cancel_are_a_change():
  """Their mean is near 0; what each says is not."""
  data = sample(*planted('same'), samples=16)
  rng = np.random.default_rng(0)
  noise = rng.normal(0, 0.5, data.policy.logp_policy.shape)
  moved = data.policy._replace(
    logp_policy=np.minimum(data.policy.logp_policy + noise, 0)
  )
  assert (
    verdict.judge(findings.of_table(data._replace(policy=moved))).word != 'no change'
  )


def test_a_budget_that_is_deniable_is_denied_and_the_next_is_not():
  for samples in (3, 10, 32, 500):
    k = findings.deniable(samples)
    denied = [
      support.decide([0], [samples], support.sampling(x))[0] for x in (k, k + 1)
    ]
    assert denied == [-1, 0]


def test_a_proof_overrules_samples_that_saw_nothing():
  """At 0 of n samples of the base; the log-prob of the policy's text is evidence."""
  base = np.tile([0.97, 0.03], (4, 1))
  policy = np.tile([0.1, 0.9], (4, 1))
  correct = np.tile([False, True], (4, 1))
  data = sample(policy, base, correct, samples=128)
  wrong = data.base._replace(
    rewards=np.zeros((4, 128)),
    logp_base=np.full((4, 128), np.log(0.97)),
    logp_policy=np.full((4, 128), np.log(0.1)),
    texts=[['0'] * 128] * 4,
  )
  found = findings.of_table(data._replace(base=wrong))
  np.testing.assert_allclose(found.creation.elicited.value, 1)
  assert found.status.tolist() == [1] * 4
  near = findings.of_table(data._replace(base=wrong), budget=50)  # ε = 0.058
  assert near.creation.elicited.value == 0
  assert near.creation.created.value == 1  # 64 samples without a right one deny 50
  assert near.status.tolist() == [-1] * 4
  few = data._replace(base=first_of(wrong, 16), policy=first_of(data.policy, 16))
  few = findings.of_table(few, budget=50)  # 8 samples deny 6, and no basin is denied
  assert few.denied == findings.LEAST
  assert few.status.tolist() == [0] * 4


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
