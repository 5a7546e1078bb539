"""Random initialisation from a preset."""

import jax
import jax.numpy as jnp
import pytest

from educe.models import scratch


def test_a_seed_gives_the_same_params_and_dtypes_are_as_asked():
  model, params = scratch.load(preset='debug', seed=3, param_dtype='bfloat16')
  _, again = scratch.load(preset='debug', seed=3, param_dtype='bfloat16')
  _, other = scratch.load(preset='debug', seed=4, param_dtype='bfloat16')
  same = jax.tree.map(lambda a, b: bool((a == b).all()), params, again)
  assert all(jax.tree.leaves(same))
  assert bool((params['head'] != other['head']).any())
  assert params['head'].dtype == jnp.bfloat16
  assert model.architecture.param_dtype == 'bfloat16'


def test_an_unknown_preset_is_refused():
  with pytest.raises(ValueError, match='no architecture is called'):
    scratch.load(preset='none')
