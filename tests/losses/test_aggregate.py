import jax.numpy as jnp
import numpy as np
import pytest

from educe.losses.aggregate import AGGREGATES, aggregate

X = jnp.array([[9.0, 1.0, 3.0], [9.0, 8.0, 9.0], [9.0, 9.0, 9.0]])
MASK = jnp.array([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


def test_token_mean_counts_tokens():
  mean = aggregate(X, MASK, 'token_mean')
  assert (mean.total, mean.count, mean.value) == (12.0, 3.0, 4.0)


def test_sequence_mean_counts_rows_that_have_tokens():
  mean = aggregate(X, MASK, 'sequence_mean')
  assert (mean.total, mean.count, mean.value) == (10.0, 2.0, 5.0)


def test_sequence_sum_counts_rows_that_have_tokens():
  mean = aggregate(X, MASK, 'sequence_sum')
  assert (mean.total, mean.count, mean.value) == (12.0, 2.0, 6.0)


def test_constant_divides_by_rows_and_the_configured_length():
  mean = aggregate(X, MASK, 'constant', 8)
  assert (mean.total, mean.count, mean.value) == (12.0, 24.0, 0.5)


@pytest.mark.parametrize('length', [None, 0, -4])
def test_constant_asks_for_its_length(length):
  with pytest.raises(ValueError, match=f'max_completion_length={length}: give'):
    aggregate(X, MASK, 'constant', length)


@pytest.mark.parametrize('how', AGGREGATES)
def test_a_batch_without_trained_tokens_sums_to_zero(how):
  mean = aggregate(X, jnp.zeros_like(MASK), how, 8)
  assert mean.total == 0.0
  assert mean.count == (24.0 if how == 'constant' else 0.0)


@pytest.mark.parametrize('how', AGGREGATES)
def test_right_padding_changes_nothing(how):
  wide = jnp.pad(X, ((0, 0), (0, 4)), constant_values=jnp.nan)
  padded = aggregate(wide, jnp.pad(MASK, ((0, 0), (0, 4))), how, 8)
  np.testing.assert_array_equal(padded, aggregate(X, MASK, how, 8))


@pytest.mark.parametrize('how', AGGREGATES)
def test_any_split_of_the_rows_adds_up_to_the_whole(how):
  whole = aggregate(X, MASK, how, 8)
  parts = [aggregate(X[i : i + 1], MASK[i : i + 1], how, 8) for i in range(3)]
  total = parts[0] + parts[1] + parts[2]
  assert (total.total, total.count) == (whole.total, whole.count)


def test_an_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match=r"'mean' is not one of \['constant'"):
    aggregate(X, MASK, 'mean')
