import jax
import numpy as np

from educe.types import Batch, Mean, TrainState


def test_means_add_exactly_where_averages_would_not():
  both = Mean(6.0, 3) + Mean(10.0, 1)
  assert (both.total, both.count, both.value) == (16.0, 4, 4.0)
  assert sum([Mean(2.0, 2)] * 3, start=Mean(0.0, 0)) == Mean(6.0, 6)


def test_nouns_are_pytrees_and_absent_fields_have_no_leaves():
  batch = Batch(np.zeros((2, 3)), np.ones((2, 3)))
  assert len(jax.tree.leaves(batch)) == 2
  doubled = jax.tree.map(lambda x: x + 1, batch)
  assert isinstance(doubled, Batch)
  assert doubled.mask.sum() == 12


def test_a_train_state_is_four_fields_for_ever():
  """Checkpoints of every age hold exactly these."""
  assert TrainState._fields == ('step', 'params', 'opt_state', 'key')
