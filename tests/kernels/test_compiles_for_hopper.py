"""The Hopper kernels compiled to sm_90a where CUDA's wheels are; no GPU is needed."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'hopper_compile.py'


@pytest.mark.skipif(
  jax.version.__version_info__ < (0, 12)
  or importlib.util.find_spec('jax_cuda13_plugin') is None,
  reason='jax >= 0.12 and CUDA wheels (pip install -e .[cuda]) are not here',
)
def test_no_register_is_spilled():
  # In a process of its own: this one has chosen its platform.
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  done = subprocess.run(
    [sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True, timeout=900
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  # The moments and the logits' gradient; ptxas says of each what it spilled.
  assert found['kernels'] >= 2
  assert found['spilled_bytes'] == 0
