"""Rollouts: groups of completions, judged, as the arrays that an update reads.

Token in, token out: a prompt is encoded once, and the tokens trained on are the very
tokens sampled. Text is only what the judge and the transcripts see.
"""

from __future__ import annotations

import functools
import math
import pathlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Key

from educe.data.chat import encode_prompt
from educe.data.tokenizer import Tokenizer
from educe.environments import verifiers
from educe.rollouts.sampler import bucket
from educe.rollouts.texts import Completion, generate
from educe.types import OUTCOMES, Environment, Model, Params, Rollouts, Turn

Record = Mapping[str, Any]
# (record, transcript: the completion's text, turn by turn) of each row -> their Turns
Judge = Callable[[Sequence[tuple[Record, Sequence[str]]]], Sequence[Turn]]


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
  seeds: Sequence[int] | None = None,
  judge: Judge | None = None,
  **sampling: Any,
) -> Rollouts:
  """`group` completions of each record's prompt, judged; rows are group-major.

  records: some of environment.prompts, or others that it can judge
  seeds: one integer a row, P·G of them; 0, 1, 2 … by default. A row's sample depends
    on (key, its seed, its prompt) alone, so a step should bring a fresh key.
  judge: answers all rows at once, in order, such as a pool of worker processes; None
    asks environment.respond here, one row after the other. A reward that raises is the
    outcome 'error' and not scored; if all of them raise, so does this function.
  sampling: temperature, top_k, top_p, min_p, stop, batch_size, show of `texts.generate`

  Rows are padded to a bucket of the longest (`sampler.bucket`), so that few training
  steps are compiled. `kept` is given when top_k, top_p or min_p is on: then the ratio
  of a policy to sampler_logp is no longer 1 in the mean, and needs log kept.

  Raises ValueError for bad sizes, a record without a prompt or with one that does not
  fit the context (`fitting` drops those), a judge that answers the wrong number of
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
  turns = list(judge(rows) if judge else _in_process(environment, rows, names))
  if len(turns) != len(rows):
    raise ValueError(f'the judge answered {len(turns)} rows, {len(rows)} were asked')
  rewards: Any = np.array(
    [_reward(*row) for row in zip(turns, names, strict=True)], np.float32
  )
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
      _transcript(*row)
      for row in zip(names, repeated, completions, turns, rewards, strict=True)
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


def _in_process(environment: Environment, rows, names) -> list[Turn]:
  turns, errors = [], []
  for record, transcript in rows:
    try:
      turns.append(environment.respond(record, transcript))
    except Exception as error:  # the text is a model's: anything may happen
      frame = traceback.extract_tb(error.__traceback__)[-1]
      place = f'{pathlib.Path(frame.filename).name} line {frame.lineno}'
      errors.append(f'{type(error).__name__}: {error} ({place})')
      info = {'outcome': 'error', 'error': errors[-1]}
      turns.append(Turn(None, None, True, info))
  if len(errors) == len(rows):
    raise ValueError(
      f'the reward of every row raised: environment {_name(environment)}; the first, '
      f'record {names[0]!r}: {errors[0]}'
    )
  return turns


def _name(environment: Environment) -> str:
  """The module that its verdicts come from."""
  respond: Any = environment.respond
  while isinstance(respond, functools.partial):
    respond = respond.func
  return getattr(respond, '__module__', None) or type(respond).__name__


def _reward(turn: Any, name) -> Any:
  """NaN if not scored."""
  if not isinstance(turn, Turn) or not isinstance(turn.info, Mapping):
    raise ValueError(
      f'record {name!r}: respond returned {turn!r:.120}; it must return '
      'Turn(observation, reward, done, info), info a dict (see types.py)'
    )
  if not turn.done:
    raise ValueError(
      f'record {name!r}: the environment asks for another turn; collect has only one'
    )
  if turn.reward is None:
    return math.nan
  number = isinstance(turn.reward, (int, float, np.number))
  if not number or abs(turn.reward) > verifiers.LARGEST:
    raise ValueError(
      f'record {name!r}: the reward is {turn.reward!r:.80}; it must be a finite '
      'number, or None where a completion is not scored'
    )
  return float(turn.reward)


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


def _transcript(name, record, done: Completion, turn: Turn, reward) -> dict[str, Any]:
  turn = turn._replace(reward=None if math.isnan(reward) else float(reward))
  outcome = verifiers.outcome(turn)
  if outcome not in OUTCOMES:
    raise ValueError(f'record {name!r}: outcome {outcome!r} is none of {OUTCOMES}')
  row = {
    'id': name,
    'prompt': record['prompt'],
    'completion': done.text,
    'answer': record.get('answer'),
    'reward': turn.reward,
    'rewards': dict(turn.info.get('rewards', {})),
    'outcome': outcome,
    'length': len(done.tokens),
    'stopped': done.stopped,
  }
  return row | ({'error': turn.info['error']} if 'error' in turn.info else {})
