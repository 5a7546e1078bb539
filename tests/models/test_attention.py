"""Who computes attention, where, and that a decoder means the same by each of them."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from educe import sharding
from educe.kernels.attention import cudnn, splash
from educe.models import attention, policy
from educe.models.architecture import Architecture
from educe.models.attention import Causal, Fork


def chip(kind, size=1, names=sharding.AXES):
  """A context in which programs are traced for such chips."""
  device = AbstractDevice(kind, 1, 'tpu' if kind.startswith('TPU') else 'gpu')
  mesh = AbstractMesh(
    (size,) + (1,) * (len(names) - 1),
    names,
    (AxisType.Auto,) * len(names),
    abstract_device=device,
  )
  return jax.sharding.use_abstract_mesh(mesh)


def operands(dtype=jnp.bfloat16, B=2, N=32, h=16):
  q = jax.ShapeDtypeStruct((B, N, 4, h), dtype)
  k = jax.ShapeDtypeStruct((B, 2, N, h), dtype)
  return q, k, k


def fork(N=32):
  return Fork(jnp.ones((2, 8), bool), (N - 8) // 3)


@pytest.fixture(autouse=True)
def heard(monkeypatch):
  """What is said; and cuDNN is taken to be installed."""
  lines = []
  monkeypatch.setattr(attention, 'say_once', functools.cache(lines.append))
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  return lines


@pytest.mark.parametrize(
  ('kind', 'dtype', 'visible', 'want', 'why'),
  [
    ('cpu', jnp.bfloat16, Causal(), 'portable', None),
    ('AMD Instinct MI300X', jnp.bfloat16, Causal(), 'portable', None),
    ('TPU v5 lite', jnp.bfloat16, Causal(), 'splash', None),
    ('TPU v5 lite', jnp.float32, fork(), 'splash', None),
    ('TPU v5 lite', jnp.float16, Causal(), 'portable', 'no float16'),
    ('NVIDIA H200', jnp.bfloat16, Causal(), 'cudnn', None),
    ('NVIDIA H200', jnp.bfloat16, fork(), 'portable', None),
    ('NVIDIA H200', jnp.float32, Causal(), 'portable', 'float32'),
  ],
)
def test_the_rule(kind, dtype, visible, want, why, heard):
  where = contextlib.nullcontext() if kind == 'cpu' else chip(kind)
  with where:
    for _ in range(2):
      assert attention.choose('auto', *operands(dtype), visible) == want
    assert attention.choose('portable', *operands(dtype), visible) == 'portable'
  assert len(heard) == (why is not None)
  assert all(why in line and '\n' not in line for line in heard)


@pytest.mark.parametrize(
  ('kind', 'dtype', 'name', 'why'),
  [
    ('cpu', jnp.bfloat16, 'splash', 'needs a device of kind TPU, and this one is cpu'),
    ('cpu', jnp.bfloat16, 'cudnn', 'needs a device of kind NVIDIA'),
    ('NVIDIA H200', jnp.bfloat16, 'splash', 'and this one is NVIDIA H200'),
    ('NVIDIA H200', jnp.float32, 'cudnn', 'float32'),
    ('TPU v4', jnp.float16, 'splash', 'TPUs have no float16'),
  ],
)
def test_a_named_one_runs_or_raises(kind, dtype, name, why):
  where = contextlib.nullcontext() if kind == 'cpu' else chip(kind)
  with where, pytest.raises(ValueError, match=f'attention={name!r} cannot.*{why}'):
    attention.choose(name, *operands(dtype), Causal())


def test_a_name_that_is_not_there_is_said():
  with pytest.raises(ValueError, match=r"attention='spalsh' does not exist.*'splash'"):
    attention.attend(*map(jnp.zeros_like, operands()), Causal(), 'spalsh')


@pytest.mark.parametrize('packed', [False, True])
def test_by_rule_a_gpu_s_program_calls_cudnn(packed, heard):
  """As it is traced in a step: operands that are tracers, in a gradient."""
  segments = jnp.ones((2, 32), jnp.int32) if packed else None

  def total(q, k, v):
    return attention.attend(q, k, v, Causal(segments)).astype(jnp.float32).sum()

  with chip('NVIDIA H200'):
    step = jax.jit(jax.grad(total, (0, 1, 2))).trace(*operands())
    text = step.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('@__cudnn$fmha') == 2
  assert not heard


def test_a_fork_by_cudnn_when_it_is_asked_for():
  with chip('NVIDIA H200'):
    assert attention.choose('cudnn', *operands(), fork()) == 'cudnn'


def test_many_chips_without_a_mesh(monkeypatch, heard):
  """A kernel cannot be split by the compiler, nor is it known how it should be."""
  monkeypatch.setattr(attention, 'device_kind', lambda: 'TPU v5 lite')
  assert attention.choose('auto', *operands(), Causal()) == 'portable'
  assert 'no mesh is in use' in heard[0]


@pytest.mark.parametrize(
  ('size', 'B', 'want'),
  [
    (1, 2, None),
    (2, 2, (sharding.ROWS, None, None, None)),
    (4, 2, ((), None, None, None)),
  ],
)
def test_how_a_mesh_splits_it(size, B, want):
  with chip('TPU v5 lite', size):
    q, k, _ = operands(B=B)
    split = sharding.split(len(q), k.shape[1], 'kv_heads')
    assert (split and split[1:]) == want


def test_where_the_tokens_of_a_row_lie_on_several_devices(monkeypatch):
  """What is chosen for them, and why something else is not."""
  heard = []
  monkeypatch.setattr(attention, 'say_once', heard.append)
  mesh = AbstractMesh(
    (1, 1, 1, 4, 1),
    sharding.AXES,
    (AxisType.Auto,) * 5,
    abstract_device=AbstractDevice('TPU v5 lite', 1, 'tpu'),
  )
  with jax.sharding.use_abstract_mesh(mesh):
    assert attention.choose('auto', *operands(N=1024), Causal()) == 'splash'
    assert attention.choose('auto', *operands(N=1000), Causal()) == 'portable'
    assert '1000 tokens over config.mesh.context do not divide by 512' in heard[-1]
    assert attention._split(*operands(N=1002)[:2], Causal()).along is None


ARCHITECTURE = Architecture(
  vocab_size=64,
  dim=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  ffn=64,
  max_length=64,
)


@pytest.mark.parametrize('case', ['plain', 'packed', 'fork'])
@pytest.mark.parametrize('name', ['splash', 'cudnn'])
def test_a_decoder_means_the_same_by_each(name, case, monkeypatch):
  """States and the gradient of params, through the choice and the wrappers."""
  monkeypatch.setattr(
    attention, 'device_kind', lambda: {'splash': 'TPU'}.get(name, 'NVIDIA')
  )
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setattr(cudnn, 'obstacle', lambda *_: None)
  monkeypatch.setattr(
    splash, 'attend', functools.partial(splash.attend, interpret=True)
  )
  monkeypatch.setattr(cudnn, 'attend', functools.partial(cudnn.attend, library='xla'))
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 64, (4, 12)))
  batch, there = {}, np.ones((4, 12))
  if case == 'packed':
    segments = np.repeat([[1, 2, 0]], 4, 0).repeat([5, 4, 3], 1)
    batch, there = {'segments': jnp.asarray(segments)}, segments > 0
  if case == 'fork':
    batch = {'prefix': jnp.asarray([[3, 4, 5], [6, -1, -1]])}
    batch['positions'] = jnp.asarray([[3], [3], [1], [1]]) + jnp.arange(12)[None]
  params = policy.build(ARCHITECTURE).init(jax.random.key(0))
  weight = jnp.asarray(rng.normal(size=(4, 12, 32)) * there[..., None], jnp.float32)

  def of(attention_name):
    model = policy.build(dataclasses.replace(ARCHITECTURE, attention=attention_name))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(params):
      states, _ = model.hidden(params, tokens, **batch)
      return (states * weight).sum(), states

    (_, states), grads = total(params)
    return states * there[..., None], grads

  (states, grads), (want, want_grads) = of(name), of('portable')
  np.testing.assert_allclose(states, want, atol=2e-5)
  scale = max(float(abs(x).max()) for x in jax.tree.leaves(want_grads))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x / scale, y / scale, atol=1e-6),
    grads,
    want_grads,
  )


@pytest.mark.parametrize('name', ['portable', 'splash', 'cudnn'])
def test_padding_gets_zeros_and_gives_no_gradient(name, monkeypatch):
  """To the libraries padding is a document like any other; to a caller it is nothing."""
  monkeypatch.setattr(attention, 'choose', lambda *_: name)
  monkeypatch.setattr(
    splash, 'attend', functools.partial(splash.attend, interpret=True)
  )
  monkeypatch.setattr(cudnn, 'attend', functools.partial(cudnn.attend, library='xla'))
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in operands())
  segments = jnp.asarray(np.repeat([[1, 2, 0]], 2, 0).repeat([12, 9, 11], 1))

  @jax.jit
  def both(q, k, v):
    run = lambda *x: attention.attend(*x, Causal(segments))  # noqa: E731
    out, back = jax.vjp(run, q, k, v)
    return out, *back(jnp.ones_like(out))

  out, dq, dk, dv = both(q, k, v)
  for x in (out[:, 21:], dq[:, 21:], dk[:, :, 21:], dv[:, :, 21:]):
    assert not np.asarray(x).any()
  assert np.asarray(out[:, :21]).all()


def test_nothing_of_t_by_t_where_it_is_not_needed():
  """With splash, no array of the program has two axes of tokens."""
  T = 1536  # three blocks
  architecture = dataclasses.replace(ARCHITECTURE, attention='splash', max_length=T)
  model = policy.build(architecture)
  with chip('TPU v5 lite'):
    program = jax.make_jaxpr(
      jax.grad(lambda p, t, s: model.hidden(p, t, segments=s)[0].sum()),
    )(policy.shapes(architecture), *[jax.ShapeDtypeStruct((2, T), jnp.int32)] * 2)
  shapes = str(program)
  assert 'pallas_call' in shapes
  assert f'{T},{T}' not in shapes
