"""Every output's log-prob, against one forward pass of each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe.losses.logprobs import score
from educe.measurement.enumeration import distribution, sequence_logp
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


@pytest.mark.parametrize('batch_size', [1, 100])
def test_anything_else_is_what_the_other_tokens_have(batch_size):
  """Spelled with every token, the outputs that hold one that is no symbol."""
  model, params = toy.model(vocabulary=8, softcap=3.0)
  p = distribution(model, params, PROMPTS, SYMBOLS, 3, batch_size=batch_size)
  assert p.shape == (3, 28)
  every = np.exp(sequence_logp(model, params, PROMPTS, np.arange(8), 3))
  outputs = np.array(list(itertools.product(range(8), repeat=3)))
  inside = np.isin(outputs, SYMBOLS).all(-1)
  np.testing.assert_allclose(p[:, :-1], every[:, inside], rtol=1e-5)
  np.testing.assert_allclose(p[:, -1], every[:, ~inside].sum(-1), rtol=1e-5)
  np.testing.assert_allclose(p.sum(-1), 1, atol=1e-12)


def test_anything_else_can_be_very_little_or_nothing():
  """1 − Σ would be the rounding of float32."""
  model, params = toy.model(vocabulary=8, scale=12.0)
  order = np.argsort(sequence_logp(model, params, PROMPTS[:1], np.arange(8), 1)[0])
  p = distribution(model, params, PROMPTS[:1], order[1:], 1)
  least = np.exp(sequence_logp(model, params, PROMPTS[:1], order[:1], 1))
  assert 0 < least[0, 0] < 1e-9
  np.testing.assert_allclose(p[0, -1], least[0, 0], rtol=1e-5)
  assert (distribution(model, params, PROMPTS, np.arange(8), 2)[:, -1] == 0).all()


@pytest.mark.parametrize(
  'wrong', [dict(length=0), dict(batch_size=0), dict(temperature=0.0)]
)
def test_numbers_that_cannot_be(wrong):
  model, params = toy.model()
  with pytest.raises(ValueError, match='enumeration: '):
    sequence_logp(model, params, PROMPTS, SYMBOLS, **{'length': 2, **wrong})
