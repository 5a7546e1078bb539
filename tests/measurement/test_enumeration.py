"""Every output's log-prob, against one forward pass of each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe.losses.logprobs import score
from educe.measurement.enumeration import sequence_logp
from educe.models import policy, presets
from educe.types import Batch

SYMBOLS = np.array([3, 5, 6])
PROMPTS = np.array([[1, 2], [4, 7], [0, 0]])


def brute(model, params, length, temperature=1.0):
  out = []
  for prompt in PROMPTS:
    tokens = np.array(
      [[*prompt, *y] for y in itertools.product(SYMBOLS, repeat=length)]
    )
    batch = Batch(jnp.asarray(tokens), jnp.ones(tokens.shape))
    logp = score(model, params, batch, temperature=temperature).logp
    out.append(np.asarray(logp, np.float64)[:, 2:].sum(-1))
  return np.array(out)


@pytest.mark.parametrize('batch_size', [1, 5, 100])
@pytest.mark.parametrize('length', [1, 2, 4])
def test_a_toy_whose_distribution_is_known(length, batch_size):
  model, params = toy.model(softcap=3.0, scale=1.2)
  got = sequence_logp(
    model, params, PROMPTS, SYMBOLS, length, batch_size=batch_size, temperature=0.7
  )
  assert got.shape == (3, 3**length)
  # float32, four steps of a few nats
  np.testing.assert_allclose(got, brute(model, params, length, 0.7), atol=1e-5)


def test_a_transformer():
  model = policy.build(presets.get('debug'))
  params = model.init(jax.random.key(0))
  got = sequence_logp(model, params, PROMPTS, SYMBOLS, 3)
  np.testing.assert_allclose(got, brute(model, params, 3), atol=2e-5)


def test_all_symbols_together_are_certain():
  model, params = toy.model(vocabulary=8)
  logp = sequence_logp(model, params, PROMPTS, np.arange(8), 3)
  np.testing.assert_allclose(np.exp(logp).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
  'wrong', [dict(length=0), dict(batch_size=0), dict(temperature=0.0)]
)
def test_numbers_that_cannot_be(wrong):
  model, params = toy.model()
  with pytest.raises(ValueError, match='enumeration: '):
    sequence_logp(model, params, PROMPTS, SYMBOLS, **{'length': 2, **wrong})
