"""Decoding in slots that are used again: the programs under the sampler.

B slots decode side by side. A slot's cache has W places for a prompt, then a ring of R for
what is decoded. Rows enter at different times but step together: at step s each writes
its key at the same place, s mod R, with a position of its own. R is the most that a row
may decode by the time that a ring comes round, so nothing that a living row still reads
is ever written over, and one `dynamic_update_slice` serves all rows.

Every step attends to all W + R places, written or not. So a long ring begins short and
grows when it is full for the first time (`rings`, `grow`): a few programs more, and the
early steps cost what short ones do.

A row enters with its prompt but for the last token in the cache; that one is the first
thing decoded. So entering draws nothing, and every draw is made in one place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from educe import sharding
from educe.models import lora
from educe.models.policy import narrowed, unstack
from educe.rollouts import draw as draw_lib
from educe.rollouts.draw import Settings, draw
from educe.types import Cache, Head, Params

FIRST_RING = 64
GROWTH = 4  # rings of 64, 256, 1,024, …: each is a program, compiled when it is reached


class Functions(NamedTuple):
  """The part of a Model that can be hashed, and so told apart by jit."""

  head: Callable[..., Head]
  init_cache: Callable[..., Cache]
  decode: Callable[..., tuple[Array, Cache]]


class Weights(NamedTuple):
  """Params made ready to be read at every step."""

  params: Params  # layers as a list: from a stack, every step would copy them
  # Its matrix as [V, D]: on a CPU few rows times a wide [D, V] take up to twice as long.
  head: Head


class Slots(NamedTuple):
  """B rows on their way. What was drawn at step s is in column s mod R."""

  step: Int[Array, '']
  cache: Cache
  token: Int[Array, 'B']  # to be read next
  position: Int[Array, 'B']  # its place in the row
  drawn: Int[Array, 'B']  # tokens drawn so far
  seed: Int[Array, 'B']
  matched: Int[Array, 'B']  # state of the stop-string automaton
  live: Bool[Array, 'B']
  stopped: Bool[Array, 'B']  # ended by itself
  tokens: Int[Array, 'B R']
  logp: Float[Array, 'B R']
  kept: Float[Array, 'B R']


Layout = tuple[PartitionSpec, ...]  # of each leaf of unstacked params


def layout(params: Params) -> tuple[Layout, ...]:
  """How `prepare` lays params of the mesh in use: as they lie, and then so that each device
  gets its part of the heads, of the MLP's width and of the vocabulary whole, for what lies
  over fsdp would be gathered at every step. () where there is none."""
  if sharding.in_use() is None:
    return ()
  base = lora.without(params)
  described = (
    unstack(x, part=_layer) for x in (base, sharding.whole_over('fsdp', base))
  )
  return tuple(
    tuple(x.sharding.spec for x in jax.tree.leaves(each)) for each in described
  )


@functools.partial(jax.jit, static_argnames=('model', 'specs'))
def prepare(
  params: Params,
  *,
  model: Functions,
  specs: tuple[Layout, ...] = (),
) -> Weights:
  """Once per params, not per step: they come in the dtype that is multiplied in.

  specs: `layout` of them
  """
  params = unstack(params)
  params = narrowed(params, jax.eval_shape(model.head, params).matrix.dtype)
  for each in specs:  # adapters are small, and lie as they like
    base = lora.without(params)
    where = jax.tree.unflatten(jax.tree.structure(base), each)
    params = {**params, **jax.tree.map(jax.lax.with_sharding_constraint, base, where)}
  head = model.head(params)
  return Weights(params, head._replace(matrix=head.matrix.T))


def _layer(stacked, _: int):
  """What describes a layer of stacked arrays."""
  where = stacked.sharding
  where = where.update(spec=PartitionSpec(*where.spec[1:]))
  return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype, sharding=where)


@functools.partial(jax.jit, static_argnames=('model', 'rows', 'width', 'room'))
def empty(*, model: Functions, rows: int, width: int, room: int) -> Slots:
  """`rows` free slots for prompts of up to `width` + 1 tokens and a ring of `room`."""
  zeros = jnp.zeros(rows, jnp.int32)
  no = zeros.astype(bool)
  blank = sharding.by_row(jnp.zeros((rows, room), jnp.float32))
  return Slots(
    step=jnp.int32(0),
    cache=model.init_cache(rows, room + width),
    token=zeros,
    position=zeros,
    drawn=zeros,
    seed=zeros.astype(jnp.uint32),
    matched=zeros,
    live=no,
    stopped=no,
    tokens=blank.astype(jnp.int32),
    logp=blank,
    kept=blank,
  )


def rings(most: int) -> tuple[int, ...]:
  """The sizes of the rings for rows of up to `most` tokens, one after another."""
  sizes = [min(FIRST_RING, most)]
  while sizes[-1] < most:
    sizes.append(min(GROWTH * sizes[-1], most))
  return tuple(sizes)


@functools.partial(jax.jit, static_argnames=('model', 'width', 'room'))
def grow(slots: Slots, *, model: Functions, width: int, room: int) -> Slots:
  """The same slots with a larger ring, `room`; theirs has not come round yet."""
  larger = empty(model=model, rows=len(slots.token), width=width, room=room)

  def copy(into, values):
    return jax.lax.dynamic_update_slice(into, values, (0,) * values.ndim)

  return jax.tree.map(copy, larger, slots)


class Entries(NamedTuple):
  """Rows to let in, as host arrays of one size always; n prompts, each for one slot or
  more."""

  prompts: Int[np.ndarray, 'n W']  # without the last token
  lengths: Int[np.ndarray, 'n']  # of what prompts holds, 0 or more
  real: int | np.int32  # how many entries are meant; the first ones
  slot: Int[np.ndarray, 'B']  # B, which is no slot, where not meant
  prompt: Int[np.ndarray, 'B']  # which of the n
  token: Int[np.ndarray, 'B']  # the prompt's last
  seed: Int[np.ndarray, 'B']


def nobody(many: int, width: int, rows: int) -> Entries:
  """Entries for up to `many` prompts and `rows` slots, of which none is meant yet."""
  return Entries(
    prompts=np.zeros((many, width), np.int32),
    lengths=np.zeros(many, np.int32),
    real=np.int32(0),
    slot=np.full(rows, rows, np.int32),
    prompt=np.zeros(rows, np.int32),
    token=np.zeros(rows, np.int32),
    seed=np.zeros(rows, np.uint32),
  )


@functools.partial(jax.jit, static_argnames='model', donate_argnames='slots')
def enter(params: Params, slots: Slots, entries: Entries, *, model: Functions) -> Slots:
  """Reads each prompt once and puts it into its slots, which must be free."""
  many, width = entries.prompts.shape
  room = slots.tokens.shape[1]
  column = jnp.arange(width, dtype=jnp.int32)[None]
  positions = jnp.where(column < entries.lengths[:, None], column, -1)
  _, fresh = model.decode(
    params, model.init_cache(many, width), entries.prompts, positions, 0
  )
  blank = model.init_cache(1, room + width)  # a row put in brings an empty ring with it

  def put(index, cache):
    def one(into, blank, read):
      row = jax.lax.dynamic_slice_in_dim(read, entries.prompt[index], 1)
      row = _beginning(blank, row)
      return jax.lax.dynamic_update_slice_in_dim(into, row, entries.slot[index], 0)

    return jax.tree.map(one, cache, blank, fresh)

  def at_slot(into, values):
    return into.at[entries.slot].set(values, mode='drop')

  if sharding.in_use() is None:
    cache = jax.lax.fori_loop(0, entries.real, put, slots.cache)
  else:  # a loop over rows would gather those of all devices: each fills its own
    source = at_slot(jnp.full(len(slots.token), -1), entries.prompt)
    fill = functools.partial(_filled, source)
    cache = jax.tree.map(fill, slots.cache, blank, fresh)
  return slots._replace(
    cache=cache,
    token=at_slot(slots.token, entries.token),
    position=at_slot(slots.position, entries.lengths[entries.prompt]),
    drawn=at_slot(slots.drawn, 0),
    seed=at_slot(slots.seed, entries.seed),
    matched=at_slot(slots.matched, 0),
    live=at_slot(slots.live, True),
    stopped=at_slot(slots.stopped, False),
  )


def _filled(source, into, blank, read):
  """into [B, …], with blank [1, …] that begins as read[source[b]] at each row b that has a
  source, 0 or more."""
  new = source.reshape(-1, *[1] * (into.ndim - 1)) >= 0
  axes = ('rows', 'kv_heads')[: into.ndim - 1]
  rows = sharding.lay(read[jnp.maximum(source, 0)], *axes)
  return jnp.where(new, _beginning(jnp.broadcast_to(blank, into.shape), rows), into)


def _beginning(rows, start):
  return jax.lax.dynamic_update_slice(rows, start, (0,) * rows.ndim)


@functools.partial(jax.jit, static_argnames=('model', 'width'), donate_argnames='slots')
def advance(
  weights: Weights,
  slots: Slots,
  key: Key[Array, ''],
  settings: Settings,
  eos_ids: Int[Array, 'E'],
  stop: Int[Array, 'states V'] | None,
  enough: Int[Array, ''],
  most: Int[Array, ''],
  *,
  model: Functions,
  width: int,
) -> Slots:
  """Decodes while more than `enough` slots are live, and until a ring that is shorter
  than `most`, the tokens that a row may draw, is full.

  A token's randomness depends on (key, the row's seed, its index in the row) alone.
  """
  room = slots.tokens.shape[1]
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, slots.seed)

  def more(slots: Slots):
    return (slots.live.sum() > enough) & ((slots.step < room) | (room >= most))

  def step(slots: Slots) -> Slots:
    at, live = slots.step % room, slots.live
    states, cache = model.decode(
      weights.params,
      slots.cache,
      slots.token[:, None],
      jnp.where(live, slots.position, -1)[:, None],
      width + at,
    )
    z = logits(weights.head, states[:, 0])
    noise = jax.vmap(_noise, (0, 0, None))(keys, slots.drawn, z.shape[-1])
    new = draw(z, noise, settings)
    ends = (new.token[:, None] == eos_ids[None]).any(-1)
    matched = slots.matched
    if stop is not None:
      matched = stop[matched, new.token].astype(jnp.int32)
      ends |= matched == stop.shape[0] - 1
    drawn = slots.drawn + live
    return Slots(
      step=slots.step + 1,
      cache=cache,
      token=new.token,
      position=slots.position + 1,
      drawn=drawn,
      seed=slots.seed,
      matched=matched,
      live=live & ~ends & (drawn < most),
      stopped=slots.stopped | (live & ends),
      tokens=_column(slots.tokens, new.token, live, at),
      logp=_column(slots.logp, new.logp, live, at),
      kept=_column(slots.kept, new.kept, live, at),
    )

  return jax.lax.while_loop(more, step, slots)


def logits(head: Head, states: Float[Array, '... D']) -> Float[Array, '... V']:
  """Float32 logits of states by the head of `Weights`, scale and soft-cap included."""
  out = jnp.einsum(
    '...d,vd->...v', states, head.matrix, preferred_element_type=jnp.float32
  )
  out = out * head.scale
  return out if head.softcap is None else head.softcap * jnp.tanh(out / head.softcap)


def _noise(key, index, vocabulary):
  return draw_lib.noise(jax.random.fold_in(key, index), vocabulary)


def _column(table, values, live, at):
  """Writes `values` into column `at` of the live rows; finished ones wait unread."""
  return table.at[:, at].set(jnp.where(live, values, table[:, at]))
