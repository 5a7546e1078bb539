"""Params by name, and in two parts that make one again."""

import jax
import jax.numpy as jnp
import numpy as np

from educe.models import parts

PARAMS = {
  'embedding': jnp.ones((3, 2)),
  'layers': {'norm': jnp.zeros(2), 'w': jnp.full((2, 2), 4.0)},
  'value': {'head': jnp.ones(2)},
}


def test_a_path_is_the_keys_of_a_leaf():
  names = jax.tree.leaves(parts.paths(PARAMS, lambda path: path))
  assert names == ['embedding', 'layers/norm', 'layers/w', 'value/head']
  assert parts.hit(('^emb', 'x'), 'embedding')
  assert not parts.hit(('^emb',), 'layers/embedding')


def test_two_parts_hold_each_leaf_once_and_are_one_again():
  trained, frozen = parts.split(PARAMS, ('embed', 'norm'))
  assert trained['embedding'] is trained['layers']['norm'] is None
  assert frozen['layers']['w'] is frozen['value']['head'] is None
  assert len(jax.tree.leaves(trained)) == len(jax.tree.leaves(frozen)) == 2
  for one, other in ((trained, frozen), (frozen, trained)):
    whole = parts.over(one, other)
    assert jax.tree.structure(whole) == jax.tree.structure(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, whole, PARAMS)
  everything, nothing = parts.split(PARAMS, ())
  jax.tree.map(np.testing.assert_array_equal, everything, PARAMS)
  assert not jax.tree.leaves(nothing)


def test_a_reference_laid_over_params_is_the_policy_as_it_was():
  """Its leaves first, and no key that it does not have: no critic."""
  before = {name: x for name, x in PARAMS.items() if name != 'value'}
  reference, _ = parts.split(before, ('embed',))
  now = jax.tree.map(lambda x: x + 1, PARAMS)
  whole = parts.over(now, reference)
  assert set(whole) == {'embedding', 'layers'}
  np.testing.assert_array_equal(whole['embedding'], now['embedding'])
  jax.tree.map(np.testing.assert_array_equal, whole['layers'], PARAMS['layers'])
  assert parts.over(now, before) == before  # a whole one is itself
  assert parts.over((1, 2), (None, 3)) == (1, 3)  # whatever the params are
