"""score: tokens → per-token log-probs. The only place in educe that shifts tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient as sg

from educe import sharding
from educe.kernels.divergence import divergence
from educe.kernels.logprob import in_one_pass, logprob, one_pass
from educe.losses.elementwise import couples_rows, elementwise
from educe.types import Batch, LossFn, Max, Mean, Model, Params, Scores, Split


def score(
  model: Model,
  params: Params,
  batch: Batch,
  *,
  temperature: float = 1.0,
  teacher: tuple[Model, Params] | None = None,
  beta: float = 0.5,
) -> Scores:
  """Log-probs and entropies of `batch.tokens` under the policy, `[B, T]`, in nats.

  Aligned to the token they score: logp[b, t] = log p(tokens[b, t] | tokens[b, :t]), and 0
  where batch.mask is 0: nobody asked. In a packed row the first token of a document
  is scored from the document before it; its mask is 0 (data/packing.py).

  With a value head, values[b, t] is the value of tokens[b, :t], the state that token t is
  drawn from: None without one. `aux` are the auxiliary losses of a sparse model, of the
  tokens that a trained one comes after: None of a dense one.

  Args:
    temperature: of the distribution scored. To compare with sampler log-probs, pass
      the sampling temperature.
    teacher: another model of the same vocabulary, held constant; with it `divergence` is
      how far its next-token distributions are from the policy's.
    beta: of that divergence (kernels/divergence.py); read with a teacher alone.
  """
  states, flat, head, aux = _read(model, params, batch)
  scores = logprob(
    flat * jnp.asarray(head.scale, flat.dtype),
    head.matrix,
    _asked(batch, batch.tokens),
    needed=_asked(batch, batch.mask) > 0,
    temperature=temperature,
    softcap=head.softcap,
    split=_split(batch, head),
    implementation=_named(model),
  )
  distance = None
  if teacher is not None:
    _, *other, _ = _read(*teacher, batch)
    distance = divergence(flat, head, *other, beta=beta, temperature=temperature)
  values, more = _values(model, params, batch, states)
  return _aligned(batch, scores, values, distance)._replace(aux=aux | more or None)


def lose(
  model: Model, params: Params, batch: Batch, loss: LossFn, *, temperature: float = 1.0
) -> tuple[Mean, dict[str, Mean | Max], dict[str, Mean]]:
  """(*loss(score(…), batch), aux), with the gradient formed while the logits are there.

  Where the loss allows it (elementwise.py) and neither the architecture nor a measurement
  names another way: it saves making them again, a quarter of the head's matmuls.
  """
  if _named(model) or not in_one_pass() or not _allows(loss, model, batch):
    found = score(model, params, batch, temperature=temperature)
    return *loss(found, batch), found.aux or {}
  states, flat, head, aux = _read(model, params, batch)
  scaled = flat * jnp.asarray(head.scale, flat.dtype)
  values, more = _values(model, params, batch, states)

  def cotangents(scores, given):
    batch, values = given
    return jax.grad(lambda x: loss(_aligned(batch, x, values), batch)[0].total)(scores)

  scores, d_hidden, d_matrix = one_pass(
    sg(scaled),
    sg(head.matrix),
    _asked(batch, batch.tokens),
    cotangents,
    (batch, sg(values)),
    needed=_asked(batch, batch.mask) > 0,
    temperature=temperature,
    softcap=head.softcap,
    split=_split(batch, head),
  )
  mean, metrics = loss(_aligned(batch, scores, values), batch)
  total = _given(mean.total, (scaled, head.matrix), (d_hidden, d_matrix))
  return mean._replace(total=total), metrics, aux | more


def _allows(loss: LossFn, model: Model, batch: Batch) -> bool:
  """Whether a token's cotangents follow from its own scores; and, where each device has
  rows of its own, from what is in them."""
  if _parts(batch) > 1:  # a token's mask is on the device of the one before it
    return False
  like: Any = jax.ShapeDtypeStruct(batch.tokens.shape, jnp.float32)
  scores = Scores(like, like, like if model.values else None, mean_logp=like)
  split = sharding.split(_rows(batch), 1, 'vocab')
  coupled = split and split.rows and couples_rows(loss, scores, batch)
  return elementwise(loss, scores, batch) and not coupled


def _named(model: Model) -> str | None:
  """The implementation that the architecture names, if it does."""
  name = getattr(model.architecture, 'logprob', 'auto')
  return None if name == 'auto' else name


def _rows(batch: Batch) -> int:
  """How many rows are read: those that share a prompt are one."""
  return len(batch.tokens if batch.prefix is None else batch.prefix)


def _split(batch: Batch, head) -> Split | None:
  """Of tokens, vocabulary, and the head's width."""
  length = batch.tokens.shape[1] if _parts(batch) > 1 else 1
  split = sharding.split(_rows(batch), head.matrix.shape[1], 'vocab', length)
  if split is None:
    return None
  if split.along:  # as `_flat` orders them
    split = split._replace(rows=(split.along, *split.rows), along=None)
  if split.rows:
    stored, _ = sharding.spec(('embed', 'vocab'), head.matrix.shape, split.mesh)
    split = split._replace(stored=stored)
  # Where nothing divides, the compiler finds something to divide.
  return split if split.rows or split.across else None


def _said(model: Model, batch: Batch):
  """What a model is given: of rows that share a prefix, without their last tokens."""
  real = () if model.aux_coefs is None else (_real(batch),)
  if batch.prefix is None:
    said = batch.tokens, batch.positions, batch.segments
    return (*said, None, *real) if real else said
  assert batch.positions is not None, 'a shared batch has positions (data/sharing.py)'
  real = tuple(x[:, :-1] for x in real)
  return batch.tokens[:, :-1], batch.positions[:, :-1], None, batch.prefix, *real


def _real(batch: Batch):
  """`[B, T]`: the tokens that are read for a later one, which is trained on, in the same
  row and document. So padding does not count, nor what a shared row has no room for."""
  length = batch.tokens.shape[1]
  trained = jnp.where(batch.mask > 0, jnp.arange(length), length)
  after = jnp.pad(trained[:, 1:], ((0, 0), (0, 1)), constant_values=length)
  following = jax.lax.cummin(after, axis=1, reverse=True)
  real = following < length
  if batch.segments is None:
    return real
  theirs = jnp.take_along_axis(
    batch.segments, jnp.minimum(following, length - 1), axis=1
  )
  return real & (theirs == batch.segments) & (batch.segments > 0)


def _read(model: Model, params: Params, batch: Batch):
  """All states, those that predict a token `[B·(T−1), D]`, the head, and what `hidden`
  says beside the states."""
  states, aux = model.hidden(params, *_said(model, batch))
  return states, _flat(batch, states), model.head(params), aux


def _values(model: Model, params: Params, batch: Batch, states):
  """(values or None, what they say beside them)."""
  if model.values is None:
    return None, {}
  values, aux = model.values(params, states, *_said(model, batch))
  return _ahead(batch, values), aux


def _ahead(batch: Batch, x):
  """x [B, …] of the tokens that another one follows."""
  return x[:, : batch.tokens.shape[1] - 1]


def _parts(batch: Batch) -> int:
  """How many devices the tokens of a row lie on."""
  parts = sharding.token_parts(sharding.in_use())
  whole = batch.prefix is not None or batch.tokens.shape[1] % parts
  return 1 if whole else parts


def _flat(batch: Batch, x):
  """x [B, T, …] of the tokens that another one follows, one after another.

  Where they lie on several devices, of all tokens: one less would not divide. Part by
  part, so that what is on a device stays together.
  """
  parts = _parts(batch)
  if parts == 1:
    x = _ahead(batch, x)
    return x.reshape(-1, *x.shape[2:])
  B, T, *rest = x.shape
  return jnp.swapaxes(x.reshape(B, parts, T // parts, *rest), 0, 1).reshape(-1, *rest)


def _asked(batch: Batch, x):
  """x [B, T] of what follows each token of `_flat`; 0 behind a row."""
  return _flat(batch, jnp.pad(x[:, 1:], ((0, 0), (0, 1))))


def _rowwise(batch: Batch, x):
  """What `_flat` made of [B, T − 1], as it was."""
  parts, B = _parts(batch), len(batch.tokens)
  if parts > 1:
    x = jnp.swapaxes(x.reshape(parts, B, -1), 0, 1).reshape(B, -1)
  return _ahead(batch, x.reshape(B, -1))


def _aligned(batch: Batch, scores: Scores, values, distance=None) -> Scores:
  """Of the tokens after the first → of all, [B, T]."""

  def align(x):
    if x is None:
      return None
    rows = x if x.ndim == 2 else _rowwise(batch, x)
    return jnp.pad(rows, ((0, 0), (1, 0)))

  return Scores(
    align(scores.logp),
    align(scores.entropy),
    align(values),
    align(scores.mean_logp),
    align(distance),
  )


@jax.custom_vjp
def _given(total: Any, inputs: Any, gradients: Any) -> Any:
  """`total`, whose gradient in `inputs` is known: `gradients`."""
  return total


def _given_forward(total, inputs, gradients):
  return total, gradients


def _given_backward(gradients, cotangent):
  known = jax.tree.map(lambda x: (cotangent * x).astype(x.dtype), gradients)
  return cotangent, known, jax.tree.map(jnp.zeros_like, gradients)


_given.defvjp(_given_forward, _given_backward)
