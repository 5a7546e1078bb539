import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe import sharding
from educe.kernels import dispatch, logprob
from educe.kernels.dispatch import Measurement, Trial
from educe.types import Scores

ROOT = pathlib.Path(__file__).parents[2]


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


def of(*operands):
  return Trial(lambda op: op, operands, '')


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
  assert dispatch.choose('op', table, trial=of(jnp.ones(6), None, jnp.ones(6))) is whole


def test_what_was_measured_best_goes_first(monkeypatch):
  measured(monkeypatch, 'fast', 'chunked')
  assert dispatch.choose('op', TABLE, trial=of(jnp.ones(3))) is half


def test_what_does_not_compile_is_passed_over_and_said_once(monkeypatch, capsys):
  measured(monkeypatch, 'broken', 'chunked')
  for _ in range(2):
    assert dispatch.choose('op', TABLE, trial=of(jnp.ones(4))) is double
  said = capsys.readouterr().err.splitlines()
  assert said == ['op: broken does not compile here, chunked runs instead: no lowering']


def test_other_settings_are_tried_anew(monkeypatch):
  """What compiles without a cap need not compile with one."""
  measured(monkeypatch, 'fast', 'chunked')
  operands = (jnp.ones(8),)

  def capped(op):
    return broken

  assert dispatch.choose('op', TABLE, trial=Trial(lambda op: op, operands, '')) is half
  assert dispatch.choose('op', TABLE, trial=Trial(capped, operands, 'cap')) is double
  assert dispatch.choose('op', TABLE, trial=Trial(lambda op: op, operands, '')) is half


def test_a_trial_is_of_the_gradient_of_what_one_device_holds(monkeypatch, mesh_of):
  """A kernel whose backward pass does not fit is not taken for its forward pass."""
  tried = []

  @jax.custom_vjp
  def grows(hidden, head):
    return (hidden @ head).sum(-1)

  def backward(residuals, cotangent):
    raise MemoryError('out of vector memory')

  grows.defvjp(lambda *x: (grows(*x), x), backward)

  def kernel(hidden, head, targets, **_):
    tried.append((hidden.shape, head.shape))
    logp = grows(hidden, head)
    return Scores(logp, logp, mean_logp=logp)

  monkeypatch.setitem(
    dispatch.MEASURED, ('logprob', HERE[1]), Measurement(('new',), '')
  )
  monkeypatch.setitem(logprob.IMPLEMENTATIONS, 'new', kernel)
  hidden, head, targets = jnp.ones((8, 4)), jnp.ones((4, 6)), jnp.zeros(8, jnp.int32)
  mesh = mesh_of(2, 2, 2)
  with sharding.using(mesh):
    split = sharding.split(8, 6, 'vocab')
    everywhere = jax.NamedSharding(mesh, jax.P())
    hidden, head, targets = jax.device_put((hidden, head, targets), everywhere)
    scores = jax.jit(lambda *x: logprob.logprob(*x, split=split))(hidden, head, targets)
  assert tried == [((2, 4), (4, 3))]
  np.testing.assert_allclose(scores.logp, -np.log(6), rtol=1e-6)


def test_a_chip_that_is_not_here_is_not_asked(monkeypatch):
  chip = jax.sharding.AbstractDevice(device_kind='TPU v9', num_cores=1, platform='tpu')
  mesh = jax.sharding.AbstractMesh(
    (1,), ('x',), (jax.sharding.AxisType.Auto,), abstract_device=chip
  )
  monkeypatch.setitem(
    dispatch.MEASURED, ('op', 'TPU v9'), Measurement(('broken', 'chunked'), 'a file')
  )
  assert dispatch.choose('op', TABLE, trial=of(jnp.ones(7))) is double
  with jax.sharding.use_abstract_mesh(mesh):
    assert dispatch.choose('op', TABLE, trial=of(jnp.ones(7))) is broken


def test_a_named_implementation_is_that_one(monkeypatch):
  measured(monkeypatch, 'fast', 'chunked')
  assert dispatch.choose('op', TABLE, 'broken', of(jnp.ones(5))) is broken


def test_a_name_that_is_not_there_never_falls_back():
  with pytest.raises(ValueError, match=r"'pallas_tpu' does not exist.*chunked"):
    dispatch.choose('op', TABLE, 'pallas_tpu')


def test_every_choice_has_its_evidence():
  for measurement in dispatch.MEASURED.values():
    said = json.loads((ROOT / measurement.evidence).read_text())
    assert all(name in json.dumps(said) for name in measurement.names)


@pytest.mark.parametrize('file', sorted((ROOT / 'benchmarks/results').rglob('*.json')))
def test_results_are_whole(file):
  assert json.loads(file.read_text())
