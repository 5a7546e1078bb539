"""From two passes over the logits to an op with a gradient, on one device or on a mesh.

An implementation is two functions of the operands that are on this device,

  moments(how, hidden, head, targets, needed)                       → tile.Moments of [N]
  gradients(how, hidden, head, targets, needed, known, dtypes)      → dH [N, D], dW [D, V]

with known = tile.constants, of each token, and dtypes those of dH and dW. What comes
after the first and before the second is here: the sums over a vocabulary that is split
among devices (max and sums of `Moments` merge by one pmax and one psum), those of dW
over the tokens of all devices, and the rule that makes JAX differentiate it. A head that
is kept in parts of its width is read whole, in its own dtype, once forward and once
backward; of dW each device gets its part of the sum alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from educe.kernels.logprob import tile
from educe.types import Scores, Split


class How(NamedTuple):
  """What every implementation is told."""

  temperature: float = 1.0
  softcap: float | None = None


class Passes(NamedTuple):
  moments: Callable[..., tile.Moments]
  gradients: Callable[..., tuple[Any, Any]]


def apply(passes: Passes, how, split: Split | None, hidden, head, targets, needed):
  """The scores by these passes; `how` begins as `How` does."""
  if not len(hidden):
    return of_no_tokens()
  targets = jnp.asarray(targets, jnp.int32)
  return _apply(passes, how, split, hidden, head, targets, needed)


def of_no_tokens() -> Scores:
  """Of rows of a single token, which no tile is small enough for."""
  none = jnp.zeros(0, jnp.float32)
  return Scores(none, none, mean_logp=none)


def logprob(passes: Passes) -> Callable[..., Scores]:
  """The `educe.kernels.logprob.logprob` of passes that need to be told nothing else."""

  def of_passes(
    hidden, head, targets, *, temperature=1.0, softcap=None, needed=None, split=None
  ):
    how = How(temperature, softcap)
    return apply(passes, how, split, hidden, head, targets, needed)

  return of_passes


def over(split: Split | None, function, into: str, out: str):
  """function of what is on a device. into, out: an r for each operand that is split by
  rows, an h for each that is split as the head."""
  if split is None:
    return function
  P = jax.sharding.PartitionSpec
  specs = {'r': P(split.rows or None), 'h': P(split.stored, split.across)}

  def of(names):
    return tuple(specs[name] for name in names)

  # The collectives are written out below, and a kernel's results carry no axis names.
  return jax.shard_map(
    function,
    mesh=split.mesh,
    in_specs=of(into),
    out_specs=of(out) if len(out) > 1 else specs[out],
    check_vma=False,
  )


def whole(split: Split | None, head):
  """The head's width, of which devices keep parts."""
  if split is None or split.stored is None:
    return head
  return jax.lax.all_gather(head, split.stored, axis=0, tiled=True)


def own(split: Split | None, targets, head):
  """Targets as places in this device's part of the vocabulary; −1: not in it."""
  if split is None or split.across is None:
    return targets
  size = head.shape[1]
  place = targets - jax.lax.axis_index(split.across) * size
  return jnp.where((place >= 0) & (place < size), place, -1)


def merged(split: Split | None, found: tile.Moments, size: int) -> tile.Moments:
  """Over all parts of the vocabulary, each of `size` entries."""
  if split is None or split.across is None:
    return found
  top = jax.lax.pmax(found.top, split.across)
  found = tile.about(found, top, size)
  return tile.Moments(top, *jax.lax.psum(found[1:], split.across))


def parts_of(split: Split | None, hidden, head):
  """The dtypes of a device's dH and dW: parts of a sum are rounded after it."""
  return (
    jnp.float32 if split and split.across else hidden.dtype,
    jnp.float32 if split and split.rows else head.dtype,
  )


def summed(split: Split | None, d_hidden, d_head, hidden, head):
  """dH and dW of all devices, rounded to the operands' dtypes; of dW what is kept here."""
  if split and split.across:
    d_hidden = jax.lax.psum(d_hidden, split.across)
  if split and split.rows:
    if split.stored:  # first: what remains is less
      # Part by part: so TPUs' compiler sends parts of sums in more cases than with
      # tiled=True. Over all of a slice it still sums all everywhere, on more links at once.
      parts = d_head.reshape(split.mesh.shape[split.stored], -1, d_head.shape[1])
      d_head = jax.lax.psum_scatter(parts, split.stored)
    rest = tuple(axis for axis in split.rows if axis != split.stored)
    d_head = jax.lax.psum(d_head, rest)
  return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _apply(passes, how, split, hidden, head, targets, needed):
  return _forward(passes, how, split, hidden, head, targets, needed)[0]


def _forward(passes, how, split, hidden, head, targets, needed):
  def here(hidden, head, targets, needed):
    head = whole(split, head)
    found = passes.moments(how, hidden, head, own(split, targets, head), needed)
    return merged(split, found, head.shape[1])

  found = over(split, here, 'rhrr', 'r')(hidden, head, targets, needed)
  scores, lse = tile.finish(found, targets, head.shape[1])
  return scores, (hidden, head, targets, needed, lse, scores.entropy)


def _backward(passes, how, split, residuals, cotangents: Scores):
  hidden, head, targets, needed, lse, entropy = residuals
  worth = cotangents.logp, cotangents.entropy, cotangents.mean_logp
  known = tile.constants(lse, entropy, worth, targets, head.shape[1])

  def here(hidden, head, targets, needed, known):
    head = whole(split, head)
    targets, dtypes = own(split, targets, head), parts_of(split, hidden, head)
    d_hidden, d_head = passes.gradients(
      how, hidden, head, targets, needed, known, dtypes
    )
    return summed(split, d_hidden, d_head, hidden, head)

  found = over(split, here, 'rhrrr', 'rh')(hidden, head, targets, needed, known)
  none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (targets, needed))
  return *found, *none


_apply.defvjp(_forward, _backward)
