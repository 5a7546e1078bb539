"""Log-probs of texts that were sampled: under the policy now, a reference, a teacher."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from educe.losses.logprobs import score
from educe.types import Batch, Model, Params

Reader = Callable[[Params, np.ndarray, np.ndarray], np.ndarray]


def reader(
  model: Model, place: Callable[[Batch], Batch], *, size: int, temperature: float
) -> Reader:
  """logp(params, tokens `[B, T]`, mask) -> `[B, T]` nats on the host; 0 where the mask is.

  place: a batch of host arrays onto the devices
  size: rows read at once; the last of them are filled up with empty ones
  temperature: of the distribution that is scored
  """
  read = jax.jit(
    lambda params, batch: score(model, params, batch, temperature=temperature).logp
  )

  def logp(params, tokens, mask):
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    missing = ((0, -len(tokens) % size), (0, 0))
    filled = Batch(np.pad(tokens, missing), np.pad(mask, missing))
    parts = [
      read(params, place(jax.tree.map(lambda x, at=at: x[at : at + size], filled)))
      for at in range(0, len(filled.tokens), size)
    ]
    # `where`, not `*`: what a model says of padding may be anything.
    whole = np.concatenate([np.asarray(x) for x in parts])[: len(tokens)]
    return np.where(mask > 0, whole, 0.0)

  return logp
