"""Which implementation of an op runs here.

An op is a table {name: function}. `implementation=None` takes the first name that
this backend prefers; a name that was asked for and cannot run raises, never falls back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

Op = Callable[..., Any]

# What each backend prefers, best first. `chunked` is portable XLA and always there.
# Pallas kernels join this table with the measurement that puts them in front.
PREFERENCE = {'cpu': ('chunked',), 'gpu': ('chunked',), 'tpu': ('chunked',)}


def choose(op: str, table: Mapping[str, Op], implementation: str | None = None) -> Op:
  """The function to call for `op`.

  Raises:
    ValueError: `implementation` is not in the table.
  """
  if implementation is None:
    preferred = PREFERENCE.get(jax.default_backend(), ('chunked',))
    implementation = next(name for name in preferred if name in table)
  if implementation not in table:
    raise ValueError(
      f'{op}: implementation={implementation!r} does not exist; '
      f'choose one of {sorted(table)} or None'
    )
  return table[implementation]
