"""Three ways of attention against a loop over queries, written in float64.

Splash runs as its interpreter, cuDNN's call as the XLA that JAX puts in its place.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from educe import collectives, sharding
from educe.kernels.attention import cudnn, portable, ring, splash
from educe.types import Split

B, H, K, h = 2, 6, 3, 8
PACKED = np.array([[1] * 40 + [2] * 75 + [3] * 15 + [0] * 12, [1] * 142])
WAYS = {
  'portable': portable.causal,
  'splash': functools.partial(splash.attend, interpret=True),
  'cudnn': functools.partial(cudnn.attend, library='xla'),
}
FORKS = {
  'portable': portable.forked,
  'splash': lambda *args: by_library(WAYS['splash'], *args),
  'cudnn': lambda *args: by_library(WAYS['cudnn'], *args),
}


def by_library(attend, q, k, v, prompt, T):
  there = jnp.ones((len(q), q.shape[1] - prompt.shape[1]), jnp.int32)
  segments = jnp.concatenate([prompt.astype(jnp.int32), there], 1)
  return attend(q, k, v, segments, (prompt.shape[1], T))


def draw(seed, T, S=None, dtype=jnp.float32):
  """q, k, v and the cotangent of the result."""
  rng = np.random.default_rng(seed)
  shapes = (B, T, H, h), (B, K, S or T, h), (B, K, S or T, h), (B, T, H, h)
  return tuple(jnp.asarray(rng.normal(size=s) / h**0.25, dtype) for s in shapes)


def loop(q, k, v, out, visible):
  """(o, dq, dk, dv): of one query at a time, by the definition and by its derivative."""
  q, k, v, out = (np.asarray(x, np.float64) for x in (q, k, v, out))
  o, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
  for b, t, n in np.ndindex(q.shape[:3]):
    see, m = visible[b, t], n // (H // K)
    if see.any():
      p = np.exp(k[b, m, see] @ q[b, t, n])
      p /= p.sum()
      o[b, t, n] = p @ v[b, m, see]
      ds = p * ((v[b, m, see] - o[b, t, n]) @ out[b, t, n])
      dq[b, t, n] = ds @ k[b, m, see]
      dk[b, m, see] += np.outer(ds, q[b, t, n])
      dv[b, m, see] += np.outer(p, out[b, t, n])
  return o, dq, dk, dv


def run(attend, q, k, v, out, there=True):
  """(o, dq, dk, dv), with zeros for the queries that are not there, as attend's callers
  have them."""

  @jax.jit
  def all_of_it(q, k, v):
    o, back = jax.vjp(lambda *x: jnp.where(there, attend(*x), 0), q, k, v)
    return o, *back(out)

  return all_of_it(q, k, v)


def causal(T, segments=None):
  visible = np.tril(np.ones((B, T, T), bool))
  if segments is not None:
    visible &= (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
  return visible


def check(got, want, atol, dtype=jnp.float32):
  for name, x, y in zip(('o', 'dq', 'dk', 'dv'), got, want, strict=True):
    assert x.dtype == dtype
    np.testing.assert_allclose(np.asarray(x, np.float64), y, atol=atol, err_msg=name)


def test_a_mask_and_queries_that_see_nothing():
  *args, out = draw(0, 5, 7)
  visible = np.random.default_rng(1).random((B, 5, 7)) < 0.6
  visible[0, 2] = False
  attend = functools.partial(portable.attend, visible=jnp.asarray(visible))
  got = run(attend, *args, out)
  check(got, loop(*args, out, visible), 1e-5)
  for x in got[:2]:
    assert not np.asarray(x)[0, 2].any()
  assert np.asarray(got[0])[0, 1].any()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('way', WAYS)
def test_causal(way, packed, dtype):
  T = PACKED.shape[1]
  *args, out = draw(2, T, dtype=dtype)
  segments = PACKED if packed else None
  there = np.expand_dims(PACKED > 0, (2, 3)) if packed else True
  attend = WAYS[way]
  if packed:
    attend = functools.partial(attend, segments=jnp.asarray(segments))
  want = loop(*args, out, causal(T, segments))
  check(
    run(attend, *args, out, there), want, 2e-5 if dtype == jnp.float32 else 0.05, dtype
  )


def test_float16_does_not_overflow():
  """1,000 equal scores and values of 100: their sum is no float16, their mean is."""
  N = 1000
  q, k, v = (
    jnp.zeros(s, jnp.float16) for s in [(1, N, 2, h), (1, 2, N, h), (1, 2, N, h)]
  )
  prompt = jnp.ones((1, N // 2), bool)
  for got in (
    portable.causal(q, k, v + 100),
    portable.forked(q, k, v + 100, prompt, N // 2),
  ):
    np.testing.assert_allclose(np.asarray(got, np.float32), 100, rtol=2e-3)


@pytest.mark.parametrize('T', [255, 256, 261])
def test_blocks_of_a_long_row(T):
  """Each query is in one block; the values are those of one product."""
  blocks = portable.blocks(T)
  assert np.concatenate([np.arange(*block) for block in blocks]).tolist() == list(
    range(T)
  )
  assert len(blocks) == (1 if T < portable.LONG else portable.BLOCKS)
  *args, out = draw(3, T)
  segments = np.repeat([[1, 2, 3, 0]], B, 0).repeat([100, 90, 60, T - 250], 1)
  whole = functools.partial(portable.attend, visible=jnp.asarray(causal(T, segments)))
  cut = functools.partial(portable.causal, segments=jnp.asarray(segments))
  check(run(cut, *args, out), run(whole, *args, out), 1e-5)


def test_a_row_of_several_blocks_of_splash(monkeypatch):
  monkeypatch.setattr(splash, 'BLOCK', 128)
  T = 300
  *args, out = draw(4, T)
  got = run(functools.partial(splash.attend, interpret=True), *args, out)
  check(got, run(portable.causal, *args, out), 1e-5)


@pytest.mark.parametrize('way', ['portable', 'portable in blocks', 'splash', 'cudnn'])
def test_a_fork_equals_whole_rows(way, monkeypatch):
  """Each completion beside its own copy of the prompt, one after the other; the
  gradient is that of a loop which knows who sees whom."""
  if way == 'portable in blocks':
    way = 'portable'
    monkeypatch.setattr(portable, 'LONG', 4)
  S, G, T = 9, 3, 7
  N = S + G * T
  *args, out = draw(5, N)
  prompt = np.array([[True] * S, [True] * 5 + [False] * 4])
  visible = causal(N)
  for g in range(G):
    rows = slice(S + g * T, S + (g + 1) * T)
    visible[:, rows, S : S + g * T] = False
  visible[:, :, :S] &= prompt[:, None]
  there = np.c_[prompt, np.ones((B, G * T), bool)]
  visible &= there[:, :, None]

  def fork(*args):
    return FORKS[way](*args, jnp.asarray(prompt), T)

  there = np.expand_dims(there, (2, 3))
  got = run(fork, *args, out, there)
  check(got, loop(*args, out, visible), 2e-5)
  for g in range(G):
    own = np.r_[:S, S + g * T : S + (g + 1) * T]
    segments = np.c_[prompt, np.ones((B, T), bool)].astype(np.int32)
    q, k, v = args
    alone = portable.causal(
      q[:, own], k[:, :, own], v[:, :, own], jnp.asarray(segments)
    )
    np.testing.assert_allclose(got[0][:, own], alone, atol=1e-5)


def test_splash_on_a_mesh():
  """Rows over one axis, heads over another: as on one device, gradients too."""
  assert jax.device_count() == 8
  mesh = jax.make_mesh(
    (2, 3),
    ('data', 'tensor'),
    axis_types=(AxisType.Auto,) * 2,
    devices=jax.devices()[:6],
  )
  T = PACKED.shape[1]
  *args, out = draw(6, T)
  segments = jnp.asarray(PACKED)
  want = run(functools.partial(portable.causal, segments=segments), *args, out)
  split = Split(mesh, ('data',), 'tensor')
  there = np.expand_dims(PACKED > 0, (2, 3))
  attend = functools.partial(
    splash.attend, segments=segments, split=split, interpret=True
  )
  placed = [
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in zip(
      args, (P('data', None, 'tensor'), *[P('data', 'tensor')] * 2), strict=True
    )
  ]
  check(run(attend, *placed, out, there), want, 2e-5)
  replicated = functools.partial(attend, split=Split(mesh))
  check(run(replicated, *args, out, there), want, 2e-5)


@pytest.mark.parametrize(
  ('sizes', 'packed'),
  [(dict(context=4), False), (dict(data=2, context=2, tensor=2), True)],
)
@pytest.mark.parametrize('way', ['ring', 'splash'])
def test_the_tokens_of_a_row_on_several_devices(
  way, sizes, packed, mesh_of, monkeypatch
):
  """As the loop over queries says; documents end inside of a device's part, and the last
  part of a row may be padding."""
  monkeypatch.setattr(splash, 'BLOCK', 128)  # several of a device, where it has 256
  T = 512
  rng = np.random.default_rng(12)
  q, k, v, out = (
    jnp.asarray(rng.normal(size=shape) / 4**0.25, jnp.float32)
    for shape in ((2, T, 4, 4), (2, 2, T, 4), (2, 2, T, 4), (2, T, 4, 4))
  )
  segments = np.repeat([[1] * 200 + [2] * 180 + [0] * 132, [1] * 512], 1, 0)
  before = np.tril(np.ones((T, T), bool))
  visible = np.stack([before] * 2)
  if packed:
    visible &= (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0)
  want = loop(q, k, v, out, visible)
  given = jnp.asarray(segments) if packed else None
  way = (
    ring.attend if way == 'ring' else functools.partial(splash.attend, interpret=True)
  )
  there = np.expand_dims(segments > 0, (2, 3)) if packed else 1
  with jax.set_mesh(mesh_of(**sizes)):
    split = sharding.split(2, 2, 'kv_heads', T)
    assert split.along == 'context'
    attend = functools.partial(way, segments=given, split=split)
    check(run(attend, q, k, v, out, there), want, 2e-5)


def test_a_query_that_sees_nothing_gets_zeros_of_a_ring(mesh_of):
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((1, 8, 2, 4), (1, 2, 8, 4), (1, 2, 8, 4))
  )
  segments = jnp.asarray([[1, 1, 1, 0, 0, 0, 0, 0]])  # padding begins inside of a part
  with jax.set_mesh(mesh_of(context=4)):
    split = sharding.split(1, 2, 'kv_heads', 8)
    got = jax.jit(lambda *x: ring.attend(*x, segments, split=split))(q, k, v)
  assert np.asarray(got)[:, :3].all()
  assert not np.asarray(got)[:, 3:].any()


def test_a_ring_holds_no_more_than_its_part(mesh_of):
  """Of keys, and of scores: neither T keys nor T² scores, forward and backward."""
  T, mesh = 1024, mesh_of(context=8)
  with sharding.using(mesh):
    split = sharding.split(2, 2, 'kv_heads', T)

  def total(q, k, v):
    return ring.attend(q, k, v, None, split=split).sum()

  where = (
    NamedSharding(mesh, P(None, 'context')),
    NamedSharding(mesh, P(None, None, 'context')),
  )
  q = jax.ShapeDtypeStruct((2, T, 4, 8), jnp.float32, sharding=where[0])
  k = jax.ShapeDtypeStruct((2, 2, T, 8), jnp.float32, sharding=where[1])
  program = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k).compile()
  moved = {x.op for x in collectives.read(program.as_text()) if x.bytes}
  assert moved == {'collective-permute'}
  part = 2 * 4 * (T // 8) ** 2 * 4  # float32 scores of all heads
  assert program.memory_analysis().temp_size_in_bytes < 6 * part


@pytest.mark.parametrize('segments', [None, PACKED[:, :128]])
def test_the_call_becomes_cudnn_s_on_a_gpu(segments, monkeypatch):
  """Lowered for CUDA; the masks of documents are a bias, a plain row needs none."""
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  *args, out = draw(7, 128, dtype=jnp.bfloat16)
  if segments is not None:
    segments = jnp.asarray(segments)

  def both(q, k, v):
    o, back = jax.vjp(lambda *x: cudnn.attend(*x, segments), q, k, v)
    return o, *back(out)

  text = jax.jit(both).trace(*args).lower(lowering_platforms=('cuda',)).as_text()
  name = 'fmhaSoftmax' if segments is None else 'fmhaScaleBiasSoftmax'
  calls = re.findall(r'@__cudnn\$(\w+)\(', text)
  assert calls == [name, f'{name}Backward']
  assert len(re.findall('mask_type.{,20}CAUSAL', text)) == 2


def test_what_cudnn_does_not_take(monkeypatch):
  of = {d: draw(8, 16, dtype=d)[:3] for d in (jnp.float32, jnp.bfloat16)}
  assert 'cuDNN' in cudnn.obstacle(*of[jnp.bfloat16])  # there is none here
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  assert cudnn.obstacle(*of[jnp.bfloat16]) is None
  assert 'float32' in cudnn.obstacle(*of[jnp.float32])
  narrow = [x[..., :6] for x in of[jnp.bfloat16]]
  assert 'head dim' in cudnn.obstacle(*narrow)
