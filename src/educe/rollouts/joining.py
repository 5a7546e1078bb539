"""Rollouts of two samplings put together: one behind the other, side by side, or in part.

Their rows may be of two widths, and top-k and the like may have cut something off in one
of them alone: both are evened out, so that no row loses what is known of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from educe.types import Rollouts

ARRAYS = ('tokens', 'mask', 'sampler_logp', 'stopped', 'rewards', 'kept')


def rows_of(groups, size: int) -> np.ndarray:
  """The rows of these groups of `size`, group by group."""
  return (np.asarray(groups)[:, None] * size + np.arange(size)).ravel()


def joined(first: Rollouts, second: Rollouts) -> Rollouts:
  """All rows of the first, then all of the second, as wide as the wider."""
  both: dict[str, Any] = {
    name: np.concatenate(arrays) for name, arrays in _as_wide(first, second).items()
  }
  rows = [*first.transcripts, *second.transcripts]
  return Rollouts(**both, group=first.group, transcripts=rows)


def side_by_side(first: Rollouts, second: Rollouts) -> Rollouts:
  """Groups of both: those of the first, each followed by the same one of the second.

  Both answer the same prompts in the same order, in groups of one size.
  """
  both, size = joined(first, second), first.group
  order = np.arange(len(both.rewards)).reshape(2, -1, size).swapaxes(0, 1).ravel()
  arrays: dict[str, Any] = {
    name: x[order] for name in ARRAYS if (x := getattr(both, name)) is not None
  }
  rows = [both.transcripts[row] for row in order.tolist()]
  return Rollouts(**arrays, group=2 * size, transcripts=rows)


def replace_groups(rollouts: Rollouts, places, others: Rollouts, which) -> Rollouts:
  """`rollouts` with the groups at `places` replaced by those `which` of others."""
  if not len(places):
    return rollouts
  at = rows_of(places, rollouts.group)
  of = rows_of(which, rollouts.group)[: len(at)]
  changed: dict[str, Any] = {}
  for name, (ours, theirs) in _as_wide(rollouts, others).items():
    ours[at] = theirs[of]
    changed[name] = ours
  rows = list(rollouts.transcripts)
  for place, source in zip(at, of, strict=True):
    rows[place] = others.transcripts[source]
  return rollouts._replace(**changed, transcripts=rows)


def _as_wide(*parts: Rollouts) -> dict[str, list[np.ndarray]]:
  """Copies of the arrays of each part, as wide as the widest.

  `kept` is 1 where nothing was sampled, for a loss takes the log, and in a part without;
  where no part has any, it is left out.
  """
  width = max(np.shape(part.tokens)[1] for part in parts)

  def wide(part: Rollouts, name: str) -> np.ndarray:
    array = getattr(part, name)
    array = np.ones(np.shape(part.mask), np.float32) if array is None else array
    missing = [(0, 0)] + [(0, width - size) for size in np.shape(array)[1:]]
    return np.pad(array, missing, constant_values=name == 'kept')

  there = [n for n in ARRAYS if any(getattr(part, n) is not None for part in parts)]
  return {name: [wide(part, name) for part in parts] for name in there}
