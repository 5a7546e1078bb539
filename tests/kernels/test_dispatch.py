import pytest

from educe.kernels import dispatch

TABLE = {'reference': min, 'chunked': max}


def test_none_takes_what_the_backend_prefers():
  assert dispatch.choose('op', TABLE) is max


def test_a_named_implementation_is_that_one():
  assert dispatch.choose('op', TABLE, 'reference') is min


def test_a_name_that_is_not_there_never_falls_back():
  with pytest.raises(ValueError, match=r"'pallas_tpu' does not exist.*chunked"):
    dispatch.choose('op', TABLE, 'pallas_tpu')
