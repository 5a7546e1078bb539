"""Preference records to tokens: a prompt and what was said to it, with what that is worth.

  pairs     prompt + chosen + rejected, or chosen and rejected as whole conversations (or
            texts), whose common beginning is the prompt; and, if there are ratings,
            margin, or chosen_rating + rejected_rating
  unpaired  prompt + completion + label: desirable or not (KTO)
  rated     prompt + completion + rating: a number, true and false being 1 and 0
  steps     prompt + completions + labels: the texts of the steps, each right or not;
            a newline stands between two of them

Instead of prompt + completion there may be `messages`, whose last one is the completion.
Messages or texts, as in `chat`, with the same templates and stop tokens.

The two rows of a pair start with the same tokens and are trained from the same token on:
where the end of the prompt is tokenised differently in front of the two completions, those
tokens belong to the completions. What a template writes after the last trained token is
left out, so that a completion ends here as it does when it is sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from educe.data import chat
from educe.data.tokenizer import Tokenizer

LARGEST = float(np.finfo(np.float32).max)  # what a batch can hold


class Said(NamedTuple):
  """A prompt and its completions, as tokens."""

  prompt: np.ndarray  # [N] int32
  completions: tuple[chat.Encoded, ...]  # chosen first; mask[0] is 1
  labels: tuple[float, ...] | None = None  # one a completion; None: not rated
  targets: np.ndarray | None = None  # [L] of the completion: at a step's end its label


def encode(tokenizer: Tokenizer, record: Mapping[str, Any], records: str) -> Said:
  """One record as `records` (a key of data/preference_rows.ROWS) says.

  Raises ValueError for columns that are missing, or not of the same kind; an empty
  completion; chosen = rejected; prompts that differ; labels that are no labels.
  """
  if records == 'pairs':
    return _pair(tokenizer, record)
  if records == 'steps':
    return _steps(tokenizer, record)
  prompt, completion = _single(record)
  name = {'unpaired': 'label', 'rated': 'rating'}[records]
  number = _label if records == 'unpaired' else _number
  worth = number(_column(record, name), name)
  row = _encode(tokenizer, record, prompt, completion, 'completion')
  return _said([row], _first(row), (worth,))


def _pair(tokenizer: Tokenizer, record: Mapping[str, Any]) -> Said:
  sides = ('chosen', 'rejected')
  chosen, rejected = (_listed(_column(record, name)) for name in sides)
  prompt = record.get('prompt')
  if isinstance(chosen, str) != isinstance(rejected, str):
    raise ValueError(
      'chosen and rejected must both be texts or both messages (got '
      f'{type(chosen).__name__} and {type(rejected).__name__})'
    )
  if isinstance(chosen, str) and prompt is None:
    rows = [
      _encode(tokenizer, {'text': text}, None, text, name)
      for name, text in zip(sides, (chosen, rejected), strict=True)
    ]
    start = _common(rows)
    if start <= tokenizer.add_bos:
      raise ValueError(
        'prompt mismatch: chosen and rejected do not begin with a common token; give '
        'the prompt as a column of its own'
      )
    for name, row in zip(sides, rows, strict=True):
      if start >= len(row.tokens) - 1:  # nothing of its own but the stop token
        raise ValueError(f'{name} is empty after the prompt that both begin with')
      row.mask[start:] = 1
  else:
    if not isinstance(chosen, str):
      prompt, chosen, rejected = _conversations(prompt, chosen, rejected)
    rows = [
      _encode(tokenizer, record, prompt, said, name)
      for name, said in zip(sides, (chosen, rejected), strict=True)
    ]
    start = _shared_start(tokenizer, rows)
  if np.array_equal(rows[0].tokens, rows[1].tokens):
    raise ValueError('chosen and rejected are the same: nothing is preferred')
  return _said(rows, start, _ratings(record))


def _conversations(prompt, chosen, rejected):
  """(prompt, chosen, rejected) as messages, of completions or whole conversations."""
  chosen = chat.normalize(chosen, 'chosen')
  rejected = chat.normalize(rejected, 'rejected')
  pairs = zip(chosen, rejected, strict=False)
  shared = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
  if shared is None:
    if len(chosen) == len(rejected):
      raise ValueError('chosen and rejected are the same: nothing is preferred')
    shared = min(len(chosen), len(rejected))
    name = 'chosen' if shared == len(chosen) else 'rejected'
    raise ValueError(f'{name} is empty after the messages that both begin with')
  if chosen[0]['role'] == 'assistant' and prompt is not None:
    return _listed(prompt), chosen, rejected  # completions alone
  for name, said in (('chosen', chosen), ('rejected', rejected)):
    if not shared or said[shared]['role'] != 'assistant':
      raise ValueError(
        f'prompt mismatch: {name}[{shared}] differs from the other side and is of role '
        f'{said[shared]["role"]!r}; only what the assistant says may differ, after a '
        'common prompt'
      )
  opening = chosen[:shared]
  if isinstance(prompt, str):
    # As in UltraFeedback: the prompt once more, as a text.
    asked = [m['content'] for m in opening if m['role'] == 'user']
    matches = asked[-1:] == [prompt]
  else:
    matches = prompt is None or chat.normalize(_listed(prompt), 'prompt') == opening
  if not matches:
    raise ValueError(
      f'prompt mismatch: prompt is {prompt!r:.60}, but chosen and rejected both begin '
      f'with {opening[-1].get("content")!r:.60}'
    )
  return opening, chosen[shared:], rejected[shared:]


def _steps(tokenizer: Tokenizer, record: Mapping[str, Any]) -> Said:
  steps, labels = (_column(record, name) for name in ('completions', 'labels'))
  for name, values in (('completions', steps), ('labels', labels)):
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
      raise ValueError(f'{name}: expected a non-empty list, got {values!r:.60}')
  if len(steps) != len(labels):
    raise ValueError(f'completions has {len(steps)} steps, labels {len(labels)}')
  for index, step in enumerate(steps):
    if not isinstance(step, str) or not step.strip():
      raise ValueError(f'completions[{index}]={step!r:.60} must be a text of a step')
  prompt, text = _column(record, 'prompt'), '\n'.join(steps)
  said: Any = text
  if not isinstance(prompt, str):
    said = [{'role': 'assistant', 'content': text}]
  row = _encode(tokenizer, record, prompt, said, 'completions')
  start, end = _first(row), _last(row)
  pieces = [tokenizer.token_bytes(int(i)) for i in row.tokens[start:end]]
  # A template may trim the text at its ends.
  at = b''.join(pieces).find(text.strip().encode())
  if at < 0:
    raise ValueError(
      'completions: the chat template changes their text, so that the ends of the steps '
      'cannot be found in its tokens'
    )
  at -= len(text.encode()) - len(text.lstrip().encode())
  reached = np.cumsum([len(piece) for piece in pieces])
  targets = np.full(end - start, np.nan, np.float32)
  for index, label in enumerate(labels):
    until = at + len('\n'.join(steps[: index + 1]).encode())
    token = int(np.searchsorted(reached, until))
    # The last step ends with the whole completion, stop token and all.
    token = len(pieces) - 1 if index == len(labels) - 1 else token
    if np.isfinite(targets[token]):
      raise ValueError(f'completions[{index}]: ends in the same token as another step')
    targets[token] = _label(label, f'labels[{index}]')
  return _said([row], start)._replace(targets=targets)


def _single(record: Mapping[str, Any]) -> tuple[Any, Any]:
  """(prompt, completion) of a record with one completion."""
  messages = record.get('messages')
  if messages is None:
    return _listed(_column(record, 'prompt')), _listed(_column(record, 'completion'))
  messages = chat.normalize(messages)
  if len(messages) < 2 or messages[-1]['role'] != 'assistant':
    raise ValueError(
      'messages: the last one must be what the assistant says to those before it '
      f'(roles: {[m["role"] for m in messages]})'
    )
  return messages[:-1], messages[-1:]


def _encode(tokenizer, record, prompt, said, name) -> chat.Encoded:
  """One row; `name` is the column that what is wrong is said of."""
  words = said
  if not isinstance(said, str):
    words = ''.join(
      f'{message["content"] or ""}{message.get("tool_calls") or ""}'
      for message in chat.normalize(said, name)
    )
  if not words.strip():
    raise ValueError(f'{name} is empty: there is nothing to prefer or to label')
  if prompt == '' and not tokenizer.add_bos:
    raise ValueError(
      'prompt is empty, and this tokenizer writes no BOS: there is nothing to predict the '
      'first token from; give a prompt'
    )
  if prompt is not None:
    record = {'prompt': prompt, 'completion': said, 'tools': record.get('tools')}
  try:
    return chat.encode_record(tokenizer, record)
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from None


def _said(rows: Sequence[chat.Encoded], start: int, labels=None) -> Said:
  completions = [
    chat.Encoded(row.tokens[start : _last(row)], row.mask[start : _last(row)])
    for row in rows
  ]
  return Said(rows[0].tokens[:start], tuple(completions), labels)


def _shared_start(tokenizer: Tokenizer, rows: Sequence[chat.Encoded]) -> int:
  """The token from which both rows are trained; extends their masks to it."""
  firsts = [_first(row) for row in rows]
  start = min(*firsts, _common(rows))
  texts, untrained = [], 0
  for row, first in zip(rows, firsts, strict=True):
    pieces = [tokenizer.token_bytes(int(i)) for i in row.tokens[start:]]
    texts.append(b''.join(pieces))
    untrained = max(untrained, len(b''.join(pieces[: first - start])))
    row.mask[start:first] = 1
  if texts[0][:untrained] != texts[1][:untrained]:
    raise ValueError(
      'prompt mismatch: the chat template writes the prompt of chosen and of rejected '
      'differently; give one whose earlier turns do not depend on later ones'
    )
  return start


def _common(rows: Sequence[chat.Encoded]) -> int:
  """Tokens that both rows begin with."""
  length = min(len(row.tokens) for row in rows)
  same = rows[0].tokens[:length] == rows[1].tokens[:length]
  return length if same.all() else int(np.argmin(same))


def _first(row: chat.Encoded) -> int:
  return int(np.argmax(row.mask > 0))


def _last(row: chat.Encoded) -> int:
  """One past the last trained token."""
  return len(row.mask) - int(np.argmax(row.mask[::-1] > 0))


def _ratings(record: Mapping[str, Any]) -> tuple[float, float] | None:
  if record.get('margin') is not None:
    ratings = _number(record['margin'], 'margin'), 0.0
  else:
    names = ('chosen_rating', 'rejected_rating')
    given = [name for name in names if record.get(name) is not None]
    if not given:
      return None
    a, b = (_number(_column(record, name), name) for name in names)
    ratings = a, b
  if ratings[0] < ratings[1]:
    raise ValueError(
      f'chosen is rated {ratings[0]:g} and rejected {ratings[1]:g}: a margin must not be '
      'negative; swap the two'
    )
  return ratings


def _column(record: Mapping[str, Any], name: str) -> Any:
  if record.get(name) is None:
    there = sorted(n for n, value in record.items() if value is not None)
    raise ValueError(
      f"no column {name!r} (there are {there}); rename yours with columns=dict({name}='…')"
    )
  return record[name]


def _listed(said: Any) -> Any:
  """A message by itself is a list of one."""
  return [said] if isinstance(said, Mapping) else said


def _number(value: Any, name: str) -> float:
  if not isinstance(value, int | float) or not abs(value) <= LARGEST:  # nor is NaN
    raise ValueError(f'{name}={value!r:.60} must be a finite number')
  return float(value)


def _label(value: Any, name: str) -> float:
  if not isinstance(value, int | float) or value not in (0, 1):
    raise ValueError(f'{name}={value!r:.60} must be true or false (1 or 0)')
  return float(value)
