import jax.numpy as jnp
import numpy as np
import pytest

from educe.losses.aggregate import aggregate

X = jnp.array([[9.0, 1.0, 3.0], [9.0, 8.0, 9.0], [9.0, 9.0, 9.0]])
MASK = jnp.array([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


def test_token_mean_counts_tokens():
  mean = aggregate(X, MASK, 'token_mean')
  assert (mean.total, mean.count, mean.value) == (12.0, 3.0, 4.0)


def test_sequence_mean_counts_rows_that_have_tokens():
  mean = aggregate(X, MASK, 'sequence_mean')
  assert (mean.total, mean.count, mean.value) == (10.0, 2.0, 5.0)


def test_a_batch_without_trained_tokens_sums_to_zero():
  for how in ('token_mean', 'sequence_mean'):
    mean = aggregate(X, jnp.zeros_like(MASK), how)
    assert (mean.total, mean.count) == (0.0, 0.0)


def test_right_padding_changes_nothing():
  wide = jnp.pad(X, ((0, 0), (0, 4)), constant_values=jnp.nan)
  for how in ('token_mean', 'sequence_mean'):
    padded = aggregate(wide, jnp.pad(MASK, ((0, 0), (0, 4))), how)
    np.testing.assert_array_equal(padded, aggregate(X, MASK, how))


def test_an_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match=r"'mean' is not one of \['sequence_mean'"):
    aggregate(X, MASK, 'mean')
