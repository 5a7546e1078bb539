"""Generalised Jensen–Shannon divergence of two next-token distributions, token by token.

  p = softmax(teacher's logits / τ)    q = softmax(student's logits / τ)
  m = β·p + (1 − β)·q
  D_β(p‖q) = β·KL(p‖m) + (1 − β)·KL(q‖m)        0 < β < 1      (nats)
  D_0(p‖q) = KL(p‖q)    forward KL: lim D_β/β for β → 0
  D_1(p‖q) = KL(q‖p)    reverse KL: lim D_β/(1 − β) for β → 1

Rishabh Agarwal et al., "On-policy distillation of language models" (GKD), 2023, §2,
arXiv:2306.13649; the limits: Ferenc Huszár, 2015, arXiv:1511.05101. D_β itself goes to 0
at both ends, and its gradient with it, so 0 and 1 stand for the KLs that it goes to *in
proportion*: a step from β = 0.01 to β = 0 makes the loss about a hundred times as large.

Logits of both models exist one chunk of tokens at a time, and again in the backward pass:
a few float32 [C, V] tiles, C ≪ N, never [N, V]. The teacher is held constant. With z the
student's logits the gradient, by hand, is

  ∂D_β/∂q_v = (1 − β)·log(q_v/m_v) + const
  ∂D_β/∂z_v = (1 − β)·q_v·(log(q_v/m_v) − KL(q‖m))·∂z/∂s

and q_v − p_v at β = 0; at β = 1 the same with p for m and 1 for 1 − β.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float

from educe.kernels.logprob.chunked import chunk_rows, products
from educe.types import Head


def divergence(
  hidden: Float[Array, 'N D'],
  head: Head,
  teacher_hidden: Float[Array, 'N E'],
  teacher_head: Head,
  *,
  beta: float,
  temperature: float = 1.0,
) -> Float[Array, 'N']:
  """D_β(teacher‖student) of each token (nats, float32).

  Args:
    hidden, head: of the student, which gradients reach in their own dtypes
    teacher_hidden, teacher_head: of a model of any width and the same vocabulary
    beta: 0 forward KL(teacher‖student), 1 reverse KL(student‖teacher), between: see above
    temperature: τ > 0 of both distributions

  Raises ValueError for beta outside [0, 1], a temperature that is not positive, and two
  vocabularies.
  """
  if not 0 <= beta <= 1:
    raise ValueError(f'divergence: beta={beta} must be in [0, 1]')
  if not temperature > 0:
    raise ValueError(f'divergence: temperature={temperature} must be > 0')
  vocab, other = head.matrix.shape[-1], teacher_head.matrix.shape[-1]
  if vocab != other:
    raise ValueError(
      f'divergence: the student knows {vocab} tokens and the teacher {other}; both '
      'distributions must be over the same vocabulary'
    )
  rows = len(hidden)
  chunk = chunk_rows(rows, 2 * vocab)  # two models' tiles
  padding = ((0, -rows % chunk), (0, 0))

  def scaled(x, head):
    return jnp.pad(x * jnp.asarray(head.scale, x.dtype), padding)

  settings = (beta, temperature, head.softcap, teacher_head.softcap, chunk)
  out = _chunked(
    settings,
    scaled(hidden, head),
    head.matrix,
    sg(scaled(teacher_hidden, teacher_head)),
    sg(teacher_head.matrix),
  )
  return out[:rows]


def _log_softmax(hidden, head, temperature, softcap):
  """log-probs [C, V] in float32, and ∂z/∂s of the soft-capped, tempered logits."""
  s = jnp.einsum('cd,dv->cv', hidden, head, preferred_element_type=jnp.float32)
  slope = 1 / temperature
  if softcap is not None:
    t = jnp.tanh(s / softcap)
    s, slope = softcap * t, (1 - t * t) / temperature
  return jax.nn.log_softmax(s / temperature), slope


def _kl(log_p, log_q):
  """KL(p‖q) of each row, [C, 1]."""
  return (jnp.exp(log_p) * (log_p - log_q)).sum(-1, keepdims=True)


def _mixture(log_p, log_q, beta):
  return jnp.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)


def _value(log_p, log_q, beta):
  if beta == 0:
    return _kl(log_p, log_q)
  if beta == 1:
    return _kl(log_q, log_p)
  log_m = _mixture(log_p, log_q, beta)
  return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _slope(log_p, log_q, beta):
  """∂D_β/∂z [C, V], z the student's logits."""
  q = jnp.exp(log_q)
  if beta == 0:
    return q - jnp.exp(log_p)
  log_m, weight = log_p, 1.0
  if beta != 1:
    log_m, weight = _mixture(log_p, log_q, beta), 1 - beta
  return weight * q * (log_q - log_m - _kl(log_q, log_m))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(settings, hidden, head, teacher_hidden, teacher_head):
  beta, temperature, softcap, teacher_softcap, chunk = settings

  def tile(_, xs):
    log_q, _ = _log_softmax(xs[0], head, temperature, softcap)
    log_p, _ = _log_softmax(xs[1], teacher_head, temperature, teacher_softcap)
    return None, _value(log_p, log_q, beta)

  _, out = jax.lax.scan(tile, None, _chunks(chunk, hidden, teacher_hidden))
  return out.reshape(-1)


def _forward(settings, *arrays):
  return _chunked(settings, *arrays), arrays


def _backward(settings, arrays, cotangent):
  beta, temperature, softcap, teacher_softcap, chunk = settings
  hidden, head, teacher_hidden, teacher_head = arrays

  def tile(d_head, xs):
    h, teacher, g = xs
    log_q, slope = _log_softmax(h, head, temperature, softcap)
    log_p, _ = _log_softmax(teacher, teacher_head, temperature, teacher_softcap)
    ds = g[:, None] * _slope(log_p, log_q, beta) * slope
    d_hidden, d_head = products(ds, h, head, d_head)
    return d_head, d_hidden.astype(h.dtype)

  zeros = jnp.zeros(head.shape, jnp.float32)
  xs = _chunks(chunk, hidden, teacher_hidden, cotangent)
  d_head, d_hidden = jax.lax.scan(tile, zeros, xs)
  return d_hidden.reshape(hidden.shape), d_head.astype(head.dtype), None, None


def _chunks(chunk, *arrays):
  return tuple(x.reshape(-1, chunk, *x.shape[1:]) for x in arrays)


_chunked.defvjp(_forward, _backward)
