"""What a judge thinks of a policy's answers, beside those of the policy it started from.

On the same prompts, with the same seeds: the mean score of each, how often ours is
preferred (measurement/win_rate.py), and how far the policy has moved,

  KL(π ‖ π_start) ≈ mean over π's own completions of Σ_t (log π(y_t) − log π_start(y_t)),

so that a run's evaluations are a curve of score against √KL, as Leo Gao et al. (2022,
arXiv:2210.10760) draw it: with a judge that the run was not trained on, it turns where the
proxy is over-optimised.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from educe.data.tokenizer import Tokenizer
from educe.measurement.accuracy import Z
from educe.measurement.sequence_logp import sequence_logp
from educe.measurement.win_rate import (
  LengthControlled,
  WinRate,
  length_controlled,
  win_rate,
)
from educe.rollouts.collect import collect
from educe.rollouts.joining import rows_of, side_by_side
from educe.rollouts.judges import Judge, rewarded
from educe.types import Environment, Model, Params, Rollouts


class Judged(NamedTuple):
  wins: WinRate  # over the policy that the run started from
  even: LengthControlled | None  # the same between answers of one length; of repeats=1
  score: float  # mean of the judge's scores of ours
  score_error: float  # its standard error, over prompts
  start_score: float  # of the start's answers
  kl: float  # nats a completion
  kl_error: float  # its standard error
  length: float  # tokens, mean of ours
  transcripts: list[dict[str, Any]]

  @property
  def verb(self) -> str:
    return 'is preferred on'

  def metrics(self) -> dict[str, float]:
    """What goes into metrics.jsonl."""
    return {
      **_named('win_rate', self.wins),
      **({} if self.even is None else _named('win_rate_at_equal_length', self.even)),
      'judged/score': self.score,
      'judged/score_error': self.score_error,
      'judged/start_score': self.start_score,
      'judged/kl': self.kl,
      'judged/kl_error': self.kl_error,
      'judged/length': self.length,
    }

  def __str__(self) -> str:
    even = '' if self.even is None else f', {self.even.rate:.1%} at equal length'
    kl = round(self.kl, 2) + 0.0  # no −0.00
    return (
      f'{self.wins}{even}; score {self.score:.3f} ± {Z * self.score_error:.3f}, at the '
      f'start {self.start_score:.3f}; KL {kl:.2f} ± {Z * self.kl_error:.2f} nats'
    )


def evaluate(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  start: Params,
  *,
  environment: Environment,
  judge: Judge,
  max_new_tokens: int,
  temperature: float = 1.0,
  repeats: int = 1,
  batch_size: int = 64,
) -> Judged:
  """A policy's answers, judged: what the config section `evaluation` runs, in all
  processes.

  start: the policy that the run started from
  environment: only its prompts are read
  judge: a section of its own; not the one that the run is trained on, if over-optimisation
    is to be seen. It is asked once, of each prompt our answers and then the start's; the
    scores of one that compares are the shares that they win among all of these.
  temperature: of both policies' samples, and of the log-probs in the KL
  repeats: completions of each prompt; every one is compared with every one of the start's

  Raises ValueError for numbers that cannot be, and where nothing could be judged.
  """
  check(
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    repeats=repeats,
    batch_size=batch_size,
  )
  prompts = environment.prompts

  def answers(params: Params) -> Rollouts:
    return collect(
      model,
      params,
      tokenizer,
      environment,
      prompts,
      group=repeats,
      key=jax.random.key(0),
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      batch_size=batch_size,
      show='evaluating',
      together=True,
    )

  ours, theirs = answers(params), answers(start)
  # In one call: a judge that compares has to see the completions of both.
  both = rewarded(side_by_side(ours, theirs), prompts, judge)
  rewards = np.asarray(both.rewards, np.float64).reshape(-1, 2, repeats)
  scores, start_scores = rewards[:, 0], rewards[:, 1]
  own = rows_of(np.arange(0, 2 * len(prompts), 2), repeats)
  base = sequence_logp(
    model, start, ours.tokens, ours.mask, temperature=temperature, batch_size=batch_size
  )
  # What π says of its own completions, the sampler knows already.
  drawn = (np.asarray(ours.sampler_logp, np.float64) * ours.mask).sum(-1)
  kl = (drawn - base).reshape(-1, repeats).mean(-1)
  wins, even = win_rate(scores, start_scores), None
  if repeats == 1:
    lengths = (np.asarray(x.mask).sum(-1) for x in (ours, theirs))
    even = length_controlled(scores[:, 0], start_scores[:, 0], *lengths)
  mean, error = _mean(_by_prompt(scores))
  kl_mean, kl_error = _mean(kl)
  return Judged(
    wins=wins,
    even=even,
    score=mean,
    score_error=error,
    start_score=_mean(_by_prompt(start_scores))[0],
    kl=kl_mean,
    kl_error=kl_error,
    length=float(np.mean([row['length'] for row in ours.transcripts])),
    transcripts=[both.transcripts[row] for row in own.tolist()],
  )


def _named(name: str, rate: WinRate | LengthControlled) -> dict[str, float]:
  return {name: rate.rate, f'{name}/low': rate.low, f'{name}/high': rate.high}


def _by_prompt(scores: np.ndarray) -> np.ndarray:
  """The mean of each prompt that has a score."""
  return np.nanmean(scores[np.isfinite(scores).any(-1)], -1)


def _mean(x: np.ndarray) -> tuple[float, float]:
  """(mean, its standard error) over prompts; of a single one the error is unknown."""
  error = x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.nan
  return float(x.mean()), float(error)


def check(
  *, max_new_tokens: int, temperature: float, repeats: int, batch_size: int
) -> None:
  """Raises ValueError for arguments of `evaluate` that no model could make good."""
  for name, value in (
    ('max_new_tokens', max_new_tokens),
    ('repeats', repeats),
    ('batch_size', batch_size),
  ):
    if value < 1:
      raise ValueError(f'{name}={value} must be at least 1')
  if not 0 < temperature < float('inf'):
    raise ValueError(
      f'temperature={temperature} must be above 0: a KL is of what is sampled'
    )
