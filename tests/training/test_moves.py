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
from educe.losses import dpo, grpo, sft
from educe.models import policy, presets
from educe.training import optimizer
from educe.training.step import init_state, make_step
from educe.types import Batch

# No two of these sizes are the same, nor any product that a layer holds.
B, T, V, D, L, F = 16, 200, 2560, 96, 6, 160
MODEL = policy.build(
  dataclasses.replace(
    presets.debug,
    vocab_size=V,
    dim=D,
    layers=L,
    heads=8,
    kv_heads=8,
    head_dim=8,
    ffn=F,
  )
)
PARAMS = 4 * policy.count(policy.shapes(MODEL.architecture))  # bytes
LOSSES = {
  'sft': (sft.loss, ()),
  'grpo': (grpo.loss, ('sampler_logp', 'old_logp', 'advantages')),
  'dpo': (dpo.loss, ('ref_logp',)),
}
SMALL = 1e5  # bytes of scalars, norms, statistics of tokens


def moved(mesh, name):
  """Every collective of the compiled step."""
  loss, fields = LOSSES[name]
  tx = optimizer.make(10, learning_rate=1e-3)

  def start():
    params = MODEL.init(jax.random.key(0))
    return init_state(params, tx, jax.random.key(0))

  def place(tree, where):
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
    )

  real = sharding.place(MODEL.init(jax.random.key(0)), MODEL.axes, mesh)
  real = sharding.replicate_rest(init_state(real, tx, jax.random.key(0)), mesh)
  where = jax.tree.map(lambda x: x.sharding, real)
  state = place(jax.eval_shape(start), where)
  zeros = np.zeros((B, T), np.float32)
  batch = Batch(np.zeros((B, T), np.int32), zeros + 1, **dict.fromkeys(fields, zeros))
  batch = sharding.place_batch(batch, mesh)
  step = make_step(MODEL, loss, tx, state_shardings=where)
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
  assert sum(sent.values()) <= 1.02 * (sent['all-reduce'] + sent['all-gather'])
  check_none_is_of_logits(found)


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
