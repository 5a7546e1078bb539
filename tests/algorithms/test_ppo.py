"""From rounds to PPO's updates: rewards token by token, GAE, the coefficient of the KL."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe.algorithms import on_policy
from educe.algorithms import ppo as algorithm
from educe.data import tokenizer as tokenizers
from educe.environments import chain, reward_functions
from educe.losses import ppo
from educe.models import value_head
from educe.rollouts import rounds
from educe.rollouts.pool import Pool
from educe.training import optimizer
from educe.training.step import init_state, make_step
from educe.types import Rollouts

WORDS = tokenizers.load(path=f'characters:{chain.ALPHABET}')
V = WORDS.vocab_size
ROOM = 5  # max_new_tokens
LENGTHS, SCORES, STOPPED = [2, 3, 4, 5], [1.0, -0.5, 2.0, 0.25], [1, 1, 1, 0]


@functools.cache
def policy(trunk='shared'):
  """A model with a known answer: its value is a table's row of the tokens so far."""
  inner, table = toy.model(vocabulary=V)
  model = inner._replace(
    head=lambda params: inner.head(params['table']), axes={'table': ('vocab', 'embed')}
  )
  model, params = value_head.attach(model, {'table': table}, trunk=trunk, init_std=0.6)
  return model, jax.tree.map(np.array, params)  # a step donates what is on the device


def other_policy(scale=0.9):
  params = policy()[1]
  return jax.tree.map(jnp.asarray, {**params, 'table': params['table'] * scale})


def state_of(params=None, reference=None, step=0, learning_rate=2.0):
  params = jax.tree.map(jnp.asarray, policy()[1] if params is None else params)
  tx = optimizer.make(
    99, name='sgd', learning_rate=learning_rate, schedule='constant', clip_norm=None
  )
  state = init_state(params, tx, jax.random.key(0), reference=True)
  if reference is not None:
    state = state._replace(reference=reference)
  return state._replace(step=jnp.int32(step)), tx


class Fixed:
  """Stands in for sampler and judge: what a test says a round is. Row 0 of its mask has an
  observation inside; the last completion fills its row."""

  def __init__(self, lengths, rewards, stopped):
    rows, width = len(lengths), 3 + max(lengths)
    at = np.arange(width)[None] - 3
    inside = at < np.array(lengths)[:, None]
    tokens = np.random.default_rng(0).integers(1, V, (rows, width))
    mask = (inside & (at >= 0)) * np.float32(1)
    mask[2, 4] = 0
    self.rollouts = Rollouts(
      np.where(inside, tokens, 0).astype(np.int32),
      mask,
      -mask,
      np.array(stopped, np.int32),
      np.array(rewards, np.float32),
      1,
      [
        {'outcome': 'wrong', 'rewards': {}, 'reward': float(r), 'length': n, 'id': i}
        for i, (r, n) in enumerate(zip(rewards, lengths, strict=True))
      ],
    )

  def __call__(self, params, chosen, key, *, group=1, temperature=1.0):
    assert 'value' not in params  # the sampler gets the policy alone
    return self.rollouts


def make(run_dir, source, loss=ppo.loss, model=None, **options):
  return algorithm.make(
    model or policy()[0],
    WORDS,
    source,
    loss,
    lambda batch, shares=1: batch,
    run_dir,
    **options,
  )


def fixed(run_dir, lengths=LENGTHS, rewards=SCORES, stopped=STOPPED, **options):
  source = rounds.Rounds(
    Fixed(lengths, rewards, stopped), Pool(20, seed=0, adaptive=False), None, seed=0,
    prompts=len(lengths), group=1, max_new_tokens=ROOM, temperature=1.0, refills=0,
    ahead=False, show_every=0,
  )  # fmt: skip
  return make(run_dir, source, **{'epochs': 1, **options})


def letters(prompt, completion, record):
  return sum((at + 1) * (ord(c) % 7) for at, c in enumerate(completion)) / 10


def build(run_dir, sampling=None, **options):
  """With the real sampler and judge."""
  prompts = [{'id': f'{f}{s}', 'prompt': f'{f}{s}='} for f in '012345' for s in 'abcd']
  world = reward_functions.make(prompts=prompts, functions={'letters': letters})
  settings = dict(prompts=8, group=1, max_new_tokens=ROOM, workers=0, show_every=0)
  source = rounds.make(policy()[0], WORDS, world, 0, **(settings | (sampling or {})))
  return make(run_dir, source, **options)


def logp(params, batch):
  """In float64, from the table: column t is log p(token t | those before)."""
  out = np.zeros(batch.tokens.shape)
  for row, tokens in enumerate(np.asarray(batch.tokens)):
    for t in range(1, len(tokens)):
      out[row, t] = toy.log_softmax(toy.logits(params['table'], tokens[:t]))[tokens[t]]
  return out


def value_after(params, tokens):
  """Of the state after these tokens."""
  head = params['value']['head']
  return float(head['weight'][int(sum(tokens)) % V]) + float(head['bias'])


def by_loop(
  batch, params, reference, scores, stopped, kl_coef=0.05, gamma=1.0, lam=0.95,
  missing_eos_penalty=0.0, bootstrap=False, whiten=True, whiten_rewards=False,
):  # fmt: skip
  """(advantages, returns, values, metrics), row by row from the equations."""
  tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
  old, ref = logp(params, batch), logp(reference, batch)
  places = [[int(t) for t in np.flatnonzero(row)] for row in mask]
  rewards, values, kls = {}, {}, []
  for b, at in enumerate(places):
    if not at:
      continue
    kls.append(sum(old[b, t] - ref[b, t] for t in at))
    for t in at:
      rewards[b, t] = -kl_coef * (old[b, t] - ref[b, t])
      values[b, t] = value_after(params, tokens[b, :t])
    penalty = 0 if stopped[b] else missing_eos_penalty
    rewards[b, at[-1]] += scores[b] - penalty
  if whiten_rewards:
    x = np.array([*rewards.values()])
    rewards = {k: (r - x.mean()) / (x.std(ddof=1) + 1e-6) + x.mean()
               for k, r in rewards.items()}  # fmt: skip
  advantages = {}
  for b, at in enumerate(places):
    for i, t in enumerate(at):
      total = 0.0
      for k, s in enumerate(at[i:]):
        last = s == at[-1]
        after = value_after(params, tokens[b, : s + 1]) * (bootstrap and not stopped[b])
        coming = after if last else values[b, at[i + k + 1]]
        delta = rewards[b, s] + gamma * coming - values[b, s]
        total += (gamma * lam) ** k * delta
      advantages[b, t] = total
  flat = np.array([*advantages.values()])
  returns = {k: a + values[k] for k, a in advantages.items()}
  targets = np.array([*returns.values()])
  scored = [b for b, at in enumerate(places) if at]
  numbers = {
    'objective/kl': np.mean(kls),
    'objective/scores': np.mean([scores[b] for b in scored]),
    'objective/rlhf_reward': np.mean([
      scores[b] - (0 if stopped[b] else missing_eos_penalty) for b in scored
    ]) - kl_coef * np.mean(kls),
    'objective/entropy': -sum(old[k] for k in advantages) / len(scored),
    'objective/kl_coef': kl_coef,
    'explained_variance': 1 - flat.var() / targets.var(),
    'advantages/std': flat.std(),
  }  # fmt: skip
  if whiten:
    mean, std = flat.mean(), flat.std(ddof=1)
    advantages = {k: (a - mean) / (std + 1e-6) for k, a in advantages.items()}
  arrays = []
  for found in (advantages, returns, values):
    arrays.append(np.zeros(mask.shape))
    for place, x in found.items():
      arrays[-1][place] = x
  return (*arrays, numbers)


OPTIONS = {
  'default': {},
  'strong_kl': dict(kl_coef=0.7),
  'plain': dict(whiten=False, gamma=0.9, lam=0.6),
  'monte_carlo': dict(lam=1.0, whiten=False),
  'penalty': dict(missing_eos_penalty=1.5, whiten=False),
  'bootstrap': dict(bootstrap=True, whiten=False, gamma=0.8),
  'rewards': dict(whiten_rewards=True, kl_coef=0.3),
  'no_kl': dict(kl_coef=0.0, reference_every=None),
}


@pytest.mark.parametrize('name', OPTIONS)
def test_the_round_equals_the_loop(tmp_path, name):
  options, reference = OPTIONS[name], other_policy()
  method = fixed(tmp_path, **options)
  batch, info = method.next_batch(state_of(reference=reference)[0])
  assert batch.mask[2, 4] == 0 < batch.mask[2, 5]  # an observation inside
  options = {k: x for k, x in options.items() if k != 'reference_every'}
  *want, numbers = by_loop(batch, policy()[1], reference, SCORES, STOPPED, **options)
  # float32 log-probs of up to 10 nats, summed over 5 tokens.
  for got, x in zip(
    (batch.advantages, batch.returns, batch.old_values), want, strict=True
  ):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, x, atol=1e-4)
  if name != 'no_kl':
    for key, x in numbers.items():
      assert info[key] == pytest.approx(x, abs=1e-4), key
    together = info['objective/scores'] + info['objective/non_score_reward']
    assert info['objective/rlhf_reward'] == pytest.approx(together)
    np.testing.assert_allclose(
      batch.ref_logp, logp(reference, batch) * batch.mask, atol=2e-5
    )
  else:
    assert batch.ref_logp is None
    assert info['objective/kl'] == 0
  np.testing.assert_allclose(
    batch.old_logp, logp(policy()[1], batch) * batch.mask, atol=2e-5
  )


def test_every_option_of_those_changes_the_advantages(tmp_path):
  """Each is read: no two rounds are the same."""
  seen = set()
  for name, options in OPTIONS.items():
    method = fixed(tmp_path / name, **options)
    batch, _ = method.next_batch(state_of(reference=other_policy())[0])
    seen.add(np.asarray(batch.advantages).tobytes())
  assert len(seen) == len(OPTIONS)


@pytest.mark.parametrize('name', [None, 'reference', 'pallas'])
def test_gae_on_the_device_is_that_of_the_host(tmp_path, name):
  state, _ = state_of()
  want, _ = fixed(tmp_path / 'host').next_batch(state)
  got, _ = fixed(tmp_path / 'device', gae=name).next_batch(state)
  for a, b in zip(
    (got.advantages, got.returns), (want.advantages, want.returns), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_completion_that_was_not_scored_is_not_trained_on(tmp_path):
  scores = [1.0, math.nan, 2.0, 0.25]
  reference = other_policy()
  batch, info = fixed(tmp_path, rewards=scores).next_batch(
    state_of(reference=reference)[0]
  )
  assert not batch.mask[1].any()
  assert batch.mask[[0, 2, 3]].any(-1).all()
  *want, numbers = by_loop(batch, policy()[1], reference, scores, STOPPED)
  np.testing.assert_allclose(batch.advantages, want[0], atol=1e-4)
  np.testing.assert_allclose(batch.returns, want[1], atol=1e-4)
  for key, x in numbers.items():
    assert info[key] == pytest.approx(x, abs=1e-4), key


def test_scores_are_normalised_by_those_of_the_first_round(tmp_path):
  """… that has any, and so they stay, also after a restart."""

  def round_of(scores, saved=None, **options):
    method = fixed(tmp_path, rewards=scores, missing_eos_penalty=0.5, **options)
    if saved:
      method.data.set_state(saved)
    batch, info = method.next_batch(state_of(reference=other_policy())[0])
    return batch, info, method.data.get_state()

  def same(got, want):
    for name in ('advantages', 'returns'):
      # float32, whitened
      np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-5)

  *_, saved = round_of([math.nan] * 4, normalise_scores=True)
  first = 0.1 * np.array([*SCORES[:3], math.nan]) + 0.5
  got, info, saved = round_of(first, saved, normalise_scores=True)
  mean, std = np.nanmean(first), np.nanstd(first, ddof=1)
  want, numbers, _ = round_of((first - mean) / std)
  same(got, want)
  for key in ('objective/scores', 'objective/rlhf_reward'):
    assert info[key] == pytest.approx(numbers[key], abs=1e-5), key
  second = np.array([0.4, 0.7, 0.3, 0.5])
  got, *_ = round_of(second, saved, normalise_scores=True)
  want, *_ = round_of((second - mean) / std)
  same(got, want)
  for scores in ([2.0] * 4, [2.0, math.nan, math.nan, math.nan]):
    with pytest.raises(ValueError, match='scores of the first round do not differ'):
      round_of(scores, normalise_scores=True)


def test_a_round_without_any_score_moves_nothing(tmp_path):
  method = fixed(tmp_path, rewards=[math.nan] * 4)
  state, tx = state_of()
  before = jax.tree.map(np.array, state.params)
  batch, info = method.next_batch(state)
  assert math.isnan(info['explained_variance'])
  state, metrics = make_step(policy()[0], method.loss, tx)(state, batch)
  assert int(metrics['skipped_updates']) == 0
  jax.tree.map(np.testing.assert_array_equal, before, state.params)


def test_policy_and_values_of_the_round_stay_what_they_were(tmp_path):
  """ρ = 1 and V = V_old at the first of a round's updates, and not at the second."""
  method = build(tmp_path, epochs=3, kl_coef=0.1)
  state, tx = state_of(learning_rate=0.5)
  step = make_step(policy()[0], method.loss, tx)
  kept, distances = [], []
  for _ in range(4):
    batch, info = method.next_batch(state)
    assert 'objective/kl' in info  # every step
    now = np.asarray([
      [value_after(state.params, row[:t]) for t in range(len(row))]
      for row in np.asarray(batch.tokens)
    ])  # fmt: skip
    order = np.lexsort(np.asarray(batch.tokens).T)
    kept.append([np.asarray(x)[order] for x in (
      batch.old_logp, batch.old_values, batch.advantages, batch.returns
    )])  # fmt: skip
    distances.append(np.abs((now - batch.old_values) * batch.mask).max())
    state, metrics = step(state, batch)
    # Two float32 programs of the same log-probs, of up to 10 nats.
    first = len(kept) in (1, 4)
    assert (abs(float(metrics['importance_ratio']) - 1) < 1e-5) == first
    assert (float(metrics['approx_kl']) < 1e-9) == first
  assert max(distances[0], distances[3]) < 1e-5 < 1e-3 < min(distances[1:3])
  for other in kept[1:3]:
    for a, b in zip(kept[0], other, strict=True):
      np.testing.assert_array_equal(a, b)
  assert np.abs(kept[3][0]).sum() != np.abs(kept[0][0]).sum()


def test_a_critic_learns_the_returns(tmp_path):
  """The same round again and again: it ends at the mean return of each state, and with a
  trunk of its own the policy does not feel it."""
  model, params = policy('separate')
  loss = functools.partial(ppo.loss, value_coef=1.0, value_clip=None)
  method = fixed(
    tmp_path, loss=loss, model=model, kl_coef=0.0, lam=1.0, epochs=200, whiten=False
  )
  state, tx = state_of(params, learning_rate=0.5)
  step = make_step(model, method.loss, tx)
  errors = []
  for number in range(200):
    batch, _ = method.next_batch(state)
    if number == 0:
      batch0 = batch
    silent = batch._replace(advantages=0 * batch.advantages)
    state, metrics = step(state, silent)
    errors.append(float(metrics['value_error']))
  returns = {}
  for b, t in zip(*np.nonzero(np.asarray(batch.mask)), strict=True):
    state_read = int(batch.tokens[b, :t].sum()) % V
    returns.setdefault(state_read, []).append(float(batch.returns[b, t]))
  best = sum(np.var(x) * len(x) for x in returns.values()) / batch.mask.sum()
  assert errors[0] > 2 * best
  # (1 − ½/13)^200 = 4e-4 of a rare state's error is left, and its square of the loss's.
  assert errors[-1] == pytest.approx(best, abs=1e-5)
  np.testing.assert_array_equal(state.params['table'], params['table'])
  np.testing.assert_array_equal(batch.returns.sum(), batch0.returns.sum())


def test_the_coefficient_follows_the_kl(tmp_path):
  """Ziegler et al.: by at most a fifth of n/horizon a round, up above the target."""
  for target, way in ((0.01, 1), (1e6, -1)):
    method = fixed(tmp_path / str(target), kl_coef=0.1, kl_target=target, kl_horizon=8)
    # Of tokens drawn at random a sharper policy is the less likely: a KL above 0.
    state, _ = state_of(reference=other_policy(1.1))
    used = [method.next_batch(state)[1]['objective/kl_coef'] for _ in range(4)]
    np.testing.assert_allclose(used, 0.1 * (1 + way * 0.2 * 4 / 8) ** np.arange(4))
  near = fixed(tmp_path / 'near', kl_coef=0.1, kl_horizon=8)
  kl = near.next_batch(state)[1]['objective/kl']
  assert kl > 0
  assert [near.next_batch(state)[1]['objective/kl_coef'] for _ in range(3)] == [0.1] * 3
  # A fixed one may be changed by who resumes; a horizon is nothing to it.
  changed = fixed(tmp_path / 'changed', kl_coef=0.3, kl_horizon=1)
  changed.data.set_state(near.data.get_state())
  assert changed.next_batch(state)[1]['objective/kl_coef'] == 0.3
  method = fixed(
    tmp_path / 'in', kl_coef=0.1, kl_target=kl / 1.1, kl_horizon=10, epochs=2
  )
  used = [method.next_batch(state)[1]['objective/kl_coef'] for _ in range(6)]
  want = 0.1 * (1 + 0.1 * 4 / 10) ** np.array([0, 0, 1, 1, 2, 2])
  np.testing.assert_allclose(used, want)


def test_a_round_whose_kl_is_no_number_leaves_the_coefficient_alone(tmp_path):
  method = fixed(tmp_path, kl_coef=0.1, kl_target=0.01, kl_horizon=8)
  _, info = method.next_batch(state_of(reference=other_policy(math.nan))[0])
  assert math.isnan(info['objective/kl'])
  _, info = method.next_batch(state_of(reference=other_policy(1.1))[0])
  assert info['objective/kl_coef'] == 0.1
  _, info = method.next_batch(state_of(reference=other_policy(1.1))[0])
  assert info['objective/kl_coef'] == pytest.approx(0.11)


def test_a_round_that_could_not_be_written_moves_the_coefficient_once(
  tmp_path, monkeypatch
):
  """The disk is full at round 2; it comes again after a restart."""
  options = dict(kl_coef=0.1, kl_target=0.01, kl_horizon=8)
  state, _ = state_of(reference=other_policy(1.1))

  def used(method, rounds):
    return [method.next_batch(state)[1]['objective/kl_coef'] for _ in range(rounds)]

  want = used(fixed(tmp_path / 'clean', **options), 3)
  method, write = fixed(tmp_path / 'full', **options), on_policy.write
  got = used(method, 1)

  def full(*_):
    raise OSError('no space left on device')

  monkeypatch.setattr(on_policy, 'write', full)
  with pytest.raises(OSError, match='no space left'):
    method.next_batch(state)
  monkeypatch.setattr(on_policy, 'write', write)
  again = fixed(tmp_path / 'full', **options)
  again.data.set_state(method.data.get_state())
  assert got + used(again, 2) == want


def test_the_reference_is_kept_without_a_critic():
  state, _ = state_of(policy('separate')[1])
  assert 'value' in state.params
  assert set(state.reference) == {'table'}


def test_the_coefficient_counts_the_completions_that_were_scored(tmp_path):
  method = fixed(
    tmp_path, rewards=[1.0, math.nan, 2.0, 0.25], kl_coef=0.1, kl_target=1e6,
    kl_horizon=8,
  )  # fmt: skip
  state, _ = state_of(reference=other_policy(1.1))
  used = [method.next_batch(state)[1]['objective/kl_coef'] for _ in range(2)]
  np.testing.assert_allclose(used, [0.1, 0.1 * (1 - 0.2 * 3 / 8)])


def test_a_round_without_any_score_leaves_the_coefficient_alone(tmp_path):
  """Its KL of nothing, 0, is not below the target."""
  method = fixed(
    tmp_path, rewards=[math.nan] * 4, kl_coef=0.1, kl_target=1.0, kl_horizon=8
  )
  state, _ = state_of(reference=other_policy(1.1))
  used = [method.next_batch(state)[1]['objective/kl_coef'] for _ in range(3)]
  assert used == [0.1] * 3


@pytest.mark.parametrize('at', [1, 3, 4, 6])
def test_a_restored_run_goes_on_inside_the_round(tmp_path, at):
  options = dict(epochs=2, minibatches=2, kl_coef=0.2, kl_target=0.01, kl_horizon=16)
  state, _ = state_of(reference=other_policy())
  method = build(tmp_path / 'a', **options)
  for _ in range(at):
    method.next_batch(state)
  saved = method.data.get_state()
  want = [method.next_batch(state) for _ in range(6)]
  other = build(tmp_path / 'b', **options)
  other.data.set_state(saved)
  for batch, info in want:
    got, numbers = other.next_batch(state)
    for name, x in batch._asdict().items():
      if x is not None:
        np.testing.assert_array_equal(x, getattr(got, name), err_msg=name)
        assert x.dtype == getattr(got, name).dtype
    named = {k: x for k, x in info.items() if not k.startswith('timing/')}
    assert named == {k: x for k, x in numbers.items() if not k.startswith('timing/')}
  used = [info['objective/kl_coef'] for _, info in want]
  assert len(set(used)) > 1


@pytest.mark.parametrize('temperature', [0.7, 1.3])
def test_policy_reference_and_step_agree_on_the_temperature(tmp_path, temperature):
  method = build(tmp_path, sampling={'temperature': temperature}, epochs=1)
  state, tx = state_of()
  batch, info = method.next_batch(state)
  assert info['objective/kl'] == pytest.approx(0, abs=1e-5)  # the reference is itself
  step = make_step(policy()[0], method.loss, tx, temperature=method.temperature)
  _, metrics = step(state, batch)
  assert float(metrics['importance_ratio']) == pytest.approx(1, abs=1e-5)
  assert float(metrics['sampling/logp_difference/max']) < 1e-4


def test_a_round_is_written(tmp_path):
  method = build(tmp_path, epochs=1)
  batch, _ = method.next_batch(state_of(step=7)[0])
  lines = (tmp_path / 'rollouts' / '000000.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert len(rows) == 8
  for row, written in enumerate(rows):  # one update a round: as it was sampled
    at = np.asarray(batch.mask)[row] > 0
    np.testing.assert_allclose(
      written['advantages'], np.asarray(batch.advantages)[row][at], atol=1e-5
    )
    assert written['step'] == 7
    assert max(map(abs, written['log_ratio'])) < 1e-4


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(kl_coef=-0.1), 'kl_coef=-0.1 must be at least 0'),
    (dict(reference_every=None), 'kl_coef=0.05 needs a reference policy'),
    (dict(kl_target=0.0), 'kl_target=0.0 must be above 0'),
    (dict(kl_target=6.0, kl_coef=0.0), 'with kl_coef=0.0 above 0 too'),
    (
      dict(kl_target=1.0, kl_horizon=3),
      'kl_horizon=3 must be at least the 4 completions',
    ),
    (dict(gamma=1.5), r'gamma=1.5 and lam=0.95 must be in \[0, 1\]'),
    (dict(lam=-0.5), 'lam=-0.5'),
    (
      dict(gae='jnp'),
      r"gae='jnp' must be 'numpy', None or one of \['pallas', 'reference",
    ),
    (dict(missing_eos_penalty=-1.0), 'missing_eos_penalty=-1.0 must be at least 0'),
    (dict(epochs=0), 'epochs=0'),
    (dict(minibatches=3), 'rollouts.prompts=4 a multiple of minibatches'),
    (dict(reference_every=-1), 'reference_every=-1'),
    (
      dict(loss=functools.partial(ppo.loss, clip_low=2.0)),
      'config.loss: ppo: clip_low',
    ),
    (
      dict(model=policy()[0]._replace(values=None)),
      r"needs a value head: add a section config.value = dict\(trunk='shared'\)",
    ),
  ],
)
def test_what_cannot_be_is_said_before_anything_is_sampled(tmp_path, options, message):
  with pytest.raises(ValueError, match=message) as caught:
    fixed(tmp_path, **options)
  assert '\n' not in str(caught.value)
