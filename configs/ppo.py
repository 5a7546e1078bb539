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

from configs import grpo
from educe.spelling import near


def get_config(recipe='arithmetic'):
  recipes = {'chain': chain, 'arithmetic': arithmetic}
  if recipe not in recipes:
    raise ValueError(f'no recipe {recipe!r}' + near(recipe, [*recipes, 'debug']))
  return recipes[recipe]()


def arithmetic():
  """Single sums and differences, answered with the number alone."""
  config = grpo.get_config('arithmetic')
  del config['advantage']
  config.value = dict(trunk='shared')
  config.rollouts = dict(prompts=64, group=1, max_new_tokens=8)
  # What Stiennon et al. (arXiv:2009.01325) and most since them use: λ = 0.95, γ = 1.
  config.algorithm = dict(
    name='ppo', epochs=2, minibatches=2, kl_coef=0.05, missing_eos_penalty=1.0
  )
  config.loss = dict(name='ppo', value_coef=0.1)
  config.steps, config.save_every = 120, 60
  return config


def chain():
  """A base model that has seen the composition in 1 of 20 documents, and PPO on it."""
  both = grpo.get_config('chain')
  config = both.grpo
  del config['advantage'], both['grpo']
  config.value = dict(trunk='separate')
  config.rollouts.update(prompts=256, group=1)
  config.algorithm = dict(name='ppo', epochs=2, kl_coef=0.05)
  config.loss = dict(name='ppo', value_coef=1.0)
  config.steps, config.save_every, config.evaluate_every = 200, 100, 20
  both.stages, both.ppo = ('pretrain', 'ppo'), config
  return both
