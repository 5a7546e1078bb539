"""score against a float64 forward pass: alignment, padding, scale, temperature."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe import sharding
from educe.kernels import dispatch
from educe.losses import grpo, logprobs, sft
from educe.losses.logprobs import lose, score
from educe.types import Batch, Head, Mean, Model


def bigram(vocab=7, scale=1.0, softcap=None):
  """The smallest language model: states are rows of a table, the head is a matrix."""

  def hidden(params, tokens, positions=None, segments=None):
    return params['table'][tokens], {}

  def head(params):
    return Head(params['head'], scale, softcap)

  return Model(None, hidden, head, None, None, None, None)


def draw(vocab=7, width=5):
  rng = np.random.default_rng(0)
  params = {
    'table': jnp.float32(rng.normal(size=(vocab, width))),
    'head': jnp.float32(rng.normal(size=(width, vocab))),
  }
  tokens = jnp.int32(rng.integers(0, vocab, (3, 6)))
  return params, Batch(tokens, jnp.ones((3, 6)))


@pytest.mark.parametrize(('scale', 'softcap'), [(1.0, None), (0.5, 2.0)])
@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_logp_is_aligned_to_the_token_it_scores(scale, softcap, temperature):
  params, batch = draw()
  scores = score(bigram(7, scale, softcap), params, batch, temperature=temperature)
  table, head = np.float64(params['table']), np.float64(params['head'])
  for b, row in enumerate(np.asarray(batch.tokens)):
    assert scores.logp[b, 0] == scores.entropy[b, 0] == 0
    for t in range(1, 6):
      z = scale * table[row[t - 1]] @ head  # the state *before* token t scores it
      z = (softcap * np.tanh(z / softcap) if softcap else z) / temperature
      log_p = z - np.log(np.exp(z).sum())
      entropy = -(np.exp(log_p) * log_p).sum()
      np.testing.assert_allclose(scores.logp[b, t], log_p[row[t]], atol=2e-6)
      np.testing.assert_allclose(scores.entropy[b, t], entropy, atol=2e-6)
      np.testing.assert_allclose(scores.mean_logp[b, t], log_p.mean(), atol=2e-6)


def test_right_padding_changes_nothing():
  params, batch = draw()
  wide = Batch(*(jnp.pad(x, ((0, 0), (0, 5))) for x in batch[:2]))
  a, b = (score(bigram(), params, x).logp for x in (batch, wide))
  np.testing.assert_allclose(a, b[:, :6], atol=1e-6)


def test_a_token_outside_the_vocabulary_scores_nan():
  params, batch = draw()
  bad = batch._replace(tokens=batch.tokens.at[1, 3].set(7))
  logp = score(bigram(), params, bad).logp
  assert np.isnan(logp[1, 3])
  assert np.isfinite(logp[jnp.array([0, 2])]).all()


def test_an_auxiliary_loss_is_not_dropped_in_silence():
  params, batch = draw()
  model = bigram()
  aux = {'router': Mean(3.0, 2.0)}
  router = model._replace(hidden=lambda *a: (model.hidden(*a)[0], aux))
  assert score(router, params, batch).aux == aux
  assert lose(router, params, batch, sft.loss)[2] == aux
  assert score(model, params, batch).aux is None


def test_gradient_reaches_table_and_head():
  params, batch = draw()
  gradient = jax.grad(lambda p: score(bigram(), p, batch).logp.sum())(params)
  assert all(np.abs(g).max() > 0 for g in gradient.values())


def test_masked_tokens_are_not_scored():
  params, batch = draw()
  half = batch._replace(mask=batch.mask.at[:, :3].set(0))
  whole, cut = (score(bigram(), params, x) for x in (batch, half))
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
    assert (b[:, :3] == 0).all()
    np.testing.assert_allclose(a[:, 3:], b[:, 3:], atol=1e-6)


@pytest.mark.parametrize('importance', ['token', 'sequence'])
@pytest.mark.parametrize('scale', [1.0, 0.5])
def test_lose_is_the_loss_of_the_scores(importance, scale):
  """Value, metrics and gradient, in one pass over the logits or in two."""
  params, batch = draw()
  rng = np.random.default_rng(3)
  batch = batch._replace(
    mask=jnp.float32(rng.random((3, 6)) < 0.7),
    old_logp=jnp.float32(rng.normal(size=(3, 6)) - 2),
    advantages=jnp.float32(rng.normal(size=(3, 6))),
  )
  model = bigram(scale=scale, softcap=5.0)

  def loss(scores, batch):
    return grpo.loss(scores, batch, importance=importance, entropy_coef=0.1)

  def plain(params):
    mean, metrics = loss(score(model, params, batch, temperature=0.7), batch)
    return mean.total / mean.count, (mean, metrics)  # as a step does

  def fused(params):
    mean, metrics, _ = lose(model, params, batch, loss, temperature=0.7)
    return mean.total / mean.count, (mean, metrics)  # as a step does

  (want, want_aux), (got, got_aux) = (
    jax.jit(jax.grad(f, has_aux=True))(params) for f in (plain, fused)
  )
  for a, b in zip(jax.tree.leaves(got_aux), jax.tree.leaves(want_aux), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  for name, right in want.items():
    assert np.abs(right).max() > 0
    np.testing.assert_allclose(got[name], right, rtol=1e-5, atol=1e-6)


def test_one_pass_makes_the_logits_once():
  """Products with the head, counted: three where two passes take four."""
  params, batch = draw()

  def products(loss):
    def total(params):
      return lose(bigram(), params, batch, loss)[0].total

    text = str(jax.make_jaxpr(jax.grad(total))(params))
    return text.count('dot_general')

  assert products(sft.loss) == 3

  def by_sequence(scores, batch):
    return sft.loss(scores._replace(logp=scores.logp.cumsum(-1)), batch)

  assert products(by_sequence) == 4


def test_what_was_measured_to_be_better_runs_instead_of_one_pass(monkeypatch):
  params, batch = draw()
  where = ('logprob', dispatch.device_kind())
  best = dispatch.Measurement(('vocabulary', 'chunked'), 'a file')
  monkeypatch.setitem(dispatch.MEASURED, where, best)

  def total(params):
    return lose(bigram(), params, batch, sft.loss)[0].total

  # Two passes over the logits: four products with the head, not three.
  assert str(jax.make_jaxpr(jax.grad(total))(params)).count('dot_general') == 4


def test_rows_that_share_a_prompt_are_split_as_the_prompts_are(mesh_of):
  """Eight rows divide by four devices; their two prompts do not, nor do those rows."""
  params, _ = draw()
  batch = Batch(jnp.zeros((8, 6), jnp.int32), jnp.ones((8, 6)))
  shared = batch._replace(prefix=jnp.zeros((2, 3), jnp.int32))
  with sharding.using(mesh_of(4)):
    head = Head(params['head'])
    assert logprobs._split(batch, head)[1:] == (sharding.ROWS, None, None, None)
    assert logprobs._split(shared, head) is None


@pytest.mark.parametrize('lossy', [False, True])
def test_an_architecture_names_the_implementation(lossy):
  """It runs, also where one pass would have done; and only it."""
  params, batch = draw()
  model = bigram()._replace(architecture=types.SimpleNamespace(logprob='pallas_tpu'))

  def total(params):
    if lossy:
      return lose(model, params, batch, sft.loss)[0].total
    return score(model, params, batch).logp.sum()

  assert 'logprob_moments' in str(jax.make_jaxpr(total)(params))
  assert 'logprob_d_head' in str(jax.make_jaxpr(jax.grad(total))(params))


def test_what_counts_is_read_for_a_later_trained_token_of_its_row_and_document():
  mask = np.array([[0, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1, 0]])
  segments = np.array([[1] * 7, [1] * 7, [1, 1, 1, 2, 2, 2, 0]])
  batch = Batch(jnp.zeros((3, 7), jnp.int32), jnp.asarray(mask, jnp.float32))
  plain = [[1, 1, 1, 1, 0, 0, 0], [0] * 7, [1, 1, 1, 1, 1, 0, 0]]
  np.testing.assert_array_equal(logprobs._real(batch), np.array(plain, bool))
  packed = [plain[0], plain[1], [1, 1, 0, 1, 1, 0, 0]]
  found = logprobs._real(batch._replace(segments=jnp.asarray(segments)))
  np.testing.assert_array_equal(found, np.array(packed, bool))
