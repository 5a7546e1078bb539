"""Rows that begin alike, rewritten so that what they share is there once.

  rows    [p p p p a a]            prefix [p p p]    tokens [p a a]
          [p p p p b b b]    →                              [p b b b]

Completions of one prompt, or the two sides of a pair, attend to one copy of it: at 1,024
tokens of prompt, 512 of completion and groups of 8 that is 5,120 tokens in place of
12,288. The prompt's last token stays in each row, for the first token of a completion is
predicted from it; so every row still has a column 0 that nothing predicts, and nobody who
reads scores has to know (losses/logprobs.py). The last column predicts nothing that is
trained on: no model has to read it, and rows are one longer than a width that suits one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from educe.sharding import fetch
from educe.types import Batch

WORTH = 0.9  # of the tokens that there were; above it, rows stay as they are
GRAIN = 16  # every padded width is a multiple of it


def share(batch: Batch, group: int, parts: int = 1) -> Batch:
  """The same batch with a `prefix`, if that leaves at most WORTH of its tokens.

  batch: host arrays; each `group` rows next to each other may begin alike
  parts: that its rows will be cut into; where that would cut groups, and for groups of
    one and packed or shared batches, it comes back as it is
  """
  rows, length = batch.tokens.shape
  if group < 2 or rows % (group * parts):
    return batch
  if batch.segments is not None or batch.positions is not None:
    return batch
  tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
  shared = _shared(tokens.reshape(-1, group, length), mask.reshape(-1, group, length))
  start = np.repeat(shared, group)  # of a row: the first token that stays in it
  # Behind the last token that is trained on nothing matters.
  ends = np.where(mask > 0, np.arange(length) + 1, 0).max(-1)
  # Each pair of widths is a program. Pairs of a data set come in all lengths, and have
  # quarters of a row; the more rows share a prompt, the more a narrow rest saves.
  grain = max(16, length // min(2 * group, 16))
  width, rest = (
    -(-max(int(x), 1) // grain) * grain
    for x in (shared.max(), (ends - start).max() - 1)
  )
  rest += 1
  prompts = rows // group
  if prompts * width + rows * (rest - 1) > WORTH * rows * length:
    return batch
  place = np.arange(width)
  prefix = np.where(place < shared[:, None], _columns(tokens[::group], place, 0), -1)
  columns = start[:, None] + np.arange(rest)

  def cut(x: Any) -> Any:
    if x is None or np.ndim(x) < 2:
      return x
    return _columns(np.asarray(x), columns, 0)

  arrays: dict[str, Any] = {name: cut(x) for name, x in batch._asdict().items()}
  arrays |= dict(prefix=prefix.astype(np.int32), positions=columns.astype(np.int32))
  return Batch(**arrays)


def restore(x: np.ndarray, batch: Batch, length: int) -> np.ndarray:
  """What was said of the tokens of a shared batch, where they stood before: `[B, length]`,
  0 elsewhere."""
  if batch.prefix is None:
    return x
  columns = np.asarray(fetch(batch.positions))
  inside = columns < length
  out = np.zeros((len(x), length), x.dtype)
  row, _ = np.nonzero(inside)
  out[row, columns[inside]] = x[inside]
  out[np.arange(len(x)), columns[:, 0]] = 0  # column 0 of a shared row: nobody's
  return out


def _shared(tokens, mask) -> np.ndarray:
  """Of each group: leading tokens that are all rows', that no row is trained on, but for
  the last of them, `[P]`."""
  alike = (tokens == tokens[:, :1]).all(1) & ~(mask > 0).any(1)
  return np.maximum(np.cumprod(alike, -1).sum(-1) - 1, 0)


def _columns(x, columns, fill):
  """x[b, columns[b]], and `fill` beyond the end."""
  columns = np.broadcast_to(columns, (len(x), columns.shape[-1]))
  inside = columns < x.shape[1]
  taken = np.take_along_axis(x, np.where(inside, columns, 0), 1)
  return np.where(inside, taken, fill).astype(x.dtype)


def bucket(length: int) -> int:
  """The padded width for `length` tokens: at most a quarter is padding beyond 64
  tokens, and there are only four widths an octave, so few programs are compiled."""
  grain = max(GRAIN, 2 ** (int(length - 1).bit_length() - 3))
  return -(-int(length) // grain) * grain
