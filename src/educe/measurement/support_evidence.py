"""What is known of a behaviour's mass: from below by its traces, from above by samples.

**Certificates.** The teacher-forced log-probability of one output of b is a lower bound of
log p0(b|x), and the sum over several different ones a better bound, exact and without
sampling; where all of b is listed (a task of which every step is forced has one correct
trace) the bound is the value. With the probabilities s_i of a trace's steps, one by one
given the steps before, search that checks every step needs Σ_i 1/s_i draws on average
where sampling whole traces needs Π_i 1/s_i.

**Missing mass.** Of N samples with labels, f₁ of which were seen once, f₂ labels twice,

  M̂ = f₁/N                          I. J. Good, 1953, Biometrika 40
  M̂ ± z·√(f₁·(1 − f₁/N) + 2·f₂)/N   Warren Esty, 1983, Annals of Statistics 11

estimates the mass of all labels that were not seen; E M̂ is the expected missing mass of
N − 1 samples exactly. **Differs from Esty**: the interval is no narrower than Clopper and
Pearson's for f₁ of N, for a normal law says ±0 where nothing was seen once.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from educe.measurement.accuracy import Z
from educe.measurement.intervals import bootstrap
from educe.measurement.support import as_log_p, clopper_pearson


class Certificate(NamedTuple):
  log_p: np.ndarray  # [P] nats: at most log p0(b|x); −∞ without a trace
  log_step: (
    np.ndarray
  )  # [P] nats: the least step of the trace in which that is greatest
  log_search: np.ndarray  # [P] log of draws of a step: the cheapest trace's Σ 1/s_i
  traces: np.ndarray  # [P] different ones

  def __str__(self) -> str:
    there = self.traces > 0
    median = float(np.median(self.log_p[there])) if there.any() else -math.inf
    return (
      f'{int(there.sum())} of {len(there)} prompts have a trace; median log p0 of these '
      f'≥ {median:.2f} nats'
    )


class MissingMass(NamedTuple):
  rate: float  # mean over prompts of the mass of labels not seen
  low: float  # 95 %, over prompts; of a single prompt, its own
  high: float
  per_prompt: np.ndarray  # [P]
  per_prompt_low: np.ndarray  # [P] 95 %, over samples
  per_prompt_high: np.ndarray  # [P]
  samples: int  # N, of each prompt

  def __str__(self) -> str:
    return (
      f'{self.rate:.1%} of the mass not seen in {self.samples} samples of each of '
      f'{len(self.per_prompt)} prompts (95 % interval {self.low:.1%} to {self.high:.1%})'
    )


def certify(
  step_logp: np.ndarray,
  mask: np.ndarray,
  tokens: np.ndarray,
  prompt: np.ndarray,
  *,
  prompts: int,
) -> Certificate:
  """What R traces show of the behaviours of P prompts.

  step_logp: `[R, T]`, nats: of each step given the prompt and the gold steps before it,
    under the same decoding as all else (−∞ where that has cut a step off)
  mask: `[R, T]`, > 0 at the steps of the trace; what is not a step is not read
  tokens: `[R, T]`, what the steps are, by which equal traces are found and counted once
  prompt: `[R]`, which of the P prompts each is of

  Traces are whole outputs, their end included: only then are different ones disjoint.

  Raises ValueError for shapes that differ, a trace without steps, a prompt out of range,
  what is no log-probability, and a trace that another one goes on from.
  """
  step_logp, tokens = np.asarray(step_logp, np.float64), np.asarray(tokens)
  inside, prompt = np.asarray(mask) > 0, np.asarray(prompt)
  if step_logp.ndim != 2 or not (
    step_logp.shape == inside.shape == tokens.shape and prompt.shape == inside.shape[:1]
  ):
    raise ValueError(
      'certificate: step_logp, mask and tokens must be [R, T] and prompt [R], not '
      f'{[list(x.shape) for x in (step_logp, inside, tokens, prompt)]}'
    )
  found: list[dict[tuple[int, ...], np.ndarray]] = [{} for _ in range(prompts)]
  for row, index in enumerate(prompt):
    if not inside[row].any():
      raise ValueError(f'certificate: trace {row} has no step; its mask is 0')
    if not 0 <= index < prompts:
      raise ValueError(
        f'certificate: trace {row} is of prompt {index}, and there are {prompts}'
      )
    trace = tuple(tokens[row, inside[row]].tolist())
    found[index].setdefault(trace, as_log_p(step_logp[row, inside[row]]))
  log_p, log_step = np.full((2, prompts), -np.inf)
  log_search = np.full(prompts, np.inf)
  for index, traces in enumerate(found):
    _check_disjoint(list(traces), index)
    for steps in traces.values():
      log_p[index] = np.logaddexp(log_p[index], steps.sum())
      log_step[index] = max(log_step[index], steps.min())
      log_search[index] = min(log_search[index], np.logaddexp.reduce(-steps))
  counts = np.array([len(traces) for traces in found])
  return Certificate(np.minimum(log_p, 0), log_step, log_search, counts)


def missing_mass(
  labels: Sequence[Sequence[Hashable]], *, resamples: int = 2000, seed: int = 0
) -> MissingMass:
  """The mass of labels that N samples of each prompt did not show.

  labels: `[P, N]`, anything that can be compared (answers, strategies, token tuples);
    give None, or another name of its own, to what could not be read
  resamples, seed: of the bootstrap over prompts

  Raises ValueError without samples, or if prompts differ in their number.
  """
  sizes = {len(row) for row in labels}
  if len(sizes) != 1 or 0 in sizes:
    raise ValueError(
      f'missing mass: labels must be [P, N], not rows of {sorted(sizes)} samples'
    )
  (n,) = sizes
  once, twice = np.zeros((2, len(labels)))
  for index, row in enumerate(labels):
    seen = Counter(Counter(row).values())
    once[index], twice[index] = seen[1], seen[2]
  rates = once / n
  half = Z * np.sqrt(once * (1 - rates) + 2 * twice) / n
  exact_low, exact_high = clopper_pearson(once, n)
  lows = np.maximum(np.minimum(rates - half, exact_low), 0)
  highs = np.minimum(np.maximum(rates + half, exact_high), 1)
  if len(rates) == 1:
    low, high = lows[0], highs[0]
  else:
    means = bootstrap(np.mean, rates, resamples=resamples, seed=seed)
    pooled = clopper_pearson(once.sum(), n * len(rates))
    low, high = min(means[0], pooled[0]), max(means[1], pooled[1])
  return MissingMass(
    float(rates.mean()), float(low), float(high), rates, lows, highs, n
  )


def expected_missing_mass(p: np.ndarray, n: int) -> np.ndarray:
  """Σ_y p(y)·(1−p(y))ⁿ, `[…]`: what n samples leave unseen on average.

  p: `[…, Y]`, of every label

  Raises ValueError for n < 0.
  """
  if n < 0:
    raise ValueError(f'missing mass: n={n} must be 0 or more')
  p = np.asarray(p, np.float64)
  return (p * (1 - p) ** n).sum(-1)


def _check_disjoint(traces: list[tuple[int, ...]], prompt: int) -> None:
  """In lexicographic order what goes on from a trace comes right after it."""
  traces = sorted(traces)
  for trace, following in itertools.pairwise(traces):
    if following[: len(trace)] == trace:
      raise ValueError(
        f'certificate: of prompt {prompt} one trace of {len(trace)} steps is the '
        f'beginning of another of {len(following)}; add the end to both'
      )
