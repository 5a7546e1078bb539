"""Collectives of programs whose traffic is known: written by hand, or counted by hand."""
# ruff: noqa: E501 (HLO has long lines)

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from educe import collectives
from educe.collectives import Array

# Two loops, one in the other; trips that the text says, that its condition says (with and
# without a fusion around it, not from 0), and that nobody knows.
NESTED = """HloModule nested, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[4,6])) -> (s32[], bf16[4,6]) {
  %p = (s32[]{:T(128)}, bf16[4,6]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[4,6]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %all-gather = bf16[4,24]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}, use_global_device_ids=true, metadata={op_name="jit(f)/layers/dot" stack_frame_id=7}
  ROOT %t = (s32[], /*index=1*/bf16[4,6]{1,0}) tuple(%i, %x)
}

%inner_condition (p: (s32[], bf16[4,6])) -> pred[] {
  %p = (s32[], bf16[4,6]{1,0}) parameter(0)
  %five = s32[] constant(5), metadata={op_name="jit(f)/while/cond"}
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

%less (a: s32[], b: s32[]) -> pred[] {
  %b = s32[] parameter(1)
  %a = s32[] parameter(0)
  ROOT %c = pred[] compare(%a, %b), direction=LT
}

%outer_condition (p: (s32[], bf16[4,6])) -> pred[] {
  %p = (s32[], bf16[4,6]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %four = s32[] constant(4)
  ROOT %wrapped = pred[] fusion(%i, %four), kind=kLoop, calls=%less
}

%outer (p: (s32[], bf16[4,6])) -> (s32[], bf16[4,6]) {
  %p = (s32[], bf16[4,6]{1,0}) parameter(0)
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %x = bf16[4,6]{1,0} get-tuple-element(%p), index=1
  %all-reduce = bf16[4,6]{1,0} all-reduce(%x), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %t = (s32[], bf16[4,6]{1,0}) tuple(%start, %all-reduce)
  ROOT %while.1 = (s32[], bf16[4,6]{1,0}) while(%t), condition=%inner_condition, body=%inner
}

%open (p: (s32[], bf16[4,6])) -> (s32[], bf16[4,6]) {
  %p = (s32[], bf16[4,6]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[4,6]{1,0} get-tuple-element(%p), index=1
  %start = (bf16[4,6]{1,0}, bf16[4,6]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %done = bf16[4,6]{1,0} collective-permute-done(%start)
  ROOT %t = (s32[], bf16[4,6]{1,0}) tuple(%i, %done)
}

%open_condition (p: (s32[], bf16[4,6])) -> pred[] {
  %p = (s32[], bf16[4,6]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %four = s32[] constant(4)
  %less.1 = pred[] compare(%i, %four), direction=LT
  ROOT %and = pred[] and(%less.1, %less.1)
}

ENTRY %main (x: bf16[4,6]) -> bf16[4,6] {
  %x = bf16[4,6]{1,0} parameter(0)
  %one = s32[] constant(1)
  %t = (s32[], bf16[4,6]{1,0}) tuple(%one, %x)
  %while.2 = (s32[], bf16[4,6]{1,0}) while(%t), condition=%outer_condition, body=%outer
  %while.3 = (s32[], bf16[4,6]{1,0}) while(%while.2), condition=%outer_condition, body=%outer, backend_config={"known_trip_count":{"n":"7"}}
  %while.4 = (s32[], bf16[4,6]{1,0}) while(%while.3), condition=%open_condition, body=%open
  ROOT %out = bf16[4,6]{1,0} get-tuple-element(%while.4), index=1
}
"""


def entry(*lines):
  return (
    'HloModule m, num_partitions=8\n\nENTRY %main (x: f32[16]) -> f32[16] {\n  '
    + ('\n  '.join(['%x = f32[16]{0} parameter(0)', *lines]) + '\n}\n')
  )


def test_what_lies_in_loops_runs_once_a_trip():
  gather, reduce, permute = collectives.read(NESTED)
  x, whole = Array('bf16', (4, 6)), Array('bf16', (4, 24))
  # From 1 to 4 and 7 times, and 5 times in each.
  assert gather[:6] == ('all-gather', (x,), (whole,), 4, 5 * (3 + 7), False)
  assert gather.where == 'jit(f)/layers/dot'
  assert gather.bytes == 50 * 3 * 48
  assert reduce[:6] == ('all-reduce', (x,), (x,), 2, 3 + 7, False)
  assert reduce.bytes == 10 * 48  # 2·(g − 1)/g = 1
  assert permute[:6] == ('collective-permute', (x,), (x,), 2, 1, True)
  assert collectives.total([gather, reduce, permute, reduce]) == {
    'all-gather': 7200,
    'all-reduce': 960,
    'collective-permute': 48,
  }


@pytest.mark.parametrize(
  ('written', 'group'),
  [
    ('{{0,2,4,6},{1,3,5,7}}', 4),
    ('{}', 8),
    ('[4,2]<=[8]', 2),
    ('[2,4]<=[4,2]T(1,0)', 4),
    ("mesh['a'=4,'b'=2] {'a'}", 4),
    ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0','axis_1'}", 8),
    ("mesh['a'=8] {'a':(2)4}", 4),
    ("mesh['a'=8] {}", 1),
  ],
)
def test_a_group_however_it_is_written(written, group):
  line = (
    f'ROOT %r = f32[2] reduce-scatter(%x), replica_groups={written}, dimensions={{0}}'
  )
  (found,) = collectives.read(entry(line))
  assert found.group == group
  assert found.outs == (Array('f32', (16 // group,)),)
  assert found.bytes == 64 * (group - 1) / group


def test_of_what_runs_beside_other_work_only_the_start_counts():
  text = """HloModule m, num_partitions=4

%begin (x: bf16[8]) -> bf16[32] {
  %x = bf16[8]{0} parameter(0)
  ROOT %g = bf16[32]{0} all-gather(%x), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
}

%go_on (x: bf16[8]) -> bf16[32] {
  %x = bf16[8]{0} parameter(0)
  ROOT %g = bf16[32]{0} all-gather(%x), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

%all-reduce-scatter.3 (x: bf16[8]) -> bf16[2] {
  %x = bf16[8]{0} parameter(0)
  %r = bf16[8]{0} all-reduce(%x), channel_id=6, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %part = bf16[2]{0} dynamic-slice(%r, %x), dynamic_slice_sizes={2}
}

%wrapped (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  ROOT %a = bf16[8]{0} all-to-all(%x), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  %s = bf16[32]{0} fusion(%x), kind=kCustom, calls=%begin
  %m = bf16[32]{0} fusion(%x), kind=kCustom, calls=%go_on
  %r = bf16[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3
  %t = ((bf16[8]{0}), bf16[8]{0}, u32[]) async-start(%x), calls=%wrapped
  %u = ((bf16[8]{0}), bf16[8]{0}, u32[]) async-update(%t), calls=%wrapped
  %v = bf16[8]{0} async-done(%u), calls=%wrapped
  %y = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %z = bf16[32]{0} all-gather-done(%y)
}
"""
  found = collectives.read(text)
  sent = [(x.op, x.outs[0].shape, x.times, x.bytes) for x in found]
  assert sent == [
    ('all-gather', (32,), 1, 48),
    ('reduce-scatter', (2,), 1, 12),
    ('all-to-all', (8,), 1, 12),
    ('all-gather', (32,), 1, 48),
  ]


def test_a_loop_that_does_two_iterations_at_a_time():
  """As TPUs' rings of products have it: of 9 there are 5 trips."""
  counted = NESTED.replace('%five = s32[] constant(5)', '%five = s32[] constant(9)')
  twice = counted.replace(
    'ROOT %t = (s32[], /*index=1*/bf16[4,6]{1,0}) tuple(%i, %x)',
    '%two = s32[] constant(2)\n  %next = s32[] add(%i, %two)\n'
    '  ROOT %t = (s32[], /*index=1*/bf16[4,6]{1,0}) tuple(%next, %x)',
  )
  assert [collectives.read(text)[0].times for text in (counted, twice)] == [90, 50]


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no HLO module'):
    collectives.read('module @jit_f { }')


@pytest.mark.parametrize(
  ('operand', 'sent'),
  [
    ('%x', 64),
    ('x', 64),  # names without a sign
    ('f32[16]{0:T(8,128)} %x', 64),  # the long form
    ('f32[2,4]{1,0} %elsewhere', 32),  # described beside it alone
    ('/*index=5*/%x', 64),
  ],
)
def test_operands_however_they_are_written(operand, sent):
  line = (
    f'ROOT %r = f32[16] collective-permute({operand}), source_target_pairs={{{{0,1}}}}'
  )
  (found,) = collectives.read(entry(line))
  assert found.bytes == sent


@pytest.mark.parametrize(
  'line',
  [
    'ROOT %r = f32[16] all-reduce(%gone), replica_groups={}',
    'ROOT %r = f32[16] all-reduce(%x, %gone), replica_groups={}',
    'ROOT %r = f32[16] while(%x), condition=%gone, body=%gone',
  ],
)
def test_what_a_text_does_not_describe_is_one_line(line):
  with pytest.raises(ValueError, match=r"'gone'.* give the whole text") as caught:
    collectives.read(entry(line))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    ('compare(%i, %five)', 'compare(%elsewhere, %five)'),
    ('compare(%i, %five)', 'compare(%i, %elsewhere)'),
    ('%five = s32[] constant(5)', '%five = s32[] copy(%elsewhere)'),
    ('ROOT %less = pred[] compare', '%less = pred[] compare'),
  ],
)
def test_of_a_loop_whose_end_is_elsewhere_one_trip_is_counted(old, new):
  assert old in NESTED
  gather, *_ = collectives.read(NESTED.replace(old, new))
  assert (gather.times, gather.open) == (3 + 7, True)


def test_a_start_that_is_elsewhere_is_zero():
  text = NESTED.replace('while(%t), condition=%outer', 'while(%gone), condition=%outer')
  gather, *_ = collectives.read(text)
  assert gather.times == 5 * (4 + 7)


def test_of_a_bounded_dimension_the_most_is_sent():
  """As HLO prints a dimension whose size is known when the program runs."""
  lines = (
    '%y = f32[<=4,2]{1,0} parameter(1)',
    'ROOT %r = f32[<=4,2]{1,0} all-reduce(%y), replica_groups={}, to_apply=%add',
  )
  (found,) = collectives.read(entry(*lines))
  assert found.ins == (Array('f32', (4, 2)),)
  assert found.bytes == 2 * 7 / 8 * 32


def test_an_attribute_may_have_line_breaks():
  """As kernels' metadata do, and what follows is still of the instruction."""
  broken = (
    '%y = f32[16]{0} collective-permute(%x), frontend_attributes={kernel_metadata={\n'
    '"xprof_metadata":"{\\"block_q\\": 256}"\n}}, source_target_pairs={{0,1}}, '
    'metadata={op_name="jit(f)/turn" stack_frame_id=10}',
    'ROOT %r = f32[16]{0} add(%y, %x)',
  )
  (found,) = collectives.read(entry(*broken))
  assert (found.group, found.where) == (1, 'jit(f)/turn')


def test_sizes_of_what_is_not_a_float():
  assert Array('pred', (3,)).bytes == 3
  assert Array('s4', (3, 2)).bytes == 3
  assert Array('f8e4m3fn', (5,)).bytes == 5
  assert Array('token', ()).bytes == 0
  assert str(Array('bf16', (2, 3))) == 'bf16[2,3]'


def test_weights_gathered_at_every_layer_of_a_real_program(mesh_of):
  """Six layers of [64, 64], split over four: gathered in both passes, summed in one."""
  mesh = mesh_of(1, 4, 2)

  def loss(weights, x):
    def layer(x, w):
      x = jnp.tanh(x @ w)
      return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P('fsdp'))), None

    return jax.lax.scan(layer, x, weights)[0].sum()

  def like(shape, *axes):
    sharding = NamedSharding(mesh, P(*axes))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

  weights = like((6, 64, 64), None, 'fsdp')
  step = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
  text = step.lower(weights, like((32, 64), 'fsdp')).compile().as_text()
  found = collectives.read(text)
  part, whole = Array('f32', (16, 64)), Array('f32', (64, 64))
  gathers = [x for x in found if x.op == 'all-gather']
  assert {(x.ins, x.outs, x.group, x.times) for x in gathers} == {
    ((part,), (whole,), 4, 6)
  }
  # The last layer's weights are not read again for the gradient of the first's input.
  assert len(gathers) == 2
  summed = [x for x in found if whole in x.ins]
  assert [(x.group, x.times) for x in summed] == [(4, 6)]
  assert collectives.total(gathers)['all-gather'] == 2 * 6 * 3 * part.bytes


def test_collectives_that_are_written_out(mesh_of):
  mesh = mesh_of(1, 4, 2)

  def here(x):
    def turn(_, x):
      return jax.lax.ppermute(x, 'fsdp', [(0, 1), (1, 2), (2, 3), (3, 0)])

    x = jax.lax.psum_scatter(x, 'fsdp', tiled=True)
    x = jax.lax.all_to_all(x, 'tensor', 0, 0, tiled=True)
    return jax.lax.psum(jax.lax.fori_loop(0, 3, turn, x), ('fsdp', 'tensor'))

  each = jax.jit(jax.shard_map(here, mesh=mesh, in_specs=P(), out_specs=P()))
  x = jax.ShapeDtypeStruct((32, 4), jnp.float32, sharding=NamedSharding(mesh, P()))
  found = collectives.read(each.lower(x).compile().as_text())
  sent = {x.op: (x.group, x.times, x.bytes) for x in found}
  part = 8 * 4 * 4
  assert sent == {
    'reduce-scatter': (4, 1, 32 * 4 * 4 * 3 / 4),
    'all-to-all': (2, 1, part / 2),
    'collective-permute': (8, 3, 3 * part),
    'all-reduce': (8, 1, part * 2 * 7 / 8),
  }


BRANCHES = """HloModule m, num_partitions=2

%yes (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  ROOT %r = f32[16]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

%no (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  ROOT %p = f32[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (x: f32[16], i: s32[]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %c = f32[16]{0} conditional(%i, %x, %x), branch_computations={%yes, %no}
}
"""


def test_both_branches_of_a_conditional_count():
  assert [x.op for x in collectives.read(BRANCHES)] == [
    'all-reduce',
    'collective-permute',
  ]
  named = 'true_computation=%yes, false_computation=%no'
  text = BRANCHES.replace('branch_computations={%yes, %no}', named)
  assert [x.times for x in collectives.read(text)] == [1, 1]
