"""What a compiled program needs of a chip, and the floors under its time.

FLOPs come from a formula, for XLA counts the body of a loop over layers once; bytes that
are sent from the program's HLO (collectives.py); bytes that are held from its compiler. The
time is the longest of three floors, none of which was measured:

  matmul     FLOPs, with those of what is computed again / (devices · peak)
  memory     (arguments + results + 2·temporaries) / bandwidth: each read or written once,
             temporaries both
  exchange   bytes that a device sends / all of its links together

What `config.offload` moves to the host and back is in none of them.

Samuel Williams, Andrew Waterman and David Patterson, "Roofline: an insightful visual
performance model for multicore architectures", 2009.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from educe import collectives
from educe.models import lora, parts, quantized, value_head
from educe.topology import CHIPS
from educe.training.metrics import PEAK_FLOPS
from educe.types import Batch, Model, Params

# What the names of our kernels begin with, as HLO has them where it calls a Pallas program.
CALL = 'tpu_custom_call'
KERNELS = {
  'logprob': 'logprob_moments',
  'attention': 'splash_mha',
}


class Work(NamedTuple):
  """What a program is there for: not what a compiler made of it."""

  flops: float  # on all devices
  redone: float  # … that it computes a second time to save memory
  tokens: int


class Reading(NamedTuple):
  """What goes through a model once."""

  tokens: int
  pairs: float  # of a query and a key that it sees, over all rows
  scored: int  # tokens that go on to the head


def full(rows: int, length: int) -> Reading:
  """Rows without padding, each token of which sees itself and what came before."""
  return Reading(rows * length, rows * length**2 / 2, rows * length)


def forked(prompts: int, start: int, rows: int, length: int) -> Reading:
  """Rows of `length` tokens that go on from prompts of `start`, each of which is read once
  for all of its rows."""
  pairs = prompts * start**2 / 2 + rows * (start * length + length**2 / 2)
  return Reading(prompts * start + rows * length, pairs, rows * length)


def reading(batch: Batch) -> Reading:
  """Of a batch as a step gets it, full to its edge."""
  rows, length = batch.tokens.shape
  if batch.prefix is None:
    return full(rows, length)
  prompts, start = batch.prefix.shape
  return forked(prompts, start, rows, length - 1)


def forward(model: Model, params: Params, read: Reading) -> float:
  """FLOPs of one pass: 2 a weight and token that multiplies, and 4·h a head and pair. Of
  a mixture's experts those that a token goes to, and the router; with a value head its
  values too, and the trunk that they are read from.

  params: arrays or what describes them
  """
  return sum(part.once for part in _parts(model, params, {}, read))


def update(
  model: Model,
  params: Params,
  read: Reading,
  trained: Params | None = None,
  *,
  teacher: tuple[Model, Params] | None = None,
  scored: bool = True,
  tokens: int | None = None,
) -> Work:
  """Of an update: a pass forward; as much again for the gradient of what comes in, where
  something is trained further down; and for that of each trained weight.

  With remat='full' layers that are gone through backward come once more.

  trained: those of params, None elsewhere; all
  teacher: who only reads the same
  scored: whether log-probs are asked for; else the head is not there
  tokens: that the rows have, where some are read once for several of them
  """
  read = read if scored else read._replace(scored=0)
  every = [*_parts(model, params, params if trained is None else trained, read)]
  flops = sum(part.once + part.inputs + part.weights for part in every)
  if teacher is not None:
    flops += forward(*teacher, read)
  again = sum(part.once for part in every if part.layers and part.inputs)
  remat = getattr(model.architecture, 'remat', 'none') == 'full'
  return Work(flops, again if remat else 0.0, tokens or read.tokens)


class _Part(NamedTuple):
  """FLOPs of a part of a model."""

  once: float  # forward
  inputs: float  # for the gradient of what comes in
  weights: float  # … of what is trained in it
  layers: bool = False


# A weight that every token is multiplied with, or an adapter's; not a norm's scale.
_MATRIX = re.compile(r'^(?:adapter/)?layers/(?:attention|mlp|experts)/\w+(?:/[ab])?$')


def _parts(
  model: Model, params: Params, trained: Params, read: Reading
) -> Iterator[_Part]:
  a, params = model.architecture, jax.eval_shape(quantized.restored, params)
  yield _trunk(a, params, trained, read)
  learns = _learns(trained)
  head = 2.0 * a.dim * a.vocab_size * read.scored
  own = 'embedding' if a.tied else 'head'
  below = learns or bool(jax.tree.leaves(trained.get('norm')))
  yield _Part(head, below * head, bool(jax.tree.leaves(trained.get(own))) * head)
  if model.values is None:
    return
  value, ours = params[value_head.KEY], trained.get(value_head.KEY) or {}
  if 'trunk' in value:
    trunk, mine = value['trunk'], ours.get('trunk') or {}
    learns = _learns(mine)
    # An adapter is beside the policy's own layers.
    base = {'layers': params['layers']} if lora.KEY in trunk else {}
    yield _trunk(a, {**base, **trunk}, mine, read)
  values = 2.0 * a.dim * read.tokens
  yield _Part(values, learns * values, bool(jax.tree.leaves(ours.get('head'))) * values)


def _trunk(a: Any, params: Params, trained: Params, read: Reading) -> _Part:
  """All layers."""
  scores = 4.0 * a.layers * a.heads * a.head_dim * read.pairs
  once = 2.0 * _multiplied(a, params) * read.tokens
  # Of both operands of both products.
  inputs = _learns(trained) * (once + 2 * scores)
  return _Part(once + scores, inputs, 2.0 * _multiplied(a, trained) * read.tokens, True)


def _learns(trained: Params) -> bool:
  """Whether anything is trained under the states that come out of the layers."""
  return any(
    bool(jax.tree.leaves(trained.get(x))) for x in ('layers', 'embedding', lora.KEY)
  )


def _multiplied(a: Any, params: Params) -> float:
  """Weights that a token is multiplied with."""
  names = jax.tree.leaves(parts.paths(params, str))
  total = 0.0
  for name, leaf in zip(names, jax.tree.leaves(params), strict=True):
    if _MATRIX.search(name):
      one_of = '/experts/' in name and not name.endswith('/router')
      share = a.experts_per_token / a.experts if one_of else 1
      total += math.prod(leaf.shape) * share
  return total


def report(
  compiled: Any, devices: Any, work: Work, *, beside: float = 0.0, kept: bool = False
) -> dict[str, Any]:
  """What a compiled program says of itself, and the floors under its time.

  devices: of the mesh
  beside: bytes that each of them holds meanwhile, which are no operands of the program
  kept: what comes out is what went in, but for a little of it (a cache): it is not
    written anew
  """
  kind, count = devices.flat[0].device_kind, devices.size
  chip, said = CHIPS[kind], compiled.memory_analysis()
  sizes = {
    'arguments': said.argument_size_in_bytes,
    'results': said.output_size_in_bytes,
    'temporaries': said.temp_size_in_bytes,
  }
  # What is donated is counted once. The compiler's own peak may be less (temporaries are
  # not all there at once) or more (the program itself): the larger is safe.
  held = sum(sizes.values()) - said.alias_size_in_bytes
  peak = max(getattr(said, 'peak_memory_in_bytes', 0), held) + beside
  text = _text(compiled)
  moved = sizes['arguments'] + (0 if kept else sizes['results'])
  floors = {
    'matmul': (work.flops + work.redone) / (count * PEAK_FLOPS[kind]),
    'memory': (moved + 2 * sizes['temporaries']) / chip.bandwidth,
  }
  sent = None
  if text is not None:
    sent = collectives.total(collectives.read(text))
    floors['exchange'] = sum(sent.values()) / chip.links
  bound = max(floors, key=lambda name: floors[name])
  seconds = floors[bound]
  return {
    'device': kind,
    'devices': count,
    **{f'{name}_gb': size / 1e9 for name, size in sizes.items()},
    'beside_gb': beside / 1e9,
    'peak_gb': peak / 1e9,
    'fits': peak <= chip.memory,
    'flops': work.flops,
    'redone_flops': work.redone,
    'sent_gb': sent and {op: size / 1e9 for op, size in sent.items()},
    'floors_seconds': floors,
    'seconds': seconds,
    'bound': bound,
    'tokens': work.tokens,
    'tokens_per_second': work.tokens / seconds,
    'mfu': work.flops / (seconds * count * PEAK_FLOPS[kind]),
    'kernels': None if text is None else kernels(text),
  }


def kernels(text: str) -> list[str]:
  """Which of KERNELS a compiled program calls, whatever else in it is called alike."""
  called = collectives.calls(text, CALL)
  return [n for n, x in KERNELS.items() if any(name.startswith(x) for name in called)]


def _text(compiled: Any) -> str | None:
  try:
    return compiled.as_text()
  except Exception:  # of some programs a compiler cannot print what it made
    return None
