"""Sample from a policy: prefill, then decode in a while loop, under one jit.

Prompts of unequal length are padded on the right. The token that step i generates is
written to cache slot P + i in every row (P is the padded width) but carries its own
row's position len_b + i; padding carries position −1 and is attended to by nobody.
So there is no left padding, and a row's result does not depend on its neighbours.

A row's randomness depends on (key, the row's seed, i) alone: the same seed gives the
same sample however the rows are split into batches or padded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from educe.models.policy import unstack
from educe.rollouts.draw import Draw, Settings, draw
from educe.types import Cache, Head, Model, Params, Samples


def sample(
  model: Model,
  params: Params,
  prompts: Sequence[Sequence[int]],
  key: Key[Array, ''],
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  eos_ids: Sequence[int] = (),
  stop: np.ndarray | None = None,
  seeds: Sequence[int] | None = None,
) -> Samples:
  """Continue each prompt until an EOS id, a stop string, or max_new_tokens.

  The defaults are neutral: nothing is taken from a model's generation_config.

  prompts: token ids, unpadded, at least one each
  temperature: 0 is greedy; log-probs are then those at temperature 1
  top_k, top_p, min_p: see `draw`; 0, 1.0 and 0.0 switch them off
  eos_ids: any of them ends a row; the id is part of the sample and its logp counted
  stop: table from `stop_strings.automaton`; the token that completes a stop string is
    part of the sample. Only generated text is searched, not the prompt.
  seeds: one integer a row; 0, 1, 2 … by default

  Compiled once per (model, number of rows, bucket of the longest prompt,
  max_new_tokens, which options are on); the numbers themselves are traced.

  Raises ValueError for bad input, before any device work.
  """
  settings = _settings(temperature, top_k, top_p, min_p)
  vocabulary = vocabulary_size(model, params)
  limit = model.architecture.max_length
  _check(prompts, max_new_tokens, vocabulary, limit)
  if stop is not None and stop.shape[-1] != vocabulary:
    raise ValueError(
      f'stop table is for {stop.shape[-1]} tokens, the model has {vocabulary}'
    )
  seeds = range(len(prompts)) if seeds is None else seeds
  if len(seeds) != len(prompts):
    raise ValueError(f'{len(seeds)} seeds for {len(prompts)} prompts')
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), bucket(lengths.max())), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  return _generate(
    params,
    tokens,
    lengths,
    key,
    np.asarray(seeds, np.uint32),
    settings,
    np.asarray(eos_ids, np.int32),
    stop,
    model=_Functions(model.head, model.init_cache, model.decode),
    room=max_new_tokens,
  )


def bucket(length: int) -> int:
  """The padded width for `length` tokens: at most a quarter is padding beyond 64
  tokens, and there are only four widths an octave, so few programs are compiled."""
  grain = max(16, 2 ** (int(length - 1).bit_length() - 3))
  return -(-int(length) // grain) * grain


def vocabulary_size(model: Model, params: Params) -> int:
  """How many tokens the model tells apart; its tokenizer may know fewer."""
  return jax.eval_shape(model.head, params).matrix.shape[-1]


def logits(head: Head, states: Float[Array, '... D']) -> Float[Array, '... V']:
  """Float32 logits of hidden states, logit scale and soft-cap included."""
  out = jnp.matmul(states, head.matrix, preferred_element_type=jnp.float32)
  out = out * head.scale
  return out if head.softcap is None else head.softcap * jnp.tanh(out / head.softcap)


class _Functions(NamedTuple):
  """The part of a Model that can be hashed, and so told apart by jit."""

  head: object
  init_cache: object
  decode: object


class _Carry(NamedTuple):
  drawn: Array  # [] tokens generated so far
  cache: Cache
  token: Array  # [B] the last one drawn
  matched: Array  # [B] state of the stop-string automaton
  done: Array  # [B]
  samples: Samples


@functools.partial(jax.jit, static_argnames=('model', 'room'))
def _generate(
  params, tokens, lengths, key, seeds, settings, eos_ids, stop, *, model, room
) -> Samples:
  rows, width = tokens.shape
  if isinstance(params, dict) and 'layers' in params:
    params = unstack(params)  # once, here: inside the loop every step would copy them
  head = model.head(params)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, seeds)

  def next_token(states, index) -> Draw:
    step = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    uniforms = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(step)
    return draw(logits(head, states), uniforms, settings)

  def record(carry: _Carry, new: Draw) -> _Carry:
    """Append `new` to the rows that are still going."""
    going, samples, at = ~carry.done, carry.samples, carry.drawn
    token = jnp.where(going, new.token, 0)
    matched, ends = carry.matched, (token[:, None] == eos_ids[None]).any(-1)
    if stop is not None:
      matched = stop[matched, token].astype(jnp.int32)
      ends |= matched == stop.shape[0] - 1
    ends &= going
    samples = Samples(
      tokens=samples.tokens.at[:, at].set(token),
      logp=samples.logp.at[:, at].set(jnp.where(going, new.logp, 0)),
      kept=samples.kept.at[:, at].set(jnp.where(going, new.kept, 1)),
      length=samples.length + going,
      stopped=samples.stopped + ends,
    )
    return _Carry(at + 1, carry.cache, token, matched, carry.done | ends, samples)

  def more(carry: _Carry):
    return (carry.drawn < room) & ~carry.done.all()

  def step(carry: _Carry) -> _Carry:
    at = carry.drawn - 1  # the token drawn last is the at-th generated one
    position = jnp.where(carry.done, -1, lengths + at)
    states, cache = model.decode(
      params, carry.cache, carry.token[:, None], position[:, None], width + at
    )
    new = next_token(states[:, 0], carry.drawn)
    return record(carry._replace(cache=cache), new)

  column = jnp.arange(width, dtype=jnp.int32)[None]
  positions = jnp.where(column < lengths[:, None], column, -1)
  # The last token drawn is never read, hence room − 1 slots for generated ones.
  cache = model.init_cache(rows, width + room - 1)
  states, cache = model.decode(params, cache, tokens, positions, 0)
  states = jnp.take_along_axis(states, (lengths - 1)[:, None, None], 1)[:, 0]
  zeros = jnp.zeros(rows, jnp.int32)
  blank = jnp.zeros((rows, room), jnp.float32)
  empty = Samples(blank.astype(jnp.int32), blank, blank + 1, zeros, zeros)
  start = _Carry(jnp.int32(0), cache, zeros, zeros, zeros.astype(bool), empty)
  carry = record(start, next_token(states, jnp.int32(0)))
  return jax.lax.while_loop(more, step, carry).samples


def _settings(temperature, top_k, top_p, min_p) -> Settings:
  """Numbers checked and switched off where neutral."""
  if not (0 <= temperature < float('inf')):
    raise ValueError(f'temperature must be a number ≥ 0, got {temperature}')
  if not (top_k >= 0 and int(top_k) == top_k):
    raise ValueError(f'top_k must be a whole number ≥ 0 (0: off), got {top_k}')
  if not (0 < top_p <= 1):
    raise ValueError(f'top_p must be in (0, 1] (1: off), got {top_p}')
  if not (0 <= min_p <= 1):
    raise ValueError(f'min_p must be in [0, 1] (0: off), got {min_p}')
  if temperature == 0:  # the most likely token survives any truncation
    return Settings(temperature=None)
  return Settings(
    temperature,
    top_k or None,
    top_p if top_p < 1 else None,
    min_p or None,
  )


def _check(prompts, max_new_tokens, vocabulary, limit):
  if not len(prompts):
    raise ValueError('no prompts to sample from')
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens must be at least 1, got {max_new_tokens}')
  for row, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(f'prompt {row} is empty; it needs at least one token')
    worst = max(prompt, key=lambda token: abs(token - (vocabulary - 1) / 2))
    if not 0 <= worst < vocabulary:
      raise ValueError(
        f'prompt {row} holds token id {worst}; the model knows 0..{vocabulary - 1}'
      )
    if len(prompt) + max_new_tokens > limit:
      raise ValueError(
        f'prompt {row} has {len(prompt)} tokens, with {max_new_tokens} new ones more '
        f"than the model's context of {limit}; shorten it or max_new_tokens"
      )
