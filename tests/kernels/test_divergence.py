"""Divergence of two heads against float64 NumPy written from the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.kernels.divergence import divergence
from educe.types import Head

SHAPES = {
  'ragged': (37, 16, 9, 101),
  'one_row': (1, 8, 8, 5),
  'wide': (24, 32, 48, 1000),
}
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def draw(shape, dtype=np.float32, scale=1.0):
  rows, width, other, vocab = SHAPES[shape]
  rng = np.random.default_rng(0)

  def array(*size):
    return jnp.asarray(rng.normal(size=size) * scale, dtype)

  arrays = (
    array(rows, width),
    array(width, vocab),
    array(rows, other),
    array(other, vocab),
  )
  return arrays, rng.normal(size=rows)


def log_softmax(hidden, head, softcap, temperature, scale):
  s = scale * np.float64(hidden) @ np.float64(head)
  z = (softcap * np.tanh(s / softcap) if softcap else s) / temperature
  slope = (1 - np.tanh(s / softcap) ** 2 if softcap else np.ones_like(s)) / temperature
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True)), slope


def in_float64(arrays, cotangent, beta, temperature=1.0, caps=(None, None), scale=1.0):
  """Values, and gradients of Σ g·D: the chain rule, Jacobian of the softmax and all."""
  hidden, head, teacher_hidden, teacher_head = arrays
  log_q, slope = log_softmax(hidden, head, caps[0], temperature, scale)
  log_p, _ = log_softmax(teacher_hidden, teacher_head, caps[1], temperature, 1.0)
  p, q = np.exp(log_p), np.exp(log_q)
  if beta == 0:
    value, d_q = (p * (log_p - log_q)).sum(-1), -p / q
  elif beta == 1:
    value, d_q = (q * (log_q - log_p)).sum(-1), log_q - log_p + 1
  else:
    m = beta * p + (1 - beta) * q
    value = beta * (p * np.log(p / m)).sum(-1) + (1 - beta) * (q * np.log(q / m)).sum(
      -1
    )
    # m depends on q, too: ∂/∂q of p·log(p/m) is −(1 − β)·p/m.
    d_q = -beta * (1 - beta) * p / m
    d_q += (1 - beta) * (np.log(q / m) + 1 - (1 - beta) * q / m)
  jacobian = q[:, :, None] * (np.eye(q.shape[1]) - q[:, None, :])  # ∂q_v/∂z_u
  d_s = np.einsum('n,nv,nvu->nu', cotangent, d_q, jacobian) * slope
  d_hidden = scale * d_s @ np.float64(head).T
  return value, d_hidden, scale * np.float64(hidden).T @ d_s


def run(arrays, cotangent, beta, temperature=1.0, caps=(None, None), scale=1.0):
  def weighted(hidden, head, teacher_hidden, teacher_head):
    out = divergence(
      hidden,
      Head(head, scale, caps[0]),
      teacher_hidden,
      Head(teacher_head, 1.0, caps[1]),
      beta=beta,
      temperature=temperature,
    )
    return (jnp.float32(cotangent) * out).sum(), out

  gradients, values = jax.jit(jax.grad(weighted, (0, 1, 2, 3), has_aux=True))(*arrays)
  return values, gradients


def check(got, want):
  values, gradients = got
  # float32 rounds at 6e-8; logits reach 30, so that a probability is known to 2e-6, and
  # the sums run over ≤ 1000 terms.
  np.testing.assert_allclose(values, want[0], rtol=1e-5, atol=5e-6)
  for gradient, expected in zip(gradients, want[1:], strict=False):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-5 * scale)


@pytest.mark.parametrize('beta', BETAS)
@pytest.mark.parametrize('shape', ['ragged', 'one_row'])
def test_values_and_gradients_equal_float64(shape, beta):
  arrays, cotangent = draw(shape)
  check(run(arrays, cotangent, beta), in_float64(arrays, cotangent, beta))


@pytest.mark.parametrize('beta', [0.0, 0.3, 1.0])
def test_temperature_scale_and_soft_caps_of_each_model(beta):
  arrays, cotangent = draw('ragged')
  options = dict(temperature=0.7, caps=(5.0, 3.0), scale=1.5)
  got, want = (f(arrays, cotangent, beta, **options) for f in (run, in_float64))
  check(got, want)


def test_a_vocabulary_of_many_chunks():
  arrays, cotangent = draw('wide')
  check(run(arrays, cotangent, 0.5), in_float64(arrays, cotangent, 0.5))


def test_the_teacher_is_held_constant():
  arrays, cotangent = draw('ragged')
  for beta in (0.0, 0.5, 1.0):
    *_, teacher_hidden, teacher_head = run(arrays, cotangent, beta)[1]
    assert not np.any(teacher_hidden)
    assert not np.any(teacher_head)


def test_the_ends_are_the_limits_that_huszar_states():
  """D_β/β → KL(p‖q), D_β/(1−β) → KL(q‖p); the gap is first order in the distance."""
  arrays, cotangent = draw('one_row', scale=0.5)
  for end, near, share in ((0.0, 1e-3, 1e-3), (1.0, 1 - 1e-3, 1e-3)):
    want = in_float64(arrays, cotangent, end)
    exact = in_float64(arrays, cotangent, near)
    got = run(arrays, cotangent, near)
    # In float64 the limit holds to O(1e-3); float32 sees 1e-7 / 1e-3 of noise on top.
    np.testing.assert_allclose(exact[0] / share, want[0], rtol=2e-2)
    np.testing.assert_allclose(np.float64(got[0]) / share, want[0], rtol=2e-2)
    np.testing.assert_allclose(
      np.float64(got[1][1]) / share, want[2], rtol=5e-2, atol=0.05
    )


def test_equal_models_do_not_differ_and_the_symmetric_one_is_bounded_by_ln_2():
  (hidden, head, _, _), cotangent = draw('ragged')
  for beta in BETAS:
    values, gradients = run((hidden, head, hidden, head), cotangent, beta)
    np.testing.assert_allclose(values, 0, atol=1e-6)
    np.testing.assert_allclose(gradients[0], 0, atol=1e-5)
  arrays, cotangent = draw('ragged', scale=10.0)
  values, _ = run(arrays, cotangent, 0.5)
  assert values.max() <= np.log(2) + 1e-6
  assert values.max() > 0.69


def test_large_logits_stay_finite():
  arrays, cotangent = draw('ragged', scale=30.0)
  for beta in BETAS:
    values, gradients = run(arrays, cotangent, beta)
    assert np.isfinite(values).all()
    assert all(np.isfinite(g).all() for g in gradients)
    if beta in (0, 1):  # between, float64 itself has no p/m where both underflow
      log_q, log_p = (
        log_softmax(*arrays[i : i + 2], None, 1.0, 1.0)[0] for i in (0, 2)
      )
      if beta == 1:
        log_p, log_q = log_q, log_p
      want = (np.exp(log_p) * (log_p - log_q)).sum(-1)
      np.testing.assert_allclose(values, want, rtol=1e-5)


def test_bfloat16_inputs_keep_float32_sums():
  arrays, cotangent = draw('wide', jnp.bfloat16)
  want = in_float64(arrays, cotangent, 0.5)
  values, gradients = run(arrays, cotangent, 0.5)
  np.testing.assert_allclose(values, want[0], rtol=1e-5, atol=5e-6)
  # bf16 carries 8 bits: 2^-8 relative for the rounding of ds and of the result.
  for got, expected in zip(gradients, want[1:], strict=False):
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.float64(got) - expected).max() < 2**-7 * np.abs(expected).max()


def test_temporaries_do_not_hold_the_logits():
  rows, width, vocab = 2048, 64, 8192
  shapes = [(rows, width), (width, vocab), (rows, width), (width, vocab)]
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

  def chunked(hidden, head, other, matrix):
    return divergence(hidden, Head(head), other, Head(matrix), beta=0.5).sum()

  def dense(hidden, head, other, matrix):
    q, p = jax.nn.log_softmax(hidden @ head), jax.nn.log_softmax(other @ matrix)
    m = jnp.logaddexp(p, q) - jnp.log(2)
    return ((jnp.exp(p) * (p - m) + jnp.exp(q) * (q - m)) / 2).sum()

  def temporaries(f):
    compiled = jax.jit(jax.grad(f, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = rows * vocab * 4
  assert temporaries(dense) >= 2 * logits  # the measure does see both models' logits
  assert temporaries(chunked) < logits


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(beta=1.5), r'beta=1.5 must be in \[0, 1\]'),
    (dict(beta=float('nan')), 'beta=nan'),
    (dict(beta=0.5, temperature=0.0), 'temperature=0.0 must be > 0'),
  ],
)
def test_bad_settings(options, message):
  (hidden, head, other, matrix), _ = draw('one_row')
  with pytest.raises(ValueError, match=message):
    divergence(hidden, Head(head), other, Head(matrix), **options)


def test_another_vocabulary_is_one_clear_line():
  (hidden, head, other, matrix), _ = draw('one_row')
  with pytest.raises(ValueError, match='knows 5 tokens and the teacher 4'):
    divergence(hidden, Head(head), other, Head(matrix[:, :-1]), beta=0.5)
