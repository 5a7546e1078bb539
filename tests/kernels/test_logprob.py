"""Every implementation of logprob against float64 NumPy written from the definition."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from educe.kernels.logprob import (
  IMPLEMENTATIONS,
  check,
  chunked,
  logprob,
  one_pass,
  vocabulary,
)
from educe.types import Scores, Split

# Real models' ratios, small: N, D and V that divide by nothing, one row, many entries.
SHAPES = {
  'ragged': (37, 16, 101),
  'ragged_width': (20, 200, 130),
  'one_row': (1, 8, 5),
  'wide': (24, 32, 1000),
}
F32, BF16 = jnp.float32, jnp.bfloat16
# What multiplies float32 in full, and what multiplies 16 bits alone.
MATRIX = [(name, dtype) for name in IMPLEMENTATIONS for dtype in (F32, BF16)]
MATRIX.remove(('pallas_gpu', F32))
SETTINGS = [(1.0, None), (0.6, None), (1.3, 5.0)]


def draw(shape, dtype=np.float32, scale=1.0):
  rows, width, vocab = SHAPES[shape]
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(rows, width)) * scale, dtype)
  head = jnp.asarray(rng.normal(size=(width, vocab)), dtype)
  targets = jnp.asarray(rng.integers(0, vocab, rows), jnp.int32)
  return hidden, head, targets, rng.normal(size=(3, rows))


def in_float64(hidden, head, targets, cotangents, temperature, softcap):
  """Values, and gradients of Σ g·logp + e·entropy + m·mean_logp, one row at a time."""
  hidden, head = np.float64(hidden), np.float64(head)
  out, d_hidden, d_head = [], np.zeros_like(hidden), np.zeros_like(head)
  for i, (h, y) in enumerate(zip(hidden, np.asarray(targets), strict=True)):
    s = h @ head
    z = (softcap * np.tanh(s / softcap) if softcap else s) / temperature
    slope = (1 - np.tanh(s / softcap) ** 2 if softcap else 1.0) / temperature
    log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
    p = np.exp(log_p)
    out.append((log_p[y], -(p * log_p).sum(), log_p.mean()))
    g, e, m = cotangents[:, i]
    # ∂/∂z of each output by the chain rule through the softmax's Jacobian.
    jacobian = np.eye(len(z)) - p[None, :]  # ∂log_p_v/∂z_u
    d_log_p = -e * p * (log_p + 1) + m / len(z)
    d_log_p[y] += g
    ds = (d_log_p @ jacobian) * slope
    d_hidden[i] = head @ ds
    d_head += np.outer(h, ds)
  return np.array(out).T, d_hidden, d_head


@pytest.fixture
def interpreted():
  """interpreted(implementation): kernels of chips that are not here run as XLA."""
  with contextlib.ExitStack() as stack:

    def start(implementation):
      if implementation != 'pallas_gpu':  # that for TPUs does so by itself
        return
      if jax.version.__version_info__ < (0, 12):
        pytest.skip('Mosaic GPU is interpreted from jax 0.12 on')
      import jax.experimental.pallas.mosaic_gpu as plgpu

      stack.enter_context(plgpu.force_gpu_interpret_mode())

    yield start


@pytest.mark.parametrize(('implementation', 'dtype'), MATRIX)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(('temperature', 'softcap'), SETTINGS)
def test_values_and_gradients_equal_float64(
  implementation, dtype, shape, temperature, softcap, interpreted
):
  interpreted(implementation)
  # Logits up to about 25, whatever the width.
  hidden, head, targets, cotangents = draw(shape, dtype, (16 / SHAPES[shape][1]) ** 0.5)

  def weighted(hidden, head):
    s = logprob(
      hidden,
      head,
      targets,
      temperature=temperature,
      softcap=softcap,
      implementation=implementation,
    )
    parts = jnp.stack([s.logp, s.entropy, s.mean_logp])
    return (jnp.float32(cotangents) * parts).sum(), parts

  gradient = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))
  (d_hidden, d_head), values = gradient(hidden, head)
  want, want_h, want_w = in_float64(
    hidden, head, targets, cotangents, temperature, softcap
  )
  assert values.dtype == F32
  # float32 rounds at 6e-8, and sums run over ≤ 1000 terms. Products of two bfloat16 are
  # exact in float32: a log-sum-exp of that dtype would be off by 3e-2 here.
  np.testing.assert_allclose(values, want, rtol=2e-6, atol=5e-6)
  for got, right in ((d_hidden, want_h), (d_head, want_w)):
    assert got.dtype == dtype
    error, scale = np.abs(np.float64(got) - right), np.abs(right).max()
    if dtype == F32:
      assert (error <= 1e-5 * np.abs(right) + 2e-6 * scale).all()
    else:  # 2^-8 for the rounding of dlogits, and again of the result
      assert error.max() < 2**-7 * scale


def test_large_logits_stay_finite_and_exact():
  """Logits of ±1000: exp overflows unless the maximum is taken out first."""
  hidden, head, targets, cotangents = draw('ragged', scale=250.0)
  want, *_ = in_float64(hidden, head, targets, cotangents, 1.0, None)
  s = logprob(hidden, head, targets, implementation='chunked')
  np.testing.assert_allclose(s.logp, want[0], rtol=1e-5, atol=1e-3)
  np.testing.assert_allclose(s.entropy, want[1], atol=1e-3)
  gradient = jax.grad(
    lambda h: logprob(h, head, targets, implementation='chunked').logp.sum()
  )
  assert np.isfinite(gradient(hidden)).all()


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_target_outside_the_vocabulary_is_nan_and_nothing_else(
  implementation, interpreted
):
  interpreted(implementation)
  hidden, head, _, _ = draw('ragged', BF16)
  targets = jnp.arange(37, dtype=jnp.int32).at[3].set(101)
  logp = logprob(hidden, head, targets, implementation=implementation).logp
  assert np.flatnonzero(np.isnan(logp)).tolist() == [3]


@pytest.mark.parametrize('outside', [-1, 101])
def test_a_trained_target_outside_the_vocabulary_poisons_the_gradient(outside):
  hidden, head, _, _ = draw('ragged')
  targets = jnp.arange(37, dtype=jnp.int32).at[3].set(outside)

  def total(hidden, weight):
    return (weight * logprob(hidden, head, targets).logp)[weight != 0].sum()

  trained = jax.grad(total)(hidden, np.ones(37))
  assert np.isnan(trained[3]).all()
  # … and one that is masked out leaves no trace.
  masked = jax.grad(total)(hidden, np.ones(37) - np.eye(37)[3])
  assert np.isfinite(masked).all()


def test_chunks_cover_all_rows_and_bound_the_tile():
  for rows, vocab in [(1, 7), (3, 50), (504, 49152), (16384, 128256), (5, 10**9)]:
    chunk = chunked.chunk_rows(rows, vocab)
    assert 1 <= chunk <= rows
    assert chunk == 1 or chunk * vocab * 4 <= chunked.TILE_BYTES
    # Chunks without a masked token are many enough for masks to save some.
    assert chunk < 2 * chunked.ROWS


def test_chips_multiply_more_rows_at_once(monkeypatch):
  monkeypatch.setattr(chunked, 'device_kind', lambda: 'TPU v5')
  for rows, chunk in [(1, 1), (2048, 2048), (16384, 2048), (3000, 1500)]:
    assert chunked.chunk_rows(rows, 128256) == chunk


@pytest.mark.parametrize('rows', [37, 700])
@pytest.mark.parametrize('share', [0.0, 0.4, 1.0])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_tokens_that_nobody_needs_are_left_out(
  implementation, rows, share, interpreted
):
  if rows > 100 and implementation.startswith('pallas'):
    pytest.skip(
      'one tile says what several do; see test_pallas_tpu and test_pallas_gpu'
    )
  interpreted(implementation)
  dtype = BF16 if implementation == 'pallas_gpu' else F32
  rng = np.random.default_rng(1)
  hidden = jnp.asarray(rng.normal(size=(rows, 8)), dtype)
  head = jnp.asarray(rng.normal(size=(8, 50)), dtype)
  targets = jnp.int32(rng.integers(0, 50, rows))
  needed = jnp.asarray(rng.random(rows) < share)

  def total(hidden, head, needed):
    s = logprob(hidden, head, targets, needed=needed, implementation=implementation)
    kept = [jnp.where(needed, x, 0) for x in (s.logp, s.entropy, s.mean_logp)]
    return (kept[0] + 2 * kept[1] + 3 * kept[2]).sum(), s

  gradient = jax.jit(jax.grad(total, (0, 1), has_aux=True))
  grads, scores = gradient(hidden, head, needed)
  everything = logprob(hidden, head, targets, implementation='reference')
  for got, want in zip(
    jax.tree.leaves(scores), jax.tree.leaves(everything), strict=True
  ):
    np.testing.assert_allclose(got, np.where(needed, want, 0), atol=5e-6)

  def reference(hidden, head):
    s = logprob(hidden, head, targets, implementation='reference')
    parts = s.logp + 2 * s.entropy + 3 * s.mean_logp
    return jnp.where(needed, parts, 0).sum()

  for got, want in zip(grads, jax.grad(reference, (0, 1))(hidden, head), strict=True):
    got, want = np.float32(got), np.float32(want)
    close = dict(rtol=1e-5, atol=1e-6 * np.abs(want).max())
    if dtype == BF16:  # see above; both sides round the result
      close = dict(rtol=0, atol=2**-7 * np.abs(want).max())
    np.testing.assert_allclose(got, want, **close)


@pytest.mark.parametrize('needed', [None, 'some'])
@pytest.mark.parametrize(('temperature', 'softcap'), SETTINGS)
@pytest.mark.parametrize('rows', [37, 700])
def test_one_pass_equals_float64(rows, temperature, softcap, needed):
  """Cotangents that bend: of log p at each token, and of its entropy."""
  rng = np.random.default_rng(2)
  hidden = jnp.float32(rng.normal(size=(rows, 8)))
  head = jnp.float32(rng.normal(size=(8, 50)))
  targets = jnp.int32(rng.integers(0, 50, rows))
  some = np.ones(rows, bool) if needed is None else rng.random(rows) < 0.6
  weight = jnp.float32(rng.normal(size=rows))

  def total(scores):
    bent = jnp.sin(scores.logp) * weight + scores.entropy**2 + scores.mean_logp * weight
    return jnp.where(some, bent, 0).sum()

  scores, *grads = jax.jit(
    lambda hidden, head: one_pass(
      hidden,
      head,
      targets,
      lambda scores, _: jax.grad(total)(scores),
      temperature=temperature,
      softcap=softcap,
      needed=None if needed is None else jnp.asarray(some),
    )
  )(hidden, head)
  values, *_ = in_float64(
    hidden, head, targets, np.zeros((3, rows)), temperature, softcap
  )
  for got, want in zip(jax.tree.leaves(scores), values, strict=True):
    np.testing.assert_allclose(got, np.where(some, want, 0), rtol=2e-6, atol=5e-6)
  logp, entropy, _ = values
  weight = np.float64(weight)
  slopes = np.array([np.cos(logp) * weight, 2 * entropy, weight]) * some
  _, *want = in_float64(hidden, head, targets, slopes, temperature, softcap)
  for got, right in zip(grads, want, strict=True):
    np.testing.assert_allclose(got, right, rtol=1e-5, atol=3e-6 * np.abs(right).max())


@pytest.mark.parametrize(
  'axes',
  [
    (('data',), None),
    ((), 'tensor'),
    (('data',), 'tensor'),
    (('data', 'tensor'), None),  # all rows are summed over both
  ],
)
@pytest.mark.parametrize(
  'implementation', ['chunked', 'vocabulary', 'pallas_tpu', 'one_pass']
)
def test_a_mesh_changes_nothing(implementation, axes, interpreted):
  """Each device with its own tokens and its own entries, none of them even.

  Not pallas_gpu: all devices would share the one interpreter's barriers, and the process
  ends. What happens on a mesh is op.py's for all of them.
  """
  interpreted(implementation)
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  split = Split(mesh, *axes)
  rng = np.random.default_rng(3)
  hidden = jnp.asarray(rng.normal(size=(60, 16)), F32)
  head = jnp.asarray(rng.normal(size=(16, 150)), F32)
  targets = jnp.int32(rng.integers(0, 150, 60))
  # The first and the last entry of a device are in no other one's ragged tile.
  targets = targets.at[:4].set(jnp.array([0, 74, 75, 149]))
  # The first device has more to do than the second.
  needed = jnp.asarray(rng.random(60) < np.linspace(0.9, 0.1, 60)).at[:4].set(True)
  weights = jnp.float32(rng.normal(size=60))

  def total(scores, weights):
    parts = scores.logp + 2 * scores.entropy + 3 * scores.mean_logp
    return (weights * parts).sum()

  def grads(implementation, split):
    def of(hidden, head):
      how = dict(needed=needed, split=split, implementation=implementation)
      scores = logprob(hidden, head, targets, **how)
      return total(scores, weights), scores

    return jax.jit(jax.grad(of, (0, 1), has_aux=True))(hidden, head)

  if implementation == 'one_pass':
    scores, *found = jax.jit(
      lambda hidden, head: one_pass(
        hidden, head, targets, jax.grad(total), weights, needed=needed, split=split
      )
    )(hidden, head)
  else:
    found, scores = grads(implementation, split)
  right, want = grads('reference', None)
  for a, b in zip(jax.tree.leaves(scores), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=5e-6)
  for a, b in zip(found, right, strict=True):
    assert np.abs(a - b).max() < 5e-6 * np.abs(b).max()


def of_logp(implementation, weight, split=None):
  """(dH, dW) of Σ weight·logp."""

  def grads(hidden, head, targets):
    def total(hidden, head):
      scores = logprob(
        hidden, head, targets, split=split, implementation=implementation
      )
      return (weight * scores.logp).sum()

    return jax.grad(total, (0, 1))(hidden, head)

  def worth(scores, _):
    return Scores(
      jnp.full_like(scores.logp, weight),
      jnp.zeros_like(scores.logp),
      mean_logp=jnp.zeros_like(scores.logp),
    )

  if implementation == 'one_pass':
    return jax.jit(lambda *x: one_pass(*x, worth, split=split)[1:])
  return jax.jit(grads)


@pytest.mark.parametrize(
  'implementation', ['chunked', 'vocabulary', 'pallas_tpu', 'one_pass']
)
def test_parts_that_cancel_among_devices_are_rounded_after_their_sum(implementation):
  """1.5·(1 + 2^-7) is no bfloat16, and 1.5·2^-7, which is left of it, is one."""
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  grads = of_logp(implementation, 3.0, Split(mesh, ('data',), 'tensor'))
  targets = jnp.arange(2)  # of two entries with one logit: their slopes are ±1.5
  one, other = jnp.zeros((2, 1), BF16), jnp.asarray([[1 + 2**-7], [1]], BF16)
  d_hidden, _ = grads(one, other.T, targets)
  assert d_hidden[:, 0].tolist() == [1.5 * 2**-7, -1.5 * 2**-7]
  _, d_head = grads(other, one.T, targets)
  assert d_head[0].tolist() == [1.5 * 2**-7, -1.5 * 2**-7]


@pytest.mark.parametrize('implementation', ['chunked', 'one_pass'])
def test_chunks_add_up_in_float32(implementation, monkeypatch):
  """700 equal tokens in chunks of one: a bfloat16 sum stands still after 256 of them."""
  monkeypatch.setattr(chunked, 'ROWS', 1)
  hidden, head = jnp.ones((700, 1), BF16), jnp.zeros((1, 2), BF16)
  _, d_head = of_logp(implementation, 1.0)(hidden, head, jnp.zeros(700, jnp.int32))
  np.testing.assert_allclose(np.float32(d_head), [[350, -350]], rtol=2**-8)


@pytest.mark.parametrize(('temperature', 'softcap'), SETTINGS)
def test_chunks_of_the_vocabulary_add_up(temperature, softcap, monkeypatch):
  """101 entries in chunks of 40, of which the last one overlaps the one before."""
  monkeypatch.setattr(vocabulary, 'TILE_BYTES', 4 * 37 * 40)
  monkeypatch.setattr(vocabulary, 'LEAST_COLUMNS', 8)
  hidden, head, targets, cotangents = draw('ragged')
  # In the overlap, and at the edges of chunks.
  targets = targets.at[:6].set(jnp.array([61, 79, 80, 39, 40, 100]))

  def weighted(hidden, head):
    how = dict(temperature=temperature, softcap=softcap, implementation='vocabulary')
    s = logprob(hidden, head, targets, **how)
    parts = jnp.stack([s.logp, s.entropy, s.mean_logp])
    return (jnp.float32(cotangents) * parts).sum(), parts

  grads, values = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))(hidden, head)
  want, *right = in_float64(hidden, head, targets, cotangents, temperature, softcap)
  np.testing.assert_allclose(values, want, rtol=2e-6, atol=5e-6)  # see above
  for got, of in zip(grads, right, strict=True):
    np.testing.assert_allclose(got, of, rtol=1e-5, atol=2e-6 * np.abs(of).max())


@pytest.mark.parametrize(
  ('way', 'most'), [('one_pass', 140), ('chunked', 140), ('vocabulary', 16)]
)
def test_temporaries_do_not_hold_the_logits(way, most):
  """MB, of 2,048 tokens, width 512, vocabulary 32,768: 268 MB of logits."""
  shapes = (
    jax.ShapeDtypeStruct((2048, 512), jnp.float32),
    jax.ShapeDtypeStruct((512, 32768), jnp.float32),
    jax.ShapeDtypeStruct((2048,), jnp.int32),
  )

  def temporaries(way):
    def total(hidden, head, targets):
      return logprob(hidden, head, targets, implementation=way).logp.sum()

    run = jax.grad(total, (0, 1))
    if way == 'one_pass':

      def run(*operands):
        return one_pass(
          *operands, lambda scores, _: jax.tree.map(jnp.ones_like, scores)
        )

    compiled = jax.jit(run).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries('reference') >= 2048 * 32768 * 4  # the measure does see logits
  assert temporaries(way) <= most * 1e6


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    ({'temperature': 0.0}, 'temperature=0.0 must be > 0'),
    ({'temperature': float('nan')}, 'temperature=nan must be > 0'),
    ({'softcap': -1.0}, 'softcap=-1.0 must be > 0'),
    ({'softcap': float('inf')}, 'softcap=inf must be > 0 and finite'),
    ({'implementation': 'palas'}, "implementation='palas' does not exist"),
  ],
)
def test_bad_settings_are_refused(bad, message):
  hidden, head, targets, _ = draw('one_row')
  with pytest.raises(ValueError, match=message):
    logprob(hidden, head, targets, **bad)


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    ({'head': (6, 5)}, r'hidden is \(3, 4\) and head \(6, 5\)'),
    ({'head': (4, 0)}, 'V > 0'),
    ({'targets': (2,)}, r'targets is int32\[2\]; it must be integers of N = 3'),
    ({'targets': (3,), 'dtype': F32}, 'targets is float32'),
    ({'needed': (1,)}, r'needed is bool\[1\]; it must be bool of N = 3 tokens'),
  ],
)
def test_operands_that_do_not_belong_together_are_refused(bad, message):
  """Without jaxtyping a kernel reads beyond the smaller one, or broadcasts."""
  with pytest.raises(ValueError, match=message):
    check(
      jnp.zeros((3, 4)),
      jnp.zeros(bad.get('head', (4, 5))),
      jnp.zeros(bad.get('targets', 3), bad.get('dtype', jnp.int32)),
      jnp.zeros(bad.get('needed', 3), bool),
    )


@pytest.mark.parametrize('implementation', [*IMPLEMENTATIONS, 'one_pass'])
def test_of_no_token_nothing_is_said(implementation):
  """A batch of rows of a single token, which nothing predicts."""
  hidden, head = jnp.zeros((0, 8), BF16), jnp.ones((8, 5), BF16)
  d_hidden, d_head = of_logp(implementation, 1.0)(hidden, head, jnp.zeros(0, jnp.int32))
  assert d_hidden.shape == (0, 8)
  assert d_head.shape == (8, 5)
  assert not d_head.any()
