"""How often a policy solves an environment's problems, and what it wrote.

The interval is Wilson's (1927, doi:10.1080/01621459.1927.10502953): unlike p ± 1.96·se
it stays inside [0, 1] and is honest at 0 and at n.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from educe.data.tokenizer import Tokenizer
from educe.rollouts.texts import complete
from educe.types import OUTCOMES, Environment, Model, Params

Z = 1.959964  # two-sided 95 %


class Accuracy(NamedTuple):
  rate: float  # verified / total
  low: float  # Wilson 95 %
  high: float
  total: int
  counts: dict[str, int]  # of each of OUTCOMES
  transcripts: list[dict[str, Any]]

  def metrics(self, name: str = 'accuracy') -> dict[str, float]:
    """What goes into metrics.jsonl."""
    return {name: self.rate, f'{name}/low': self.low, f'{name}/high': self.high}

  def __str__(self) -> str:
    counts = ', '.join(f'{n} {outcome}' for outcome, n in self.counts.items() if n)
    interval = f'95 % interval {self.low:.1%} to {self.high:.1%}'
    return f'{self.rate:.1%} of {self.total} ({interval}; {counts})'


def accuracy(
  policy: Callable[[Sequence[Any]], Sequence[Any]], environment: Environment
) -> Accuracy:
  """The share of single-turn problems solved, one completion each.

  policy: prompts -> completions with `.text`, `.tokens` and `.stopped`, such as
    `functools.partial(rollouts.texts.complete, model, params, tokenizer, …)`
  environment: whose `info['outcome']` is one of OUTCOMES; without it a reward of 1 or
    more counts as verified, less as wrong, and None as unparsable

  Each transcript has id, prompt, completion, answer, reward, outcome, length (tokens)
  and stopped.

  Raises ValueError for no prompts, or if an environment asks for another turn.
  """
  records = environment.prompts
  if not len(records):
    raise ValueError('accuracy: the environment has no prompts')
  completions = policy([record['prompt'] for record in records])
  counts = dict.fromkeys(OUTCOMES, 0)
  transcripts = []
  for index, (record, done) in enumerate(zip(records, completions, strict=True)):
    turn = environment.respond(record, [done.text])
    if not turn.done:
      raise ValueError('accuracy: the environment asks for more than one turn')
    outcome = turn.info.get('outcome') or _outcome(turn.reward)
    counts[outcome] += 1
    transcripts.append(
      {
        'id': record.get('id', index),
        'prompt': record['prompt'],
        'completion': done.text,
        'answer': record['answer'],
        'reward': turn.reward,
        'outcome': outcome,
        'length': len(done.tokens),
        'stopped': done.stopped,
      }
    )
  low, high = wilson(counts['verified'], len(records))
  rate = counts['verified'] / len(records)
  return Accuracy(rate, low, high, len(records), counts, transcripts)


def evaluate(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  *,
  environment: Environment,
  max_new_tokens: int,
  batch_size: int = 64,
) -> Accuracy:
  """Greedy accuracy of a policy: what the config section `evaluation` runs."""
  policy = functools.partial(
    complete,
    model,
    params,
    tokenizer,
    key=jax.random.key(0),  # greedy: never used
    max_new_tokens=max_new_tokens,
    batch_size=batch_size,
    temperature=0.0,
    show='evaluating',
  )
  return accuracy(policy, environment)


def _outcome(reward: float | None) -> str:
  if reward is None:
    return 'unparsable'
  return 'verified' if reward >= 1 else 'wrong'


def wilson(successes: int, total: int) -> tuple[float, float]:
  """95 % score interval for a binomial share."""
  if not 0 <= successes <= total or total == 0:
    raise ValueError(f'wilson: {successes} successes of {total}')
  p, z2 = successes / total, Z * Z / total
  middle = (p + z2 / 2) / (1 + z2)
  half = Z * math.sqrt(p * (1 - p) / total + z2 / (4 * total)) / (1 + z2)
  # At the ends the bound is exact; rounding must not put it beyond the rate.
  low = 0.0 if successes == 0 else middle - half
  high = 1.0 if successes == total else middle + half
  return low, high
