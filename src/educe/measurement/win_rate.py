"""How often one policy's answers are preferred to another's on the same prompts.

With scores of a judge, prompt x is won by the share of (ours, theirs) pairs in which ours
scores higher, a tie counting one half; the win rate is the mean over prompts. The interval
is Wilson's for a share of P prompts: what a prompt contributes lies in [0, 1], so its
variance is at most the rate·(1 − rate) that Wilson's takes, and ties and several samples a
prompt can only make the interval wider than it need be. It is of prompts like these, for
this judge; the judge's own errors are not in it.

A judge that likes length is controlled for by a logistic regression of wins on length,

  P(x is won) = σ(θ + φ·tanh(Δ_x / std Δ)),    Δ_x = our length − their length

whose prediction at Δ = 0, σ(θ), is the length-controlled rate: Yann Dubois et al.,
"Length-controlled AlpacaEval", 2024, §3, arXiv:2404.04475.

**Differs from the paper**: its third term, a prompt's difficulty, is fitted on the answers
of many models and is left out here, where there are two; in place of its cross-validated
penalty the data have one prompt more, a tie, half of it at each end of the length term, so
that θ and φ are finite where every prompt is won and swapping the policies is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from educe.measurement.accuracy import Z, wilson


class WinRate(NamedTuple):
  rate: float  # mean share of a prompt that is won, ties one half
  low: float  # 95 %
  high: float
  prompts: int  # compared
  ties: float  # mean share of a prompt that is tied
  unjudged: int  # prompts that could not be compared

  def __str__(self) -> str:
    left_out = f'; {self.unjudged} not judged' if self.unjudged else ''
    return (
      f'{self.rate:.1%} of {self.prompts} prompts (95 % interval {self.low:.1%} to '
      f'{self.high:.1%}; {self.ties:.1%} tied{left_out})'
    )


class LengthControlled(NamedTuple):
  rate: float  # σ(θ): what is expected between answers of equal length
  low: float  # 95 %, by the curvature at the optimum
  high: float
  length_effect: float  # φ, log-odds; > 0: the judge prefers the longer answer
  prompts: int


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> WinRate:
  """The win rate of `ours` over `theirs`.

  ours, theirs: `[P]` or `[P, N]`, `[P, M]`: scores of each policy's completions of the
    same prompts in the same order; NaN: not judged. Every completion of one is compared
    with every one of the other; a prompt without any left is in no statistic.

  Raises ValueError if the prompts differ in number or none can be compared.
  """
  a, b = _rows(ours, 'ours'), _rows(theirs, 'theirs')
  if len(a) != len(b):
    raise ValueError(
      f'win rate: {len(a)} prompts of ours and {len(b)} of theirs; both policies must '
      'answer the same ones'
    )
  judged = np.isfinite(a)[:, :, None] & np.isfinite(b)[:, None, :]
  a, b = np.nan_to_num(a)[:, :, None], np.nan_to_num(b)[:, None, :]
  count = judged.sum((1, 2))
  there = count > 0
  if not there.any():
    raise ValueError('win rate: no prompt has a score of both policies')
  wins = (judged & (a > b)).sum((1, 2))[there] / count[there]
  ties = (judged & (a == b)).sum((1, 2))[there] / count[there]
  rate = float((wins + ties / 2).mean())
  prompts = int(there.sum())
  # A sum of shares may pass 0 or P by a rounding.
  low, high = wilson(min(max(rate, 0.0), 1.0) * prompts, prompts)
  return WinRate(
    rate, low, high, prompts, float(ties.mean()), int(len(there) - prompts)
  )


def length_controlled(
  ours: np.ndarray,
  theirs: np.ndarray,
  our_lengths: np.ndarray,
  their_lengths: np.ndarray,
) -> LengthControlled:
  """The win rate between answers of equal length, by the regression above.

  All `[P]`, one completion of each policy a prompt; lengths in any one unit; NaN scores
  as in `win_rate`. It removes what is linear in the length term, no other bias of the
  judge, and nothing where the better answers are longer for a good reason.

  Raises ValueError as `win_rate` does, for lengths that are not finite, and for shapes
  that differ.
  """
  arrays = [
    np.asarray(x, np.float64) for x in (ours, theirs, our_lengths, their_lengths)
  ]
  if arrays[0].ndim != 1 or len({x.shape for x in arrays}) > 1:
    raise ValueError(
      'length-controlled win rate: scores and lengths must all be [P], not '
      f'{[list(x.shape) for x in arrays]}'
    )
  for scores, whose in zip(arrays, ('ours', 'theirs'), strict=False):
    _rows(scores, whose)  # an infinite one is refused
  judged = np.isfinite(arrays[0]) & np.isfinite(arrays[1])
  a, b, our_length, their_length = (x[judged] for x in arrays)
  if not len(a):
    raise ValueError('win rate: no prompt has a score of both policies')
  longer = our_length - their_length
  if not np.isfinite(longer).all():
    raise ValueError('length-controlled win rate: a length is not finite')
  spread = longer.std()
  term = np.tanh(longer / spread) if spread > 0 else np.zeros_like(longer)
  won = np.where(a == b, 0.5, a > b)
  # The prompt more: half a tie where ours is much longer, half where theirs is.
  x = np.stack([np.ones(len(a) + 2), np.append(term, [1, -1])], 1)
  y, weight = np.append(won, [0.5, 0.5]), np.append(np.ones(len(a)), [0.5, 0.5])
  theta = np.zeros(2)

  def state(theta):
    z = x @ theta
    loss = (weight * (np.logaddexp(0, z) - y * z)).sum()
    p = 1 / (1 + np.exp(-z))
    slope = x.T @ (weight * (p - y))
    return loss, slope, (x * (weight * p * (1 - p))[:, None]).T @ x

  loss, slope, curvature = state(theta)
  for _ in range(100):
    step = np.linalg.solve(curvature, slope)
    if np.abs(step).max() < 1e-12:
      break
    while (tried := state(theta - step))[0] > loss + 1e-12 * abs(loss):
      step = step / 2  # far out a whole Newton step can overshoot
    theta, (loss, slope, curvature) = theta - step, tried
  error = float(np.sqrt(np.linalg.inv(curvature)[0, 0]))
  rate, low, high = (
    float(1 / (1 + np.exp(-(theta[0] + z * error)))) for z in (0.0, -Z, Z)
  )
  return LengthControlled(rate, low, high, float(theta[1]), len(a))


def _rows(scores: np.ndarray, what: str) -> np.ndarray:
  """`[P, N]`."""
  scores = np.asarray(scores, np.float64)
  if scores.ndim not in (1, 2):
    raise ValueError(
      f'win rate: {what} must be [P] or [P, N] scores, not {list(scores.shape)}'
    )
  if np.isinf(scores).any():
    raise ValueError(f'win rate: a score of {what} is infinite; NaN says not judged')
  return scores[:, None] if scores.ndim == 1 else scores
