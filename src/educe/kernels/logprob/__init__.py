"""Per-token log-probability and entropy of the targets, straight from hidden states.

  z = softcap(h W) / τ        softcap(s) = c·tanh(s/c), or s when c is None
  log p(y) = z_y − lse(z)     H = lse(z) − Σ_v p_v z_v     (nats)

Never holding the [N, V] logits is what makes long sequences and large vocabularies
trainable. The ways:

  reference    the definition, on all logits
  chunked      a loop over chunks of tokens, in plain XLA; tokens that nobody needs left out
  one_pass     chunked, with the gradients formed where the loss allows it
  vocabulary   a loop over chunks of the vocabulary: the least memory; by name only
  pallas_tpu   Pallas for TPU
  pallas_gpu   Mosaic GPU for Hopper, 16-bit operands

What was measured to be best here runs, else `chunked` (kernels/dispatch.py).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
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
from educe.types import Scores, Split

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
    implementation: a name in IMPLEMENTATIONS, or None: see above.

  All sums are float32 whatever the dtype of `hidden` and `head`; gradients come back
  in their own dtypes.

  Raises ValueError for operands that do not belong together, and as `dispatch.choose` does.
  """
  check(hidden, head, targets, needed, temperature, softcap)
  how = dict(temperature=temperature, softcap=softcap)
  trial = _trial(hidden, head, targets, how, split)
  op = dispatch.choose('logprob', IMPLEMENTATIONS, implementation, trial)
  scores = op(hidden, head, targets, needed=needed, split=split, **how)
  if needed is None:
    return scores
  return jax.tree.map(lambda x: jnp.where(needed, x, 0), scores)


def check(hidden, head, targets, needed=None, temperature=1.0, softcap=None) -> None:
  """Raises ValueError for what an implementation might take without a word."""
  if not temperature > 0:
    raise ValueError(f'logprob: temperature={temperature} must be > 0')
  if softcap is not None and not 0 < softcap < math.inf:
    raise ValueError(
      f'logprob: softcap={softcap} must be > 0 and finite, or None for no cap'
    )
  if head.shape[0] != hidden.shape[1] or not head.shape[1]:
    raise ValueError(
      f'logprob: hidden is {hidden.shape} and head {head.shape}; they must be [N, D] and '
      '[D, V], V > 0'
    )
  for name, x, kind in (('targets', targets, 'iu'), ('needed', needed, 'b')):
    if x is not None and (x.shape != hidden.shape[:1] or x.dtype.kind not in kind):
      raise ValueError(
        f'logprob: {name} is {x.dtype}{list(x.shape)}; it must be '
        f'{"bool" if kind == "b" else "integers"} of N = {len(hidden)} tokens'
      )


def in_one_pass() -> bool:
  """Whether `one_pass` is the best that is known here of a loss that allows it."""
  return dispatch.candidates('logprob', IMPLEMENTATIONS)[0] == 'chunked'


def _trial(hidden, head, targets, how, split: Split | None) -> dispatch.Trial:
  """Forward and backward, of what one device holds."""
  rows, parts = 1, 1
  if split:
    rows = math.prod(split.mesh.shape[axis] for axis in split.rows)
    parts = split.mesh.shape[split.across] if split.across else 1
  (N, D), V = hidden.shape, head.shape[1]

  def wrap(op):
    def total(hidden, head, targets):
      scores = op(hidden, head, targets, **how)
      return scores.logp.sum() + scores.entropy.sum()

    return jax.grad(total, (0, 1))

  operands = (
    jax.ShapeDtypeStruct((N // rows, D), hidden.dtype),
    jax.ShapeDtypeStruct((D, V // parts), head.dtype),
    jax.ShapeDtypeStruct((N // rows,), targets.dtype),
  )
  return dispatch.Trial(wrap, operands, str(how))
