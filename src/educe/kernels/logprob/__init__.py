"""Per-token log-probability and entropy of the targets, straight from hidden states.

  z = softcap(h W) / τ        softcap(s) = c·tanh(s/c), or s when c is None
  log p(y) = z_y − lse(z)     H = lse(z) − Σ_v p_v z_v     (nats)

Never holding the [N, V] logits is what makes long sequences and large vocabularies
trainable; see `chunked` for how, and `reference` for what.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from educe.kernels import dispatch
from educe.kernels.logprob import (
  chunked,
  pallas_gpu,
  pallas_tpu,
  reference,
  vocabulary,
)
from educe.kernels.logprob.chunked import one_pass as one_pass
from educe.kernels.logprob.op import Split as Split
from educe.types import Scores

IMPLEMENTATIONS = {
  'reference': reference.logprob,
  'chunked': chunked.logprob,
  'vocabulary': vocabulary.logprob,
  'pallas_tpu': pallas_tpu.logprob,
  'pallas_gpu': pallas_gpu.logprob,
}


def logprob(
  hidden: Float[Array, 'N D'],
  head: Float[Array, 'D V'],
  targets: Int[Array, 'N'],
  *,
  temperature: float = 1.0,
  softcap: float | None = None,
  needed: Bool[Array, 'N'] | None = None,
  split: Split | None = None,
  implementation: str | None = None,
) -> Scores:
  """Scores of `[N]` targets: logp, entropy, and mean_logp = Σ_v log p_v / V (nats).

  Args:
    hidden: final states, already normed and multiplied by any logit scale.
    head: output matrix; N, D and V need not be multiples of anything.
    targets: token ids in 0..V-1. An id outside gives logp = NaN, never a wrong number.
    temperature: of the distribution that is scored, τ > 0.
    softcap: bound c of the logits before the temperature (Gemma 2, arXiv:2408.00118).
    needed: the tokens that are asked for; the scores of others are 0, and cost nothing
      where the implementation can leave them out. None: all.
    split: how the operands lie on a mesh, so that each device leaves out its own tokens;
      None: they are on one, or the compiler divides the work.
    implementation: a name in IMPLEMENTATIONS, or None for this backend's best.

  All sums are float32 whatever the dtype of `hidden` and `head`; gradients come back
  in their own dtypes.
  """
  if not temperature > 0:
    raise ValueError(f'logprob: temperature={temperature} must be > 0')
  if softcap is not None and not softcap > 0:
    raise ValueError(f'logprob: softcap={softcap} must be > 0, or None for no cap')
  how = dict(temperature=temperature, softcap=softcap, split=split)
  operands = (hidden, head, targets)
  op = dispatch.choose('logprob', IMPLEMENTATIONS, implementation, operands, **how)
  return op(*operands, needed=needed, **how)
