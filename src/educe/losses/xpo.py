"""XPO: optimism in online DPO, from one more term.

  L = ⟨ −log σ(β·Δh) + α·log π(ỹ) ⟩     ỹ ~ π_ref, the pair's sample of the reference

over pairs (nats). Lowering log π on what the reference would say leaves mass for what
neither policy has tried. Tengyang Xie et al., "Exploratory preference optimization", 2024,
Algorithm 1, arXiv:2405.21046.

Differs from the paper: any loss of pairs may stand before the bonus; the sums are over the
pairs of this batch, not over all rounds so far; a pair whose completions are equally good
is in neither term. log π(ỹ) is a sum over the tokens of ỹ, its end included.
"""

from __future__ import annotations

from educe.losses import aggregate as agg
from educe.types import Batch, LossFn, Max, Mean, Scores


def with_bonus(loss: LossFn) -> LossFn:
  """`loss` of pairs, and −Σ_t A_t·log π(y_t) of each pair.

  batch.advantages `[B, T]` is A: −α on the tokens of ỹ, 0 on all others, so that the bonus
  is a policy gradient that makes ỹ less likely.

  metrics: those of `loss`, and xpo/bonus, the mean of α·log π(ỹ) over pairs (nats)

  Raises ValueError for a batch without advantages, and what `loss` raises.
  """

  def optimistic(scores: Scores, batch: Batch) -> tuple[Mean, dict[str, Mean | Max]]:
    if batch.advantages is None:
      raise ValueError('xpo: batch.advantages is None; they mark the reference samples')
    mean, metrics = loss(scores, batch)
    bonus = -(batch.advantages * agg.clean(scores.logp, batch.mask)).sum()
    metrics = {**metrics, 'xpo/bonus': Mean(bonus, mean.count)}
    return Mean(mean.total + bonus, mean.count), metrics

  return optimistic
