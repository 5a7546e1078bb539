"""Preference rows: what data/pairs.py made of a record, cut to length and batched.

A batch of P records is a dict of `[B, T]` arrays like that of data/packing.py, right-padded
and never packed, with the rows of a record next to each other:

  pairs     B = 2·P; rows 2i and 2i+1 are chosen and rejected
  unpaired  B = 2·P; row 2i is the record, row 2i+1 its prompt with the completion of the
            next other record of the batch: the mismatched pair of KTO's baseline z₀
            (Kawin Ethayarajh et al., 2024, §4.1, arXiv:2402.01306)
  rated, steps  B = P

and beside them
  labels   [B] float32: ratings of a pair (if it has any), the rating, or 1 and 0 for
           (un)desirable and NaN for a mismatched row
  targets  [B, T] float32, of steps: the label at the last token of a step, else NaN

`ids` is the record of each token, so that a mismatched row has two of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from educe.data import packing, pairs

ROWS = {'documents': 1, 'pairs': 2, 'unpaired': 2, 'rated': 1, 'steps': 1}


def fit(
  said: pairs.Said,
  record: int,
  *,
  max_length: int,
  overlong: str,
  max_prompt_length: int | None = None,
  bos_id: int | None = None,
) -> dict[str, Any]:
  """One record within `max_length` tokens a row, and its fate, as packing.fit has it.

  Kept or dropped whole. overlong='truncate' keeps the end of the prompt (and BOS) and the
  start of the completions: first the prompt loses tokens, down to `max_prompt_length`
  (None: half of max_length), the same in both rows; then the completions do. What is left
  with two equal rows, or without the end of a step, is dropped as MASKED.
  """
  prompt, completions, labels, targets = said
  longest = max(len(row.tokens) for row in completions)
  fate = packing.KEPT
  if len(prompt) + longest > max_length:
    fate = packing.OVERLONG
    if overlong == 'truncate':
      fate = packing.TRUNCATED
      least = max_length // 2 if max_prompt_length is None else max_prompt_length
      room = max(least, max_length - longest)
      if len(prompt) > room:
        opening = int(prompt[0] == bos_id)
        end = prompt[len(prompt) - room + opening :]
        prompt = np.concatenate([prompt[:opening], end])
      rest = max_length - len(prompt)
      completions = tuple(type(c)(c.tokens[:rest], c.mask[:rest]) for c in completions)
      targets = None if targets is None else targets[:rest]
      first, last = completions[0].tokens, completions[-1].tokens
      same = len(completions) == 2 and np.array_equal(first, last)
      if same or (targets is not None and not np.isfinite(targets).any()):
        fate = packing.MASKED
  if fate in (packing.OVERLONG, packing.MASKED):
    prompt, targets = prompt[:0], None
    completions = tuple(type(c)(c.tokens[:0], c.mask[:0]) for c in completions)
  untrained = np.zeros(len(prompt), np.float32)
  document: dict[str, Any] = dict(
    tokens=np.concatenate([x for c in completions for x in (prompt, c.tokens)]),
    mask=np.concatenate([x for c in completions for x in (untrained, c.mask)]),
    lengths=np.array([len(prompt) + len(c.tokens) for c in completions]),
    prompt=np.array(len(prompt)),
    id=np.array(record),
    fate=fate,
  )
  if labels is not None:
    document['labels'] = np.array(labels, np.float32)
  if said.targets is not None and targets is not None:
    document['targets'] = np.concatenate([untrained + np.nan, targets])
  return document


def pad(document: dict[str, Any], *, max_length: int, pad_id: int) -> dict[str, Any]:
  """A record of `fit` with its rows apart and padded: `[G, T]` arrays."""
  lengths = document['lengths']
  cuts = np.cumsum(lengths)[:-1]

  def fill(values: np.ndarray, value: Any) -> np.ndarray:
    rows = np.split(values, cuts)
    rows = [
      np.pad(row, (0, max_length - len(row)), constant_values=value) for row in rows
    ]
    return np.stack(rows)

  total = int(lengths.sum())
  positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
  padded = dict(
    tokens=fill(document['tokens'], pad_id),
    mask=fill(document['mask'], 0),
    segments=fill(np.ones(total, np.int32), 0),
    positions=fill(positions, 0),
    ids=fill(np.full(total, document['id'], np.int32), -1),
    prompt=document['prompt'],
  )
  if 'labels' in document:
    padded['labels'] = document['labels']
  if 'targets' in document:
    padded['targets'] = fill(document['targets'], np.nan)
  return padded


def rows(batch: dict[str, Any], *, records: str, pad_id: int) -> dict[str, Any]:
  """`[P, G, …]` of `pad`, batched, as the `[B, …]` arrays at the top of this file."""
  batch = dict(batch)
  prompts = batch.pop('prompt')
  if records == 'unpaired':
    batch = _mismatched(batch, prompts, pad_id)
  return {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}


def _mismatched(batch, prompts, pad_id):
  """Adds to each record its prompt with the next other record's completion."""
  count, _, length = batch['tokens'].shape
  empty = dict(tokens=pad_id, mask=0, segments=0, positions=0, ids=-1)
  lengths = batch['segments'].sum(-1)[:, 0]
  records = batch['ids'][:, 0, 0]
  out = {name: np.full_like(batch[name], value) for name, value in empty.items()}
  for i in range(count):
    # A small data set may come round to the same record within one batch.
    after = [(i + step) % count for step in range(1, count)]
    j = next((j for j in after if records[j] != records[i]), after[0])
    n = prompts[i]
    end = min(length, n + lengths[j] - prompts[j])
    for name in ('tokens', 'mask', 'ids'):
      out[name][i, 0, :n] = batch[name][i, 0, :n]
      out[name][i, 0, n:end] = batch[name][j, 0, prompts[j] : prompts[j] + end - n]
    out['segments'][i, 0, :end] = 1
    out['positions'][i, 0, :end] = np.arange(end)
  both = {name: np.concatenate([batch[name], out[name]], 1) for name in empty}
  labels = np.concatenate([batch['labels'], np.full((count, 1), np.nan, np.float32)], 1)
  return {**both, 'labels': labels}


def fill_rows(batch: dict[str, Any], *, batch_size: int, pad_id: int) -> dict[str, Any]:
  """The last, short batch of `[P, G, …]` arrays with records of padding."""
  missing = batch_size - len(batch['tokens'])
  padding = dict(
    tokens=pad_id, mask=0, segments=0, positions=0, ids=-1, prompt=0, labels=0
  )
  return {
    name: np.pad(
      x,
      ((0, missing), *[(0, 0)] * (x.ndim - 1)),
      constant_values=padding.get(name, np.nan),
    )
    for name, x in batch.items()
  }
