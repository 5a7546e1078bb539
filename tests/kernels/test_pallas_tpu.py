"""The TPU kernel's own: tiles that do not divide, D in pieces. Interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.kernels.logprob import pallas_tpu, reference, tpu_chips

TILES = pallas_tpu.Tiles(16, 128, 128, 1 << 20)


def draw(rows, width, vocab, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(rows, width)) / width**0.5, dtype)
  head = jnp.asarray(rng.normal(size=(width, vocab)), dtype)
  weights = jnp.float32(rng.normal(size=(3, rows)))
  return hidden, head, jnp.int32(rng.integers(0, vocab, rows)), weights


def both(function, hidden, head, weights):
  def total(hidden, head):
    s = function(hidden, head)
    parts = jnp.stack([s.logp, s.entropy, s.mean_logp])
    return (weights * parts).sum(), parts

  return jax.jit(jax.grad(total, (0, 1), has_aux=True))(hidden, head)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  ('rows', 'width', 'vocab'),
  [
    (40, 64, 300),  # rows and vocabulary end within a tile; D in one piece
    (32, 256, 256),  # everything divides; D in two pieces
    (20, 200, 130),  # nothing divides: D is filled up
  ],
)
def test_tiles_equal_the_definition(rows, width, vocab, dtype):
  hidden, head, targets, weights = draw(rows, width, vocab, dtype)
  how = dict(temperature=0.7, softcap=8.0)
  (d_hidden, d_head), parts = both(
    lambda h, w: pallas_tpu.logprob(h, w, targets, tiles=TILES, **how),
    hidden,
    head,
    weights,
  )
  # The same numbers in float32: what bfloat16 rounded before, it rounded for both.
  wide = hidden.astype(jnp.float32), head.astype(jnp.float32)
  (want_hidden, want_head), want = both(
    lambda h, w: reference.logprob(h, w, targets, **how), *wide, weights
  )
  np.testing.assert_allclose(parts, want, rtol=2e-6, atol=5e-6)
  assert d_hidden.dtype == d_head.dtype == dtype
  # bfloat16: 2^-8 for the rounding of dlogits, and again of the result.
  tolerance = 5e-6 if dtype == jnp.float32 else 2**-7
  for got, right in ((d_hidden, want_hidden), (d_head, want_head)):
    error = np.abs(np.float32(got) - right).max() / np.abs(right).max()
    assert error < tolerance


def test_pieces_of_a_width():
  assert tpu_chips.divisor(4096, 4096) == 4096
  assert tpu_chips.divisor(5120, 4096) == 2560
  assert tpu_chips.divisor(576, 512) is None  # 4.5 lanes
  assert tpu_chips.divisor(100, 512) == 100
