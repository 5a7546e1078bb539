"""SFT against a float64 loop, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.losses import sft
from educe.types import Batch, Scores


def draw(rows=5, length=7, vocab=11, seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(rows, length, vocab))
  tokens = rng.integers(0, vocab, (rows, length))
  mask = (rng.random((rows, length)) < 0.6).astype(np.float32)
  mask[:, 0] = 0
  mask[3] = 0  # a row with nothing to train on
  return logits, tokens, mask


def scores_of(logits, tokens):
  log_p = jax.nn.log_softmax(logits)
  logp = jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
  entropy = -(jnp.exp(log_p) * log_p).sum(-1)
  return Scores(logp, entropy, mean_logp=log_p.mean(-1))


def by_loop(logits, tokens, mask, smoothing, aggregate):
  rows = []
  for b in range(len(tokens)):
    values = []
    for t in range(tokens.shape[1]):
      if mask[b, t]:
        z = logits[b, t]
        log_p = z - np.log(np.exp(z).sum())
        target = np.full(len(z), smoothing / len(z))
        target[tokens[b, t]] += 1 - smoothing
        values.append(-(target * log_p).sum())
    rows.append(values)
  if aggregate == 'token_mean':
    return np.mean([x for values in rows for x in values])
  over_tokens = np.mean if aggregate == 'sequence_mean' else np.sum
  return np.mean([over_tokens(values) for values in rows if values])


@pytest.mark.parametrize('aggregate', ['token_mean', 'sequence_mean', 'sequence_sum'])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_value_equals_the_loop(aggregate, smoothing):
  logits, tokens, mask = draw()
  with jax.enable_x64():
    batch = Batch(jnp.asarray(tokens), jnp.asarray(mask))
    mean, metrics = sft.loss(
      scores_of(jnp.asarray(logits), batch.tokens),
      batch,
      label_smoothing=smoothing,
      aggregate=aggregate,
    )
    value, nll = float(mean.value), float(metrics['nll'].value)
  want = by_loop(logits, tokens, mask, smoothing, aggregate)
  np.testing.assert_allclose(value, want, rtol=1e-12)
  want = by_loop(logits, tokens, mask, 0.0, 'token_mean')
  np.testing.assert_allclose(nll, want, rtol=1e-12)


@pytest.mark.parametrize('aggregate', ['token_mean', 'sequence_mean', 'sequence_sum'])
def test_any_split_of_the_rows_gives_the_same_sum_and_count(aggregate):
  logits, tokens, mask = draw()

  def part(rows):
    batch = Batch(jnp.asarray(tokens[rows]), jnp.asarray(mask[rows]))
    scores = scores_of(jnp.float32(logits[rows]), batch.tokens)
    return sft.loss(scores, batch, aggregate=aggregate)[0]

  whole = part(slice(None))
  parts = [part(slice(0, 1)), part(slice(1, 3)), part(slice(3, 5))]
  np.testing.assert_allclose(sum(p.total for p in parts), whole.total, rtol=1e-6)
  assert sum(p.count for p in parts) == whole.count


def test_masked_tokens_have_no_gradient_even_when_their_score_is_nan():
  logits, tokens, mask = draw()
  batch = Batch(jnp.asarray(tokens), jnp.asarray(mask))
  scores = scores_of(jnp.float32(logits), batch.tokens)

  def value(logp):
    return sft.loss(scores._replace(logp=logp), batch)[0].value

  poisoned = jnp.where(batch.mask > 0, scores.logp, jnp.nan)
  gradient = jax.grad(value)(poisoned)
  np.testing.assert_array_equal(gradient, np.where(mask > 0, -1 / mask.sum(), 0))


def test_entropy_is_averaged_over_trained_tokens_only():
  _, tokens, mask = draw()
  batch = Batch(jnp.asarray(tokens), jnp.asarray(mask))
  entropy = jnp.where(batch.mask > 0, 2.0, 100.0)
  zeros = jnp.zeros(tokens.shape)
  _, metrics = sft.loss(Scores(zeros, entropy, mean_logp=zeros), batch)
  assert metrics['entropy'].value == 2.0


def test_bad_settings_are_refused():
  _, tokens, mask = draw()
  batch = Batch(jnp.asarray(tokens), jnp.asarray(mask))
  zeros = Scores(*[jnp.zeros(tokens.shape)] * 2, mean_logp=jnp.zeros(tokens.shape))
  with pytest.raises(ValueError, match=r'label_smoothing=1.0 must be in \[0, 1\)'):
    sft.loss(zeros, batch, label_smoothing=1.0)
  with pytest.raises(ValueError, match="aggregate='tokenmean' is not one of"):
    sft.loss(zeros, batch, aggregate='tokenmean')
  with pytest.raises(ValueError, match="aggregate='constant' divides by the longest"):
    sft.loss(zeros, batch, aggregate='constant')
  packed = batch._replace(segments=jnp.ones_like(batch.tokens))
  with pytest.raises(ValueError, match=r'sequence_mean.*packing=False'):
    sft.loss(zeros, packed, aggregate='sequence_mean')
