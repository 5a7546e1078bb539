"""What a step moves between devices: what its layout asks for, and not a tensor more.

Bytes are those of the compiled program (collectives.py), bounded by arithmetic on the
model's sizes: each bound is what the layout must move, of which the program may move a
part. Loops over layers count as often as they run.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest

from educe import collectives, sharding
from educe.losses import dpo, grpo, ppo, sft
from educe.models import policy, presets, value_head
from educe.rollouts import slots
from educe.rollouts.draw import Settings
from educe.training import optimizer
from educe.training.step import init_state, make_step
from educe.types import Batch

# No two of these sizes are the same, nor any product that a layer holds.
B, T, V, D, L, F = 16, 200, 2560, 96, 6, 160
SIZES = dict(vocab_size=V, dim=D, layers=L, heads=8, kv_heads=8, head_dim=8, ffn=F)
MODEL = policy.build(dataclasses.replace(presets.debug, **SIZES))
MIXTURE = policy.build(dataclasses.replace(presets.debug_moe, **SIZES))
PARAMS = 4 * policy.count(policy.shapes(MODEL.architecture))  # bytes
LOSSES = {
  'sft': (sft.loss, ()),
  'grpo': (grpo.loss, ('sampler_logp', 'old_logp', 'advantages')),
  'dpo': (dpo.loss, ('ref_logp',)),
  'ppo': (
    ppo.loss,
    ('sampler_logp', 'old_logp', 'advantages', 'returns', 'old_values'),
  ),
}
SMALL = 1e5  # bytes of scalars, norms, statistics of tokens


def moved(mesh, name, model=MODEL):
  """Every collective of the compiled step."""
  loss, fields = LOSSES[name]
  tx = optimizer.make(10, learning_rate=1e-3)
  params = model.init(jax.random.key(0))
  if name == 'ppo':
    model, params = value_head.attach(model=model, params=params)
  params = sharding.place(params, model.axes, mesh)
  state = sharding.replicate_rest(init_state(params, tx, jax.random.key(0)), mesh)
  where = jax.tree.map(lambda x: x.sharding, state)
  zeros = np.zeros((B, T), np.float32)
  batch = Batch(np.zeros((B, T), np.int32), zeros + 1, **dict.fromkeys(fields, zeros))
  batch = sharding.place_batch(batch, mesh)
  step = make_step(model, loss, tx, state_shardings=where)
  return collectives.read(step.lower(state, batch).compile().as_text())


def check_none_is_of_logits(found):
  """Nor of an eighth of them, whichever way they are cut."""
  for each in found:
    for array in (*each.ins, *each.outs):
      assert math.prod(array.shape) < B * T * V / 8, str(each)


@pytest.mark.parametrize('name', ['sft', 'grpo'])
def test_copies_exchange_gradients_alone(mesh_of, name):
  found = moved(mesh_of(8), name)
  assert {x.op for x in found} == {'all-reduce'}
  sent = collectives.total(found)['all-reduce']
  once = 2 * 7 / 8 * PARAMS
  assert 0.99 * once <= sent <= once + SMALL
  check_none_is_of_logits(found)


@pytest.mark.parametrize('name', list(LOSSES))
def test_parts_of_params_are_gathered_for_each_pass(mesh_of, name):
  """Once forward, once backward; gradients are summed once. Activations stay."""
  found = moved(mesh_of(1, 8), name)
  sent = collectives.total(found)
  assert sent['all-gather'] <= 2 * 7 / 8 * PARAMS + SMALL
  # Where a compiler has no reduce-scatter it sums whole gradients: twice what it must.
  summed = sent.get('all-reduce', 0) + 2 * sent.get('reduce-scatter', 0)
  assert summed <= 2 * 7 / 8 * PARAMS + SMALL
  # Looked up by width, handed out by row, and back.
  rest = sum(sent.values()) - sent['all-gather'] - summed
  assert rest <= 3 * B * T * D * 4 / 8
  check_none_is_of_logits(found)


@pytest.mark.parametrize('name', ['sft', 'grpo'])
def test_parts_of_a_width_exchange_activations_alone(mesh_of, name):
  """A sum after attention and one after the MLP; backward one for each product that reads
  what was whole (query, key, value; gate, up)."""
  found = moved(mesh_of(1, 1, 8), name)
  activation = B * T * D * 4
  assert {x.op for x in found} == {'all-reduce'}
  sums = L * (2 + 5) + 2  # and of the embedding, and of what the head gives back
  sent = collectives.total(found)['all-reduce']
  assert sent <= sums * 2 * 7 / 8 * activation + SMALL
  weights = {x.shape for x in jax.tree.leaves(policy.shapes(MODEL.architecture))}
  for each in found:
    for array in each.ins:
      assert array.shape not in weights
  check_none_is_of_logits(found)


def test_all_three_move_the_sum_of_their_parts(mesh_of):
  found = moved(mesh_of(2, 2, 2), 'grpo')
  activation = B * T * D * 4 / 4  # of a device
  sent = collectives.total(found)
  bound = (L * (2 + 5) + 2) * 2 * 1 / 2 * activation  # over tensor
  bound += 2 * 3 / 4 * PARAMS / 2 * 2  # sums of gradients: over data, and over fsdp
  assert sent['all-reduce'] <= bound + SMALL
  assert sent['all-gather'] <= 2 * 1 / 2 * PARAMS / 2 + SMALL
  assert sent['reduce-scatter'] <= 1 / 2 * D * V * 4 / 2  # the head's, over fsdp
  assert sent['all-to-all'] <= 2 * 1 / 2 * activation  # looked up by width, and back
  rest = sum(sent.values()) - sum(
    sent[op] for op in ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all')
  )
  assert rest <= SMALL
  check_none_is_of_logits(found)


@pytest.mark.parametrize('fsdp', [1, 2])
def test_parts_of_the_experts_exchange_rows_and_parts_of_them_weights(mesh_of, fsdp):
  """Rows of all who share the experts to each, and its sums back, forward and backward;
  of the experts' weights and gradients what lies over fsdp, as of a dense model's."""
  expert = 4 // fsdp
  found = moved(mesh_of(2, fsdp, expert=expert), 'sft', MIXTURE)
  sent = collectives.total(found)
  a = MIXTURE.architecture
  rows = B // 8 * T * (D + 2 * a.experts_per_token) * 4 * (expert - 1)  # of a device
  experts = L * a.experts * 3 * D * F * 4 / expert  # bytes of those that it has
  others = 4 * policy.count(policy.shapes(a)) - experts * expert
  part = (fsdp - 1) / fsdp
  assert sent['all-gather'] <= 2 * L * rows + 2 * part * (experts + others) + SMALL
  head = D * V * 4
  assert sent['reduce-scatter'] <= 2 * L * rows + part * (experts + head) + SMALL
  sums = 2 * (
    experts / fsdp / 2 + 7 / 8 * others
  )  # over data; over all that share them
  assert sent['all-reduce'] <= sums + SMALL
  check_none_is_of_logits(found)


def test_the_sampler_gathers_weights_once_and_no_cache(mesh_of):
  mesh = mesh_of(2, 2, 2)
  params = sharding.place(MODEL.init(jax.random.key(0)), MODEL.axes, mesh)
  functions = slots.Functions(MODEL.head, MODEL.init_cache, MODEL.decode)
  rows, width, room, many = 16, 64, 64, 8
  each, ids = np.zeros(rows, np.int32), np.zeros((many, width), np.int32)
  entries = slots.Entries(
    ids, ids[:, 0], np.int32(many), each, each, each, each.astype(np.uint32)
  )
  with jax.set_mesh(mesh):
    how = dict(model=functions, specs=slots.layout(params))
    ready = slots.prepare.lower(params, **how).compile()
    weights = slots.prepare(params, **how)
    state = slots.empty(model=functions, rows=rows, width=width, room=room)
    read = slots.enter.lower(weights.params, state, entries, model=functions).compile()
    settings = Settings(1.0, None, None, None)
    bounds = np.int32(0), np.int32(room)
    given = jax.random.key(0), settings, np.zeros(1, np.int32), None, *bounds
    how = dict(model=functions, width=width)
    drawn = slots.advance.lower(weights, state, *given, **how).compile()
  once = collectives.total(collectives.read(ready.as_text()))
  assert sum(once.values()) <= 1 / 2 * PARAMS / 2 + SMALL  # over fsdp
  held = {x.shape for x in jax.tree.leaves((weights, state.cache))}
  held |= {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(weights)}
  for text in (read.as_text(), drawn.as_text()):
    found = collectives.read(text)
    assert found
    for x in found:
      assert not held & {array.shape for array in (*x.ins, *x.outs)}, str(x)
  # Sums after attention, after the MLP, and of the embedding; a prompt may fill slots of
  # any device; and of a token the noise of what is drawn, whose vocabulary is in parts.
  sums = (2 * L + 1) * D * 4  # bytes of a token
  sent = collectives.total(collectives.read(read.as_text()))
  assert sent['all-reduce'] <= many // 4 * width * sums + SMALL / 10
  assert (
    sent['all-gather'] <= 3 / 4 * 2 * L * many * width * 8 // 2 * 8 * 4 + SMALL / 10
  )
  sent = collectives.total(collectives.read(drawn.as_text()))
  assert sum(sent.values()) <= rows // 4 * sums + SMALL / 10


def test_the_tokens_of_a_row_exchange_keys_and_values_alone(mesh_of):
  found = moved(mesh_of(2, context=4), 'sft')
  sent = collectives.total(found)
  keys = B // 2 * T // 4 * 8 * 8 * 4  # of a device, and as many values
  # Round once forward; made again and differentiated, which goes round both ways.
  assert sent['collective-permute'] <= L * 3 * 2 * 3 * keys + SMALL
  assert sent.get('all-gather', 0) <= SMALL
  sums = 2 * 3 / 4 + 2 * 1 / 2  # of gradients, over one axis and then the other
  assert sent['all-reduce'] <= sums * PARAMS + SMALL
  check_none_is_of_logits(found)
