import dataclasses

import jax
import numpy as np
import pytest
import toy

from educe.models import policy, presets
from educe.rollouts import slots as slots_lib
from educe.rollouts.draw import Settings


def entries(rows, width, chosen):
  """chosen: {slot: (prompt, seed)}"""
  out = slots_lib.Entries(
    prompts=np.zeros((rows, width), np.int32),
    lengths=np.zeros(rows, np.int32),
    real=np.int32(len(chosen)),
    slot=np.full(rows, rows, np.int32),
    prompt=np.zeros(rows, np.int32),
    token=np.zeros(rows, np.int32),
    seed=np.zeros(rows, np.uint32),
  )
  for index, (slot, (prompt, seed)) in enumerate(chosen.items()):
    out.prompts[index, : len(prompt) - 1] = prompt[:-1]
    out.lengths[index] = len(prompt) - 1
    out.slot[index], out.prompt[index] = slot, index
    out.token[index], out.seed[index] = prompt[-1], seed
  return out


@pytest.mark.parametrize('use', ['toy', 'decoder'])
def test_rows_that_enter_at_other_steps_read_their_own_tokens_alone(use):
  """Slots used again and again, the ring turned many times, against the whole row."""
  if use == 'toy':
    model, params = toy.model(vocabulary=16)
  else:
    model = policy.build(presets.debug)
    params = model.init(jax.random.key(1))
    params = {**params, 'head': params['head'] * 40}
  functions = slots_lib.Functions(model.head, model.init_cache, model.decode)
  weights = slots_lib.prepare(params, model=functions)
  rows, width, room = 3, 4, 6
  slots = slots_lib.empty(model=functions, rows=rows, width=width, room=room)
  rng, key, at_hand = np.random.default_rng(0), jax.random.key(3), {}
  vocabulary = weights.head.matrix.shape[0]
  eos = np.arange(0, vocabulary, 5, np.int32)
  lengths, begins = [], set()

  @jax.jit
  def logits(whole):
    return slots_lib.logits(weights.head, model.hidden(params, whole)[0])

  for _ in range(12):
    free = [slot for slot in range(rows) if slot not in at_hand]
    chosen = {
      slot: (rng.integers(0, vocabulary, rng.integers(1, 6)).tolist(), len(lengths))
      for slot in free
    }
    slots = slots_lib.enter(
      weights.params, slots, entries(rows, width, chosen), model=functions
    )
    begins.add(int(slots.step) % room)
    at_hand |= {slot: (*row, int(slots.step)) for slot, row in chosen.items()}
    slots = slots_lib.advance(
      weights,
      slots,
      key,
      Settings(0.8),
      eos,
      None,
      np.int32(rows - 1),
      np.int32(room),
      model=functions,
      width=width,
    )
    host = jax.device_get(slots._replace(cache=None))
    assert not host.live.all()
    for slot in np.flatnonzero(~host.live).tolist():
      prompt, _, began = at_hand.pop(slot)
      columns = (began + np.arange(host.drawn[slot])) % room
      tokens = host.tokens[slot, columns]
      ends = np.isin(tokens, eos)
      assert not ends[:-1].any()
      assert ends[-1] == host.stopped[slot]
      assert ends[-1] or len(tokens) == room
      whole = np.zeros((1, width + 1 + room), np.int32)
      whole[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
      x = np.asarray(logits(whole)[0], np.float64) / 0.8
      expected = toy.log_softmax(x)[np.arange(len(tokens)) + len(prompt) - 1, tokens]
      # float32, sums of another order
      np.testing.assert_allclose(host.logp[slot, columns], expected, atol=1e-4)
      lengths.append(len(tokens))
  assert len(set(lengths)) > 3
  assert len(begins) > 3


def the_middle_one(eos_ids):
  """Three slots, of which only the second had a row, of up to 5 tokens; it has ended."""
  model, table = toy.model(vocabulary=16)
  functions = slots_lib.Functions(model.head, model.init_cache, model.decode)
  weights = slots_lib.prepare(table, model=functions)
  slots = slots_lib.empty(model=functions, rows=3, width=4, room=5)
  slots = slots_lib.enter(
    table, slots, entries(3, 4, {1: ([3, 4], 7)}), model=functions
  )
  return slots_lib.advance(
    weights,
    slots,
    jax.random.key(0),
    Settings(),
    np.asarray(eos_ids, np.int32),
    None,
    np.int32(0),
    np.int32(5),
    model=functions,
    width=4,
  )


def test_free_slots_stay_as_they_are():
  slots = the_middle_one(eos_ids=[])
  assert slots.drawn.tolist() == [0, 5, 0]
  assert slots.step == 5
  assert not np.asarray(slots.logp)[[0, 2]].any()
  assert (np.asarray(slots.cache['positions'])[[0, 2]] == -1).all()


def test_what_a_slot_draws_after_its_end_ends_nothing():
  """It draws on beside those that live; an EOS then does not say that a row ended so."""
  slots = the_middle_one(eos_ids=range(16))  # whatever is drawn
  assert slots.drawn.tolist() == [0, 1, 0]
  assert slots.stopped.tolist() == [False, True, False]


@pytest.mark.parametrize('name', ['debug', 'debug_moe'])
def test_weights_are_kept_in_the_dtype_that_is_multiplied_in(name):
  """All but norms and routers, of which a step reads every digit; what is decoded stays."""
  wide = presets.get(name)
  model = policy.build(dataclasses.replace(wide, compute_dtype='bfloat16'))
  params = model.init(jax.random.key(0))
  functions = slots_lib.Functions(model.head, model.init_cache, model.decode)
  weights = slots_lib.prepare(params, model=functions)
  kept = {
    path[-1].key
    for path, x in jax.tree_util.tree_leaves_with_path(weights.params)
    if x.dtype == np.float32
  }
  assert kept == {'scale'} | ({'router'} if wide.experts else set())
  tokens, positions = np.full((2, 3), 7, np.int32), np.arange(3, dtype=np.int32)[None]
  given = model.init_cache(2, 4), tokens, np.repeat(positions, 2, 0), 0
  for a, b in zip(
    jax.tree.leaves(jax.jit(model.decode)(weights.params, *given)),
    jax.tree.leaves(jax.jit(model.decode)(policy.unstack(params), *given)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  # Nothing is made larger, and stays as exact as it was.
  narrow = jax.tree.map(lambda x: x.astype('bfloat16'), params)
  functions = functions._replace(head=policy.build(wide).head)
  found = slots_lib.prepare(narrow, model=functions)
  assert {x.dtype for x in jax.tree.leaves(found.params)} == {np.dtype('bfloat16')}
