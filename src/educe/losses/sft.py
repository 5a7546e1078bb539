"""SFT: maximum likelihood on the trained tokens.

  L(θ) = −⟨ (1 − ε)·log π_θ(y_t) + ε·(1/V) Σ_v log π_θ(v) ⟩      (nats per token)

⟨·⟩ is the token mean over the whole batch, or the mean of per-sequence means or sums.
ε is label smoothing (Szegedy et al. 2016, §7, arXiv:1512.00567), here with the uniform
distribution.
"""

from __future__ import annotations

from educe.losses import aggregate as agg
from educe.types import Batch, Mean, Scores


def loss(
  scores: Scores,
  batch: Batch,
  *,
  label_smoothing: float = 0.0,
  aggregate: str = 'token_mean',
) -> tuple[Mean, dict[str, Mean]]:
  """Cross-entropy of `batch.tokens` where `batch.mask` is 1.

  Returns the loss, and metrics `nll` (unsmoothed, token mean), `entropy` (both nats per
  token).

  Raises:
    ValueError: label_smoothing outside [0, 1); a sequence average over packed rows,
      where a row is not a sequence; 'constant', which divides by a sampling limit.
  """
  if not 0 <= label_smoothing < 1:
    raise ValueError(f'sft: label_smoothing={label_smoothing} must be in [0, 1)')
  if aggregate == 'constant':
    raise ValueError(
      "sft: aggregate='constant' divides by the longest completion that is sampled, and "
      'here nothing is sampled; use token_mean, sequence_mean or sequence_sum'
    )
  if aggregate != 'token_mean' and batch.segments is not None:
    raise ValueError(
      f'sft: aggregate={aggregate!r} needs one sequence a row; '
      'use token_mean, or packing=False'
    )
  nll = -scores.logp
  smoothed = nll
  if label_smoothing:
    assert scores.mean_logp is not None
    smoothed = (1 - label_smoothing) * nll - label_smoothing * scores.mean_logp
  metrics = {
    'nll': agg.token_mean(nll, batch.mask),
    'entropy': agg.token_mean(scores.entropy, batch.mask),
  }
  return agg.aggregate(smoothed, batch.mask, aggregate), metrics
