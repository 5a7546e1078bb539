"""Documents to rows of one length: padded, or several packed into a row.

A row is a dict of [T] arrays:
  tokens int32 · mask float32 · segments int32 (0 = padding, 1.. = documents)
  positions int32 (from 0 in each document) · ids int32 (record; −1 = padding)

The mask is 0 on the first token of each document, so the last token of one never
predicts the first of the next, whoever shifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from educe.data import chat

KEPT, TRUNCATED, OVERLONG, MASKED = range(4)


def fit(
  document: chat.Encoded, record: int, *, max_length: int, overlong: str
) -> dict[str, Any]:
  """One document cut to `max_length` tokens, and its fate.

  overlong: 'drop' it, or 'truncate' its end (and drop it if nothing trained is left).
  Dropped documents stay in the stream, empty, so that the order of records does not
  depend on how many workers read them; `pipeline` counts and removes them.
  """
  tokens, mask = document
  fate = KEPT
  if len(tokens) > max_length:
    fate = OVERLONG
    if overlong == 'truncate':
      tokens, mask = tokens[:max_length], mask[:max_length]
      fate = TRUNCATED if mask.any() else MASKED
  if fate in (OVERLONG, MASKED):
    tokens, mask = tokens[:0], mask[:0]
  ids = np.array([record] * len(tokens), np.int32)
  return dict(tokens=tokens, mask=mask, ids=ids, fate=fate)


def pad(
  documents: Sequence[dict[str, np.ndarray]], *, max_length: int, pad_id: int
) -> dict[str, np.ndarray]:
  """A document a row, `[B, T]`."""
  lengths = np.array([len(document['tokens']) for document in documents])
  places = np.arange(max_length, dtype=np.int32)
  inside = places < lengths[:, None]

  def fill(name: str, value: int) -> np.ndarray:
    joined = np.concatenate([document[name] for document in documents])
    rows = np.full(inside.shape, value, joined.dtype)
    rows[inside] = joined  # row by row, as they were joined
    return rows

  return dict(
    tokens=fill('tokens', pad_id),
    mask=fill('mask', 0),
    segments=inside.astype(np.int32),
    positions=np.where(inside, places, 0),
    ids=fill('ids', -1),
  )


def pack(
  documents: grain.IterDataset, *, max_length: int, pad_id: int, bins: int, seed: int
) -> grain.IterDataset:
  """As many documents a row as fit: first-fit over `bins` open rows at a time.

  More bins leave less padding and mix documents from further apart. The finished rows
  of a set are shuffled, for first-fit puts the long documents into the last ones.
  """
  packed = grain.experimental.FirstFitPackIterDataset(
    documents,
    length_struct=dict(tokens=max_length, mask=max_length, ids=max_length),
    padding_struct=dict(tokens=pad_id, mask=0, ids=-1),
    # Not packed apart from the tokens: they need no segments of their own.
    meta_features=('mask', 'ids'),
    num_packing_bins=bins,
    seed=seed,
    shuffle_bins=True,
  )
  return packed.map(_rename)


def _rename(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return dict(
    tokens=row['tokens'],
    mask=row['mask'],
    segments=row['tokens_segment_ids'],
    positions=row['tokens_positions'],
    ids=row['ids'],
  )


def fill_rows(
  batch: dict[str, np.ndarray], *, batch_size: int, pad_id: int
) -> dict[str, np.ndarray]:
  """The last, short batch with rows of padding: every batch has one shape."""
  missing = batch_size - len(batch['tokens'])
  padding = dict(tokens=pad_id, mask=0, segments=0, positions=0, ids=-1)
  return {
    name: np.pad(values, ((0, missing), (0, 0)), constant_values=padding[name])
    for name, values in batch.items()
  }
