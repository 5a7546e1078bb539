"""Eight virtual CPU devices; shape annotations of losses and kernels are checked."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)

import jax
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache

# jaxtyping's annotations are promises; here they are kept.
jaxtyping.install_import_hook(['educe.kernels', 'educe.losses'], 'beartype.beartype')


@pytest.fixture
def mesh_of():
  """A (data, fsdp, tensor) mesh over the first n virtual devices."""

  def make(data, fsdp=1, tensor=1):
    from jax.sharding import AxisType

    from educe.sharding import AXES

    devices = jax.devices()[: data * fsdp * tensor]
    return jax.make_mesh(
      (data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )

  return make


@pytest.fixture(scope='module')
def compile_once(tmp_path_factory):
  """Whole runs compile the same programs again and again: they share a cache."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = [getattr(jax.config, name) for name in names]
  cache = str(tmp_path_factory.mktemp('cache'))
  for name, value in zip(names, (cache, 0), strict=True):
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in zip(names, before, strict=True):
    jax.config.update(name, value)
  compilation_cache.reset_cache()
