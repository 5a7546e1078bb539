"""Online DPO: preferences between what the policy has just written.

  python -m educe train --config=configs/online_dpo.py:chain --run_dir=runs/online
  python -m educe train --config=configs/online_dpo.py:judge --run_dir=runs/judged

Recipes:
  chain       compositions of permutations, the base of configs/grpo.py; the environment's
              reward says which of a group is better (two stages)
  xpo         the same with XPO's bonus: each completion is set against one of the reference
  arithmetic  SmolLM2-135M-Instruct on sums and differences of one digit
  judge       SmolLM2-135M-Instruct on 175 instructions (data://self_instruct_seed_tasks
              .jsonl.gz), judged by a language model behind --config.judge.url, any
              OpenAI-compatible server; a reward model of your own is config.judge =
              dict(name='reward_model', path='runs/reward_model')

Any loss of losses/dpo.py will do, as --config.loss.variant=ipo. Append `,debug` for two
steps of a tiny random model (and of no judge but the length of what it wrote).
"""

from configs import grpo
from educe.spelling import near


def get_config(recipe='chain'):
  recipes = {'chain': chain, 'xpo': xpo, 'arithmetic': arithmetic, 'judge': judge}
  if recipe not in recipes:
    wrong = next((x for x in recipe.split(',') if x not in recipes), recipe)
    raise ValueError(f'no recipe {wrong!r}' + near(wrong, [*recipes, 'debug']))
  return recipes[recipe]()


def with_pairs(config, batch_size):
  del config['advantage']
  config.algorithm = dict(name='online_dpo', batch_size=batch_size)
  config.loss = dict(name='dpo', variant='sigmoid', beta=0.1)
  return config


def chain():
  stages = grpo.get_config('chain')
  stages.stages = ('pretrain', 'online_dpo')
  stages.online_dpo = with_pairs(stages.grpo, batch_size=8)
  del stages['grpo']
  return stages


def xpo():
  stages = chain()
  stages.online_dpo.algorithm.update(alpha=5e-3, batch_size=64)
  stages.online_dpo.rollouts.group = 8
  return stages


def arithmetic():
  return with_pairs(grpo.get_config('arithmetic'), batch_size=8)


def judge():
  config = arithmetic()
  config.environment = dict(
    name='prompts',
    source=dict(
      name='jsonl',
      path='data://self_instruct_seed_tasks.jsonl.gz',
      columns=dict(prompt='instruction'),
      chat=True,
    ),
  )
  config.judge = dict(
    name='endpoint', url='http://localhost:8000/v1', model='judge', style='pairwise'
  )
  config.rollouts.update(group=2, max_new_tokens=128, overlong_prompts='drop')
  del config['evaluation']
  return config
