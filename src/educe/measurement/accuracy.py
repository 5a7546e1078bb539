"""How often a policy solves an environment's problems, and what it wrote.

The interval is Wilson's (1927, doi:10.1080/01621459.1927.10502953): unlike p ± 1.96·se
it stays inside [0, 1] and is honest at 0 and at n.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from educe.data.tokenizer import Tokenizer
from educe.environments import verifiers
from educe.rollouts.collect import collect
from educe.types import OUTCOMES, Environment, Model, Params

Z = 1.959964  # two-sided 95 %


class Accuracy(NamedTuple):
  rate: float  # verified / total
  low: float  # Wilson 95 %
  high: float
  total: int
  counts: dict[str, int]  # of each of OUTCOMES
  transcripts: list[dict[str, Any]]

  @property
  def verb(self) -> str:
    return 'solves'

  def metrics(self) -> dict[str, float]:
    """What goes into metrics.jsonl."""
    return {'accuracy': self.rate, 'accuracy/low': self.low, 'accuracy/high': self.high}

  def __str__(self) -> str:
    counts = ', '.join(f'{n} {outcome}' for outcome, n in self.counts.items() if n)
    interval = f'95 % interval {self.low:.1%} to {self.high:.1%}'
    return f'{self.rate:.1%} of {self.total} ({interval}; {counts})'


def accuracy(transcripts: Sequence[dict[str, Any]]) -> Accuracy:
  """The share of completions whose `outcome` is 'verified'.

  transcripts: rows of `Rollouts.transcripts`

  Raises ValueError for none.
  """
  if not transcripts:
    raise ValueError('accuracy: there are no transcripts')
  counts = dict.fromkeys(OUTCOMES, 0)
  for row in transcripts:
    counts[row['outcome']] += 1
  low, high = wilson(counts['verified'], len(transcripts))
  rate = counts['verified'] / len(transcripts)
  return Accuracy(rate, low, high, len(transcripts), counts, list(transcripts))


def evaluate(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  *,
  environment: Environment,
  max_new_tokens: int,
  temperature: float = 0.0,
  repeats: int = 1,
  batch_size: int = 64,
  workers: int = 0,
  time_limit: float = 10.0,
) -> Accuracy:
  """Accuracy of a policy on an environment: what the config section `evaluation` runs, in
  all processes; each judges a share.

  temperature: 0 is greedy
  repeats: completions of each prompt, always with the same seeds. The interval takes
    them as independent: it is of the rate on these prompts, not on others like them.
  workers, time_limit (seconds): of the verifier's processes, as for rollouts; with 0 the
    environment judges in this process, where nothing can stop it.
  """
  check(
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    repeats=repeats,
    batch_size=batch_size,
    workers=workers,
    time_limit=time_limit,
  )
  ask = functools.partial(
    collect,
    model,
    params,
    tokenizer,
    environment,
    environment.prompts,
    group=repeats,
    key=jax.random.key(0),
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    batch_size=batch_size,
    show='evaluating',
    together=True,
  )
  if not workers:
    return accuracy(ask().transcripts)
  pool = verifiers.worker_pool(
    environment.respond, workers=workers, time_limit=time_limit
  )
  with pool as verifier:
    return accuracy(ask(verifier=verifier).transcripts)


def check(
  *,
  max_new_tokens: int,
  temperature: float,
  repeats: int,
  batch_size: int,
  workers: int,
  time_limit: float,
) -> None:
  """Raises ValueError for arguments of `evaluate` that no model could make good."""
  for name, value, low in (
    ('max_new_tokens', max_new_tokens, 1),
    ('repeats', repeats, 1),
    ('batch_size', batch_size, 1),
    ('workers', workers, 0),
  ):
    if value < low:
      raise ValueError(f'{name}={value} must be at least {low}')
  if not 0 <= temperature < math.inf:
    raise ValueError(f'temperature={temperature} must be a number ≥ 0')
  if not time_limit > 0:
    raise ValueError(f'time_limit={time_limit} must be more than 0 seconds')
  if repeats > 1 and not temperature:
    raise ValueError(
      f'repeats={repeats} greedy completions would be equal; set temperature=1.0'
    )


def wilson(successes: float, total: int) -> tuple[float, float]:
  """95 % score interval for a binomial share; a tie may count as half a success."""
  if not 0 <= successes <= total or total == 0:
    raise ValueError(f'wilson: {successes} successes of {total}')
  p, z2 = successes / total, Z * Z / total
  middle = (p + z2 / 2) / (1 + z2)
  half = Z * math.sqrt(p * (1 - p) / total + z2 / (4 * total)) / (1 + z2)
  # At the ends the bound is exact; rounding must not put it beyond the rate.
  low = 0.0 if successes == 0 else middle - half
  high = 1.0 if successes == total else middle + half
  return low, high
