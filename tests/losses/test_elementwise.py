"""What is read off a loss's gradient, against the losses and against its own Jacobian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.losses import dpo, grpo, ppo, sft
from educe.losses.elementwise import couples_rows, elementwise
from educe.types import Batch, Mean, Scores

SHAPE = (4, 6)


def draw():
  rng = np.random.default_rng(0)

  def array(scale=1.0):
    return jnp.float32(rng.normal(size=SHAPE) * scale)

  mask = jnp.float32(rng.random(SHAPE) < 0.7).at[:, 1].set(1)
  batch = Batch(
    jnp.zeros(SHAPE, jnp.int32),
    mask,
    sampler_logp=array() - 2,
    old_logp=array(0.3) - 2,
    ref_logp=array(0.3) - 2,
    advantages=array(),
    returns=array(),
    old_values=array(),
  )
  return Scores(array(0.3) - 2, array() + 2, array(), array() - 4), batch


def mixes(loss, scores, batch) -> bool:
  """Whether the cotangent of log p at a token moves with log p at another one."""

  def cotangent(logp):
    total = lambda logp: loss(scores._replace(logp=logp), batch)[0].total  # noqa: E731
    return jax.grad(total)(logp).reshape(-1)

  flat = jax.jacobian(cotangent)(scores.logp).reshape(cotangent(scores.logp).size, -1)
  return bool(np.abs(flat - jnp.diag(jnp.diag(flat))).max() > 1e-9)


grpo_with = functools.partial(functools.partial, grpo.loss)
LOSSES = {
  'sft': (sft.loss, True),
  'sft smoothed': (functools.partial(sft.loss, label_smoothing=0.1), True),
  'sft by sequence': (functools.partial(sft.loss, aggregate='sequence_mean'), True),
  'grpo': (grpo.loss, True),
  'dual clip': (grpo_with(dual_clip=3.0, clip_high=0.28), True),
  'cispo': (grpo_with(objective='cispo'), True),
  'sapo': (grpo_with(objective='sapo'), True),
  'reinforce': (grpo_with(objective='reinforce', aggregate='sequence_sum'), True),
  'k1, k3': (grpo_with(kl_coef=0.1, entropy_coef=0.01), True),
  'k2': (grpo_with(kl_coef=0.1, kl_estimator='k2', kl_gradient='naive'), True),
  'corrected': (grpo_with(sampler_correction='token_truncate'), True),
  'gspo': (grpo_with(importance='sequence'), False),
  'dpo': (dpo.loss, False),
  'ppo': (ppo.loss, True),
}


@pytest.mark.parametrize('name', LOSSES)
def test_what_each_loss_is(name):
  loss, expected = LOSSES[name]
  scores, batch = draw()
  assert elementwise(loss, scores, batch) is expected
  assert mixes(loss, scores, batch) is not expected


def one(total):
  return lambda scores, batch: (Mean(total(scores.logp), 1.0), {})


MIXED = {
  'a running sum': lambda x: (jnp.cumsum(x, -1) ** 2).sum(),
  'a mean of the batch': lambda x: ((x - x.mean()) ** 2).sum(),
  'its neighbour': lambda x: (x[:, 1:] * x[:, :-1]).sum(),
  'a softmax': lambda x: jax.nn.softmax(x)[:, 0].sum(),
  'a loop': lambda x: jax.lax.scan(lambda c, y: (c * y.sum(), None), 1.0, x)[0],
  'reversed': lambda x: (x * x[:, ::-1]).sum(),
}


@pytest.mark.parametrize('name', LOSSES)
def test_none_of_ours_that_is_elementwise_couples_rows(name):
  loss, is_elementwise = LOSSES[name]
  assert not (is_elementwise and couples_rows(loss, *draw()))


COUPLED = {
  'whitened': lambda a: (a - a.mean()) / a.std(),
  'ranked': lambda a: jnp.argsort(a, 0) * 1.0,
  'less the row before': lambda a: a - jnp.cumsum(a, 0),
  'in a call': jax.jit(lambda a: a / jnp.abs(a).max()),
  # Along another axis, once the rows lie there; and without any axis.
  'transposed': lambda a: a - a.T.mean(1)[None],
  'in groups': lambda a: a - a.reshape(2, 2, 6).mean(1).repeat(2, 0),
  'shifted': lambda a: a - jnp.pad(a[:-1], ((1, 0), (0, 0))),
  'a product': lambda a: jnp.eye(4)[::-1] @ a,
  'reversed': lambda a: a[::-1],
  'a loop': lambda a: jax.lax.scan(lambda c, x: (c + x, c), a[0], a)[1],
  'picked': lambda a: a[a[:, 0].argmax()][None] + 0 * a,
}


@pytest.mark.parametrize('name', COUPLED)
def test_advantages_that_a_loss_makes_of_all_rows_are_found_out(name):
  def loss(scores, batch):
    weights = COUPLED[name](batch.advantages)
    return Mean(-(weights * scores.logp * batch.mask).sum(), batch.mask.sum()), {}

  scores, batch = draw()
  assert elementwise(loss, scores, batch)
  assert couples_rows(loss, scores, batch)


BY_COUNT = {
  'a mean': lambda x: x.mean(),
  'a mean over rows': lambda x: x.sum() / len(x),
  'in a call': lambda x: jax.jit(jnp.mean)(x),
  'by number': lambda x: (x * jnp.arange(len(x))[:, None]).sum(),
  'of its own': lambda x: (x * np.ones((4, 1))).sum(),
}


@pytest.mark.parametrize('name', BY_COUNT)
def test_a_loss_that_counts_rows_is_found_out(name):
  """A device has fewer: its cotangents would be larger, by as many as there are."""
  scores, batch = draw()
  assert elementwise(one(BY_COUNT[name]), scores, batch)
  assert couples_rows(one(BY_COUNT[name]), scores, batch)


WITHIN = {
  'whitened': lambda a: (a - a.mean(1, keepdims=True)) / a.std(1, keepdims=True),
  'summed': lambda a: jnp.cumsum(a[:, ::-1], 1),
  'ranked': lambda a: jnp.argsort(a, 1) * 1.0,
  'shifted': lambda a: jnp.pad(a[:, 1:], ((0, 0), (0, 1))),
  'discounted': lambda a: a * 0.9 ** jnp.arange(6)[None],
}


@pytest.mark.parametrize('name', WITHIN)
def test_advantages_that_a_loss_makes_row_by_row_couple_none(name):
  """Or a step on a mesh would make its logits twice for nothing."""

  def loss(scores, batch):
    weights = WITHIN[name](batch.advantages)
    return Mean(-(weights * scores.logp * batch.mask).sum(), batch.mask.sum()), {}

  assert not couples_rows(loss, *draw())


@pytest.mark.parametrize('name', MIXED)
def test_a_loss_of_ones_own_that_mixes_tokens_is_found_out(name):
  scores, batch = draw()
  assert not elementwise(one(MIXED[name]), scores, batch)


def test_what_is_only_reported_may_mix_tokens():
  def loss(scores, batch):
    spread = Mean(scores.logp.std(), 1.0)
    return Mean(jax.jit(jnp.tanh)(scores.logp).sum(), 1.0), {'spread': spread}

  assert elementwise(loss, *draw())
