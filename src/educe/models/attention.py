"""The one place where tokens see each other: what is visible, and who computes it.

What a query sees is described, not drawn: `Causal` and `Fork` say it without a mask of
[T, T], and every implementation reads them. Only a decode step, which looks up a cache by
position, brings a mask.

  portable   plain XLA; the reference
  splash     TPU: JAX's splash attention
  cudnn      NVIDIA GPU: cuDNN's fused attention, 16-bit numbers only

'auto' chooses by a rule that users expect, not by a measurement of ours: the library of
the chip's maker where it takes the operands, and one line where it does not; elsewhere,
and for forks on a GPU (cuDNN would make every score between two completions), portable.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Bool, Float, Int

from educe import sharding
from educe.kernels.attention import cudnn, portable, ring, splash
from educe.kernels.dispatch import device_kind
from educe.progress import say_once
from educe.types import Split

IMPLEMENTATIONS = ('auto', 'portable', 'cudnn', 'splash')
# How the kind of a device begins → what 'auto' tries there.
RULE = {'TPU': 'splash', 'NVIDIA': 'cudnn'}


class Causal(NamedTuple):
  """A token sees itself and what came before it, by index, in its own segment."""

  segments: Int[Array, 'B T'] | None = None  # 0 is padding: sees nothing, is not seen


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['prompt'], meta_fields=['length']
)
@dataclasses.dataclass(frozen=True)
class Fork:
  """Rows of one prompt and G completions: S tokens that all of them go on from, then G
  times `length` that see those and, of the others, their own alone."""

  prompt: Bool[Array, 'B S']  # which of the S are there at all
  length: int


def attend(
  q: Float[Array, 'B T H h'],
  k: Float[Array, 'B K S h'],
  v: Float[Array, 'B K S h'],
  visible: Causal | Fork | Bool[Array, '#B T S'],
  implementation: str = 'auto',
) -> Float[Array, 'B T H h']:
  """Softmax attention; H/K queries share a kv head, without repeating k and v.

  q: scaled by 1/√h
  visible: a mask is always computed by `portable`
  implementation: 'auto', or one that runs or raises, and never becomes another one

  Scores and the softmax are float32 whatever the dtypes. A query that sees no key gets
  zeros, and zero gradient.

  Raises ValueError if the named implementation cannot run here, or does not exist.
  """
  if not isinstance(visible, Causal | Fork):
    return portable.attend(q, k, v, visible)
  name = choose(implementation, q, k, v, visible)
  split = _split(q, k, visible)
  if name == 'portable':
    if isinstance(visible, Fork):
      return portable.forked(q, k, v, visible.prompt, visible.length)
    if split and split.along:
      return ring.attend(q, k, v, visible.segments, split=split)
    return portable.causal(q, k, v, visible.segments)
  segments, fork = _library(q, visible)
  if name == 'splash':
    mixed = splash.attend(q, k, v, segments, fork, split=split)
  else:
    mixed = cudnn.attend(q, k, v, segments, fork)
  if segments is not None:  # to them, padding is a document like any other
    mixed = jnp.where(jnp.expand_dims(segments > 0, (2, 3)), mixed, 0)
  return mixed


def choose(implementation: str, q, k, v, visible: Causal | Fork) -> str:
  """The name of what computes it here; see `attend`."""
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'config.model.attention={implementation!r} does not exist; '
      f'choose one of {sorted(IMPLEMENTATIONS)}'
    )
  kind = device_kind()
  name = implementation
  if name == 'auto':
    name = next((n for start, n in RULE.items() if kind.startswith(start)), 'portable')
    if name == 'cudnn' and isinstance(visible, Fork):
      name = 'portable'
  if name == 'portable':
    return name
  obstacle = _obstacle(name, kind, q, k, v, visible)
  if obstacle is None:
    return name
  if implementation == 'auto':
    say_once(
      f'attention: {name} cannot run here, portable runs instead: {obstacle:.200}'
    )
    return 'portable'
  raise ValueError(
    f'config.model.attention={name!r} cannot run here: {obstacle}; choose auto'
  )


def _obstacle(name: str, kind: str, q, k, v, visible) -> str | None:
  maker = next(start for start, n in RULE.items() if n == name)
  if not kind.startswith(maker):
    return f'it needs a device of kind {maker}, and this one is {kind}'
  split = _split(q, k, visible)
  if name == 'cudnn':
    if split and split.along:
      return 'the tokens of a row lie on several devices (config.mesh.context)'
    return cudnn.obstacle(q, k, v, *_library(q, visible))
  if q.dtype == jnp.float16:
    return 'TPUs have no float16'
  if split and split.along and q.shape[1] % (least := splash.least(split)):
    return f'{q.shape[1]} tokens over config.mesh.context do not divide by {least}'
  if get_abstract_mesh().empty and jax.device_count() > 1:
    return (
      f'{jax.device_count()} devices are here and no mesh is in use (sharding.using)'
    )
  return None


def _split(q, k, visible: Causal | Fork) -> Split | None:
  """Of q, k and v on the mesh in use. What goes on from a shared prompt stays together."""
  length = q.shape[1] if isinstance(visible, Causal) else 1
  return sharding.split(len(q), k.shape[1], 'kv_heads', length)


def _library(q, visible: Causal | Fork):
  """(segments, (S, T) of a fork), as the libraries' wrappers read them."""
  if isinstance(visible, Causal):
    return visible.segments, None
  B, S = visible.prompt.shape
  there = jnp.ones((B, q.shape[1] - S), jnp.int32)
  segments = jnp.concatenate([visible.prompt.astype(jnp.int32), there], 1)
  return segments, (S, visible.length)
