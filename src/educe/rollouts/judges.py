"""Judges: numbers for completions that no program can verify.

  judge(records, completions) -> a float for each, or None for 'not scored'

`reward_model` is a run that trained a value head, read at the end of the text. `endpoint`
is any server that speaks OpenAI's chat completions, asked for a grade of each completion,
or which of two is better (Lianmin Zheng et al., "Judging LLM-as-a-judge with MT-Bench and
Chatbot Arena", 2023, §3, arXiv:2306.05685; its two orders against position bias, §3.4).

In a run a judge's numbers are the rewards (config.judge). What could not be judged is
None: it adds nothing to its group, and its outcome is 'error' (rollouts/rounds.py).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from educe import hosts
from educe.data import pairs
from educe.data.chat import encode_record, normalize
from educe.environments import verifiers
from educe.rollouts import http_client, server
from educe.rollouts.sampler import bucket
from educe.sharding import using_that_of
from educe.types import Batch, Model, Params, Rollouts

Record = Mapping[str, Any]
Judge = Callable[[Sequence[Record], Sequence[str]], list[float | None]]

# What a text is worth, from the values V_t [S] at the ends of its steps.
STEPS: dict[str, Callable[[np.ndarray], float]] = {
  'last': lambda v: float(v[-1]),
  'min': lambda v: float(np.exp(-np.logaddexp(0, -v).max())),
  'product': lambda v: float(np.exp(-np.logaddexp(0, -v).sum())),
}
STYLES = ('scalar', 'pairwise')
SCALAR = """\
You grade the answer of an assistant. {criteria}

[Conversation]
{prompt}

[Answer]
{completion}

Explain yourself in one sentence. Then, on a line of its own, write the grade, a number \
from {low} to {high}, as: Grade: <number>"""
PAIRWISE = """\
You compare two answers of an assistant. {criteria} Their order and their length do not \
matter.

[Conversation]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Explain yourself in one sentence. Then, on a line of its own, write your verdict, as: \
Verdict: A, or Verdict: B, or Verdict: tie"""


def reward_model(
  open_values: Callable[[str], tuple[Model, Params, Any]],
  *,
  path: str,
  steps: str = 'last',
  batch_size: int = 16,
  max_length: int | None = None,
) -> Judge:
  """The value of a whole text under the reward model that the run at `path` trained.

  Texts are padded to few widths (`sampler.bucket`) and read `batch_size` at a time. The
  value read is that of the state after the text's last token, the end of turn included:
  a completion that was cut off is scored as if it had ended there.

  A process reward model is read at the end of every step, which is a line, as in what it
  was trained on (records='steps'): the score of a solution is the chance that all its
  steps are right, or that of the weakest, in 0..1. Hunter Lightman et al., "Let's verify
  step by step", 2023, §2.6 and appendix F, arXiv:2305.20050.

  Args:
    open_values: run folder -> (model with values, params, tokenizer)
    steps: 'last' reads V at the end of the text; 'product' is Π σ(V_t) and 'min' min σ(V_t)
      over its steps t, None where their ends cannot be told apart in tokens
    max_length: tokens; a longer text is None. By default the model's context.

  Raises ValueError for a run without a value head, unknown steps, and sizes below 1.
  """
  if steps not in STEPS:
    raise ValueError(f'judge.steps={steps!r} must be one of {list(STEPS)}')
  if batch_size < 1 or (max_length is not None and max_length < 1):
    raise ValueError(f'judge: {batch_size=} and {max_length=} must be at least 1')
  model, params, words = open_values(path)
  value_of = model.values
  if value_of is None:
    raise ValueError(f'judge.path={path!r} is of a run without a value head')
  limit = min(max_length or math.inf, model.architecture.max_length)

  @jax.jit
  def read(params, batch):
    states, _ = model.hidden(params, batch.tokens)
    return value_of(params, states, batch.tokens)[0]

  def judge(records, completions):
    texts, ends = [], []
    for record, completion in zip(records, completions, strict=True):
      ids = _encode(words, record, completion)
      texts.append(ids)
      ends.append([len(ids) - 1])
      if steps != 'last' and completion.strip():
        ends[-1] = _step_ends(words, record, completion)
    scores: list[float | None] = [None] * len(texts)
    fit = [row for row, x in enumerate(texts) if len(x) <= limit and len(ends[row])]
    fit.sort(key=lambda row: len(texts[row]))  # so that a batch holds equals
    for at in range(0, len(fit), batch_size):
      rows = fit[at : at + batch_size]
      tokens = np.zeros((batch_size, bucket(len(texts[rows[-1]]))), np.int32)
      mask = np.zeros(tokens.shape, np.float32)
      mask[:, 0] = 1  # rows that fill the batch up
      for place, row in enumerate(rows):
        tokens[place, : len(texts[row])] = texts[row]
        mask[place, : len(texts[row])] = 1
      arrays: dict[str, Any] = dict(tokens=tokens, mask=mask)
      with using_that_of(params):
        values = np.asarray(read(params, Batch(**arrays)))
      for place, row in enumerate(rows):
        value = STEPS[steps](values[place, ends[row]].astype(np.float64))
        scores[row] = value if math.isfinite(value) else None
    return scores

  return judge


def _encode(words, record: Record, completion: str) -> list[int]:
  """Prompt, completion and the end of the turn, as they are trained on."""
  prompt = record['prompt']
  said: Any = completion
  if not isinstance(prompt, str):
    said = [{'role': 'assistant', 'content': completion}]
  text = {'prompt': prompt, 'completion': said, 'tools': record.get('tools')}
  if isinstance(prompt, str) and not completion:
    text = {'text': prompt}  # nothing but the end was said
  whole = encode_record(words, text)
  # What a template writes after the last trained token is never sampled, nor was it rated.
  return whole.tokens[: np.flatnonzero(whole.mask)[-1] + 1].tolist()


def _step_ends(words, record: Record, completion: str) -> list[int]:
  """The token that each step, a line that is not blank, ends in; none if two share one."""
  lines = re.split(r'\n(?=[^\n]*\S)', completion)
  if not lines[0].strip():
    lines[:2] = ['\n'.join(lines[:2])]
  read = {'prompt': record['prompt'], 'tools': record.get('tools')}
  read |= {'completions': lines, 'labels': [0] * len(lines)}
  try:
    said = pairs.encode(words, read, 'steps')
  except ValueError:
    return []
  assert said.targets is not None
  return (len(said.prompt) + np.flatnonzero(np.isfinite(said.targets))).tolist()


def length(*, target: int) -> Judge:
  """−|characters − target|/target: no opinion at all, for dry runs and as a control of how
  much of another judge's taste is length. Raises ValueError for a target below 1."""
  if target < 1:
    raise ValueError(f'judge.target={target} must be at least 1 character')

  def judge(records, completions):
    return [-abs(len(text) - target) / target for text in completions]

  return judge


def endpoint(
  *,
  url: str,
  model: str,
  style: str = 'scalar',
  criteria: str = 'Judge how correct, helpful and harmless it is.',
  lowest: float = 1.0,
  highest: float = 10.0,
  api_key_env: str | None = None,
  timeout: float = 60.0,
  retries: int = 3,
  backoff: float = 1.0,
  concurrency: int = 8,
  error_limit: float = 0.1,
  temperature: float = 0.0,
  max_tokens: int = 512,
) -> Judge:
  """A language model behind an OpenAI-compatible server, as a judge.

  scalar: one question a completion; its score is the grade, from 0 (lowest) to 1
  (highest). pairwise: two questions for every two completions of a prompt, in both orders,
  so that a preference for a place cancels: G·(G − 1) a prompt. A score is the share of
  comparisons won, a tie half; one that is unanswered in either order counts for neither.
  It is relative to the completions of the same call (`compares`).

  Args:
    url: of the server, up to and with /v1
    criteria: sentences for the judge: what is good
    lowest, highest: of the grades asked for
    api_key_env: name of the environment variable that holds the key; None sends none
    timeout, backoff (seconds), retries, concurrency, error_limit: see http_client.Client
    temperature, max_tokens: of the judge's own sampling

  Raises ValueError for settings out of range. The judge raises EndpointError when too many
  questions stay unanswered, and ValueError for a prompt with one completion to compare.
  """
  wrong = None
  if style not in STYLES:
    wrong = f'style={style!r} must be one of {list(STYLES)}'
  elif not -math.inf < lowest < highest < math.inf:
    wrong = f'lowest={lowest} must be less than highest={highest}, both finite'
  elif max_tokens < 1:
    wrong = f'{max_tokens=} must be at least 1'
  elif not 0 <= temperature < math.inf:
    wrong = f'temperature={temperature} must be a number ≥ 0'
  if wrong:
    raise ValueError(f'judge.{wrong}')
  client = http_client.connect(
    'judge',
    url=url,
    model=model,
    api_key_env=api_key_env,
    timeout=timeout,
    retries=retries,
    backoff=backoff,
    concurrency=concurrency,
    error_limit=error_limit,
  )
  ask = functools.partial(
    server.chat, client, temperature=temperature, max_tokens=max_tokens
  )

  def grades(records, completions):
    texts = [
      SCALAR.format(
        criteria=criteria,
        prompt=conversation(record['prompt']),
        completion=completion,
        low=f'{lowest:g}',
        high=f'{highest:g}',
      )
      for record, completion in zip(records, completions, strict=True)
    ]

    def read(text):
      grade = _last(r'grade\W{0,8}?(-?\d+(?:\.\d+)?)', text)
      if grade is None or not lowest <= float(grade) <= highest:
        return None
      return (float(grade) - lowest) / (highest - lowest)

    return ask(texts, read)

  def comparisons(records, completions):
    pairs = list(_pairs(records))
    asked = [(i, j) for i, j in pairs if completions[i] != completions[j]]
    questions = [
      PAIRWISE.format(
        criteria=criteria,
        prompt=conversation(records[i]['prompt']),
        first=completions[a],
        second=completions[b],
      )
      for i, j in asked
      for a, b in ((i, j), (j, i))
    ]

    def read(text):
      verdict = _last(r'verdict\W{0,8}?(a|b|tie)\b', text)
      return None if verdict is None else {'a': 1.0, 'b': 0.0, 'tie': 0.5}[verdict]

    said = ask(questions, read)
    # The second question of a pair has it the other way round.
    wins = {
      pair: None if one is None or two is None else (one + 1 - two) / 2
      for pair, one, two in zip(asked, said[::2], said[1::2], strict=True)
    }
    scores: list[list[float]] = [[] for _ in completions]
    for i, j in pairs:
      if (won := wins.get((i, j), 0.5)) is not None:
        scores[i].append(won)
        scores[j].append(1 - won)
    return [sum(x) / len(x) if x else None for x in scores]

  judge: Any = grades if style == 'scalar' else comparisons
  judge.compares = style == 'pairwise'
  return judge


def compares(judge: Judge) -> bool:
  """Whether its scores are relative: to the other completions of the same call.

  Scores of two calls then say nothing of each other. A judge says so by an attribute
  `compares`; one without it scores each completion by itself.
  """
  return getattr(judge, 'compares', False)


def rewarded(rollouts: Rollouts, records: Sequence[Record], judge: Judge) -> Rollouts:
  """Rollouts whose rewards are the judge's scores.

  records: of each group. What the environment had said stays in `rewards`, and so does its
  outcome where it had scored the row; else that is 'judged', or 'error' without a score.
  Of several processes each asks about a share of the rows, groups kept together for a judge
  that compares; all of them must call this.

  Raises ValueError for a judge that answers the wrong number of rows, or no numbers.
  """
  rows = list(rollouts.transcripts)
  repeated = [record for record in records for _ in range(rollouts.group)]
  unit = rollouts.group if compares(judge) else 1

  def judged(which: Sequence[int]) -> list[float | None]:
    said = judge([repeated[i] for i in which], [rows[i]['completion'] for i in which])
    if len(said) != len(which):
      raise ValueError(f'the judge scored {len(said)} rows, {len(which)} were asked')
    return [verifiers.real(score, 'judge: a score') for score in said]

  scores = hosts.shared(len(rows), unit, judged)
  transcripts = []
  for row, score in zip(rows, scores, strict=True):
    parts = {'environment': row['reward'], **row['rewards'], 'judge': score}
    outcome = row['outcome']
    if row['reward'] is None:
      outcome = 'judged'
    if score is None:
      outcome = 'error'
    extra = {'error': 'the judge gave no score'} if score is None else {}
    transcripts.append(
      {**row, **extra, 'reward': score, 'rewards': parts, 'outcome': outcome}
    )
  rewards: Any = np.array([math.nan if x is None else x for x in scores], np.float32)
  return rollouts._replace(rewards=rewards, transcripts=transcripts)


def conversation(prompt: str | Sequence[Mapping[str, Any]]) -> str:
  """A prompt as text for a judge to read."""
  if isinstance(prompt, str):
    return prompt
  turns = normalize(prompt, 'prompt')
  return '\n\n'.join(f'{turn["role"]}: {turn["content"] or ""}' for turn in turns)


def _last(pattern: str, text: str) -> str | None:
  """What the pattern's group says where it is found last: models reason first."""
  found = re.findall(pattern, text.lower())
  return found[-1] if found else None


def _pairs(records: Sequence[Record]):
  """(i, j) of every two rows that lie together and have the same prompt."""
  for _, group in itertools.groupby(
    range(len(records)), lambda i: records[i]['prompt']
  ):
    rows = list(group)
    if len(rows) < 2:
      raise ValueError(
        "judge.style='pairwise' compares completions of the same prompt, and one came "
        "alone: set rollouts.group to 2 or more, or style='scalar'"
      )
    yield from itertools.combinations(rows, 2)
