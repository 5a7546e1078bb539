"""What is refused of a config before a model is made, for a run and for a plan of it."""

import pytest

from educe import config as config_lib
from educe import sections


def test_what_may_lie_on_the_host():
  sections.check_offload(('opt_state', 'reference'))
  with pytest.raises(config_lib.ConfigError, match="'params' is none of"):
    sections.check_offload(('opt_state', 'params'))


@pytest.mark.parametrize(
  ('data', 'longer', 'message'),
  [
    ({'max_length': 12}, 0, None),
    ({'max_length': 13}, 0, r'max_length=13 does not divide .*context=2 parts'),
    ({'max_length': 12}, 1, r'max_length=12 and 1 more does not divide'),
    ({'max_length': 11}, 1, None),
    (None, 0, None),
  ],
)
def test_rows_divide_into_parts_of_a_context(mesh_of, data, longer, message):
  mesh = mesh_of(context=2)
  if message is None:
    return sections.check_context(mesh, data, longer)
  with pytest.raises(config_lib.ConfigError, match=message):
    sections.check_context(mesh, data, longer)


def test_the_widths_of_rollouts_divide_too(mesh_of):
  with pytest.raises(config_lib.ConfigError, match='context=3 must divide 16'):
    sections.check_context(mesh_of(context=3), None)


def optimizer(adapter):
  section = dict(name='sgd', learning_rate=1.0)
  return sections.optimizer_of(dict(optimizer=section, steps=1, adapter=adapter))


def test_beside_an_adapter_the_rest_is_frozen_but_for_a_head():
  adapter = {'scale': 1.0, 'layers': {'mlp': {'up': {'a': 2.0}}}}
  params = {'layers': {'mlp': {'up': 1.0}}, 'adapter': adapter, 'value': {'head': 3.0}}
  assert optimizer(None).split(params)[0] == params
  trained, frozen = optimizer({'rank': 1}).split(params)
  assert trained['layers']['mlp']['up'] is trained['adapter']['scale'] is None
  assert trained['adapter']['layers'] == adapter['layers']
  assert trained['value'] == params['value']
  assert frozen['layers'] == params['layers']


def test_the_scale_of_a_critic_s_own_adapter_is_frozen_as_well():
  trunk = {'adapter': {'scale': 1.0, 'layers': {'mlp': {'up': {'a': 2.0}}}}}
  params = {'layers': {'mlp': 1.0}, 'value': {'head': 3.0, 'trunk': trunk}}
  kept = optimizer({'rank': 1}).split(params)[0]['value']['trunk']['adapter']
  assert kept == {**trunk['adapter'], 'scale': None}
