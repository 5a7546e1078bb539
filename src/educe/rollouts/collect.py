"""Rollouts: groups of completions, judged, as the arrays that an update reads.

Token in, token out: a prompt is encoded once, and the tokens trained on are the very
tokens sampled. Text is only what the verifier and the transcripts see.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Key

from educe import hosts
from educe.data.chat import encode_prompt
from educe.data.tokenizer import Tokenizer
from educe.environments import verifiers, worker
from educe.rollouts.sampler import bucket
from educe.rollouts.texts import Completion, generate
from educe.types import Environment, Model, Params, Rollouts, Turn

Record = Mapping[str, Any]
# (record, transcript: the completion's text, turn by turn) of each row -> their Turns
Verifier = Callable[[Sequence[tuple[Record, Sequence[str]]]], Sequence[Turn]]

RAISED = 'raised'  # in the info of a verdict that is none
TOLD = ('outcome', 'rewards', 'answer', 'error', RAISED)  # what is read of an info


def collect(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  environment: Environment,
  records: Sequence[Record],
  *,
  group: int,
  key: Key[Array, ''],
  max_new_tokens: int,
  generate: Callable[..., list[Completion]] = generate,
  seeds: Sequence[int] | None = None,
  verifier: Verifier | None = None,
  together: bool = False,
  **sampling: Any,
) -> Rollouts:
  """`group` completions of each record's prompt, judged; rows are group-major.

  records: some of environment.prompts, or others that it can judge
  generate: who samples: `texts.generate` here, or `server.generate` of an engine
  seeds: one integer a row, P·G of them; 0, 1, 2 … by default. A row's sample depends
    on (key, its seed, its prompt) alone, so a step should bring a fresh key.
  verifier: answers all rows at once, in order, such as a pool of worker processes; None
    asks environment.respond here, one row after the other. A reward that raises or
    is no number is the outcome 'error' and not scored; if all are, this raises.
  together: of several processes all call this with the same rows; each has its share of
    them judged, and hears of the others'
  sampling: temperature, top_k, top_p, min_p, stop, batch_size, show of `texts.generate`

  Rows are padded to a bucket of the longest (`sampler.bucket`), so that few training
  steps are compiled. `kept` is given when top_k, top_p or min_p is on: then the ratio
  of a policy to sampler_logp is no longer 1 in the mean, and needs log kept.

  Raises ValueError for bad sizes, a record without a prompt or with one that does not
  fit the context (`fitting` drops those), a verifier that answers the wrong number of
  rows or with something that is no number, and an environment that is not done.
  """
  if not (group >= 1 and int(group) == group):
    raise ValueError(f'group must be a whole number ≥ 1, got {group}')
  if not records:
    raise ValueError('collect: no records to sample from')
  prompts = [_encode(tokenizer, record, index) for index, record in enumerate(records)]
  for index, (record, ids) in enumerate(zip(records, prompts, strict=True)):
    if not _fits(model, ids, max_new_tokens):
      raise ValueError(
        f'record {record.get("id", index)!r}: its prompt has {len(ids)} tokens, with '
        f"max_new_tokens = {max_new_tokens} more than the model's context of "
        f'{model.architecture.max_length}; lower that or drop such records (`fitting`)'
      )
  repeated = [record for record in records for _ in range(group)]
  repeated_ids = [ids for ids in prompts for _ in range(group)]
  completions = generate(
    model,
    params,
    tokenizer,
    repeated_ids,
    key=key,
    max_new_tokens=max_new_tokens,
    seeds=seeds,
    **sampling,
  )
  texts = [[done.text] for done in completions]
  rows = list(zip(repeated, texts, strict=True))
  names = [records[row // group].get('id', row // group) for row in range(len(rows))]

  def judged(which: Sequence[int]) -> list[Turn]:
    some, called = [rows[i] for i in which], [names[i] for i in which]
    if verifier:
      return _asked(verifier, some, called)
    return _here(environment, some)

  if together and hosts.count() > 1:
    told = hosts.shared(len(rows), 1, lambda which: list(map(_plain, judged(which))))
    turns = [Turn(*turn) for turn in told]
  else:
    turns = judged(range(len(rows)))
  if not verifier:
    _check_any(environment, turns, names)
  rewards: Any = np.array([_nan(turn.reward) for turn in turns], np.float32)
  truncated = any(mass < 1 for done in completions for mass in done.kept)
  tokens, mask, logp, kept, stopped = _arrays(repeated_ids, completions)
  return Rollouts(
    tokens=tokens,
    mask=mask,
    sampler_logp=logp,
    stopped=stopped,
    rewards=rewards,
    group=group,
    transcripts=[
      _transcript(*row) for row in zip(names, repeated, completions, turns, strict=True)
    ],
    kept=kept if truncated else None,
  )


def fitting(
  model: Model,
  tokenizer: Tokenizer,
  records: Sequence[Record],
  *,
  max_new_tokens: int,
) -> list[Record]:
  """The records whose prompt leaves room for max_new_tokens, in order.

  What does not fit is dropped whole: a prompt cut short asks another question.
  """
  return [
    record
    for index, record in enumerate(records)
    if _fits(model, _encode(tokenizer, record, index), max_new_tokens)
  ]


def _fits(model, ids, max_new_tokens) -> bool:
  return len(ids) + max_new_tokens <= model.architecture.max_length


def _encode(tokenizer, record, index) -> list[int]:
  if 'prompt' not in record:
    raise ValueError(
      f'record {record.get("id", index)!r} has no prompt, only {sorted(record)}'
    )
  return encode_prompt(tokenizer, record['prompt'], tools=record.get('tools'))


def _asked(verifier: Verifier, rows, names) -> list[Turn]:
  turns = verifier(rows)
  if len(turns) != len(rows):
    raise ValueError(f'the verifier answered {len(turns)} rows, {len(rows)} were asked')
  for turn, name in zip(turns, names, strict=True):
    try:
      _verdict(turn)
    except ValueError as error:
      raise ValueError(f'record {name!r}: {error}') from None
  return list(turns)


def _here(environment: Environment, rows) -> list[Turn]:
  turns = []
  for record, transcript in rows:
    try:
      turns.append(_verdict(environment.respond(record, transcript)))
    except Exception as error:  # the text is a model's: anything may happen
      said = worker.one_line(error)
      turns.append(
        Turn(None, None, True, {'outcome': 'error', 'error': said, RAISED: 1})
      )
  return turns


def _check_any(environment: Environment, turns: Sequence[Turn], names) -> None:
  if all(RAISED in turn.info for turn in turns):
    raise ValueError(
      f'the reward of every row raised: environment {_name(environment)}; the first, '
      f'record {names[0]!r}: {turns[0].info["error"]}'
    )


def _plain(turn: Turn) -> list[Any]:
  """A Turn as it goes from one process to another."""
  info = {name: turn.info[name] for name in TOLD if name in turn.info}
  return [turn.observation, turn.reward, turn.done, info]


def _name(environment: Environment) -> str:
  """The module that its verdicts come from."""
  respond: Any = environment.respond
  while isinstance(respond, functools.partial):
    respond = respond.func
  return getattr(respond, '__module__', None) or type(respond).__name__


def _verdict(turn: Any) -> Turn:
  turn = verifiers.check(turn)
  if not turn.done:
    raise ValueError('the environment asks for another turn; collect has only one')
  return turn


def _nan(reward: float | None) -> float:
  return math.nan if reward is None else reward


def _arrays(prompts, completions: Sequence[Completion]):
  """tokens, mask, logp, kept [B, T], each at the token it speaks of; stopped [B]."""
  width = max(
    len(ids) + len(done.tokens) for ids, done in zip(prompts, completions, strict=True)
  )
  shape = (len(prompts), bucket(width))
  tokens = np.zeros(shape, np.int32)
  mask, logp = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
  kept = np.ones(shape, np.float32)
  for row, (ids, done) in enumerate(zip(prompts, completions, strict=True)):
    span = slice(len(ids), len(ids) + len(done.tokens))
    tokens[row, : span.start] = ids
    tokens[row, span] = done.tokens
    mask[row, span] = 1
    logp[row, span] = done.logp
    kept[row, span] = done.kept
  stopped = np.array([done.stopped for done in completions], np.int32)
  return tokens, mask, logp, kept, stopped


def _transcript(name, record, done: Completion, turn: Turn) -> dict[str, Any]:
  row = {
    'id': name,
    'prompt': record['prompt'],
    'completion': done.text,
    'answer': record.get('answer'),
    'reward': turn.reward,
    'rewards': dict(turn.info.get('rewards', {})),
    'outcome': verifiers.outcome(turn),
    'parsed': turn.info.get('answer'),
    'length': len(done.tokens),
    'stopped': done.stopped,
  }
  return row | ({'error': turn.info['error']} if 'error' in turn.info else {})
