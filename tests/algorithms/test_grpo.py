"""From rounds to updates: whose advantage, which mask, under which policy."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe.algorithms import grpo as algorithm
from educe.data import tokenizer as tokenizers
from educe.environments import chain, reward_functions
from educe.losses import advantages, grpo
from educe.rollouts import rounds
from educe.rollouts.pool import Pool
from educe.training import optimizer
from educe.training.step import init_state, make_step
from educe.types import Rollouts, Scores

WORDS = tokenizers.load(path=f'characters:{chain.ALPHABET}')
G = 4  # rows of a group
ROOM = 5  # max_new_tokens


@functools.cache
def policy():
  """A model with a known answer; its log-probs are far from uniform."""
  model, params = toy.model(vocabulary=WORDS.vocab_size)
  return model, np.array(params)  # a step donates what lies on the device


def letters(prompt, completion, record):
  """A reward that is another for nearly every completion; even prompts are silent."""
  if int(prompt[0]) % 2 == 0:
    return 0.25
  return sum((at + 1) * (ord(c) % 7) for at, c in enumerate(completion)) / 10


PROMPTS = [
  {'id': f'{f}{s}', 'prompt': f'{f}{s}='} for f in '012345' for s in 'abcdefgh'
]


def world():
  return reward_functions.make(prompts=PROMPTS, functions={'letters': letters})


def state_of(params=None, reference=None, step=0):
  params = jax.tree.map(jnp.asarray, policy()[1] if params is None else params)
  tx = optimizer.make(99, name='sgd', learning_rate=2.0, schedule='constant')
  state = init_state(params, tx, jax.random.key(0))
  return state._replace(reference=reference, step=jnp.int32(step)), tx


def build(
  run_dir, advantage=advantages.group_relative, loss=grpo.loss, sampling=None, **options
):
  """(Algorithm, its Rounds) with the real sampler, model and judge."""
  settings = dict(prompts=4, group=G, max_new_tokens=ROOM, workers=0, show_every=0)
  source = rounds.make(policy()[0], WORDS, world(), 0, **(settings | (sampling or {})))
  return make(run_dir, source, advantage, loss, **options), source


def make(run_dir, source, advantage, loss, **options):
  if not isinstance(advantage, functools.partial):
    advantage = functools.partial(advantage)
  return algorithm.make(
    policy()[0],
    WORDS,
    source,
    advantage,
    loss,
    lambda batch, shares=1: batch,
    run_dir,
    **options,
  )


def text_of(batch, row):
  """(prompt, completion) as the tokens say; the end token is not text."""
  at = np.flatnonzero(np.asarray(batch.mask[row]))
  tokens = np.asarray(batch.tokens[row])
  prompt = WORDS.decode([t for t in tokens[: at[0]] if t != WORDS.bos_id])
  ends = set(WORDS.eos_ids)
  return prompt, WORDS.decode([t for t in tokens[at] if t not in ends])


def logp(params, batch):
  """In float64, from the table itself: column t is log p(token t | those before)."""
  out = np.zeros(batch.tokens.shape)
  for row, tokens in enumerate(np.asarray(batch.tokens)):
    for t in range(1, len(tokens)):
      logits = toy.logits(params, tokens[:t])
      out[row, t] = toy.log_softmax(logits)[tokens[t]]
  return out


def plain(rewards, group):
  """The shaped reward itself, where a test wants to read it."""
  return rewards


@pytest.mark.parametrize('refills', [0, 6])
def test_every_row_has_the_advantage_of_its_own_completion(tmp_path, refills):
  """Through refills, minibatches and shuffling: recomputed from the row's tokens."""
  method, _ = build(
    tmp_path, epochs=2, minibatches=2, sampling=dict(refills=refills, prompts=6)
  )
  state, _ = state_of()
  seen = []
  for _ in range(4):
    batch, _ = method.next_batch(state)
    assert len(batch.tokens) == method.rows == 12
    for at in range(0, 12, G):
      texts = [text_of(batch, row) for row in range(at, at + G)]
      assert len({prompt for prompt, _ in texts}) == 1
      r = np.array([letters(prompt, said, None) for prompt, said in texts])
      want = (r - r.mean()) / (r.std(ddof=1) + 1e-6) if np.ptp(r) else 0 * r
      expected = np.asarray(batch.mask[at : at + G]) * want[:, None]
      np.testing.assert_allclose(batch.advantages[at : at + G], expected, atol=1e-5)
      seen.append((texts[0][0], tuple(said for _, said in texts)))
  first, second = seen[:6], seen[6:]
  assert sorted(first) == sorted(second)
  assert len(set(first)) == 6
  assert first != second  # an order of its own each epoch
  share = np.mean([int(prompt[0]) % 2 for prompt, _ in first])
  assert share == 1 if refills else share < 1


def test_every_pass_of_every_round_has_an_order_of_its_own(tmp_path):
  """Else the same place of a round would always be in the freshest minibatch."""
  groups = 8
  source = rounds.Rounds(
    Fixed([2] * groups * G, np.arange(groups * G)), Pool(20, seed=0, adaptive=False),
    None, seed=0, prompts=groups, group=G, max_new_tokens=ROOM, temperature=1.0,
    refills=0, ahead=False, show_every=0,
  )  # fmt: skip
  method = make(tmp_path, source, plain, grpo.loss, epochs=2, minibatches=2)
  state, _ = state_of()
  orders = set()
  for _ in range(4):  # two rounds of two passes
    passed = [method.next_batch(state)[0].advantages[:, 3] for _ in range(2)]
    order = np.concatenate(passed)
    assert sorted(order) == list(range(groups * G))
    assert (order.reshape(-1, G) % G == np.arange(G)).all()  # whole groups, in order
    orders.add(tuple(order))
  assert len(orders) == 4


def test_old_log_probs_stay_where_the_round_began(tmp_path):
  """ρ = 1 at the first inner step and not at the second, through the real step."""
  method, _ = build(tmp_path, epochs=3)
  state, tx = state_of()
  step = make_step(policy()[0], method.loss, tx)
  ratios, olds = [], []
  for _ in range(4):
    batch, _ = method.next_batch(state)
    now = logp(state.params, batch)
    ratios.append(np.abs(np.exp((now - batch.old_logp) * batch.mask) - 1).max())
    order = np.lexsort(np.asarray(batch.tokens).T)
    olds.append(np.asarray(batch.old_logp)[order])
    state, metrics = step(state, batch)
    drift = abs(float(metrics['importance_ratio']) - 1)
    # Two float32 programs of the same log-probs, of up to 10 nats: 1e-5.
    assert (drift < 1e-5) == (len(olds) in (1, 4))
  assert ratios[0] < 2e-5
  assert ratios[3] < 2e-5  # a new round
  assert min(ratios[1:3]) > 1e-2
  np.testing.assert_array_equal(olds[0], olds[1])
  np.testing.assert_array_equal(olds[0], olds[2])


def test_one_update_a_round_needs_no_old_log_probs(tmp_path):
  method, _ = build(tmp_path)
  assert method.next_batch(state_of()[0])[0].old_logp is None


@pytest.mark.parametrize('temperature', [0.6, 1.0, 1.3])
def test_sampler_and_step_agree_at_every_temperature(tmp_path, temperature):
  for epochs in (1, 2):  # without and with log-probs of the policy that began the round
    sampling = {'temperature': temperature}
    method, _ = build(tmp_path, epochs=epochs, sampling=sampling)
    state, tx = state_of()
    batch, _ = method.next_batch(state)
    step = make_step(policy()[0], method.loss, tx, temperature=method.temperature)
    _, metrics = step(jax.tree.map(jnp.copy, state), batch)
    worst = float(metrics['sampling/logp_difference/max'])
    assert float(metrics['sampling/logp_difference/mean']) <= worst <= 1e-4
    assert float(metrics['importance_ratio']) == pytest.approx(1, abs=1e-5)
  # A step at another temperature is seen at once.
  wrong = make_step(policy()[0], method.loss, tx, temperature=temperature + 0.2)
  _, metrics = wrong(state, batch._replace(old_logp=None))
  assert float(metrics['sampling/logp_difference/mean']) > 1e-2


def test_stale_weights_in_the_sampler_are_seen(tmp_path):
  method, source = build(tmp_path)
  state, tx = state_of()
  stale = jax.tree.map(lambda x: x * 1.05, state.params)
  honest = source.next
  source.next = lambda params, *rest, **more: honest(stale, *rest, **more)
  step = make_step(policy()[0], method.loss, tx)
  _, metrics = step(state, method.next_batch(state)[0])
  assert float(metrics['sampling/logp_difference/max']) > 0.05
  assert float(metrics['sampling/logp_difference/mean']) > 0.005


def test_one_step_off_has_the_log_probs_of_both_policies(tmp_path):
  """Sampled by the policy of a round ago, ρ is against the policy of now."""
  method, _ = build(tmp_path, minibatches=2, sampling={'ahead': True})
  state, tx = state_of()
  step = make_step(policy()[0], method.loss, tx)
  differences, staleness = [], []
  for number in range(6):
    batch, info = method.next_batch(state)
    if number % 2 == 0:
      staleness.append(info['sampling/staleness_steps'])
    else:
      assert not info
    if number % 2 == 0:
      now = logp(state.params, batch)
      assert np.abs((now - batch.old_logp) * batch.mask).max() < 2e-5
    state, metrics = step(state, batch)
    differences.append(float(metrics['sampling/logp_difference/max']))
  method.data.close()
  assert staleness == [0, 2, 2]  # one round, and never more
  assert differences[0] < 1e-4 < 1e-2 < min(differences[2:])


def test_a_stale_round_is_scored_again_even_when_ahead_was_switched_off(tmp_path):
  method, _ = build(tmp_path / 'a', sampling={'ahead': True})
  state, _ = state_of()
  method.next_batch(state)
  saved = method.data.get_state()
  method.data.close()
  other, _ = build(tmp_path / 'b')
  other.data.set_state(saved)
  moved = jax.tree.map(lambda x: x * 1.05, state.params)
  later, info = other.next_batch(state._replace(params=moved, step=state.step + 1))
  assert info['sampling/staleness_steps'] == 1
  want = logp(moved, later) * later.mask
  np.testing.assert_allclose(later.old_logp, want, atol=2e-5)
  assert np.abs((want - later.sampler_logp) * later.mask).max() > 0.01


class Fixed:
  """Stands in for sampler and judge: what a test says a round is."""

  def __init__(self, lengths, rewards, stopped=None, kept=None):
    rows, width = len(lengths), 3 + max(lengths)
    rng = np.random.default_rng(0)
    at = np.arange(width)[None] - 3
    inside = at < np.array(lengths)[:, None]
    tokens = np.where(inside, rng.integers(0, 15, (rows, width)), 0).astype(np.int32)
    self.rollouts = Rollouts(
      tokens,
      (inside & (at >= 0)).astype(np.float32),
      np.where(inside & (at >= 0), -1.0, 0).astype(np.float32),
      np.ones(rows, np.int32) if stopped is None else np.array(stopped, np.int32),
      np.array(rewards, np.float32),
      G,
      [
        {'outcome': 'wrong', 'rewards': {}, 'reward': float(r), 'length': n, 'id': i}
        for i, (r, n) in enumerate(zip(rewards, lengths, strict=True))
      ],
      kept,
    )

  def __call__(self, params, chosen, key, *, group=G, temperature=1.0):
    r = self.rollouts
    if group == 1:
      return r._replace(rewards=np.arange(len(chosen), dtype=np.float32), group=1)
    return r._replace(rewards=r.rewards.copy())


def fixed(
  run_dir, lengths, rewards, advantage=plain, loss=grpo.loss, reference=None, **options
):
  """(batch, info) of a round that is given."""
  extra = {k: options.pop(k) for k in ('stopped', 'kept') if k in options}
  source = rounds.Rounds(
    Fixed(lengths, rewards, **extra), Pool(20, seed=0, adaptive=False), None, seed=0,
    prompts=len(lengths) // G, group=G, max_new_tokens=ROOM, temperature=1.0,
    refills=0, ahead=False, show_every=0,
  )  # fmt: skip
  method = make(run_dir, source, advantage, loss, **options)
  return method.next_batch(state_of(reference=reference)[0])


def other_policy():
  return jax.tree.map(lambda x: jnp.asarray(x * 0.9), policy()[1])


def test_overlong_completions_lose_from_nothing_to_one(tmp_path):
  """DAPO, eq. 13: with L = 5 and a buffer of 2, nothing up to 3 tokens and 1 at 5."""
  batch, _ = fixed(tmp_path, [2, 3, 4, 5], [1, 1, 1, 0], overlong_buffer=2)
  got = (np.asarray(batch.advantages)).sum(-1) / np.asarray(batch.mask).sum(-1)
  np.testing.assert_allclose(got, [1, 1, 0.5, -1])
  batch, _ = fixed(tmp_path, [2, 3, 4, 5], [1, 1, 1, 0], overlong_buffer=5)
  np.testing.assert_allclose(np.asarray(batch.advantages)[:, 3], [0.6, 0.4, 0.2, -1])


def test_kl_in_the_reward_is_summed_over_the_completion(tmp_path):
  lengths, rewards = [2, 3, 4, 5], [1, 0, 1, 0]
  reference = other_policy()
  batch, info = fixed(
    tmp_path, lengths, rewards, reference=reference, reference_every=0, kl_in_reward=0.3
  )
  mask = np.asarray(batch.mask, np.float64)
  ours, theirs = logp(policy()[1], batch), logp(reference, batch)
  np.testing.assert_allclose(batch.old_logp, ours * mask, atol=2e-5)
  np.testing.assert_allclose(batch.ref_logp, theirs * mask, atol=2e-5)
  kl = ((ours - theirs) * mask).sum(-1)
  assert np.abs(kl).min() > 0.01
  # float32 log-probs of up to 20 nats, summed over 5 tokens: 1e-4.
  np.testing.assert_allclose(
    batch.advantages, mask * (np.array(rewards) - 0.3 * kl)[:, None], atol=1e-4
  )
  assert info['reward/kl'] == pytest.approx(kl.mean(), abs=1e-4)


def test_reinforce_plus_plus_is_whitened_token_by_token(tmp_path):
  lengths, rewards = [2, 3, 4, 5], [1, 0, 1, 0]
  reference = other_policy()
  batch, _ = fixed(
    tmp_path,
    lengths,
    rewards,
    functools.partial(advantages.reinforce_plus_plus, kl_coef=0.2),
    reference=reference,
    reference_every=0,
  )
  returns = []
  for row, length in enumerate(lengths):
    kl = [float(batch.old_logp[row, 3 + t] - batch.ref_logp[row, 3 + t])
          for t in range(length)]  # fmt: skip
    returns.append([rewards[row] - 0.2 * sum(kl[t:]) for t in range(length)])
  flat = np.array([x for row in returns for x in row])
  mean, std = flat.mean(), flat.std(ddof=1)
  want = np.zeros(batch.mask.shape)
  for row, values in enumerate(returns):
    want[row, 3 : 3 + len(values)] = (np.array(values) - mean) / (std + 1e-6)
  np.testing.assert_allclose(batch.advantages, want, atol=1e-5)
  assert len(set(np.round(want[3, 3:8], 4))) == 5


def test_remax_compares_with_the_greedy_completion(tmp_path):
  batch, _ = fixed(tmp_path, [2] * 8, [0, 1, 2, 3, 0, 1, 2, 3], advantages.remax)
  got = np.asarray(batch.advantages)[:, 3]
  np.testing.assert_allclose(got, [0, 1, 2, 3, -1, 0, 1, 2])


def test_the_greedy_completion_really_is_greedy(tmp_path):
  method, _ = build(tmp_path, advantages.remax)
  state, _ = state_of()
  batch, _ = method.next_batch(state)
  for at in range(0, 16, G):
    prompt, _ = text_of(batch, at)
    ids, said = WORDS.encode(prompt), ''
    ids = [WORDS.bos_id, *ids] if WORDS.bos_id is not None else list(ids)
    for _ in range(ROOM):
      tokens = jnp.asarray([ids])
      states, _ = policy()[0].hidden(state.params, tokens)
      head = policy()[0].head(state.params)
      token = int((states[0, -1] @ head.matrix * head.scale).argmax())
      if token in WORDS.eos_ids:
        break
      ids.append(token)
      said += WORDS.decode([token])
    baseline = letters(prompt, said, None)
    for row in range(at, at + G):
      want = letters(*text_of(batch, row), None) - baseline
      got = np.asarray(batch.advantages)[row][np.asarray(batch.mask)[row] > 0]
      np.testing.assert_allclose(got, want, atol=1e-5)


def loss_count(batch):
  logp = np.zeros(batch.mask.shape, np.float32)
  return float(grpo.loss(Scores(logp, logp), jax.tree.map(jnp.asarray, batch))[0].count)


def test_what_is_dropped_is_in_no_denominator(tmp_path):
  lengths = [2, 3, 4, 5, 1, 1, 1, 2, 3, 3, 3, 4]
  rewards = [1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1]
  stopped = [1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1]

  def rows(**options):
    batch, _ = fixed(tmp_path, lengths, rewards, stopped=stopped, **options)
    kept = np.asarray(batch.mask).sum(-1)
    assert not np.asarray(batch.advantages)[kept == 0].any()
    assert loss_count(batch) == kept.sum()
    return kept.tolist()

  assert rows() == lengths
  assert rows(drop_truncated=True) == [2, 3, 4, 0, 1, 1, 1, 2, 0, 3, 3, 4]
  assert rows(drop_equal=True) == [2, 3, 4, 5, 0, 0, 0, 0, 3, 3, 3, 4]
  both = rows(drop_equal=True, drop_truncated=True)
  assert both == [2, 3, 4, 0, 0, 0, 0, 0, 0, 3, 3, 4]


def test_what_is_dropped_still_speaks_for_its_group(tmp_path):
  """A baseline is of all completions; a dropped one keeps its reward, its KL included."""

  def of(**options):
    return fixed(
      tmp_path, [2, 3, 4, 5], [1, 0, 1, 0], advantages.rloo, stopped=[1, 1, 1, 0],
      reference=other_policy(), reference_every=0, kl_in_reward=0.3, **options,
    )  # fmt: skip

  (whole, info), (less, less_info) = of(), of(drop_truncated=True)
  np.testing.assert_array_equal(less.advantages[:3], whole.advantages[:3])
  assert np.abs(whole.advantages[3]).max() > 0
  assert not less.advantages[3].any()
  assert less_info['reward/kl'] == info['reward/kl'] != 0


def test_equal_means_equal_as_the_environment_gave_it(tmp_path):
  """Length shaping makes any group look alive; so does a KL."""
  batch, _ = fixed(
    tmp_path, [2, 3, 4, 5], [1, 1, 1, 1], drop_equal=True, overlong_buffer=5
  )
  assert not np.asarray(batch.mask).any()


def test_a_round_where_all_is_dropped_moves_nothing(tmp_path):
  batch, _ = fixed(
    tmp_path, [2, 3, 4, 5], [1] * 4, advantages.group_relative, drop_equal=True
  )
  state, tx = state_of()
  before = jax.tree.map(np.array, state.params)
  state, metrics = make_step(policy()[0], grpo.loss, tx)(state, batch)
  jax.tree.map(np.testing.assert_array_equal, before, state.params)
  assert int(metrics['skipped_updates']) == 0


def test_unscored_rows_push_nowhere(tmp_path):
  batch, _ = fixed(tmp_path, [2] * 4, [1, np.nan, 0, 1], advantages.rloo)
  got = np.asarray(batch.advantages)[:, 3]
  np.testing.assert_allclose(got, [0.5, 0, -1, 0.5], atol=1e-6)


def test_the_sampler_is_what_truncation_left_of_it(tmp_path):
  """With top_k the tokens came from log p − log kept: a correction must know."""
  kept = np.ones((4, 5), np.float32)
  kept[:, 3:5] = 0.5
  batch, _ = fixed(tmp_path, [2] * 4, [1, 0, 1, 0], kept=kept)
  want = np.where(np.asarray(batch.mask) > 0, -1 - np.log(0.5), 0)
  np.testing.assert_allclose(batch.sampler_logp, want)


def test_truncation_is_corrected_end_to_end(tmp_path):
  """E[π/π_sampler] over what top_k leaves is the mass that it left: below 1."""
  method, _ = build(tmp_path, sampling={'top_k': 2})
  state, tx = state_of()
  batch, info = method.next_batch(state)
  _, metrics = make_step(policy()[0], method.loss, tx)(state, batch)
  ratio = float(metrics['sampling/importance_ratio'])
  assert ratio == pytest.approx(info['sampling/kept_mass'], abs=1e-4)
  assert ratio < 0.99


def test_a_round_is_written_with_its_advantages(tmp_path):
  method, _ = build(tmp_path, epochs=2)
  batch, _ = method.next_batch(state_of(step=7)[0])
  path = tmp_path / 'rollouts' / '000000.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(rows) == 16
  found = {tuple(text_of(batch, row)): row for row in range(16)}
  for written in rows:
    row = found[written['prompt'], written['completion']]
    at = np.asarray(batch.mask)[row] > 0
    assert written['step'] == 7
    assert len(written['tokens']) == written['length'] == at.sum()
    text = ''.join(written['tokens'])
    assert text.startswith(written['completion'])
    want = np.asarray(batch.advantages)[row][at]
    np.testing.assert_allclose(written['advantages'], want, atol=1e-5)
    assert written['advantage'] == pytest.approx(want.mean(), abs=1e-5)
    assert max(map(abs, written['log_ratio'])) < 1e-4
    assert written['reward'] == pytest.approx(
      letters(written['prompt'], written['completion'], None), abs=1e-6
    )


def test_the_log_ratio_that_is_written_is_the_policy_less_the_sampler(tmp_path):
  """Its sign is what the page's colours mean. The sampler of `fixed` says −1, always."""
  batch, _ = fixed(tmp_path, [2, 3, 4, 5], [1, 0, 1, 0], epochs=2)
  ours = logp(policy()[1], batch)
  lines = (tmp_path / 'rollouts' / '000000.jsonl').read_text().splitlines()
  assert len(lines) == 4
  for row, line in enumerate(lines):
    want = ours[row][np.asarray(batch.mask)[row] > 0] + 1
    # float32 log-probs of up to 10 nats
    np.testing.assert_allclose(json.loads(line)['log_ratio'], want, atol=2e-5)
  assert np.abs(want).max() > 0.1


@pytest.mark.parametrize('ahead', [False, True])
@pytest.mark.parametrize('at', [1, 3, 4, 6])
def test_a_restored_run_goes_on_inside_the_round(tmp_path, at, ahead):
  options = dict(epochs=2, minibatches=2, sampling={'ahead': ahead, 'refills': 1})
  state, _ = state_of()
  method, _ = build(tmp_path / 'a', **options)
  for _ in range(at):
    method.next_batch(state)
  saved = method.data.get_state()
  want = [method.next_batch(state)[0] for _ in range(5)]
  other, _ = build(tmp_path / 'b', **options)
  other.data.set_state(saved)
  for batch in want:
    got, _ = other.next_batch(state)
    for name, x in batch._asdict().items():
      y = getattr(got, name)
      assert (x is None) == (y is None)
      if x is not None:
        np.testing.assert_array_equal(x, y, err_msg=name)
        assert x.dtype == y.dtype
  method.data.close()
  other.data.close()


def test_other_epochs_on_the_way_count_from_the_next_round(tmp_path):
  """The round that was under way ends as it began."""
  state, _ = state_of()
  method, _ = build(tmp_path / 'a', epochs=4)
  for _ in range(2):
    method.next_batch(state)
  other, _ = build(tmp_path / 'b', epochs=3)
  other.data.set_state(method.data.get_state())
  new = ['reward' in other.next_batch(state)[1] for _ in range(9)]
  assert np.flatnonzero(new).tolist() == [2, 5, 8]


def loss(**options):
  return functools.partial(grpo.loss, **options)


def chosen(function, **options):
  return functools.partial(function, **options)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      dict(sampling=dict(group=1)),
      r'group=1 must be 2 or more \(config.rollouts.group',
    ),
    (dict(sampling=dict(group=1), advantage=advantages.rloo), 'group=1 must be 2'),
    (dict(advantage=chosen(advantages.pass_at_k, k=5)), 'k=5 must be between 2'),
    (
      dict(loss=loss(kl_coef=0.1)),
      'kl_coef=0.1 needs log-probs of a reference .*: set config.algorithm.reference_eve',
    ),
    (dict(kl_in_reward=0.1), 'algorithm.reference_every=0'),
    (
      dict(advantage=chosen(advantages.reinforce_plus_plus, kl_coef=0.1)),
      'algorithm.reference_every=0',
    ),
    (dict(minibatches=3), 'rollouts.prompts=4 a multiple of minibatches'),
    (dict(epochs=0), 'epochs=0'),
    (dict(minibatches=0), 'minibatches=0'),
    (dict(reference_every=-1), 'reference_every=-1'),
    (dict(kl_in_reward=-0.1, reference_every=0), 'kl_in_reward=-0.1'),
    (
      dict(
        drop_equal=True, sampling=dict(group=1), advantage=advantages.batch_whitened
      ),
      'drop_equal=True would drop all: rollouts.group=1',
    ),
    (dict(overlong_buffer=-1), 'overlong_buffer=-1'),
    (dict(overlong_buffer=6), 'overlong_buffer=6 must be in 0..rollouts.max_new_to'),
    (dict(loss=loss(aggregate='constant')), 'max_completion_length=None'),
    (dict(loss=loss(objective='ppo')), "objective='ppo'"),
  ],
)
def test_what_cannot_be_is_said_before_anything_is_sampled(tmp_path, options, message):
  with pytest.raises(ValueError, match=message) as caught:
    build(tmp_path, **options)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      dict(epochs=2, loss=loss(objective='reinforce')),
      "objective='reinforce' has no r",
    ),
    (dict(minibatches=2, loss=loss(objective='reinforce')), 'minibatches=2'),
    (dict(sampling=dict(ahead=True)), "sampler_correction='none' does not weigh that"),
  ],
)
def test_what_goes_off_policy_unweighed_is_said(tmp_path, options, message, capsys):
  method, _ = build(tmp_path, **options)
  method.data.close()
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  'options',
  [
    dict(loss=loss(objective='reinforce')),
    dict(epochs=2),
    dict(sampling=dict(ahead=True), loss=loss(sampler_correction='token_truncate')),
  ],
)
def test_what_is_weighed_needs_no_warning(tmp_path, options, capsys):
  method, _ = build(tmp_path, **options)
  method.data.close()
  assert 'warning' not in capsys.readouterr().err


def test_a_reference_makes_the_same_settings_right(tmp_path):
  """The refusals above are of the missing reference, not of the settings."""
  for options in (
    dict(loss=loss(kl_coef=0.1)),
    dict(kl_in_reward=0.1),
    dict(advantage=chosen(advantages.reinforce_plus_plus, kl_coef=0.1)),
  ):
    method, _ = build(tmp_path, reference_every=0, **options)
    batch, _ = method.next_batch(state_of(reference=other_policy())[0])
    assert np.abs(np.asarray(batch.ref_logp)).max() > 0
