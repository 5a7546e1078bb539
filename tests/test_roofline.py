"""FLOPs beside those that XLA counts, and the floors of a program that was made up."""
# ruff: noqa: E501 (HLO has long lines)

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe import roofline
from educe.models import lora, parts, policy, presets, value_head
from educe.roofline import Reading, Work

SMALL = dataclasses.replace(presets.debug, dim=64, ffn=256, vocab_size=1024)
TEXT = """HloModule m, num_partitions=8

%body (p: (s32[], bf16[500000])) -> (s32[], bf16[500000]) {
  %p = (s32[], bf16[500000]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[500000]{0} get-tuple-element(%p), index=1
  %g = bf16[4000000]{0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %t = (s32[], bf16[500000]{0}) tuple(%i, %x)
}

%less (p: (s32[], bf16[500000])) -> pred[] {
  %p = (s32[], bf16[500000]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[500000]) -> bf16[500000] {
  %x = bf16[500000]{0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[500000]{0}) tuple(%zero, %x)
  %w = (s32[], bf16[500000]{0}) while(%t), condition=%less, body=%body
  %k = bf16[500000]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/logprob_moments/pallas_call"}
  ROOT %out = bf16[500000]{0} get-tuple-element(%w), index=1
}
"""


def counted(function, *shapes):
  lowered = jax.jit(function).lower(*shapes)
  return lowered.compile().cost_analysis()['flops']


@pytest.mark.parametrize('tied', [False, True])
def test_flops_are_those_that_xla_counts(tied):
  """Of the forward pass, whose products XLA counts one by one when no loop hides them."""
  a = dataclasses.replace(SMALL, tied=tied)
  model, rows, length = policy.build(a), 2, 64

  def logits(params, tokens):
    return model.hidden(params, tokens)[0] @ model.head(params).matrix

  params, tokens = policy.shapes(a), jax.ShapeDtypeStruct((rows, length), jnp.int32)
  # XLA multiplies all pairs of tokens, where half of them count.
  pairs = rows * length**2
  ours = roofline.forward(model, params, Reading(rows * length, pairs, rows * length))
  # The rest of what it counts: norms, rotations, softmax.
  assert ours < counted(logits, params, tokens) < 1.2 * ours
  full = roofline.full(rows, length)
  assert full == Reading(rows * length, pairs / 2, rows * length)
  once = roofline.forward(model, params, full)
  assert roofline.update(model, params, full) == Work(3 * once, 0, full.tokens)


def built(adapter=None, trunk=None):
  """(model, params as shapes) of one layer, which no loop hides from XLA."""
  made = {}

  def start():
    model = policy.build(dataclasses.replace(SMALL, layers=1))
    params = model.init(jax.random.key(0))
    if adapter:
      model, params = lora.attach(model, params, **adapter)
    if trunk:
      model, params = value_head.attach(model, params, trunk=trunk)
    made['model'] = model
    return params

  params = jax.eval_shape(start)
  return made['model'], params


# Of one layer: its weights, and those that a token is multiplied with in its attention.
ATTENTION = 64 * 8 * (2 * 4 + 2 * 2)
LAYER = ATTENTION + 3 * 64 * 256
HEAD = 64 * 1024
# A of [inputs, 8] and B of [8, outputs] of each of its seven matrices.
ADAPTER = 8 * (2 * (64 + 32) + 2 * (64 + 16) + 3 * (64 + 256))


@pytest.mark.parametrize(
  ('options', 'freeze', 'a_token', 'of_pairs'),
  [
    ({}, (), 6 * (LAYER + HEAD), 3),
    ({}, ('^embedding',), 6 * (LAYER + HEAD), 3),
    ({}, ('attention/',), 6 * (LAYER + HEAD) - 2 * ATTENTION, 3),
    ({}, ('^head',), 6 * LAYER + 4 * HEAD, 3),
    ({}, ('^layers', '^embedding', '^norm'), 2 * LAYER + 4 * HEAD, 1),
    ({}, ('^layers', '^embedding', '^head'), 2 * LAYER + 4 * HEAD, 1),
    ({'adapter': {'rank': 8}}, (lora.FROZEN,), 4 * (LAYER + HEAD) + 6 * ADAPTER, 3),
    ({'trunk': 'shared'}, (), 6 * (LAYER + HEAD + 64), 3),
    ({'trunk': 'separate'}, (), 6 * (2 * LAYER + HEAD + 64), 6),
    ({'trunk': 'separate'}, ('^(?!value)',), 8 * LAYER + 2 * HEAD + 6 * 64, 4),
    (
      {'adapter': {'rank': 8}, 'trunk': 'separate'},
      (lora.FROZEN,),
      4 * (2 * LAYER + HEAD) + 6 * (2 * ADAPTER + 64),
      6,
    ),
  ],
)
def test_what_is_frozen_has_no_gradient_of_its_own(options, freeze, a_token, of_pairs):
  """By hand, and beside what XLA counts of the gradient's program."""
  model, params = built(**options)
  rows, length = 2, 64
  read = Reading(rows * length, rows * length**2, rows * length)
  trained, frozen = parts.split(params, freeze)
  work = roofline.update(model, params, read, trained)
  assert work.flops == a_token * read.tokens + of_pairs * 4 * 4 * 8 * read.pairs

  def loss(trained, frozen, tokens):
    whole = parts.over(frozen, trained)
    states, _ = model.hidden(whole, tokens)
    total = jnp.square(states @ model.head(whole).matrix).sum()
    if model.values is not None:
      total += jnp.square(model.values(whole, states, tokens)[0]).sum()
    return total

  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  xla = counted(jax.value_and_grad(loss), trained, frozen, tokens)
  assert 0.99 * work.flops < xla < 1.25 * work.flops  # norms, rotations, softmax


def test_a_quantized_base_is_multiplied_as_if_it_were_whole():
  plain, shapes = built(adapter={'rank': 8})
  stored, less = built(adapter={'rank': 8, 'base': 'nf4'})
  read = roofline.full(2, 64)
  ours, theirs = (
    roofline.update(model, params, read, parts.split(params, (lora.FROZEN,))[0])
    for model, params in ((stored, less), (plain, shapes))
  )
  assert ours == theirs


def test_without_log_probs_there_is_no_head_and_a_teacher_only_reads():
  model, params = built(trunk='shared')
  read = roofline.full(2, 64)
  head = 2 * HEAD * read.tokens
  whole = roofline.update(model, params, read).flops
  assert roofline.update(model, params, read, scored=False).flops == whole - 3 * head
  a = dataclasses.replace(SMALL, dim=32, layers=3)
  teacher = policy.build(a), policy.shapes(a)
  more = roofline.update(model, params, read, teacher=teacher).flops - whole
  assert more == roofline.forward(*teacher, read)


def test_rows_that_share_a_prompt_read_it_once():
  """Beside every pair of a query and a key that it sees, one by one; half of the diagonal
  is not counted."""
  prompts, start, group, length = 2, 5, 3, 4
  pairs = 0
  for _ in range(prompts):
    pairs += sum(1 for q in range(start) for k in range(q)) + start / 2
    for _ in range(group):
      pairs += length * start
      pairs += sum(1 for q in range(length) for k in range(q)) + length / 2
  found = roofline.forked(prompts, start, prompts * group, length)
  assert found == (prompts * start + 6 * length, pairs, 6 * length)


def test_what_is_computed_again_is_no_work():
  a = dataclasses.replace(SMALL, remat='full')
  model, params, read = policy.build(a), policy.shapes(a), roofline.full(2, 64)
  once = roofline.forward(model, params, read)
  head = 2 * a.dim * a.vocab_size * read.tokens
  work = roofline.update(model, params, read, tokens=100)
  assert work.flops == 3 * once
  assert work.redone == pytest.approx(once - head)
  assert work.tokens == 100
  # Where no gradient goes through the layers, they are not needed again.
  head_alone = parts.split(params, ('^(?!head)',))[0]
  assert roofline.update(model, params, read, head_alone).redone == 0


def compiled_to(text, **sizes):
  said = types.SimpleNamespace(
    argument_size_in_bytes=3e9,
    output_size_in_bytes=2e9,
    temp_size_in_bytes=7e9,
    alias_size_in_bytes=2e9,
    **sizes,
  )

  def as_text():
    if text is None:
      raise RuntimeError('cannot be printed')
    return text

  return types.SimpleNamespace(memory_analysis=lambda: said, as_text=as_text)


DEVICES = np.full(8, types.SimpleNamespace(device_kind='TPU v5 lite'))


def test_the_floors_are_the_formulas():
  work = Work(flops=6e13, redone=2e13, tokens=4096)
  said = roofline.report(compiled_to(TEXT), DEVICES, work, beside=3e9)
  assert said['peak_gb'] == 13  # what is donated is there once
  assert said['fits']
  floors = said['floors_seconds']
  assert floors['matmul'] == pytest.approx(8e13 / (8 * 197e12))
  assert floors['memory'] == pytest.approx((3e9 + 2e9 + 2 * 7e9) / 819e9)
  # Three trips, each of which sends seven times a million bytes.
  assert said['sent_gb'] == {'all-gather': pytest.approx(0.021)}
  assert floors['exchange'] == pytest.approx(21e6 / 200e9)
  assert (said['bound'], said['seconds']) == ('matmul', floors['matmul'])
  assert said['tokens_per_second'] == pytest.approx(4096 / floors['matmul'])
  assert said['mfu'] == pytest.approx(6 / 8)
  assert said['kernels'] == ['logprob']


def test_what_else_lies_there_and_the_compilers_own_peak_count():
  work = Work(flops=1.0, redone=0.0, tokens=1)
  more = roofline.report(compiled_to(TEXT), DEVICES, work, beside=6.5e9)
  assert not more['fits']
  more = roofline.report(compiled_to(TEXT, peak_memory_in_bytes=12e9), DEVICES, work)
  assert (more['peak_gb'], more['fits']) == (12, True)
  more = roofline.report(compiled_to(TEXT, peak_memory_in_bytes=1e9), DEVICES, work)
  assert more['peak_gb'] == 10


def test_a_cache_that_stays_where_it_is_is_not_written_anew():
  work = Work(flops=1.0, redone=0.0, tokens=1)
  said = roofline.report(compiled_to(TEXT), DEVICES, work, kept=True)
  assert said['floors_seconds']['memory'] == pytest.approx((3e9 + 14e9) / 819e9)


def test_a_program_that_cannot_be_printed_says_so():
  said = roofline.report(compiled_to(None), DEVICES, Work(1.0, 0.0, 1))
  assert said['sent_gb'] is None
  assert said['kernels'] is None
  assert set(said['floors_seconds']) == {'matmul', 'memory'}


# Lines of programs for TPUs, as libtpu prints them; of the kernels' bodies the beginning.
MOMENTS = """  %logprob_moments.1 = (f32[64,1]{1,0:T(8,128)}, f32[64,1]{1,0:T(8,128)}) custom-call(%param.11, %param.12, %copy.24), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[64,128]{1,0}, bf16[128,1024]{1,0}, s32[64,1]{1,0}}, frontend_attributes={kernel_metadata={}}, metadata={op_name="jit(f)/jvp()/shard_map/logprob_moments/pallas_call" stack_frame_id=27}, backend_config={"flag_configs":[],"custom_call_config":{"body":"TUzvUgFNTElS"}}
"""
SPLASH = r"""  %splash_mha_fwd_residuals.1 = (bf16[2,256,128]{2,1,0:T(8,128)(2,1)S(1)}, f32[2,4,256,128]{3,2,1,0:T(8,128)S(1)}) custom-call(%constant.3.clone.data_next_ref, %bitcast.9, /*index=5*/%iota.7.q_sequence_ref), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1,1]{2,1,0}, bf16[2,4,256,128]{3,2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 256, \"use_fused_bwd_kernel\": false}"
}}, metadata={op_name="jit(f)/jvp()/shard_map/vmap(static_sparsity_splash)/jit(_splash_attention)/splash_mha_fwd_residuals/splash_mha_fwd_residuals/pallas_call" stack_frame_id=6}, backend_config={"flag_configs":[],"custom_call_config":{"body":"TUzvUgFNTElS"}}
"""
PART = """  %get-tuple-element.10 = f32[64,1]{1,0:T(8,128)} get-tuple-element(%other.1), index=2, frontend_attributes={kernel_metadata={}}, metadata={op_name="jit(f)/jvp()/shard_map/logprob_moments/pallas_call" stack_frame_id=27}
"""
OTHER = MOMENTS.replace('logprob_moments', 'another')


@pytest.mark.parametrize(
  ('lines', 'found'),
  [
    (MOMENTS, ['logprob']),
    (SPLASH, ['attention']),
    (SPLASH + MOMENTS, ['logprob', 'attention']),
    # Without what JAX says of it, an instruction has its own name.
    (MOMENTS.replace('metadata={op_name', 'metadata={name'), ['logprob']),
    # What is called alike, and is none of them.
    (PART, []),
    (MOMENTS.replace('tpu_custom_call', 'Sharding'), []),
    (OTHER.replace('jit(f)', 'jit(f)/logprob_moments'), []),
    (OTHER.replace('"TUzvUgFNTElS"', '"splash_mha"'), []),
    (OTHER.replace('kernel_metadata={}', 'kernel_metadata={splash_mha}'), []),
  ],
)
def test_a_kernel_is_what_is_called_and_no_comment(lines, found):
  text = (
    'HloModule m, num_partitions=8\n\nFileNames\n1 "splash_mha.py"\n\n'
    'FunctionNames\n1 "logprob_moments"\n\nENTRY %main (x: f32[4]) -> f32[4] {\n'
    f'{lines}  ROOT %x = f32[4]{{0}} parameter(0)\n}}\n'
  )
  assert roofline.kernels(text) == found


def test_of_a_mixture_a_token_multiplies_with_its_own_experts_and_the_router():
  a = presets.debug_moe
  assert (a.experts_per_token, a.experts) == (2, 8)
  layer = a.dim * a.head_dim * (2 * a.heads + 2 * a.kv_heads)
  layer += 2 * 3 * a.dim * a.ffn + 8 * a.dim
  model, read = policy.build(a), Reading(tokens=10, pairs=0, scored=0)
  found = roofline.forward(model, policy.shapes(a), read)
  assert found == 2 * a.layers * layer * 10
