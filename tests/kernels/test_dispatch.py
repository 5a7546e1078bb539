import jax
import jax.numpy as jnp
import pytest

from educe.kernels import dispatch
from educe.kernels.dispatch import Measurement


def double(x):
  return 2 * x


def half(x):
  return x / 2


def broken(x):
  raise NotImplementedError('no lowering\nfor this chip')


TABLE = {'chunked': double, 'fast': half, 'broken': broken}
HERE = ('op', jax.devices()[0].device_kind)


def measured(monkeypatch, *names):
  monkeypatch.setitem(dispatch.MEASURED, HERE, Measurement(names, 'a file'))


def test_what_nobody_measured_is_portable():
  assert dispatch.choose('op', TABLE) is double


def test_without_chunks_the_reference_is_portable():
  assert dispatch.choose('op', {'fast': half, 'reference': double}) is double


def test_what_may_be_left_out_may_be_none(monkeypatch):
  def whole(x, y=None, z=None):
    assert y is None
    assert z is not None
    return x + z

  measured(monkeypatch, 'whole', 'chunked')
  table = {'chunked': double, 'whole': whole}
  assert dispatch.choose('op', table, trial=(jnp.ones(6), None, jnp.ones(6))) is whole


def test_what_was_measured_best_goes_first(monkeypatch):
  measured(monkeypatch, 'fast', 'chunked')
  assert dispatch.choose('op', TABLE, trial=(jnp.ones(3),)) is half


def test_what_does_not_compile_is_passed_over_and_said_once(monkeypatch, capsys):
  measured(monkeypatch, 'broken', 'chunked')
  for _ in range(2):
    assert dispatch.choose('op', TABLE, trial=(jnp.ones(4),)) is double
  said = capsys.readouterr().err.splitlines()
  assert said == ['op: broken does not compile here, chunked runs instead: no lowering']


def test_a_named_implementation_is_that_one(monkeypatch):
  measured(monkeypatch, 'fast', 'chunked')
  assert dispatch.choose('op', TABLE, 'broken', (jnp.ones(5),)) is broken


def test_a_name_that_is_not_there_never_falls_back():
  with pytest.raises(ValueError, match=r"'pallas_tpu' does not exist.*chunked"):
    dispatch.choose('op', TABLE, 'pallas_tpu')


def test_every_choice_has_its_evidence():
  for measurement in dispatch.MEASURED.values():
    assert measurement.names
    assert measurement.evidence.startswith('benchmarks/results/')
