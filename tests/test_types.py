import jax
import numpy as np

from educe.types import Algorithm, Batch, Max, Mean, TrainState


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


def test_a_train_state_is_five_fields_for_ever_and_one_may_be_absent():
  """Checkpoints of every age hold exactly these; without a reference, the first four."""
  assert TrainState._fields == ('step', 'params', 'opt_state', 'key', 'reference')
  assert len(jax.tree.leaves(TrainState(0, {'w': 1}, {'m': 2}, 3))) == 4


def test_a_max_adds_by_taking_the_larger():
  assert (Max(2.0) + Max(5.0)).value == (Max(5.0) + Max(2.0)).value == 5


def test_an_algorithm_says_how_many_rows_and_keeps_no_reference_unless_asked():
  method = Algorithm(None, None, None, 8)
  assert (method.rows, method.temperature, method.reference_every) == (8, 1.0, None)
