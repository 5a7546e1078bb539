"""TPUs by name: devices that are not here, or one line that says what would be."""

import os
from importlib import metadata

import pytest

from educe import topology
from educe.kernels.logprob import tpu_chips
from educe.training.metrics import PEAK_FLOPS


@pytest.mark.usefixtures('chips')
@pytest.mark.parametrize('name', [name for name, _ in topology.EXAMPLES.values()])
def test_every_example_is_a_pod_that_we_know(name):
  devices = topology.devices(name)
  kind = devices[0].device_kind
  assert kind in topology.CHIPS
  assert kind in PEAK_FLOPS
  assert kind in tpu_chips.CHIPS
  assert {key: os.environ[key] for key in topology.SETTINGS} == topology.SETTINGS


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('v5p-128', 'v5p-128 counts cores and has 64 chips, laid out as v5p:4x4x4'),
    ('v4-8', 'v4-8 counts cores and has 4 chips, laid out as v4:2x2x1'),
    ('v5litepod-32', 'v5litepod-32 has 32 chips, laid out as v5e:4x8'),
    ('v6e-16', 'v6e-16 has 16 chips, laid out as v6e:4x4'),
    ('v5p-a', 'name the generation and its layout, as v4:4x4x4'),
    ('v5p', 'is not a name'),
    ('', 'is not a name'),
    ('v9:2x2', 'no such generation'),
  ],
)
def test_a_name_that_is_none_says_what_would_be(name, said, monkeypatch):
  monkeypatch.setattr(topology, 'check_libtpu', lambda: pytest.fail('too late'))
  with pytest.raises(ValueError, match=said) as caught:
    topology.devices(name)
  assert '\n' not in str(caught.value)


@pytest.mark.usefixtures('chips')
@pytest.mark.parametrize('name', ['v5e:3x5', 'v5p:5x5x5'])
def test_a_layout_that_there_cannot_be(name):
  with pytest.raises(ValueError, match=f"topology='{name}': .*not divisible") as caught:
    topology.devices(name)
  assert '\n' not in str(caught.value)


def test_a_compiler_that_is_missing_or_another_is_named(monkeypatch):
  (needs,) = (x for x in metadata.requires('jax') if x.startswith('libtpu'))
  needs = needs.partition(';')[0].strip()

  def have(version):
    def of(name):
      assert name == 'libtpu'
      if version is None:
        raise metadata.PackageNotFoundError
      return version

    monkeypatch.setattr(topology.metadata, 'version', of)

  have(None)
  with pytest.raises(ValueError, match='not installed') as caught:
    topology.check_libtpu()
  assert f"pip install '{needs}'" in str(caught.value)
  have('0.0.3')
  with pytest.raises(ValueError, match=r'libtpu 0\.0\.3 is not what jax') as caught:
    topology.check_libtpu()
  assert f"pip install '{needs}'" in str(caught.value)
  have(needs.partition('==')[2].replace('*', '7'))
  topology.check_libtpu()


@pytest.mark.parametrize(
  ('generation', 'chips', 'said'),
  [
    ('v5e', 256, '16x16'),
    ('v5e', 8, '2x4'),
    ('v5p', 64, '4x4x4'),
    ('v5p', 128, '4x4x8'),
    ('v5p', 4, '2x2x1'),
  ],
)
def test_the_most_even_layout(generation, chips, said):
  assert topology.layout(generation, chips) == said
