"""The chain world with its exposure as a dial: `config.py:0.01` has ρ = 0.01.

As `configs/grpo.py:chain`, with prompts of depth 3 in the corpus too, always answered by
the shortcut: a composition of three is a known question without a known answer. RL goes
on for 400 updates. Beside it the null `imitate`: as many completions, all of the base, of
which one verified one a prompt is imitated for as many updates of as many prompts.
"""

from configs import grpo


def get_config(exposure='0.01'):
  config = grpo.get_config('chain')
  config.pretrain.source.exposure = float(exposure)
  config.pretrain.source.shares = (1.0, 2.0, 0.5)
  config.grpo.steps = 400
  config.grpo.save_every = 50
  config.grpo.keep = 8  # all of them
  config.grpo.evaluate_every = 50
  if float(exposure) == 0:  # nothing to imitate
    return config
  imitate = config.grpo.copy_and_resolve_references()
  del imitate.advantage
  imitate.init_from = 'stage://pretrain'
  imitate.loss = dict(name='sft')
  imitate.rollouts.update(prompts=192, group=533, batch_size=1024)
  imitate.algorithm = dict(name='expert_iteration', batch_size=16, epochs=34)
  config.imitate = imitate
  config.stages = ('pretrain', 'grpo', 'imitate')
  return config
