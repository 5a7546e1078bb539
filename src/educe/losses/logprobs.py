"""score: tokens → per-token log-probs. The only place in educe that shifts tokens."""

from __future__ import annotations

import jax.numpy as jnp

from educe.kernels.divergence import divergence
from educe.kernels.logprob import logprob
from educe.types import Batch, Model, Params, Scores


def score(
  model: Model,
  params: Params,
  batch: Batch,
  *,
  temperature: float = 1.0,
  teacher: tuple[Model, Params] | None = None,
  beta: float = 0.5,
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
    teacher: another model of the same vocabulary, held constant; with it `divergence` is
      how far its next-token distributions are from the policy's.
    beta: of that divergence (kernels/divergence.py); read with a teacher alone.
  """
  rows, length = batch.tokens.shape
  said = (batch.tokens, batch.positions, batch.segments)

  def read(model, params):
    states, aux = model.hidden(params, *said)
    if aux:
      raise ValueError(f'score: auxiliary losses {sorted(aux)} have no consumer yet')
    return states, states[:, :-1].reshape(-1, states.shape[-1]), model.head(params)

  states, flat, head = read(model, params)
  scores = logprob(
    flat * jnp.asarray(head.scale, flat.dtype),
    head.matrix,
    batch.tokens[:, 1:].reshape(-1),
    temperature=temperature,
    softcap=head.softcap,
    implementation=implementation,
  )

  def align(x):
    return jnp.pad(x.reshape(rows, length - 1), ((0, 0), (1, 0)))

  values = distance = None
  if model.values is not None:
    values = align(model.values(params, states, *said)[:, :-1])
  if teacher is not None:
    _, *other = read(*teacher)
    distance = align(divergence(flat, head, *other, beta=beta, temperature=temperature))
  return Scores(
    align(scores.logp),
    align(scores.entropy),
    values,
    align(scores.mean_logp),
    distance,
  )
