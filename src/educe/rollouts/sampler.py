"""Sample from a policy, with continuous batching: who ends makes room for who waits.

Orca (Yu et al. 2022, OSDI) schedules by step; here the host is asked only when enough
rows have ended, and whole stretches of steps run as one program (`slots`). Prompts of
unequal length are padded on the right, padding carries position −1 and is attended to
by nobody, so a row's result does not depend on its neighbours.

A token's randomness depends on (key, the row's seed, its index in the row) alone: the
same seed gives the same sample whatever the batch, the slot and the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from educe import sharding
from educe.data.sharing import bucket as bucket
from educe.rollouts import slots as slots_lib
from educe.rollouts.draw import Settings
from educe.types import Model, Params, Samples

# A prefill reads about so many tokens at once: enough to be a matmul rather than a walk
# through the weights, few enough that one prompt alone wastes little padding; and where
# half of MANY wait, as at the start, those.
PREFILL, MANY = 128, 1024
COLDEST = 1e-20  # below it logits / temperature may leave float32, as if they were NaN


class Sizes(NamedTuple):
  """Of the arrays that `sample` works with."""

  rows: int  # slots
  width: int  # places of a slot for a prompt but for its last token
  rings: tuple[
    int, ...
  ]  # … and for what is decoded: one after another as rows get long
  reads: tuple[int, int]  # prompts that a prefill reads: where few wait, where many do

  def read(self, waits: int) -> int:
    """Prompts that the next prefill reads, of so many that wait."""
    few, many = self.reads
    return many if 2 * waits > many else few  # or most of what is read would be padding


def sizes(
  prompts: int, longest: int, max_new_tokens: int, batch_size: int | None, ways: int
) -> Sizes:
  """Of so many prompts, the longest of `longest` tokens; see `sample`.

  ways: parts of a mesh that have slots of their own, each as many
  """
  rows = -(-min(batch_size or prompts, prompts) // ways) * ways
  width = bucket(max(longest - 1, 1))
  few, many = (
    min(max(1, tokens // width // ways) * ways, rows) for tokens in (PREFILL, MANY)
  )
  return Sizes(rows, width, slots_lib.rings(max_new_tokens), (few, many))


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
  batch_size: int | None = None,
  progress: Callable[[int], object] | None = None,
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
  batch_size: rows decoded side by side, all of them by default; the others wait for a
    row to end. Equal prompts next to each other are read once.
  progress: told how many rows have ended since it was last called

  Returns host arrays. Compiled once per (model, batch_size, bucket of the longest
  prompt, ring, which options are on); the numbers themselves are traced.

  Raises ValueError for bad input, before any device work, and for a model whose
  probabilities are not finite.
  """
  settings = drawing(temperature, top_k, top_p, min_p)
  vocabulary = vocabulary_size(model, params)
  limit = model.architecture.max_length
  prompts = _checked(prompts, max_new_tokens, vocabulary, limit)
  if stop is not None and stop.shape[-1] != vocabulary:
    raise ValueError(
      f'stop table is for {stop.shape[-1]} tokens, the model has {vocabulary}'
    )
  seeds = range(len(prompts)) if seeds is None else seeds
  if len(seeds) != len(prompts):
    raise ValueError(f'{len(seeds)} seeds for {len(prompts)} prompts')
  for seed in seeds:  # of NumPy's, those out of range would wrap to another's
    if not (0 <= seed < 2**32 and int(seed) == seed):
      raise ValueError(f'seeds must be whole numbers in 0..2³²−1, got {seed}')
  if batch_size is not None and not _whole(batch_size):
    raise ValueError(f'batch_size must be at least 1, got {batch_size}')
  ends = np.asarray(eos_ids, np.int32), None if stop is None else jax.device_put(stop)
  told = progress or (lambda ended: None)
  with sharding.using_that_of(params):
    size = sizes(
      len(prompts),
      max(map(len, prompts)),
      max_new_tokens,
      batch_size,
      sharding.row_parts(sharding.in_use()),
    )
    return _run(
      model, params, prompts, seeds, key, settings, ends, max_new_tokens, size, told
    )


def _run(
  model, params, prompts, seeds, key, settings, ends, max_new_tokens, size, told
) -> Samples:
  """`sample` of what was checked."""
  functions = slots_lib.Functions(model.head, model.init_cache, model.decode)
  weights = slots_lib.prepare(params, model=functions, specs=slots_lib.layout(params))
  rows, width = size.rows, size.width
  room, *rings = size.rings
  slots = slots_lib.empty(model=functions, rows=rows, width=width, room=room)
  out = _blank(len(prompts), max_new_tokens)
  row_of = np.full(rows, -1)  # whose slot it is; −1: free
  began = np.zeros(rows, int)  # the step at which it entered
  places = np.arange(max_new_tokens)
  waiting = list(range(len(prompts)))[::-1]  # the next one last
  while True:
    while waiting and (row_of < 0).any():
      free = np.flatnonzero(row_of < 0)
      entries, entered = _next_entries(prompts, seeds, waiting, free, size)
      slots = slots_lib.enter(weights.params, slots, entries, model=functions)
      row_of[free[: len(entered)]] = entered
      began[free[: len(entered)]] = int(slots.step)
    # With others waiting, an eighth of the slots may idle before they are let in.
    enough = rows - max(1, rows // 8) if waiting else 0
    bounds = np.int32(enough), np.int32(max_new_tokens)
    slots = slots_lib.advance(
      weights, slots, key, settings, *ends, *bounds, model=functions, width=width
    )
    host = sharding.fetch(slots._replace(cache=None))
    ended = np.flatnonzero((row_of >= 0) & ~host.live)
    rows_ended = row_of[ended]
    row_of[ended] = -1
    out.length[rows_ended] = host.drawn[ended]
    out.stopped[rows_ended] = host.stopped[ended]
    # Its first token is in the column of the step at which it entered.
    column = (began[ended, None] + places) % room
    drawn = places < host.drawn[ended, None]
    for ours, theirs in zip(
      (out.tokens, out.logp, out.kept),
      (host.tokens, host.logp, host.kept),
      strict=True,
    ):
      found = theirs[ended[:, None], column]
      ours[rows_ended] = np.where(drawn, found, ours[rows_ended])
    if not np.isfinite(out.logp[rows_ended]).all():
      raise ValueError(
        'the model gives probabilities that are not finite (NaN logits): its weights are '
        'damaged, or overflow in its compute_dtype'
      )
    told(len(ended))
    if not waiting and (row_of < 0).all():
      return out
    if rings and host.step == room:
      room = rings.pop(0)
      slots = slots_lib.grow(slots, model=functions, width=width, room=room)


def _blank(rows: int, room: int) -> Samples:
  length: Any = np.zeros(rows, np.int32)
  logp: Any = np.zeros((rows, room), np.float32)
  return Samples(logp.astype(np.int32), logp, logp + 1, length, length.copy())


def _next_entries(prompts, seeds, waiting, free, size: Sizes):
  """(Entries, their rows): those who wait, as far as slots and one prefill reach."""
  waits = len({tuple(prompts[row][:-1]) for row in waiting[-len(free) :]})
  many = size.read(waits)
  known: dict[tuple[int, ...], int] = {}  # a prompt -> its place in the prefill
  entered: list[int] = []
  entries = slots_lib.nobody(many, size.width, size.rows)
  while waiting and len(entered) < len(free):
    *start, last = prompts[waiting[-1]]
    place = known.setdefault(tuple(start), len(known))
    if place == many:
      break
    index, row = len(entered), waiting.pop()
    entries.prompts[place, : len(start)] = start
    entries.lengths[place] = len(start)
    entries.slot[index], entries.prompt[index] = free[index], place
    entries.token[index], entries.seed[index] = last, seeds[row]
    entered.append(row)
  return entries._replace(real=np.int32(len(entered))), entered


def vocabulary_size(model: Model, params: Params) -> int:
  """How many tokens the model tells apart; its tokenizer may know fewer."""
  return jax.eval_shape(model.head, params).matrix.shape[-1]


def drawing(
  temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Settings:
  """Numbers checked and switched off where neutral."""
  if not (temperature == 0 or COLDEST <= temperature < float('inf')):
    raise ValueError(
      f'temperature must be 0 (greedy) or a number ≥ {COLDEST}, got {temperature}'
    )
  if not (0 <= top_k < 2**31 and int(top_k) == top_k):
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


def _whole(x) -> bool:
  return isinstance(x, int | np.integer) and bool(x >= 1)


def _checked(prompts, max_new_tokens, vocabulary, limit) -> list[list[int]]:
  if not len(prompts):
    raise ValueError('no prompts to sample from')
  if not _whole(max_new_tokens):
    raise ValueError(f'max_new_tokens must be at least 1, got {max_new_tokens}')
  out = []
  for row, prompt in enumerate(prompts):
    ids = np.asarray(prompt)
    if ids.ndim == 1 and not ids.size:
      raise ValueError(f'prompt {row} is empty; it needs at least one token')
    if ids.ndim != 1 or ids.dtype.kind not in 'iu':
      raise ValueError(f'prompt {row} must be a list of token ids, got {prompt!r:.60}')
    worst = max(
      ids.min(), ids.max(), key=lambda token: abs(token - (vocabulary - 1) / 2)
    )
    if not 0 <= worst < vocabulary:
      raise ValueError(
        f'prompt {row} holds token id {worst}; the model knows 0..{vocabulary - 1}'
      )
    if len(ids) + max_new_tokens > limit:
      raise ValueError(
        f'prompt {row} has {len(ids)} tokens, with {max_new_tokens} new ones more '
        f"than the model's context of {limit}; shorten it or max_new_tokens"
      )
    out.append(ids.tolist())
  return out
