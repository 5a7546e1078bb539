"""Excess description length: how many bits about a task a learner took from its data.

A learner that predicts each label before it trains on it compresses the data into

  MDL(D; θ0, A) = Σ_i −log p_{θ_{i−1}}(y_i | x_i)              (prequential code)

of which n·L_test(θ*) is what the labels would have cost after training, and the rest,

  EDL = MDL − n·L_test(θ*)

is what training has told it. Per label token, EDL/D, its shape over the size n of the
data set tells two kinds of training apart: it falls from the start where the skill is
elicited (a few examples point to what is there), and rises first where it is taught
(every example brings news, until there is no more).

Elizabeth Donoway et al., 2026, arXiv:2601.04728, and 'Bits That Count', ICML 2026. The
first epoch alone counts, label tokens alone, each loss taken before the update that uses
it; θ* is trained to convergence on the n examples. Learning rate constant (a schedule
would depend on n), order of the examples the same for every n, at least three seeds.

Losses come in nats, results leave in bits. The intervals are of the examples, by a wild
bootstrap: a row's residual is its difference to the next row over √2, which a slow trend
does not widen, and changes its sign at random (C. F. Jeff Wu, 1986,
doi:10.1214/aos/1176350142; John Rice, 1984, doi:10.1214/aos/1176346788). They hold for
the course that training took: other seeds and orders are not in them. NumPy, float64.
"""

from __future__ import annotations

import itertools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from educe.training import metrics

BITS = 1 / math.log(2)  # a nat
PEAK = 4.0  # a curve rises if its peak lies at this many times its smallest size


class DescriptionLength(NamedTuple):
  per_token: float  # EDL/D, bits per label token
  low: float  # 95 %
  high: float
  excess: float  # EDL, bits
  codelength: float  # MDL, bits
  test: float  # L_test, bits per example
  examples: int  # n
  tokens: int  # D, label tokens

  def __str__(self) -> str:
    return (
      f'{self.per_token:.4g} bits per label token (95 % interval {self.low:.4g} to '
      f'{self.high:.4g}): {self.excess:.4g} of {self.codelength:.4g} bits in '
      f'{self.examples} examples'
    )


class Difference(NamedTuple):
  change: float  # of EDL/D from one size to the next, bits per label token
  low: float  # 95 %, the same examples in both
  high: float


class Course(NamedTuple):
  points: tuple[DescriptionLength, ...]  # S, by size
  differences: tuple[Difference, ...]  # S − 1
  shape: str  # 'falls', 'rises' or 'unclear', over the first decades
  support: float  # share of resamples that have this shape
  peak: int  # n of the largest EDL/D

  def __str__(self) -> str:
    return (
      f'EDL per label token {self.shape} ({self.support:.0%} of resamples), peak at '
      f'{self.peak} examples'
    )


def excess(
  losses: np.ndarray,
  tokens: np.ndarray,
  test_losses: np.ndarray,
  *,
  examples: np.ndarray | None = None,
  resamples: int = 1000,
  seed: int = 0,
) -> DescriptionLength:
  """EDL of one run.

  losses: `[N]`, nats: each row's −log p summed over its label tokens, before the update
    that trains on it, in the order of training. A row is an example or a step.
  tokens: `[N]`, label tokens of each row
  test_losses: `[M]`, nats per held-out example, after training; one number is taken as
    the expectation itself
  examples: `[N]`, of each row; None: 1

  Raises ValueError for shapes that differ, a loss that is not finite or is negative, rows
  without examples or tokens, or fewer than two rows.
  """
  one = np.atleast_1d(np.asarray(test_losses, np.float64))[None]
  rows, test = _checked(losses, tokens, one, examples)
  draws = _resampled(rows, test, [rows.shape[1]], resamples, seed)
  return _points(rows, test, [rows.shape[1]], draws)[0]


def course(
  losses: np.ndarray,
  tokens: np.ndarray,
  test_losses: np.ndarray,
  *,
  sizes: Sequence[int],
  examples: np.ndarray | None = None,
  decades: float = 2.0,
  resamples: int = 1000,
  seed: int = 0,
) -> Course:
  """EDL/D of growing data sets, each a prefix of the next, and the shape of it.

  losses, tokens, examples: `[N]`, as in `excess`: one stream serves all sizes, for the
    order is the same
  test_losses: `[S, M]`, nats per held-out example, the same ones in each row, after
    training to convergence on the first sizes[s] rows
  sizes: S of them, in rows, growing
  decades: of n from the smallest size on, over which the shape is judged: 'falls' if
    every difference is negative, 'rises' if the peak is at 4 times the smallest n or
    more, else 'unclear'. Where there is nothing to learn the shape is noise's, and
    `support` low.

  Raises ValueError as `excess` does, and for sizes that do not grow, that there are no
  rows for, or of which fewer than two lie in the decades.
  """
  rows, test = _checked(losses, tokens, np.asarray(test_losses, np.float64), examples)
  sizes = [int(size) for size in sizes]
  if any(a >= b for a, b in itertools.pairwise(sizes)):
    raise ValueError(f'description length: sizes={sizes} must grow')
  if not sizes or sizes[0] < 1 or sizes[-1] > rows.shape[1]:
    raise ValueError(
      f'description length: sizes={sizes} must be in 1..{rows.shape[1]}, the rows'
    )
  if len(test) != len(sizes):
    raise ValueError(
      f'description length: test_losses has {len(test)} rows for {len(sizes)} sizes; it '
      'needs one of each'
    )
  n = np.cumsum(rows[2])[np.array(sizes) - 1]
  window = int((n <= n[0] * 10**decades * (1 + 1e-9)).sum())
  if window < 2:
    raise ValueError(
      f'description length: decades={decades} from {n[0]:.0f} examples on hold one size; '
      'add sizes between'
    )
  draws = _resampled(rows, test, sizes, resamples, seed)
  points = _points(rows, test, sizes, draws)
  curve = np.array([point.per_token for point in points])
  low, high = np.percentile(np.diff(draws), [2.5, 97.5], axis=0)
  (shape,) = _shapes(curve[None, :window], n[:window])
  return Course(
    points,
    tuple(map(Difference, np.diff(curve).tolist(), low.tolist(), high.tolist())),
    shape,
    float(np.mean(_shapes(draws[:, :window], n[:window]) == shape)),
    points[int(curve.argmax())].examples,
  )


def of_run(run_dir: str | os.PathLike, test_nll: float) -> DescriptionLength:
  """EDL of a run of SFT, from the losses that it logged before each update.

  test_nll: nats per label token on held-out texts, after training

  Label tokens are the examples here. That the run is no longer than its first epoch is not
  seen in what it logged.

  Raises ValueError for a run that logged no `nll`, or not at every step, and for one whose
  learning rate fell.
  """
  path = pathlib.Path(run_dir) / 'metrics.jsonl'
  rows = {row['step']: row for row in metrics.read(path) if 'nll' in row}
  if sorted(rows) != list(range(1, len(rows) + 1)) or not rows:
    raise ValueError(
      f'{path}: {len(rows)} steps have nll; description length needs all of a run of SFT'
    )
  rates = [row['learning_rate'] for row in rows.values() if 'learning_rate' in row]
  if rates and rates[-1] < max(rates):
    raise ValueError(
      f'{path}: the learning rate fell from {max(rates):.3g} to {rates[-1]:.3g}; a '
      'description length needs a constant one (optimizer.schedule)'
    )
  losses, tokens = np.array(
    [(rows[i]['nll'], rows[i]['num_tokens']) for i in sorted(rows)]
  ).T
  return excess(losses * tokens, tokens, np.asarray(test_nll), examples=tokens)


def exact(p: np.ndarray, predictions: np.ndarray, final: np.ndarray) -> float:
  """EDL in bits where all labels are known: Σ_i E_p[log p_θ*(y) − log p_{θ_{i−1}}(y)].

  p, final: `[…, Y]`, the data's and the trained learner's distribution of labels, of each
    prompt; prompts are equally likely
  predictions: `[N, …, Y]`, the learner's before each example

  The expectation of `excess` over the labels, given the course of training; infinite
  where a label that occurs was impossible to the learner.
  """
  p, predictions, final = (np.asarray(x, np.float64) for x in (p, predictions, final))
  with np.errstate(divide='ignore'):
    gain = np.where(p > 0, np.log(np.where(p > 0, final, 1)), 0) - np.where(
      p > 0, np.log(np.where(p > 0, predictions, 1)), 0
    )
  return float((p * gain).sum(-1).reshape(len(predictions), -1).mean(1).sum() * BITS)


def _checked(losses, tokens, test, examples) -> tuple[np.ndarray, np.ndarray]:
  """Rows `[3, N]` (bits, tokens, examples) and test losses `[S, M]`, bits."""
  losses, tokens = np.asarray(losses, np.float64), np.asarray(tokens, np.float64)
  examples = np.ones(losses.shape) if examples is None else np.asarray(examples, float)
  if losses.ndim != 1 or {tokens.shape, examples.shape} != {losses.shape}:
    raise ValueError(
      'description length: losses, tokens and examples must all be [N], not '
      f'{[list(x.shape) for x in (losses, tokens, examples)]}'
    )
  if len(losses) < 2:
    raise ValueError(
      f'description length: {len(losses)} rows have no interval; keep the loss of each '
      'example or step'
    )
  if test.ndim != 2 or not test.size:
    raise ValueError(
      'description length: test_losses must be one or more of each size, not '
      f'{list(test.shape)}'
    )
  for name, values in (('losses', losses), ('test_losses', test)):
    # A float32 log-prob may pass 0 by a rounding; a log-prob in a loss's place is more.
    if not (np.isfinite(values).all() and (values > -1e-3).all()):
      raise ValueError(
        f'description length: {name} has one that is negative or not finite; they are '
        '−log p in nats'
      )
  if not ((tokens >= 1).all() and (examples >= 1).all()):
    raise ValueError(
      'description length: a row has no label token or no example; leave it out'
    )
  return np.stack([losses * BITS, tokens, examples]), test * BITS


def _resampled(rows, test, sizes, resamples: int, seed: int) -> np.ndarray:
  """EDL/D of each resample, `[R, S]`; sizes share what they have in common."""
  if resamples < 1:
    raise ValueError(f'resamples={resamples}: must be at least 1')
  rng = np.random.default_rng(seed)
  residual = np.diff(rows) / math.sqrt(2)
  residual = np.concatenate([residual, residual[:, -1:]], 1)[:, : sizes[-1]]
  starts = [0, *sizes[:-1]]
  sums = _sums(rows, sizes)
  out = np.empty((resamples, len(sizes)))
  for draw in out:
    sign = 2.0 * rng.integers(0, 2, size=sizes[-1]) - 1
    moved = np.cumsum(np.add.reduceat(sign * residual, starts, axis=1), axis=1)
    losses, tokens, examples = sums + moved
    chosen = rng.integers(test.shape[1], size=test.shape[1])
    draw[:] = (losses - examples * test[:, chosen].mean(1)) / tokens
  return out


def _points(rows, test, sizes, draws) -> tuple[DescriptionLength, ...]:
  losses, tokens, examples = _sums(rows, sizes)
  test = test.mean(1)
  excess = losses - examples * test
  low, high = np.percentile(draws, [2.5, 97.5], axis=0)
  columns = [x.tolist() for x in (excess / tokens, low, high, excess, losses, test)]
  counts = examples.astype(int).tolist(), tokens.astype(int).tolist()
  return tuple(map(DescriptionLength, *columns, *counts))


def _sums(rows, sizes) -> np.ndarray:
  """`[3, S]`: bits, tokens and examples of the first rows."""
  return np.cumsum(rows, axis=1)[:, np.array(sizes) - 1]


def _shapes(curves: np.ndarray, n: np.ndarray) -> np.ndarray:
  """The shape of each curve of `[R, S]`."""
  falls = (np.diff(curves) < 0).all(1)
  rises = n[curves.argmax(1)] >= PEAK * n[0]
  return np.where(falls, 'falls', np.where(rises, 'rises', 'unclear'))
