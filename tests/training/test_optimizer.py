import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from educe.models import parts
from educe.training import optimizer

PARAMS = {
  'embedding': jnp.full((3, 2), 2.0),
  'layers': {'norm': jnp.full((2,), 3.0), 'w': jnp.full((2, 2), 4.0)},
}
GRADS = jax.tree.map(lambda p: p * 0.5, PARAMS)


def apply(tx, params, *gradients):
  state = tx.init(params)
  for grads in gradients:
    trained, frozen = tx.split(params)
    updates, state = tx.update(tx.split(grads)[0], state, trained)
    params = parts.over(frozen, optax.apply_updates(trained, updates))
  return params, state


def test_adamw_is_optax_adamw():
  tx = optimizer.make(
    steps=10, learning_rate=0.1, schedule='constant', clip_norm=None, weight_decay=0.0
  )
  got, _ = apply(tx, PARAMS, GRADS, GRADS)
  plain = optax.adamw(0.1, weight_decay=0.0)
  state, want = plain.init(PARAMS), PARAMS
  for _ in range(2):
    updates, state = plain.update(GRADS, state, want)
    want = optax.apply_updates(want, updates)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize('name', ['sgd', 'lion', 'adafactor', 'adam'])
def test_any_optimizer_of_optax_by_name(name):
  tx = optimizer.make(steps=10, name=name, learning_rate=0.1)
  got, _ = apply(tx, PARAMS, GRADS)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a < b).all(), got, PARAMS)))


def test_clip_bounds_the_global_norm_and_reports_it_unclipped():
  tx = optimizer.make(
    steps=10, name='sgd', learning_rate=1.0, schedule='constant', clip_norm=0.5
  )
  got, state = apply(tx, PARAMS, GRADS)
  moved = optax.tree.norm(jax.tree.map(jnp.subtract, got, PARAMS))
  np.testing.assert_allclose(moved, 0.5, rtol=1e-6)
  np.testing.assert_allclose(state.grad_norm, optax.tree.norm(GRADS), rtol=1e-6)


def test_weight_decay_spares_what_no_decay_names():
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  tx = optimizer.make(
    steps=10,
    learning_rate=0.1,
    schedule='constant',
    weight_decay=0.5,
    no_decay=('norm', 'embed'),
  )
  got, _ = apply(tx, PARAMS, zeros)
  np.testing.assert_array_equal(got['embedding'], PARAMS['embedding'])
  np.testing.assert_array_equal(got['layers']['norm'], PARAMS['layers']['norm'])
  np.testing.assert_allclose(got['layers']['w'], 4.0 * (1 - 0.1 * 0.5), rtol=1e-6)


def test_frozen_params_stay_and_hold_no_state():
  tx = optimizer.make(steps=10, learning_rate=0.1, freeze=('embedding',))
  got, state = apply(tx, PARAMS, GRADS)
  np.testing.assert_array_equal(got['embedding'], PARAMS['embedding'])
  assert (got['layers']['w'] != PARAMS['layers']['w']).all()
  assert not any(x.shape == (3, 2) for x in jax.tree.leaves(state))
  trained, frozen = tx.split(PARAMS)
  assert len(jax.tree.leaves(trained)) == 2
  assert [x.shape for x in jax.tree.leaves(frozen)] == [(3, 2)]


def test_a_non_finite_gradient_changes_nothing_but_the_counters():
  tx = optimizer.make(steps=10, learning_rate=0.1)
  bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), GRADS)
  clean, state_clean = apply(tx, PARAMS, GRADS)
  got, state = apply(tx, PARAMS, GRADS, bad, bad)
  jax.tree.map(np.testing.assert_array_equal, got, clean)
  jax.tree.map(np.testing.assert_array_equal, state.inner, state_clean.inner)
  assert (state.skipped, state.skipped_in_a_row) == (2, 2)
  _, state = apply(tx, PARAMS, bad, GRADS)
  assert (state.skipped, state.skipped_in_a_row) == (1, 0)


@pytest.mark.parametrize(
  ('schedule', 'want'),
  [
    ('constant', [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
    ('linear', [0.25, 0.5, 0.75, 1.0, 0.7, 0.4]),
    ('cosine', [0.25, 0.5, 0.75, 1.0, 0.775, 0.325]),
  ],
)
def test_schedules_by_hand(schedule, want):
  """3 warm-up updates of 6, then decay over the other 3 down to a tenth."""
  tx = optimizer.make(
    steps=6, learning_rate=1.0, schedule=schedule, warmup_steps=3, final_fraction=0.1
  )
  np.testing.assert_allclose([tx.learning_rate(i) for i in range(6)], want, rtol=1e-6)


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    ({'name': 'adamwww'}, "name='adamwww': Optax has no such optimizer"),
    ({'name': 'chain'}, "name='chain': Optax has no such optimizer"),
    (
      {'beta1': 0.9},
      r"optimizer.beta1=0.9: adamw takes no 'beta1'; choose.*'clip_norm'",
    ),
    (
      {'learning_rat': 1},
      r"learning_rat=1: adamw takes no.*did you mean 'learning_rate'",
    ),
    ({'clipnorm': 1.0}, "clipnorm=1.0: adamw takes no.*did you mean 'clip_norm'"),
    ({'schedule': 'cosin'}, "schedule='cosin' is not one of"),
    ({'warmup_steps': 11}, 'warmup_steps=11 exceeds steps=10; lower it'),
    ({'learning_rate': -1}, 'optimizer.learning_rate=-1 must be more than 0'),
    ({'learning_rate': 0.0}, 'learning_rate=0.0 must be more than 0'),
    ({'learning_rate': math.nan}, 'learning_rate=nan must be more than 0'),
    ({'learning_rate': math.inf}, 'learning_rate=inf must be more than 0, and finite'),
    ({'clip_norm': 0.0}, 'clip_norm=0.0 must be more than 0'),
    ({'clip_norm': -1.0}, 'clip_norm=-1.0 must be more than 0'),
    ({'warmup_steps': -1}, 'warmup_steps=-1 must be at least 0'),
    ({'final_fraction': 1.5}, 'final_fraction=1.5 must be from 0 to 1'),
    ({'b2': 1.0}, 'b2=1.0 must be at least 0 and less than 1'),
    ({'b1': -0.1}, 'b1=-0.1 must be at least 0'),
    ({'name': 'sgd', 'momentum': 1.0}, 'momentum=1.0 must be'),
    ({'weight_decay': -0.1}, 'weight_decay=-0.1 must be at least 0'),
    ({'eps': -1e-8}, 'eps=-1e-08 must be at least 0'),
  ],
)
def test_bad_settings_are_refused(bad, message):
  with pytest.raises(ValueError, match=message):
    optimizer.make(**{'steps': 10, 'learning_rate': 0.1} | bad)


@pytest.mark.parametrize(
  'edge', [{'final_fraction': 1.0}, {'b1': 0.0}, {'clip_norm': None}, {'eps': 0.0}]
)
def test_numbers_at_the_edge_of_what_makes_sense_pass(edge):
  tx = optimizer.make(10, learning_rate=0.1, **edge)
  assert float(tx.learning_rate(0)) == pytest.approx(0.1)


@pytest.mark.parametrize(
  ('freeze', 'count'), [(('emb', 'lay'), 'every'), (('x',), 'no')]
)
def test_freezing_all_or_nothing_is_a_mistake(freeze, count):
  tx = optimizer.make(steps=10, learning_rate=0.1, freeze=freeze)
  with pytest.raises(ValueError, match=f'{count} param'):
    tx.init(PARAMS)


def test_moments_are_float32_whatever_the_params():
  params = {'w': jnp.ones((3, 2), jnp.bfloat16)}
  tx = optimizer.make(10, learning_rate=0.1)
  state = tx.init(params)
  _, new = tx.update(params, state, params)
  dtypes = [[x.dtype for x in jax.tree.leaves(s)] for s in (state, new)]
  assert dtypes[0] == dtypes[1]
  assert jnp.bfloat16 not in dtypes[0]
