"""An environment that only asks: whoever judges, it is not this.

Its prompts come from a source of data, and its reward is None, 'not scored': that is for a
judge (rollouts/judges.py) to give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from educe.environments import problems
from educe.types import Environment, Turn


def make(
  *,
  source: Sequence[Mapping[str, Any]],
  size: int | None = None,
  part: str = 'all',
  longest: int | None = None,
) -> Environment:
  """The prompts of `source`, each once, in the order in which they first appear.

  source: records with `prompt`, or with `messages`, whose last answer is left off;
    ShareGPT's `from` and `value` are written as `role` and `content`
  size: so many of them, the first; None: all
  longest: characters; longer prompts are left out. None: none are
  part: 'train' and 'heldout' share no prompt, whatever the source's order

  Records keep their columns; `answer` is None where there is none.

  Raises ValueError for a record with neither column, a prompt that is empty or neither
  text nor messages, a size that is more than there are, and an unknown part.
  """
  problems.in_part('0' * 8, part)  # an unknown one is told before the source is read
  found: dict[str, dict[str, Any]] = {}
  for index in range(len(source)):
    record = dict(source[index])
    prompt = _prompt(record, index)
    name = problems.digest(str(prompt))
    short = longest is None or len(_text(prompt)) <= longest
    if name not in found and short and problems.in_part(name, part):
      found[name] = {'id': name[:12], 'answer': None, **record, 'prompt': prompt}
    if size is not None and len(found) == size:
      break
  if size is not None:
    problems.at_least_one(size)
  if len(found) < (size or 1):
    raise ValueError(
      f'size={size}: the source has {len(found)} different prompts in part {part!r}'
      + (f' of at most longest={longest} characters' if longest is not None else '')
    )
  return Environment(list(found.values()), _only_ask)


def only_asks(environment: Environment) -> bool:
  """Whether somebody else has to judge."""
  return environment.respond is _only_ask


def _prompt(record: Mapping[str, Any], index: int) -> Any:
  prompt = record.get('prompt')
  if prompt is None and record.get('messages'):
    messages = _messages(record['messages'], index)
    prompt = messages[:-1] if messages[-1].get('role') == 'assistant' else messages
  if prompt is None:
    raise ValueError(
      f'source row {index} has no prompt, only {sorted(record)}; name its column with '
      "columns=dict(prompt='…')"
    )
  if not prompt or (isinstance(prompt, str) and not prompt.strip()):
    raise ValueError(f'source row {index}: its prompt is empty')
  return prompt if isinstance(prompt, str) else _messages(prompt, index)


def _messages(messages: Any, index: int) -> list[Any]:
  listed = isinstance(messages, Sequence) and not isinstance(messages, str)
  if not listed or not all(isinstance(turn, Mapping) for turn in messages):
    raise ValueError(
      f'source row {index}: its prompt is {messages!r:.60}: neither text nor messages'
    )
  roles = {'human': 'user', 'gpt': 'assistant'}
  return [
    {'role': roles.get(turn['from'], turn['from']), 'content': turn['value']}
    if {'from', 'value'} <= turn.keys()
    else turn
    for turn in messages
  ]


def _text(prompt: Any) -> str:
  if isinstance(prompt, str):
    return prompt
  return ''.join(str(turn.get('content', '')) for turn in prompt)


def _only_ask(prompt: Mapping[str, Any], transcript: Sequence[str]) -> Turn:
  return Turn(None, None, True, {})
