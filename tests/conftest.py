"""Eight virtual CPU devices; shape annotations of losses and kernels are checked."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)

import jax
import jaxtyping
import pytest

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
