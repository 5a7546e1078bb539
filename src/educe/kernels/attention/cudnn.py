"""Softmax attention by cuDNN's fused kernel, through `jax.nn.dot_product_attention`.

No score reaches memory. cuDNN knows of causality by itself; everything else that it must
know here (packed documents, forks) it takes as a bias of N × N 16-bit numbers a row, of
which some versions of JAX make a gradient that nobody reads. On one GPU or many: the call
carries its own rule for rows and heads that are split over a mesh.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attend(
  q: Float[Array, 'B N H h'],
  k: Float[Array, 'B K N h'],
  v: Float[Array, 'B K N h'],
  segments: Int[Array, 'B N'] | None = None,
  fork: tuple[int, int] | None = None,
  *,
  library: Literal['cudnn', 'xla'] = 'cudnn',
) -> Float[Array, 'B N H h']:
  """Causal, within segments; see `portable.causal` and, for fork, `portable.forked`.

  fork: (S, T) of rows that are a prompt of S tokens and completions of T
  library: 'xla' computes the same call where there is no NVIDIA GPU

  Raises what JAX raises for dtypes, widths and versions that cuDNN does not take:
  NotImplementedError, ValueError or RuntimeError.
  """
  mask = None
  if segments is not None:
    # Padding sees padding: every query has a key, and who asks for zeros makes them.
    mask = segments[:, :, None] == segments[:, None, :]
  if fork is not None:
    own = lineage(k.shape[2], *fork)[None]
    mask = own if mask is None else mask & own
  k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=mask if mask is None else mask[:, None],
    scale=1.0,
    is_causal=True,
    implementation=library,
  )


def lineage(N: int, S: int, T: int) -> Bool[Array, 'N N']:
  """[query, key]: whether the key is of the prompt, or of the query's completion."""
  branch = jnp.maximum(jnp.arange(N) - S, -1) // T  # −1 is the prompt's
  return (branch < 0)[None] | (branch[:, None] == branch[None])


def obstacle(q, k, v, segments=None, fork=None) -> str | None:
  """Why JAX would not hand these to cuDNN: it is asked, with their gradient."""

  def total(q, k, v):
    return attend(q, k, v, segments, fork).astype(jnp.float32).sum()

  try:
    jax.eval_shape(jax.grad(total, (0, 1, 2)), q, k, v)
  except (NotImplementedError, ValueError, RuntimeError) as error:
    return str(error).strip().splitlines()[0]
  return None
