"""A training step as benchmarks take it: a model and a batch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from educe.losses import dpo, grpo, sft
from educe.models.architecture import Architecture
from educe.types import Batch

LOSSES = {'sft': sft.loss, 'dpo': dpo.loss, 'grpo': grpo.loss}

# Llama 3.2 1B, which is Llama 3 8B made smaller: 1,235,814,400.
ONE_BILLION = Architecture(
  vocab_size=128_256,
  dim=2048,
  layers=16,
  heads=32,
  kv_heads=8,
  head_dim=64,
  ffn=8192,
  max_length=8192,
  rope_theta=500_000.0,
  tied=True,
)


def train_batch(a: Architecture, rows: int, length: int) -> Batch:
  """Random tokens; log-probs as an untrained model has them."""
  keys = jax.random.split(jax.random.key(1))
  tokens = jax.random.randint(keys[0], (rows, length), 0, a.vocab_size)
  mask = jnp.ones((rows, length)).at[:, 0].set(0)
  before = -math.log(a.vocab_size) * mask
  return Batch(
    tokens,
    mask,
    old_logp=before,
    ref_logp=before,
    advantages=jax.random.normal(keys[1], (rows, 1)) * mask,
  )
