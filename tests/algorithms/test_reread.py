"""Log-probs read again: every row once, in order, whatever the parts."""

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe.algorithms.reread import reader


@pytest.mark.parametrize('size', [1, 2, 3, 8])
@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_every_row_is_read_in_parts_of_any_size(size, temperature):
  model, params = toy.model()
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 8, (5, 6)).astype(np.int32)
  mask = (rng.random((5, 6)) < 0.6).astype(np.float32)
  mask[:, 0] = 0
  shapes = []

  def place(batch):
    shapes.append(batch.tokens.shape)
    return batch

  got = reader(model, place, size=size, temperature=temperature)(params, tokens, mask)
  want = np.zeros((5, 6))
  for row in range(5):
    for t in range(1, 6):
      logits = toy.logits(params, tokens[row, :t]) / temperature
      want[row, t] = toy.log_softmax(logits)[tokens[row, t]] * mask[row, t]
  # float32 rounds at 6e-8, on log-probs of up to 10 nats.
  np.testing.assert_allclose(got, want, atol=3e-6)
  assert set(shapes) == {(size, 6)}  # one program


def test_what_a_model_says_of_padding_is_nothing():
  model, params = toy.model()
  tokens = np.array([[1, 2, 99]], np.int32)  # outside the vocabulary: NaN
  mask = np.array([[0, 1, 0]], np.float32)
  read = reader(model, lambda x: x, size=1, temperature=1.0)
  got = read(jnp.asarray(params), tokens, mask)
  assert got[0, 1] < 0
  assert got[0, [0, 2]].tolist() == [0, 0]
