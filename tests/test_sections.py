"""What is refused of a config before a model is made, for a run and for a plan of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe import config as config_lib
from educe import roofline, sections
from educe.losses import reward_model, sft
from educe.models import policy, presets
from educe.types import Algorithm, Batch


def given(**changes):
  """What is checked of a config before its model is made."""
  lowest = dict(sections.LOWEST)
  none = dict.fromkeys(('evaluation', 'adapter', 'value', 'init_from', 'value_from'))
  return {**lowest, **none, 'offload': (), **changes}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({}, None),
    ({'offload': ('opt_state', 'reference')}, None),
    ({'offload': ('opt_state', 'params')}, "'params' is none of"),
    ({'steps': 0}, r'config.steps=0 must be at least 1'),
    ({'evaluate_every': -1}, r'config.evaluate_every=-1 must be at least 0'),
    (
      {'adapter': dict(rank=0, alpha=1.0, kind='lora', targets=('up',), base=None)},
      r'config.adapter.rank=0',
    ),
    (
      {'init_from': 'nowhere'},
      r"config.init_from='nowhere' is not the folder of a run",
    ),
    ({'value_from': 'nowhere', 'value': {}}, r"config.value_from='nowhere' is not"),
  ],
)
def test_what_is_wrong_whatever_the_model_is(changes, message):
  if message is None:
    return sections.check(given(**changes))
  with pytest.raises(config_lib.ConfigError, match=message):
    sections.check(given(**changes))


def test_a_value_head_that_starts_from_a_run_needs_its_section(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(config_lib.ConfigError, match='without a section value'):
    sections.check(given(value_from=str(tmp_path)))


def method(**changes):
  return Algorithm(None, sft.loss, None, 8, **changes)


def test_what_is_kept_as_a_reference_and_what_of_it_may_lie_on_the_host():
  params, tx = {'w': jnp.ones(3)}, optimizer(None)
  config, key = dict(offload=('reference',)), jax.random.key(0)

  def of(config, **changes):
    return sections.state_of(config, method(**changes), params, tx, key).reference

  assert of({'offload': ()}) is None
  np.testing.assert_array_equal(of(config, reference_every=0)['w'], params['w'])
  teacher = {'v': jnp.zeros(2)}
  assert of(config, reference=teacher, reference_every=0) is teacher
  with pytest.raises(config_lib.ConfigError, match='keeps no reference; leave it out'):
    of(config)


def test_rows_share_prompts_where_all_of_them_are_here(mesh_of):
  tokens = np.repeat(np.arange(2)[:, None], 64, 1).repeat(4, 0)
  batch = Batch(tokens, np.float32(np.arange(64) > 47) * np.ones((8, 1), np.float32))

  def prompts(mesh, whole=True, microbatches=1):
    config = dict(microbatches=microbatches)
    found = sections.shared(config, batch, 4, mesh, whole).prefix
    return None if found is None else len(found)

  assert prompts(mesh_of(2)) == 2
  assert prompts(mesh_of(2), whole=False) is None
  assert prompts(mesh_of(2, context=2)) is None
  assert prompts(mesh_of(2), microbatches=2) is None  # it would cut a group


def test_an_update_is_worth_what_its_loss_reads_and_its_teacher_too():
  a = presets.debug
  net, params, tx = policy.build(a), policy.shapes(a), optimizer(None)
  read = roofline.full(2, 8)
  head = 2 * a.dim * a.vocab_size * 16
  once = roofline.forward(net, params, read)

  def flops(**changes):
    how = method()._replace(**changes)
    return sections.work_of(net, params, tx, how, read).flops

  assert flops() == 3 * once
  assert flops(loss=reward_model.loss) == 3 * (once - head)
  assert flops(reference=params, reference_every=0) == 3 * once  # read elsewhere
  assert flops(teacher=net, reference=params) == 4 * once


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


@pytest.mark.parametrize(
  ('data', 'algorithm', 'named'),
  [
    ({'max_length': 8}, {}, 'config.data.batch_size'),
    (None, {'batch_size': 8}, 'config.algorithm.batch_size'),
    (None, {}, 'config.rollouts.prompts × group'),
    (
      None,
      {'minibatches': 2},
      'config.rollouts.prompts × group / config.algorithm.minibatches',
    ),
  ],
)
def test_rows_that_do_not_divide_are_named_as_the_config_has_them(
  mesh_of, data, algorithm, named
):
  config = dict(data=data, algorithm=algorithm, microbatches=3)
  with pytest.raises(ValueError, match=f'^{re.escape(named)}: a batch of 8 rows does'):
    sections.check_rows(config, method(), mesh_of(2))


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
