"""Which implementation of an op runs here: the one that was measured to be best.

An op is a table {name: function}. MEASURED names, for a device, those that a benchmark put
in front, best first; everywhere else, and where none of them compiles, it is the table's
portable one: plain XLA, always there. A name that was asked for runs or raises, and never
becomes another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from educe.progress import say

Op = Callable[..., Any]


class Measurement(NamedTuple):
  names: tuple[str, ...]  # best first
  evidence: str  # what was run, and what it printed


# (op, `device_kind`) → what to prefer. A kernel joins this table with its benchmark.
MEASURED: dict[tuple[str, str], Measurement] = {
  ('logprob', 'cpu'): Measurement(('chunked',), 'benchmarks/results/logprob_cpu.json'),
  ('gae', 'cpu'): Measurement(('reference',), 'benchmarks/results/advantage_cpu.json'),
}
PORTABLE = ('chunked', 'reference')  # the first that a table has


def choose(
  op: str,
  table: Mapping[str, Op],
  implementation: str | None = None,
  trial: tuple[Any, ...] = (),
  **static: Any,
) -> Op:
  """The function to call for `op`.

  trial, static: what it will be called with; a kernel that does not compile for these
    shapes is passed over, and one line says so, once

  Raises ValueError if `implementation` is not in the table.
  """
  if implementation is not None:
    if implementation not in table:
      raise ValueError(
        f'{op}: implementation={implementation!r} does not exist; '
        f'choose one of {sorted(table)} or None'
      )
    return table[implementation]
  portable = next(name for name in PORTABLE if name in table)
  found = MEASURED.get((op, jax.devices()[0].device_kind))
  for name in found.names if found else ():
    if name == portable or _runs(op, name, table[name], trial, static, portable):
      return table[name]
  return table[portable]


_known: dict[Any, bool] = {}


def _runs(op: str, name: str, function: Op, trial, static, portable: str) -> bool:
  """Whether it compiles for these shapes, tried once."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trial)
  key = (op, name, str(shapes), str(sorted(static.items())))
  if key not in _known:
    try:
      jax.jit(functools.partial(function, **static)).lower(*shapes).compile()
      _known[key] = True
    except Exception as error:  # a compiler's own: out of vector memory, no lowering, …
      _known[key] = False
      reason = (str(error).strip() or type(error).__name__).splitlines()[0]
      say(f'{op}: {name} does not compile here, {portable} runs instead: {reason:.200}')
  return _known[key]
