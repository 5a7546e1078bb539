"""A page of transcripts: what the policy wrote, what it earned, what the update made of it.

One static HTML file without anything from outside, so that it opens from disk, on a phone
and years later. Everything in a row is untrusted text; it can be read but never runs.
"""

from __future__ import annotations

import html
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from educe import paths
from educe.measurement import page_markup
from educe.types import OUTCOMES

PER_TOKEN = ('advantages', 'log_ratio')
REQUIRED = ('prompt', 'completion', 'reward', 'outcome')
Row = Mapping[str, Any]


def page(
  rows: Sequence[Row], path: str | os.PathLike, *, title: str = ''
) -> pathlib.Path:
  """Writes the rows as one HTML page at `path`, folders included; returns the path.

  A row has prompt (a text, or messages), completion, reward (None: not scored) and
  outcome (one of OUTCOMES), and may have id, step, answer, rewards (name → number or
  None), length (tokens), stopped (False: ran out of room), advantage and by (who wrote
  it). With `tokens`,
  the completion cut into texts, it may have a number for each token: `advantages` and
  `log_ratio` (trainer − sampler log-prob, nats); None or a number that is not finite is
  shown as unknown.

  Rows of one step and id are a group and stand together, in order of first appearance. A
  row without an id is a group alone. Colours have one symmetric scale for the page, full
  at the 99th percentile of |value|, so that they compare across rows.

  Raises ValueError, naming the row, for a missing or unknown value, or a list per token
  that is not as long as `tokens`.
  """
  for index, row in enumerate(rows):
    _check(index, row)
  full = {name: _bound(rows, name) for name in ('advantages', 'log_ratio')}
  groups: dict[Any, list[Row]] = {}
  for index, row in enumerate(rows):
    alone = ('alone', index) if row.get('id') is None else (row.get('step'), row['id'])
    groups.setdefault(repr(alone), []).append(row)
  title = title or 'transcripts'
  written = page_markup.PAGE.substitute(
    name=CONTROL.sub('', html.escape(title)),  # a tab's name takes no markup
    title=text(title),
    style=page_markup.STYLE,
    script=page_markup.SCRIPT,
    counts=_counts(rows),
    legend=_legend(rows, full),
    groups='\n'.join(group(rows, full) for rows in groups.values()),
  )
  path = pathlib.Path(path)
  paths.write(path, written)
  return path


def _check(index: int, row: Row) -> None:
  if not isinstance(row, Mapping):
    raise ValueError(f'transcripts: row {index} is {row!r}; a row is a dict')
  if missing := [name for name in REQUIRED if name not in row]:
    raise ValueError(f'transcripts: row {index} lacks {missing}; it has {sorted(row)}')
  if not isinstance(row['completion'], str):
    raise ValueError(
      f'transcripts: row {index}: completion={row["completion"]!r} is not a text'
    )
  if not isinstance(row['prompt'], list | tuple | str):
    raise ValueError(
      f'transcripts: row {index}: prompt={row["prompt"]!r} is neither a text nor messages'
    )
  if row['outcome'] not in OUTCOMES:
    raise ValueError(
      f'transcripts: row {index}: outcome={row["outcome"]!r} is not one of {OUTCOMES}'
    )
  for name in ('reward', 'advantage'):
    _check_number(index, name, row.get(name))
  rewards = row.get('rewards') or {}
  if not isinstance(rewards, Mapping):
    raise ValueError(
      f'transcripts: row {index}: rewards={rewards!r} is not a dict of name → number'
    )
  for name, value in rewards.items():
    _check_number(index, f'rewards[{name!r}]', value)
  for name in PER_TOKEN:
    if (values := row.get(name)) is None:
      continue
    if row.get('tokens') is None:
      raise ValueError(
        f'transcripts: row {index} has {name} but no tokens; give the text of each'
      )
    if len(values) != len(row['tokens']):
      raise ValueError(
        f'transcripts: row {index}: {name} has {len(values)} numbers for'
        f' {len(row["tokens"])} tokens; give one for each token'
      )
    for value in values:
      _check_number(index, name, value)


def _check_number(index: int, name: str, value: Any) -> None:
  if value is not None and (isinstance(value, str) or not hasattr(value, '__float__')):
    raise ValueError(
      f'transcripts: row {index}: {name}={value!r} is not a number; None is unknown'
    )


def _bound(rows: Sequence[Row], name: str) -> float:
  """The |value| of full colour: the 99th percentile of a list per token over all rows.

  One absurd token must not pale the rest. 0 where there is no finite value but 0.
  """
  values = (v for row in rows for v in _list(row, name) if _known(v))
  sizes = np.abs(np.array([float(v) for v in values if v != 0]))
  return float(np.quantile(sizes, 0.99, method='higher')) if sizes.size else 0.0


def _counts(rows: Sequence[Row]) -> str:
  total = len(rows)
  parts = [f'<b>{total}</b> completion{"s" * (total != 1)}']
  for outcome in OUTCOMES:
    if n := sum(row['outcome'] == outcome for row in rows):
      parts.append(
        f'<span class="outcome {outcome}">{outcome} {n}</span> {n / total:.0%}'
      )
  rewards = [float(row['reward']) for row in rows if _known(row['reward'])]
  if rewards:
    parts.append(f'mean reward <b>{number(sum(rewards) / len(rewards))}</b>')
  return '\n'.join(f'<li>{part}</li>' for part in parts)


def _legend(rows: Sequence[Row], full: Mapping[str, float]) -> str:
  """What the colours mean, with buttons to choose; nothing where no token has a number."""
  scales = {
    'advantages': ('advantage', ''),
    'log_ratio': ('log-ratio, trainer − sampler', ' nats'),
  }
  parts = []
  for name, (label, unit) in scales.items():
    if any(row.get(name) is not None for row in rows):
      bound = number(full[name])
      parts.append(
        f'<label><input type="checkbox" data-show="{name}" checked> {label}</label>'
        f'<span class="scale">−{bound}<i class="{name}"></i>+{bound}{unit}</span>'
      )
  if not parts:
    return ''
  parts.append('<small>tap a token for its numbers</small>')
  return f'<div class="legend">{" ".join(parts)}</div>'


def group(rows: Sequence[Row], full: Mapping[str, float]) -> str:
  """Completions of one prompt, as a section.

  full: the |value| of full colour, of each list per token that a row has
  """
  first = rows[0]
  names = [f'step {text(first["step"])}'] if first.get('step') is not None else []
  if first.get('id') is not None:
    names.append(text(first['id']))
  rewards = ' '.join(
    f'<span class="outcome {row["outcome"]}">{number(row["reward"])}</span>'
    for row in rows
  )
  answer = ''
  if first.get('answer') is not None:
    answer = f'<p class="answer">right is <bdi>{text(first["answer"])}</bdi></p>'
  completions = '\n'.join(_completion(row, full) for row in rows)
  return (
    f'<section><h2>{" · ".join(names)} <span class="rewards">{rewards}</span></h2>\n'
    f'{_prompt(first["prompt"])}{answer}\n{completions}</section>'
  )


def _prompt(prompt: Any) -> str:
  if isinstance(prompt, str):
    return f'<div class="prompt" dir="auto">{text(prompt)}</div>'
  parts = []
  for message in prompt:
    is_message = isinstance(message, Mapping)
    role = message.get('role', '') if is_message else ''
    content = message.get('content', '') if is_message else message
    parts.append(
      f'<div class="prompt" dir="auto"><small>{text(role)}</small> {text(content)}</div>'
    )
  return ''.join(parts)


def _completion(row: Row, full: Mapping[str, float]) -> str:
  facts = [f'<b>{text(row["by"])}</b>'] if row.get('by') is not None else []
  facts.append(f'<span class="outcome {row["outcome"]}">{row["outcome"]}</span>')
  facts.append(f'reward <b>{number(row["reward"])}</b>')
  for name, value in (row.get('rewards') or {}).items():
    facts.append(f'{text(name)} {number(value)}')
  if row.get('advantage') is not None:
    facts.append(f'advantage <b>{number(row["advantage"], signed=True)}</b>')
  if row.get('length') is not None:
    unit = 'token' if row['length'] == 1 else 'tokens'
    facts.append(f'{text(row["length"])} {unit}')
  if row.get('stopped') is not None and not row['stopped']:
    facts.append('<em>cut off</em>')
  body = text(row['completion'])
  if row.get('tokens') is not None:
    body = _tokens(row, full)
  body = body or '<i class="control">empty</i>'
  return (
    f'<article><p class="facts">{" · ".join(facts)}</p>'
    f'<div class="completion" dir="auto">{body}</div></article>'
  )


def _tokens(row: Row, full: Mapping[str, float]) -> str:
  """A span a token: its classes say which way and --a, --r how strongly it is coloured."""
  spans = []
  for index, token in enumerate(row['tokens']):
    classes, style, notes = ['t'], [], [f'token {index}']
    for name, letter, label in (
      ('advantages', 'a', 'advantage'),
      ('log_ratio', 'r', 'log-ratio'),
    ):
      if row.get(name) is None:
        continue
      value = row[name][index]
      unit = '' if name == 'advantages' or not _known(value) else ' nats'
      notes.append(f'{label} {number(value, signed=True)}{unit}')
      if _known(value) and full[name] > 0:
        classes.append(f'{letter}-{"plus" if value > 0 else "minus"}')
        style.append(f'--{letter}:{min(abs(float(value)) / full[name], 1):.3f}')
    attributes = f' style="{";".join(style)}"' if style else ''
    names, note = ' '.join(classes), ' · '.join(notes)
    spans.append(
      f'<span class="{names}" title="{note}"{attributes}>{text(token)}</span>'
    )
  return ''.join(spans)


def _list(row: Row, name: str) -> Sequence[Any]:
  return () if row.get(name) is None else row[name]  # an array has no truth value


def _known(value: Any) -> bool:
  return value is not None and math.isfinite(float(value))


def number(value: Any, *, signed: bool = False) -> str:
  if not _known(value):
    return '–'
  return f'{float(value):{"+" if signed else ""}.3g}'.replace('-', '−')


# C0 and C1 controls but \t and \n; lone surrogates; and the marks that reorder lines, with
# which a completion could make the page read otherwise than it is written.
CONTROL = re.compile(
  r'[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]'
)


def text(value: Any) -> str:
  """Escaped for HTML, in text and attributes; what cannot be seen is shown as its code."""
  escaped = html.escape(str(value))
  return CONTROL.sub(lambda m: f'<i class="control">{ord(m[0]):02X}</i>', escaped)
