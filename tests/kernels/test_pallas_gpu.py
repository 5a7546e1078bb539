"""The Hopper kernel, interpreted on a CPU: races and rounding of the chip are not in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.kernels.logprob import pallas_gpu, reference

if tuple(map(int, jax.__version__.split('.')[:2])) < (0, 12):
  pytest.skip('Mosaic GPU is interpreted from jax 0.12 on', allow_module_level=True)

import jax.experimental.pallas.mosaic_gpu as plgpu


def draw(rows, width, vocab, dtype=jnp.bfloat16):
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

  return jax.grad(total, (0, 1), has_aux=True)(hidden, head)


@pytest.mark.parametrize(
  ('rows', 'width', 'vocab', 'temperature', 'softcap'),
  [
    (256, 128, 512, 1.0, None),  # everything divides
    (200, 100, 700, 0.7, 8.0),  # nothing does
    (1, 64, 256, 1.3, None),
  ],
)
def test_it_equals_the_definition(rows, width, vocab, temperature, softcap):
  hidden, head, targets, weights = draw(rows, width, vocab)
  how = dict(temperature=temperature, softcap=softcap)
  with plgpu.force_gpu_interpret_mode():
    grads, parts = both(
      lambda h, w: pallas_gpu.logprob(h, w, targets, multiprocessors=2, **how),
      hidden,
      head,
      weights,
    )
  # The same numbers in float32: what bfloat16 rounded before, it rounded for both.
  wide = hidden.astype(jnp.float32), head.astype(jnp.float32)
  want_grads, want = both(
    lambda h, w: reference.logprob(h, w, targets, **how), *wide, weights
  )
  np.testing.assert_allclose(parts, want, rtol=2e-6, atol=5e-6)
  for got, right in zip(grads, want_grads, strict=True):
    assert got.dtype == jnp.bfloat16
    # 2^-8 for the rounding of dlogits, and again of the result.
    error = np.abs(np.float32(got) - right).max() / np.abs(right).max()
    assert error < 2**-7


def test_what_wgmma_does_not_multiply_is_refused():
  hidden, head, targets, _ = draw(8, 64, 256, jnp.float32)
  with pytest.raises(ValueError, match=r'hidden is float32 .* bfloat16.*compute_dtype'):
    pallas_gpu.logprob(hidden, head, targets)
