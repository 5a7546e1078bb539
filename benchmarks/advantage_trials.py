"""Tried: group normalisation and the clipped loss, each in one Pallas pass."""
import functools
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def group_normalised(rewards, *, ddof=1, eps=1e-6, interpret=True):
  """(r − r̄)/(s + eps), `[P, G]`; NaN rows are in no statistic. Whole arrays in memory."""

  def kernel(r, out):
    r = r[...]
    scored = jnp.abs(r) < jnp.inf
    n = scored.astype(jnp.float32).sum(-1, keepdims=True)
    mean = jnp.where(scored, r, 0).sum(-1, keepdims=True) / jnp.maximum(n, 1)
    high = jnp.where(scored, r, -jnp.inf).max(-1, keepdims=True)
    low = jnp.where(scored, r, jnp.inf).min(-1, keepdims=True)
    c = jnp.where(scored & (high > low), r - mean, 0.0)
    s = jnp.sqrt((c * c).sum(-1, keepdims=True) / jnp.maximum(n - ddof, 1))
    out[...] = jnp.where(n > ddof, c / (s + eps), 0.0)

  rows = min(512, rewards.shape[0])
  block = pl.BlockSpec((rows, rewards.shape[1]), lambda i: (i, 0))
  return pl.pallas_call(
    kernel, grid=(pl.cdiv(rewards.shape[0], rows),), in_specs=[block], out_specs=block,
    out_shape=jax.ShapeDtypeStruct(rewards.shape, jnp.float32), interpret=interpret,
    name='group_normalised',
  )(rewards)


SUMS = ('total', 'count', 'entropy', 'importance_ratio', 'low', 'high')


def _clip_pass(logp, entropy, mask, old, adv, *, low, high, interpret, tile=(64, 512)):
  B, T = logp.shape
  rows, width = min(tile[0], -(-B // 8) * 8), min(tile[1], -(-T // 128) * 128)

  def kernel(logp, entropy, mask, old, adv, gradient, sums):
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when((i == 0) & (j == 0))
    def _():
      sums[...] = jnp.zeros_like(sums)

    shape = (rows, width)
    here = (i * rows + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < B) & (
      j * width + jax.lax.broadcasted_iota(jnp.int32, shape, 1) < T)
    m = jnp.where(here & (mask[...] > 0), mask[...], 0.0)
    clean = lambda x: jnp.where(m > 0, x[...], 0.0)
    a, d = clean(adv), clean(logp) - clean(old)
    ratio = jnp.exp(jnp.clip(d, -20.0, 20.0))
    at_low, at_high = (a < 0) & (ratio < 1 - low), (a > 0) & (ratio > 1 + high)
    taken = jnp.where(at_low, 1 - low, jnp.where(at_high, 1 + high, ratio))
    moves = ~(at_low | at_high) & (jnp.abs(d) < 20)
    gradient[...] = jnp.where(moves, -m * a * ratio, 0.0)
    parts = (-taken * a, jnp.ones(shape), clean(entropy), ratio, at_low * 1.0, at_high * 1.0)
    for k, x in enumerate(parts):
      x = x * m
      lanes = sum(x[:, s : s + 128] for s in range(0, width, 128))
      sums[k : k + 1, :] += lanes.sum(0, keepdims=True)

  block = pl.BlockSpec((rows, width), lambda i, j: (i, j))
  gradient, sums = pl.pallas_call(
    kernel, grid=(pl.cdiv(B, rows), pl.cdiv(T, width)), in_specs=[block] * 5,
    out_specs=(block, pl.BlockSpec((8, 128), lambda i, j: (0, 0))),
    out_shape=(jax.ShapeDtypeStruct((B, T), jnp.float32), jax.ShapeDtypeStruct((8, 128), jnp.float32)),
    interpret=interpret, name='clipped_loss',
  )(logp, entropy, mask, old, adv)
  return gradient, dict(zip(SUMS, sums.sum(1)[:6]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def clipped(logp, entropy, mask, old, adv, low, high, interpret):
  return _clip_pass(logp, entropy, mask, old, adv, low=low, high=high, interpret=interpret)[1]

def _fwd(logp, entropy, mask, old, adv, low, high, interpret):
  g, sums = _clip_pass(logp, entropy, mask, old, adv, low=low, high=high, interpret=interpret)
  return sums, (g,)

def _bwd(low, high, interpret, res, ct):
  z = ct['total'] * res[0]
  return z, jnp.zeros_like(z), jnp.zeros_like(z), jnp.zeros_like(z), jnp.zeros_like(z)

clipped.defvjp(_fwd, _bwd)
