"""The definition, on full [N, V] logits. Small, obvious, and what the others must equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from educe.types import Scores


def logits(hidden, head, *, temperature=1.0, softcap=None):
  """z = softcap(h W) / τ in float32, `[..., V]`."""
  z = jnp.einsum('...d,dv->...v', hidden, head, preferred_element_type=jnp.float32)
  if softcap is not None:
    z = softcap * jnp.tanh(z / softcap)
  return z / temperature


def logprob(
  hidden, head, targets, *, temperature=1.0, softcap=None, needed=None, split=None
):
  """See `educe.kernels.logprob.logprob`. On a mesh the compiler divides the work."""
  z = logits(hidden, head, temperature=temperature, softcap=softcap)
  log_p = jax.nn.log_softmax(z)
  take = jnp.take_along_axis(
    log_p, targets[:, None], axis=-1, mode='fill', fill_value=jnp.nan
  )
  entropy = -(jnp.exp(log_p) * log_p).sum(-1)
  return Scores(take[:, 0], entropy, mean_logp=log_p.mean(-1))
