"""Which pairs are made of a round, and that a step learns from them."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe.algorithms import online_dpo as algorithm
from educe.data import tokenizer as tokenizers
from educe.environments import chain, reward_functions
from educe.losses import dpo
from educe.rollouts import judges, rounds
from educe.rollouts.http_client import EndpointError
from educe.rollouts.joining import joined
from educe.training import optimizer
from educe.training.step import init_state, make_step
from educe.types import Rollouts

WORDS = tokenizers.load(path=f'characters:{chain.ALPHABET}')
MODEL, PARAMS = toy.model(vocabulary=WORDS.vocab_size)
PARAMS = np.array(PARAMS)  # a step donates what lies on the device
NAN = float('nan')


def rollouts_of(rewards, group=4, width=5, tokens=None):
  rows = len(rewards)
  if tokens is None:
    tokens = np.arange(1, rows + 1, dtype=np.int32)[:, None] * np.ones((1, width), int)
  mask = np.zeros((rows, width), np.float32)
  mask[:, 2:4] = 1
  return Rollouts(
    np.asarray(tokens, np.int32),
    mask,
    np.zeros((rows, width), np.float32),
    np.ones(rows, np.int32),
    np.array(rewards, np.float32),
    group,
    [{'id': i // group, 'completion': str(i)} for i in range(rows)],
  )


def test_the_best_is_set_against_the_worst_of_each_prompt():
  rows, counts = algorithm.ends(rollouts_of([0, 3, -1, 2, 5, NAN, NAN, 4]))
  assert rows.tolist() == [1, 2, 4, 7]
  assert counts == {'kept': 2, 'ties': 0, 'unscored': 0}


def test_ties_and_what_is_not_scored_are_dropped_and_counted():
  rewards = [1, 1, NAN, 1] + [NAN, 2, NAN, NAN] + [0, 1, 0, 1] + [NAN] * 4
  rows, counts = algorithm.ends(rollouts_of(rewards))
  assert rows.tolist() == [9, 10]  # the first of the best, the last of the worst
  assert counts == {'kept': 1, 'ties': 1, 'unscored': 2}
  # Two rewards of the same tokens, as a noisy judge gives them, are no preference.
  same = rollouts_of([0, 1], group=2, tokens=np.ones((2, 5)))
  assert algorithm.ends(same)[1] == {'kept': 0, 'ties': 1, 'unscored': 0}


def test_against_the_reference_each_row_meets_its_own():
  ours, theirs = rollouts_of([1, 0, 1, NAN]), rollouts_of([0, 2, 1, 1], width=7)
  theirs = theirs._replace(tokens=theirs.tokens + 10)
  rows, counts = algorithm.against(joined(ours, theirs))
  assert rows.tolist() == [0, 4, 5, 1]
  assert counts == {'kept': 2, 'ties': 1, 'unscored': 1}


def by_loop(rewards, tokens, pairs):
  """(rows, counts) of pairs (best, worst), or None where too few were scored."""
  rows, counts = [], {'kept': 0, 'ties': 0, 'unscored': 0}
  for pair in pairs:
    if pair is None:
      counts['unscored'] += 1
    elif rewards[pair[0]] == rewards[pair[1]] or tokens[pair[0]] == tokens[pair[1]]:
      counts['ties'] += 1
    else:
      rows += pair
      counts['kept'] += 1
  return rows, counts


@pytest.mark.parametrize('group', [1, 2, 3, 5])
def test_the_pairs_are_those_of_a_loop_over_all_that_can_happen(group):
  rng = np.random.default_rng(group)
  rewards = rng.choice([0.0, 1.0, 2.0, NAN], 30 * group)
  tokens = rng.integers(0, 2, (30 * group, 2))
  rollouts, said = rollouts_of(rewards, group, 2, tokens), tokens.tolist()
  pairs = []
  for first in range(0, len(rewards), group):
    scored = [i for i in range(first, first + group) if rewards[i] == rewards[i]]
    best = max(scored, key=lambda i: rewards[i], default=None)
    worst = min(reversed(scored), key=lambda i: rewards[i], default=None)
    pairs.append([best, worst] if len(scored) > 1 else None)
  rows, counts = algorithm.ends(rollouts)
  assert (rows.tolist(), counts) == by_loop(rewards, said, pairs)

  half = len(rewards) // 2
  pairs = []
  for ours, theirs in zip(range(half), range(half, 2 * half), strict=True):
    a, b = rewards[[ours, theirs]]
    best_first = [ours, theirs] if a >= b else [theirs, ours]
    pairs.append(None if a != a or b != b else best_first)
  rows, counts = algorithm.against(rollouts)
  assert (rows.tolist(), counts) == by_loop(rewards, said, pairs)


def letters(prompt, completion, record):
  """Another reward for nearly every completion; prompts that begin with 0 are silent."""
  if prompt[0] == '0':
    return 0.25
  return sum((at + 1) * (ord(c) % 7) for at, c in enumerate(completion)) / 10


def source(letters=letters, prompts=4, group=4, judge=None, **changes):
  world = reward_functions.make(
    prompts=[{'id': f'{f}{s}', 'prompt': f'{f}{s}='} for f in '0123' for s in 'abcd'],
    functions={'letters': letters},
  )
  settings = dict(max_new_tokens=4, workers=0, show_every=0)
  return rounds.make(
    MODEL, WORDS, world, 0, judge, prompts=prompts, group=group,
    **(settings | changes),
  )  # fmt: skip


def build(run_dir, rollouts=None, loss=dpo.loss, **options):
  options = {'batch_size': 2, **options}
  place = lambda batch, shares=1: batch  # noqa: E731
  return algorithm.make(MODEL, rollouts or source(), loss, place, run_dir, **options)


def state_of(params=PARAMS, reference=PARAMS, step=0):
  tx = optimizer.make(99, name='sgd', learning_rate=1.0, schedule='constant')
  state = init_state(jnp.asarray(params), tx, jax.random.key(0))
  return state._replace(reference=reference, step=jnp.int32(step)), tx


def said(batch, row):
  """(prompt, completion) as the tokens say."""
  at = np.flatnonzero(np.asarray(batch.mask[row]))
  tokens = np.asarray(batch.tokens[row])
  first = [t for t in tokens[: at[0]] if t != WORDS.bos_id]
  ends = set(WORDS.eos_ids)
  return WORDS.decode(first), WORDS.decode([t for t in tokens[at] if t not in ends])


def logp(params, tokens):
  """In float64, from the table itself."""
  out = np.zeros(tokens.shape)
  for row, line in enumerate(np.asarray(tokens)):
    for t in range(1, len(line)):
      out[row, t] = toy.log_softmax(toy.logits(params, line[:t]))[line[t]]
  return out


@pytest.mark.parametrize('temperature', [1.0, 0.8])
def test_every_pair_is_of_one_prompt_and_its_better_half_comes_first(
  tmp_path, temperature
):
  """Through padding, shuffling and steps: recomputed from the rows' own tokens."""
  method = build(tmp_path, source(prompts=6, temperature=temperature), epochs=2)
  state, _ = state_of()
  batch, info = method.next_batch(state)
  steps = 2 * -(-int(info['pairs/kept']) // 2)
  batches = [batch, *(method.next_batch(state)[0] for _ in range(steps - 1))]
  assert info['pairs/kept'] + info['pairs/ties'] == 6
  assert info['pairs/ties'] >= 1
  passes = []
  for half in (batches[: steps // 2], batches[steps // 2 :]):
    pairs = []
    for batch, at in itertools.product(half, (0, 2)):
      if not batch.mask[at].any():
        assert not batch.mask[at + 1].any()
        continue
      (prompt, good), (other, bad) = said(batch, at), said(batch, at + 1)
      assert prompt == other
      assert letters(prompt, good, None) > letters(prompt, bad, None)
      rewards = [letters(prompt, x, None) for x in (good, bad)]
      np.testing.assert_allclose(batch.labels[at : at + 2], rewards, rtol=1e-6)
      pairs.append((prompt, good, bad))
    passes.append(pairs)
  assert len(passes[0]) == info['pairs/kept']
  assert sorted(passes[0]) == sorted(passes[1])
  scored = np.zeros(batch.tokens.shape)
  for row, line in enumerate(np.asarray(batch.tokens)):
    for t in range(1, len(line)):
      z = toy.logits(PARAMS, line[:t]) / temperature
      scored[row, t] = toy.log_softmax(z)[line[t]] * batch.mask[row, t]
  np.testing.assert_allclose(batch.ref_logp, scored, atol=1e-5)


def test_at_the_start_the_loss_is_ln_2_and_a_step_widens_the_margin(tmp_path):
  method = build(tmp_path)
  state, tx = state_of()
  step = make_step(MODEL, method.loss, tx, reference_every=0)
  batch, _ = method.next_batch(state)
  margins = []
  for _ in range(3):
    state, metrics = step(state, batch)
    margins.append(float(metrics['rewards/margins']))
    if len(margins) == 1:
      # Two float32 programs of log-probs of up to 10 nats; β = 0.1 of that.
      assert float(metrics['loss']) == pytest.approx(np.log(2), abs=1e-5)
  assert abs(margins[0]) < 1e-5
  assert margins[2] > margins[1] > 1e-3
  assert (method.group, method.rows, method.couples) == (2, 4, False)


def test_what_is_written_says_who_was_chosen(tmp_path):
  method = build(tmp_path, source(prompts=6))
  _, info = method.next_batch(state_of(step=7)[0])
  lines = (tmp_path / 'rollouts' / '000000.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert len(rows) == 24
  for side in (1, -1):
    assert sum(row['chosen'] == side for row in rows) == info['pairs/kept']
  for at in range(0, 24, 4):
    group = rows[at : at + 4]
    by_mark = {row['chosen']: row['reward'] for row in group}
    if 1 in by_mark:
      assert by_mark[1] == max(row['reward'] for row in group)
      assert by_mark[-1] == min(row['reward'] for row in group)
  assert {row['step'] for row in rows} == {7}


def test_xpo_sets_each_completion_against_one_of_the_reference(tmp_path):
  """α log π(ỹ) of the reference's sample and of nothing else, in the value and gradient."""
  alpha, beta = 0.03, 0.1
  rollouts = source(group=1, prompts=6)
  loss = functools.partial(dpo.loss, beta=beta)
  method = build(tmp_path, rollouts, loss, batch_size=6, alpha=alpha)
  other = np.random.default_rng(5).normal(size=PARAMS.shape).astype(np.float32)
  state, tx = state_of(reference=jnp.asarray(other))
  batch, info = method.next_batch(state)
  assert info['pairs/kept'] >= 3
  mask = np.asarray(batch.mask, np.float64)
  lines = (tmp_path / 'rollouts' / '000000.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row.get('reference', False) for row in rows] == [False] * 6 + [True] * 6
  # Who wrote what: by the transcripts, not by the code that marks it.
  theirs = {(r['prompt'], r['completion']) for r in rows[6:]}
  ours = {(r['prompt'], r['completion']) for r in rows[:6]}
  marks = np.zeros(len(mask))
  for row in range(len(mask)):
    if mask[row].any():
      text = said(batch, row)
      assert (text in theirs) != (text in ours)
      marks[row] = text in theirs
  assert 0 < marks[::2].sum() + marks[1::2].sum() == info['pairs/kept']
  np.testing.assert_allclose(
    batch.advantages, -alpha * marks[:, None] * mask, rtol=1e-6
  )
  pi = (logp(PARAMS, batch.tokens) * mask).sum(-1)
  ref = (logp(other, batch.tokens) * mask).sum(-1)
  np.testing.assert_allclose(
    (np.asarray(batch.ref_logp) * mask).sum(-1), ref, atol=2e-5
  )
  h = (pi - ref).reshape(-1, 2)
  there = mask.sum(-1).reshape(-1, 2).min(-1) > 0
  nll = np.log1p(np.exp(-beta * (h[:, 0] - h[:, 1])))
  want = (nll[there].sum() + alpha * (pi * marks).sum()) / there.sum()
  _, metrics = make_step(MODEL, method.loss, tx)(state, batch)
  assert float(metrics['loss']) == pytest.approx(want, rel=1e-5)
  bonus = alpha * (pi * marks).sum() / there.sum()
  assert float(metrics['xpo/bonus']) == pytest.approx(bonus, rel=1e-5)


def test_the_references_samples_are_the_references_own(tmp_path):
  """With a reference that always says the same, all of them do."""
  certain = np.full(PARAMS.shape, -30, np.float32)
  certain[:, WORDS.encode('b')[0]] = 30
  method = build(tmp_path, source(group=2), alpha=0.1)
  method.next_batch(state_of(reference=jnp.asarray(certain))[0])
  lines = (tmp_path / 'rollouts' / '000000.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert {r['completion'] for r in rows if r.get('reference')} == {'bbbb'}
  assert len({r['completion'] for r in rows if not r.get('reference')}) > 2


@pytest.mark.parametrize('taken', [1, 2, 5])
@pytest.mark.parametrize('alpha', [0.0, 0.1])
def test_a_restart_goes_on_with_the_same_batches(tmp_path, taken, alpha):
  def steps(method, count):
    out = []
    for _ in range(count):
      batch, _ = method.next_batch(state_of()[0])
      out.append([np.asarray(x).tolist() for x in (batch.tokens, batch.ref_logp)])
    return out

  whole, first, second = (build(tmp_path, epochs=2, alpha=alpha) for _ in range(3))
  want = steps(whole, 7)
  got = steps(first, taken)
  second.data.set_state(first.data.get_state())
  assert got + steps(second, 7 - taken) == want


@pytest.mark.parametrize('ahead', [False, True])
@pytest.mark.parametrize('failing', range(1, 7))
def test_a_judge_that_fails_once_costs_no_round(tmp_path, failing, ahead):
  """… on either half of one: what is saved then goes on as if it had not failed."""
  calls = []

  def judge(records, completions):
    calls.append(len(completions))
    if len(calls) == failing:
      raise EndpointError('down')
    return [letters('1', text, None) for text in completions]

  def method(folder):
    return build(tmp_path / folder, source(judge=judge, ahead=ahead), alpha=0.1)

  state = state_of(reference=jnp.asarray(PARAMS[::-1]))[0]

  def steps(method, count):
    made = (method.next_batch(state) for _ in range(count))
    return [[np.asarray(x).tolist() for x in batch[:2]] for batch, _ in made]

  calls += [0] * 100  # never fails
  whole = method('whole')
  want = steps(whole, 40)
  whole.data.close()
  calls.clear()
  first, got = method('parts'), []

  def go_on():
    while True:
      got.append(*steps(first, 1))

  with pytest.raises(EndpointError):
    go_on()
  second = method('parts')
  second.data.set_state(first.data.get_state())
  first.data.close()
  got += steps(second, 40 - len(got))
  second.data.close()
  assert got == want
  for path in (tmp_path / 'parts/rollouts').iterdir():
    other = tmp_path / 'whole/rollouts' / path.name
    assert path.read_text() == other.read_text()


@pytest.mark.parametrize('temperature', [0.7, 1.3])
def test_policy_and_reference_are_scored_at_the_temperature_of_the_samples(
  tmp_path, temperature
):
  method = build(tmp_path, source(temperature=temperature))
  state, tx = state_of()
  batch, _ = method.next_batch(state)
  step = make_step(MODEL, method.loss, tx, temperature=method.temperature)
  _, metrics = step(state, batch)
  assert abs(float(metrics['rewards/margins'])) < 1e-5
  assert float(metrics['loss']) == pytest.approx(np.log(2), abs=1e-5)


def test_a_reference_that_moves_is_read_anew_in_each_round(tmp_path):
  method = build(tmp_path, reference_every=3)
  assert method.reference_every == 3
  for scale in (1.0, 0.5):
    info = {}
    while 'pairs/kept' not in info:
      batch, info = method.next_batch(state_of(reference=scale * PARAMS)[0])
    want = logp(scale * PARAMS, batch.tokens) * batch.mask
    np.testing.assert_allclose(batch.ref_logp, want, atol=2e-5)


def test_a_round_without_a_pair_is_a_step_that_changes_nothing(tmp_path):
  method = build(tmp_path, source(lambda *_: 1.0))
  state, tx = state_of()
  batch, info = method.next_batch(state)
  assert (info['pairs/kept'], info['pairs/ties']) == (0, 4)
  assert batch.mask.shape[0] == method.rows == 4
  assert not batch.mask.any()
  after, metrics = make_step(MODEL, method.loss, tx)(state, batch)
  np.testing.assert_array_equal(after.params, PARAMS)
  assert float(metrics['grad_norm']) == 0
  assert (
    'pairs/kept' in method.next_batch(after)[1]
  )  # the next step has a round of its own


def test_losses_that_couple_rows_say_so(tmp_path):
  for variant, couples in (
    ('ipo', False),
    ('aot', True),
    ({'sft': 1.0, 'bco_pair': 1.0}, True),
  ):
    loss = functools.partial(dpo.loss, variant=variant)
    assert build(tmp_path, loss=loss).couples == couples
  free = functools.partial(dpo.loss, variant='simpo')
  method = build(tmp_path, loss=free, reference_every=None)
  assert method.next_batch(state_of(reference=None)[0])[0].ref_logp is None


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(batch_size=0), 'batch_size=0'),
    (dict(epochs=0), 'epochs=0'),
    (dict(reference_every=-1), r'algorithm.reference_every=-1 must be ≥ 0'),
    (dict(alpha=-0.1), r'algorithm.alpha=-0.1 must be a number ≥ 0'),
    (dict(alpha=0.1, reference_every=None), 'samples from the reference'),
    (dict(rollouts=source(group=1)), 'rollouts.group=1 gives no two'),
    (dict(reference_every=None), r'config.loss: dpo: .*needs log-probs of a reference'),
    (dict(loss=functools.partial(dpo.loss, beta=-1.0)), 'config.loss: dpo: beta=-1'),
    (dict(loss=functools.partial(dpo.loss, variant='kto')), "'kto' is of records='unp"),
    (
      dict(loss=functools.partial(dpo.loss, variant={'apo_zero_unpaired': 0.5})),
      "'apo_zero_unpaired' is of records='unpaired', and these are 'pairs'",
    ),
    (
      dict(
        alpha=0.1,
        rollouts=source(
          judge=judges.endpoint(url='http://localhost', model='m', style='pairwise')
        ),
      ),
      r"algorithm.alpha=0.1 sets .* compares .*: judge.style='scalar', or alpha=0",
    ),
  ],
)
def test_bad_input_is_said_before_anything_is_sampled(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    build(tmp_path, **options)
