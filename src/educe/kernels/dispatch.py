"""Which implementation of an op runs here: the one that was measured to be best.

An op is a table {name: function}. MEASURED names, for a device, those that a benchmark put
in front, best first; everywhere else, and where none of them compiles, it is the table's
portable one: plain XLA, always there. A name that was asked for runs or raises, and never
becomes another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from educe.progress import say, say_once

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


class Trial(NamedTuple):
  """What a kernel must compile to be taken: `wrap` of it, for operands of these shapes."""

  wrap: Callable[[Op], Op]
  operands: Any
  settings: str  # what else the program depends on


def device_kind() -> str:
  """Of the mesh that is in use, whose chips need not be here; else of this machine."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def interpreted(name: str) -> bool:
  """Whether a kernel for TPUs runs as plain XLA: right and slow, and one line says so."""
  if device_kind().startswith('TPU'):
    return False
  say_once(f'{name}: there is no TPU here, it is interpreted, slowly')
  return True


def candidates(op: str, table: Mapping[str, Op]) -> tuple[str, ...]:
  """Names in the table, best first; the last is portable, and always runs."""
  portable = next(name for name in PORTABLE if name in table)
  found = MEASURED.get((op, device_kind()))
  names = found.names if found else ()
  before = names[: names.index(portable)] if portable in names else names
  return (*before, portable)


def choose(
  op: str,
  table: Mapping[str, Op],
  implementation: str | None = None,
  trial: Trial | None = None,
) -> Op:
  """The function to call for `op`.

  trial: a kernel that does not compile is passed over, and one line says so, once; where
    the chip is not here to ask, it is taken

  Raises ValueError if `implementation` is not in the table.
  """
  if implementation is not None:
    if implementation not in table:
      raise ValueError(
        f'{op}: implementation={implementation!r} does not exist; '
        f'choose one of {sorted(table)} or None'
      )
    return table[implementation]
  *kernels, portable = candidates(op, table)
  for name in kernels:
    if trial is None or _compiles(op, name, table[name], trial, portable):
      return table[name]
  return table[portable]


_known: dict[Any, bool] = {}


def _compiles(op: str, name: str, function: Op, trial: Trial, portable: str) -> bool:
  """Tried once."""
  if device_kind() != jax.devices()[0].device_kind:
    return True
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trial.operands
  )
  key = (op, name, str(shapes), trial.settings)
  if key not in _known:
    try:
      # On one device, whatever the mesh that the operands of the call lie on.
      with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        jax.jit(trial.wrap(function)).lower(*shapes).compile()
      _known[key] = True
    except Exception as error:  # a compiler's own: out of vector memory, no lowering, …
      _known[key] = False
      reason = (str(error).strip() or type(error).__name__).splitlines()[0]
      say(f'{op}: {name} does not compile here, {portable} runs instead: {reason:.200}')
  return _known[key]
