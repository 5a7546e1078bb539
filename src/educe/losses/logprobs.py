"""score: tokens → per-token log-probs. The only place in educe that shifts tokens."""

from __future__ import annotations

import jax.numpy as jnp

from educe.kernels.logprob import logprob
from educe.types import Batch, Model, Params, Scores


def score(
  model: Model,
  params: Params,
  batch: Batch,
  *,
  temperature: float = 1.0,
  implementation: str | None = None,
) -> Scores:
  """Log-probs and entropies of `batch.tokens` under the policy, `[B, T]`, in nats.

  Aligned to the token they score: logp[b, t] = log p(tokens[b, t] | tokens[b, :t]) and
  column 0, which nothing predicts, is 0. In a packed row the first token of a document
  is scored from the document before it; its mask is 0 (data/packing.py).

  With a value head, values[b, t] is the value of tokens[b, :t], the state that token t is
  drawn from: None without one.

  Args:
    temperature: of the distribution scored. To compare with sampler log-probs, pass
      the sampling temperature.
  """
  states, aux = model.hidden(params, batch.tokens, batch.positions, batch.segments)
  if aux:
    raise ValueError(f'score: auxiliary losses {sorted(aux)} have no consumer yet')
  head = model.head(params)
  rows, length, width = states.shape
  scores = logprob(
    states[:, :-1].reshape(-1, width) * jnp.asarray(head.scale, states.dtype),
    head.matrix,
    batch.tokens[:, 1:].reshape(-1),
    temperature=temperature,
    softcap=head.softcap,
    implementation=implementation,
  )

  def align(x):
    return jnp.pad(x.reshape(rows, length - 1), ((0, 0), (1, 0)))

  values = None
  if model.values is not None:
    read = model.values(params, states, batch.tokens, batch.positions, batch.segments)
    values = align(read[:, :-1])
  return Scores(
    align(scores.logp), align(scores.entropy), values, align(scores.mean_logp)
  )
