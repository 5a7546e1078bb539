import contextlib
import logging

import jax
import pytest


@pytest.fixture
def compilations(caplog):
  """`with compilations() as names:` lists what XLA compiles meanwhile.

  A test that asserts an empty list must assert a full one too, or it could not fail if
  JAX worded its log otherwise.
  """

  @contextlib.contextmanager
  def listen():
    names: list[str] = []
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger='jax'), jax.log_compiles():
      yield names
    texts = (record.getMessage() for record in caplog.records)
    names += [text for text in texts if text.startswith('Finished XLA compilation')]

  return listen
