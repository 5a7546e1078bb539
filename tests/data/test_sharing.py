"""A group's prompt once: what moves where, and that nothing changes for anybody."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.data import sharing
from educe.losses import dpo, grpo
from educe.losses.logprobs import lose, score
from educe.models import policy, value_head
from educe.models.architecture import Architecture
from educe.types import Batch

LENGTH = 64


def rows(prompts=(40, 23), group=4, seed=0):
  """Groups of completions of 3 to 9 tokens behind prompts of these lengths."""
  rng = np.random.default_rng(seed)
  shape = (len(prompts) * group, LENGTH)
  tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
  for index, length in enumerate(prompts):
    prompt = rng.integers(1, 50, length)
    for row in range(index * group, (index + 1) * group):
      end = length + rng.integers(3, 10)
      tokens[row, :length] = prompt
      tokens[row, length:end] = rng.integers(1, 50, end - length)
      mask[row, length:end] = 1
  draw = lambda: np.float32(rng.normal(size=shape))  # noqa: E731
  return Batch(
    tokens, mask, old_logp=draw() - 4, advantages=draw(), ref_logp=draw() - 4
  )


def model(**changes):
  sizes = dict(
    vocab_size=50,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=64,
    max_length=LENGTH,
    tied=True,
  )
  made = policy.build(Architecture(**{**sizes, **changes}))
  return made, made.init(jax.random.key(0))


def test_a_prompt_is_there_once():
  batch = rows()
  shared = sharing.share(batch, 4)
  assert shared.prefix.shape == (2, 48)  # buckets of 16
  assert shared.tokens.shape == (8, 17)  # and the last one, which is not read
  for row in range(8):
    prompt, start = shared.prefix[row // 4], 39 if row < 4 else 22
    assert (prompt >= 0).sum() == start
    np.testing.assert_array_equal(prompt[:start], batch.tokens[row, :start])
    span = batch.tokens[row, start : start + 17]
    np.testing.assert_array_equal(shared.tokens[row, : len(span)], span)
    assert shared.positions[row].tolist() == list(range(start, start + 17))
  assert shared.mask.sum() == batch.mask.sum()
  assert (shared.mask[:, 0] == 0).all()
  trained = [x.old_logp[x.mask > 0] for x in (batch, shared)]
  np.testing.assert_array_equal(*trained)


@pytest.mark.parametrize('completion', [15, 16, 17])
@pytest.mark.parametrize('prompt', [32, 33, 34])
def test_nothing_is_lost_at_the_edge_of_a_width(prompt, completion):
  """Widths are multiples of 16 here: of what just fits one, and is one more than fits."""
  tokens = np.tile(np.arange(1, LENGTH + 1, dtype=np.int32), (4, 1))
  tokens[:, prompt:] += 100 * np.arange(4)[:, None]
  mask = np.zeros(tokens.shape, np.float32)
  mask[:, prompt : prompt + completion] = 1
  shared = sharing.share(Batch(tokens, mask), 4)
  assert shared.prefix.shape == (1, 32 if prompt <= 33 else 48)
  assert shared.tokens.shape == (4, 17 if completion <= 16 else 33)
  for row in range(4):
    start, end = prompt - 1, prompt + completion
    again = [*shared.prefix[0][:start], *shared.tokens[row, : end - start]]
    assert again == tokens[row, :end].tolist()
    assert shared.mask[row, : end - start].tolist() == mask[row, start:end].tolist()


def test_a_batch_whose_parts_would_cut_a_group_stays():
  batch = rows()  # 2 groups of 4
  assert sharing.share(batch, 4, 2).prefix is not None
  assert sharing.share(batch, 4, 4).prefix is None


def test_pairs_of_all_lengths_make_few_programs():
  rng = np.random.default_rng(0)
  shapes, tokens, whole = set(), 0, 0
  for _ in range(100):
    prompts = np.clip(rng.lognormal(5, 0.8, 4), 8, 700).astype(int)
    batch = Batch(*(np.zeros((8, 1024), kind) for kind in (np.int32, np.float32)))
    for row in range(8):
      length = prompts[row // 2]
      end = min(length + int(np.clip(rng.lognormal(4.5, 0.8), 4, 300)), 1024)
      batch.tokens[row, :length] = row // 2 + 1
      batch.tokens[row, length:end] = rng.integers(9, 99, end - length)
      batch.mask[row, length:end] = 1
    shared = sharing.share(batch, 2)
    prefix = np.zeros((4, 0)) if shared.prefix is None else shared.prefix
    shapes.add((prefix.shape, shared.tokens.shape))
    tokens, whole = tokens + prefix.size + shared.tokens.size, whole + batch.tokens.size
  assert len(shapes) <= 10
  assert tokens < 0.75 * whole


def test_what_comes_out_goes_back_to_its_place():
  batch = rows()
  shared = sharing.share(batch, 4)
  back = sharing.restore(shared.old_logp * shared.mask, shared, LENGTH)
  np.testing.assert_array_equal(back, batch.old_logp * batch.mask)
  assert sharing.restore(batch.mask, batch, LENGTH) is batch.mask
  # A value is said of every token: not of those in the prefix, nor of column 0.
  said = sharing.restore(np.ones_like(shared.mask), shared, LENGTH)
  for row in range(8):
    start = 39 if row < 4 else 22
    assert np.flatnonzero(said[row]).tolist() == list(
      range(start + 1, min(start + 17, LENGTH))
    )


def test_completions_that_go_on_alike_stay_apart():
  """Two equal completions: their tokens are trained on, each in its own row."""
  batch = rows(group=2)
  for name in ('tokens', 'mask'):
    getattr(batch, name)[1] = getattr(batch, name)[0]
  assert sharing.share(batch, 2).mask.sum() == batch.mask.sum()


@pytest.mark.parametrize('group', [1, 3])
def test_rows_that_share_nothing_stay(group):
  assert sharing.share(rows(), group) is not None
  assert sharing.share(rows(), group).prefix is None


def test_it_must_be_worth_it():
  batch = rows(prompts=(2, 3))
  batch.mask[:, 3:] = 1  # completions to the end of their rows
  assert sharing.share(batch, 4).prefix is None


def test_rows_whose_positions_are_told_keep_them():
  """Packed; or shared before, with positions that are not those of their columns."""
  batch, where = rows(), np.tile(np.arange(LENGTH), (8, 1))
  for told in (dict(segments=np.ones((8, LENGTH))), dict(positions=where + 3)):
    assert sharing.share(batch._replace(**told), 4).prefix is None
  once = sharing.share(rows(prompts=(33, 20)), 4)
  assert sharing.share(once, 4) is once


LOSSES = {
  'grpo': functools.partial(grpo.loss, kl_coef=0.1, entropy_coef=0.01),
  'gspo': functools.partial(grpo.loss, importance='sequence'),
  'dpo': dpo.loss,
}


@pytest.mark.parametrize('changes', [{}, {'layers': 6}, {'remat': 'full'}])
@pytest.mark.parametrize('name', LOSSES)
def test_loss_gradient_and_log_probs_are_those_of_the_rows(name, changes):
  made, params = model(**changes)
  group = 2 if name == 'dpo' else 4
  batch = rows(prompts=(40, 23, 31, 37) if name == 'dpo' else (40, 23), group=group)
  shared = sharing.share(batch, group)
  assert shared.prefix is not None

  def total(params, batch):
    mean, metrics, _ = lose(made, params, batch, LOSSES[name])
    return mean.total / mean.count, metrics

  run = jax.jit(jax.value_and_grad(total, has_aux=True))
  (want, want_metrics), want_grad = run(params, batch)
  (got, got_metrics), got_grad = run(params, shared)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(*map(jax.tree.leaves, (got_metrics, want_metrics)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want_grad))
  for a, b in zip(*map(jax.tree.leaves, (got_grad, want_grad)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * scale)
  read = jax.jit(lambda batch: score(made, params, batch).logp)
  back = sharing.restore(np.asarray(read(shared)), shared, LENGTH)
  np.testing.assert_allclose(back, read(batch), atol=1e-5)


def test_a_model_reads_the_width_that_suits_and_not_the_last_column():
  """Nothing trained on is predicted from it, and 17 columns cost what 32 do."""
  made, params = model()
  shapes = []

  def hidden(params, tokens, positions, segments, prefix):
    shapes.append((tokens.shape, positions.shape, prefix.shape))
    return made.hidden(params, tokens, positions, segments, prefix)

  shared = sharing.share(rows(), 4)
  jax.eval_shape(lambda x: score(made._replace(hidden=hidden), params, x), shared)
  assert shapes == [((8, 16), (8, 16), (2, 48))]


@pytest.mark.parametrize('trunk', value_head.TRUNKS)
def test_values_read_the_prompt_too(trunk):
  made, params = model()
  made, params = value_head.attach(made, params, trunk=trunk, init_std=0.1)
  batch = rows()
  shared = sharing.share(batch, 4)
  read = jax.jit(lambda batch: score(made, params, batch).values)
  want = np.asarray(read(batch)) * batch.mask
  got = np.asarray(read(shared)) * shared.mask
  np.testing.assert_allclose(sharing.restore(got, shared, LENGTH), want, atol=1e-5)
