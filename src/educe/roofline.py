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

from typing import Any, NamedTuple

from educe import collectives
from educe.models.architecture import Architecture
from educe.topology import CHIPS
from educe.training.metrics import PEAK_FLOPS

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


def forward(a: Architecture, read: Reading) -> float:
  """FLOPs of one pass: 2 a weight and token that multiplies, and 4·h a head and pair. Of
  a mixture's experts those that a token goes to, and the router."""
  attention = a.dim * a.head_dim * (2 * a.heads + 2 * a.kv_heads)
  mlp = 3 * a.dim * a.ffn * (a.experts_per_token or 1) + a.dim * a.experts
  layers = 2.0 * a.layers * (attention + mlp) * read.tokens
  scores = 4.0 * a.layers * a.heads * a.head_dim * read.pairs
  return layers + scores + 2.0 * a.dim * a.vocab_size * read.scored


def update(a: Architecture, read: Reading, tokens: int | None = None) -> Work:
  """A backward pass is two forward ones. With remat='full' the layers come once more.

  tokens: that the rows have, where some are read once for several of them
  """
  again = forward(a, read._replace(scored=0)) if a.remat == 'full' else 0.0
  return Work(3 * forward(a, read), again, tokens or read.tokens)


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
