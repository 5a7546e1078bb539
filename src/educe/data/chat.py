"""Chat templates and what is trained on: records to tokens and masks.

The rendered text is tokenised once and the mask follows from character offsets, so the
tokens are those that the model will see when it samples, and no boundary is moved.
A token that straddles the start of the trained text is trained: it carries its first
characters. (End prompts without a trailing space: ' yes' is usually one token, and a
sampler that was given the space can no longer produce it.)

A turn's stop token is trained; what the template writes after it is not.

Templates are untrusted code: they run in Jinja's immutable sandbox.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
from jinja2 import nodes

from educe.data import tokenizer as tokenizer_lib

Messages = Sequence[Mapping[str, Any]]

# What strftime_now() tells a template: a fixed day, or a run resumed after midnight
# would see other tokens. (It is the day that Llama 3's template falls back to.)
TODAY = datetime.datetime(2024, 7, 26)

# Around the body of {% generation %} in rendered text, then cut out again.
_BEGIN, _END = '\ue000generation\ue001', '\ue000/generation\ue001'

ACCEPTED = 'messages · prompt + completion · text'


class Encoded(NamedTuple):
  """One document."""

  tokens: np.ndarray  # [L] int32
  mask: np.ndarray  # [L] float32, 1 where the token is trained on; mask[0] = 0


class Rendered(NamedTuple):
  text: str
  spans: list[tuple[int, int]]  # characters inside {% generation %}


class Generation(jinja2.ext.Extension):
  """{% generation %} … {% endgeneration %}: the assistant's own words."""

  tags = {'generation'}  # noqa: RUF012 (Jinja's interface)

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)

    def mark(text: str) -> nodes.Output:
      return nodes.Output([nodes.TemplateData(text)], lineno=line)

    return [mark(_BEGIN), *body, mark(_END)]


def _raise(message: str):
  raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  """Plain JSON: Jinja's own filter escapes for HTML."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=['jinja2.ext.loopcontrols', Generation],
  )
  environment.filters['tojson'] = _tojson
  environment.globals['raise_exception'] = _raise
  environment.globals['strftime_now'] = TODAY.strftime
  return environment.from_string(template)


def render(
  messages: Messages,
  *,
  tokenizer: tokenizer_lib.Tokenizer,
  add_generation_prompt: bool = False,
  tools: Sequence[Any] | None = None,
) -> Rendered:
  """The conversation as the template writes it, and the spans that it marks.

  Raises ValueError if there is no template, or it cannot render these messages.
  """
  if tokenizer.chat_template is None:
    raise ValueError(
      'messages need a chat template and this tokenizer has none; load one that has '
      '(chat_template.jinja in its folder) or give prompt and completion as strings'
    )
  names = {}
  for name, i in (
    ('bos_token', tokenizer.bos_id),
    ('eos_token', tokenizer.eos_ids[0]),
    ('pad_token', tokenizer.pad_id),
  ):
    names[name] = '' if i is None else tokenizer.token_bytes(i).decode()
  try:
    text = _compile(tokenizer.chat_template).render(
      messages=messages,
      tools=tools,
      documents=None,
      add_generation_prompt=add_generation_prompt,
      **names,
    )
  except jinja2.sandbox.SecurityError as error:
    raise ValueError(f'chat template does what the sandbox forbids: {error}') from None
  except Exception as error:  # a template is a program: 1/0, endless recursion, …
    reason = str(error) or type(error).__name__
    raise ValueError(f'chat template cannot render these messages: {reason}') from None
  return _cut_marks(text)


def _cut_marks(text: str) -> Rendered:
  first, *rest = text.split(_BEGIN)
  plain, spans = [first], []
  at = len(first)
  for piece in rest:
    inside, mark, after = piece.partition(_END)
    if not mark:
      raise ValueError('chat template: {% generation %} blocks are nested or unclosed')
    spans.append((at, at + len(inside)))
    plain += [inside, after]
    at += len(inside) + len(after)
  return Rendered(''.join(plain), spans)


def normalize(messages: Any, column: str = 'messages') -> list[dict[str, Any]]:
  """Messages as {role, content}; ShareGPT's {from, value} is understood.

  A content that is a list of text parts becomes one string.
  """
  if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
    raise ValueError(
      f'{column}: expected a non-empty list of messages, got {messages!r}'
    )
  roles = {'human': 'user', 'gpt': 'assistant'}
  result = []
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise ValueError(f'{column}[{i}]: expected a mapping, got {message!r}')
    if 'from' in message and 'value' in message:
      role = roles.get(message['from'], message['from'])
      message = {'role': role, 'content': message['value']}
    if 'role' not in message:
      raise ValueError(f'{column}[{i}]: no role (it has {sorted(message)})')
    content = message.get('content')
    if content is None and not message.get('tool_calls'):
      raise ValueError(
        f'{column}[{i}]: content is missing or null; give a text, or drop the record'
      )
    if isinstance(content, Sequence) and not isinstance(content, str):
      for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get('text'), str):
          raise ValueError(f'{column}[{i}]: content part {part!r} is not text')
      content = ''.join(part['text'] for part in content)
    if isinstance(content, str) and (_BEGIN in content or _END in content):
      raise ValueError(f'{column}[{i}]: content holds a reserved private-use mark')
    result.append({**message, 'content': content})
  return result


def encode_conversation(
  tokenizer: tokenizer_lib.Tokenizer,
  messages: Messages,
  *,
  tools: Sequence[Any] | None = None,
) -> Encoded:
  """Tokens of the whole conversation; the mask is 1 on what the assistant says.

  Each assistant turn is trained up to and including its stop token. Spans come from
  the template's {% generation %} marks, else from rendering each prefix of the
  conversation, which must not change what was already written.

  Raises ValueError when nothing would be trained, when an assistant turn has no stop
  token, when the template writes BOS twice, or when it is not prefix-stable.
  """
  ids, _, mask = _conversation(tokenizer, normalize(messages), tools)
  return _encoded(ids, mask)


def _conversation(tokenizer, messages, tools):
  """(ids, the characters of each, mask) of the whole conversation."""
  turns = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
  if not turns:
    raise ValueError(
      'messages: no assistant turn, so there is nothing to train on '
      f'(roles: {[message["role"] for message in messages]})'
    )
  whole = render(messages, tokenizer=tokenizer, tools=tools)
  if whole.spans:
    # Only the last turn: earlier ones may lawfully be rewritten once they are past.
    _prefix_span(tokenizer, messages, turns[-1], tools, whole.text, last=True)
    spans = whole.spans
  else:
    spans = [
      _prefix_span(tokenizer, messages, turn, tools, whole.text) for turn in turns
    ]
  ids, offsets = tokenizer.encode_with_offsets(whole.text)
  _check_bos(tokenizer, ids)
  mask = np.zeros(len(ids), np.float32)
  for span in spans:
    first, last = _tokens_inside(offsets, span)
    mask[first : _stop(tokenizer, ids, first, last) + 1] = 1
  return ids, offsets, mask


def _prefix_span(tokenizer, messages, turn, tools, whole, last=False):
  """Characters that an assistant turn adds to the text so far."""
  before = render(
    messages[:turn], tokenizer=tokenizer, add_generation_prompt=True, tools=tools
  ).text
  after = whole
  if turn + 1 < len(messages):
    after = render(messages[: turn + 1], tokenizer=tokenizer, tools=tools).text
  for longer, shorter, what in (
    (after, before, 'the prompt that the sampler would see'),
    (whole, before if last else after, 'the text up to this turn'),
  ):
    if not longer.startswith(shorter):
      at = next(
        (i for i, (a, b) in enumerate(zip(longer, shorter, strict=False)) if a != b),
        min(len(longer), len(shorter)),
      )
      raise ValueError(
        f'chat template is not prefix-stable: rendering messages[{turn}] changes '
        f'{what} ({shorter[at : at + 24]!r} becomes {longer[at : at + 24]!r}), so the '
        'model would be trained on text that it never sees when it samples. Use a '
        "template that keeps earlier turns, or mark the assistant's words in it with "
        '{% generation %}, or give one record per turn'
      )
  return len(before), len(after)


def _tokens_inside(offsets, span) -> tuple[int, int]:
  """Tokens [first, last) that hold at least one character of the span."""
  begin, end = span
  inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin and a < b]
  return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _stop(tokenizer, ids, first, last) -> int:
  """Index of the stop token that closes a turn on tokens [first, last)."""
  stops = [i for i in range(first, last) if ids[i] in tokenizer.eos_ids]
  if stops:
    return stops[-1]
  # Marks that end just before the stop token: it is the model's to say all the same.
  if last and last < len(ids) and ids[last] in tokenizer.eos_ids:
    return last
  names = [tokenizer.token_bytes(i).decode() or i for i in tokenizer.eos_ids]
  raise ValueError(
    f"chat template closes the assistant's turn with none of the stop tokens {names}, "
    'so the model would never learn to stop; add the token that does close it to '
    "eos_token_id in the tokenizer's generation_config.json"
  )


def _check_bos(tokenizer, ids) -> None:
  if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
    raise ValueError(
      'the text starts with BOS twice '
      f'({tokenizer.token_bytes(tokenizer.bos_id).decode()!r}): remove it from the '
      'data or from the chat template'
    )


def _encoded(ids: Sequence[int], mask: Sequence[float] | np.ndarray) -> Encoded:
  trained = np.array(mask, np.float32)
  trained[:1] = 0  # nothing comes before the first token to predict it from
  if not np.count_nonzero(trained):
    raise ValueError(
      'record is all prompt: no token would be trained on; give it a completion'
    )
  return Encoded(np.array(ids, np.int32), trained)


def encode_prompt(
  tokenizer: tokenizer_lib.Tokenizer,
  prompt: str | Messages,
  *,
  tools: Sequence[Any] | None = None,
) -> list[int]:
  """Tokens that a sampler starts from.

  A string, with BOS if the tokenizer writes one; messages, rendered up to where the
  assistant speaks. The text is a prefix of what `encode_conversation` trains on, and
  so are the tokens unless one of them straddles the boundary.
  """
  if isinstance(prompt, str):
    ids = _bos(tokenizer) + tokenizer.encode(prompt)
  else:
    text = render(
      normalize(prompt, 'prompt'),
      tokenizer=tokenizer,
      add_generation_prompt=True,
      tools=tools,
    ).text
    ids = tokenizer.encode(text)
  _check_bos(tokenizer, ids)
  return ids


def _bos(tokenizer) -> list[int]:
  return [tokenizer.bos_id] if tokenizer.add_bos else []


def _encode_text(tokenizer, prompt: str, completion: str) -> Encoded:
  """prompt + completion + EOS, trained from the completion's first character."""
  ids, offsets = tokenizer.encode_with_offsets(prompt + completion)
  start = len(prompt) or -1
  # (A space that the vocabulary puts before the text has no characters of its own.)
  mask = [end > start for _, end in offsets]
  if tokenizer.add_bos:
    ids, mask = _bos(tokenizer) + ids, [False, *mask]
  _check_bos(tokenizer, ids)
  if ids and ids[-1] not in tokenizer.eos_ids:  # not twice, if the data wrote it
    ids.append(tokenizer.eos_ids[0])
    mask.append(True)
  return _encoded(ids, mask)


def encode_record(
  tokenizer: tokenizer_lib.Tokenizer, record: Mapping[str, Any]
) -> Encoded:
  """Tokens and mask of one record, by the columns that it has.

  messages (+ tools)     every assistant turn is trained
  prompt + completion    strings: the completion and EOS are trained; messages: a chat
                         whose completion is trained, and no earlier assistant turn
  text                   everything but the first token is trained, and EOS

  Raises ValueError naming the columns if they are none of these.
  """
  said, prompt, completion, text, tools = (
    record.get(name) for name in ('messages', 'prompt', 'completion', 'text', 'tools')
  )
  if said is not None:
    return encode_conversation(tokenizer, said, tools=tools)
  if prompt is not None and completion is not None:
    if isinstance(prompt, str) and isinstance(completion, str):
      if not completion:
        raise ValueError('completion is empty: the record is all prompt')
      return _encode_text(tokenizer, prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
      raise ValueError(
        'prompt and completion must both be strings or both be lists of messages '
        f'(got {type(prompt).__name__} and {type(completion).__name__})'
      )
    return _encode_chat_completion(tokenizer, prompt, completion, tools)
  if text is not None:
    if not isinstance(text, str) or not text:
      raise ValueError(f'text: expected a non-empty string, got {text!r}')
    return _encode_text(tokenizer, '', text)
  columns = {name for name, value in record.items() if value is not None}
  raise ValueError(
    f'record has columns {sorted(columns)}; expected {ACCEPTED}. Rename yours with '
    "columns=dict(prompt='question', completion='answer') or the like"
  )


def _encode_chat_completion(tokenizer, prompt, completion, tools) -> Encoded:
  prompt = normalize(prompt, 'prompt')
  completion = normalize(completion, 'completion')
  if completion[0]['role'] != 'assistant':
    raise ValueError(
      'completion must start with the assistant, got role '
      f'{completion[0]["role"]!r}: move what comes before it to the prompt'
    )
  ids, offsets, mask = _conversation(tokenizer, [*prompt, *completion], tools)
  start = render(prompt, tokenizer=tokenizer, add_generation_prompt=True, tools=tools)
  inside = np.array([end > len(start.text) for _, end in offsets], np.float32)
  return _encoded(ids, mask * inside)
