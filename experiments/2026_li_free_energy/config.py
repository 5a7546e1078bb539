"""The base of the Gibbs audit, and every way of post-training it, as educe's own sections.

  python -m educe train --config=experiments/2026_li_free_energy/config.py:rloo \\
    --run_dir=runs/li0 --config.base.seed=0 --config.rloo.seed=0

Two stages: `base`, pre-trained from nothing on the corpus of environments/language.py,
and the arm. All arms train on the 48 prompts of part='train' and see 16 rollouts of each
of them 160 times: on-policy arms draw them as they go; sft, dpo, ipo and kto have all of
theirs from the base, by the functions at the end of this file.

A world's number is the seed of its base as well; run.py sets all of them.
"""

import functools
import random

import jax
import ml_collections

from educe.environments import language
from educe.policies import open_policy
from educe.rollouts.collect import collect
from educe.rollouts.label_pairs import label
from educe.spelling import near

BETA = 0.2
PROMPTS, GROUP, ROUNDS = 48, 16, 160
KEEP = 8  # times that an arm is measured, its end included
GIBBS = dict(name='grpo', objective='reinforce', aggregate='sequence_sum')
CENTRED = dict(name='group_relative', std=False)


def in_loss(estimator):
  return dict(kl_coef=BETA, kl_estimator=estimator, kl_gradient='naive')


# name → what it changes. `per_round`: updates of a round of rollouts.
ARMS = {
  'sft': dict(loss=dict(name='sft'), source='verified'),
  'expert_iteration': dict(loss=dict(name='sft')),
  'dpo': dict(loss=dict(name='dpo', beta=BETA), source='pairs'),
  'ipo': dict(loss=dict(name='dpo', variant='ipo', beta=BETA), source='pairs'),
  'kto': dict(loss=dict(name='dpo', variant='kto', beta=BETA), source='labelled'),
  'rloo': dict(loss=GIBBS, advantage=dict(name='rloo')),
  'rloo_k1_reward': dict(
    loss=GIBBS,
    advantage=dict(name='rloo'),
    algorithm=dict(reference_every=0, kl_in_reward=BETA),
  ),
  'grpo': dict(loss=dict(name='grpo'), advantage=dict(name='group_relative')),
  'grpo_k1_reward': dict(
    loss=dict(name='grpo', aggregate='sequence_sum'),
    advantage=CENTRED,
    algorithm=dict(reference_every=0, kl_in_reward=BETA),
  ),
  'grpo_k2_loss': dict(
    loss=dict(name='grpo', aggregate='sequence_sum', **in_loss('k2')),
    advantage=CENTRED,
    algorithm=dict(reference_every=0),
  ),
  'grpo_k3_loss': dict(
    loss=dict(name='grpo', aggregate='sequence_sum', **in_loss('k3')),
    advantage=CENTRED,
    algorithm=dict(reference_every=0),
  ),
  'ppo': dict(
    loss=dict(name='ppo', value_coef=1.0),
    algorithm=dict(name='ppo', epochs=2, kl_coef=BETA),
    value=dict(trunk='separate'),
    per_round=2,
  ),
  'gspo': dict(
    loss=dict(
      name='grpo',
      importance='sequence',
      clip_low=3e-4,
      clip_high=4e-4,
      aggregate='sequence_mean',
    ),
    advantage=dict(name='group_relative'),
    algorithm=dict(minibatches=4),
    per_round=4,
  ),
}
# Arms that have a β are held against Gibbs at that β. It is the optimum of k1 in the
# reward and k2 in the loss; not of k3, of IPO and KTO, nor of DPO under a verifier's
# labels, which are no Bradley–Terry draws.
WITHOUT_KL = ('sft', 'expert_iteration', 'rloo', 'grpo', 'gspo')
BETAS = {name: BETA for name in ARMS if name not in WITHOUT_KL}
DEBUG = {
  'steps': 4,
  'save_every': 2,
  'model': {'name': 'scratch', 'preset': 'language'},
  'tokenizer': {'path': f'characters:{language.ALPHABET}'},
  'optimizer.warmup_steps': 0,
  'source.size': 2048,
  'source.rounds': 16,
  'data.batch_size': 16,
  'data.max_length': 8,
  'rollouts.prompts': 48,
  'rollouts.group': 16,
}


def get_config(arm='rloo'):
  """`arm`: a name in ARMS, or 'base' alone."""
  if arm not in (*ARMS, 'base'):
    raise ValueError(f'no arm {arm!r}' + near(arm, [*ARMS, 'base', 'debug']))
  config = ml_collections.ConfigDict()
  config.stages = ('base',) if arm == 'base' else ('base', arm)
  config.base = base()
  if arm != 'base':
    config[arm] = post_training(arm, ARMS[arm])
  return config


def common():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(name='scratch', preset='language')
  config.tokenizer = dict(path=f'characters:{language.ALPHABET}')
  config.mesh = dict(data=1)
  return config


def base():
  config = common()
  config.model.seed = config.get_ref('seed')
  config.source = dict(
    name='educe.environments.language:records',
    size=2_560_000,
    world=config.get_ref('seed'),
    seed=config.get_ref('seed'),
  )
  config.data = dict(batch_size=256, max_length=8, seed=config.get_ref('seed'))
  config.algorithm = dict(name='sft')
  config.loss = dict(name='sft')
  config.optimizer = dict(
    name='adamw', learning_rate=3e-3, schedule='cosine', warmup_steps=100, b2=0.99
  )
  config.steps, config.save_every = 10_000, 5000
  return config


def post_training(arm, changes):
  config = common()
  config.steps = ROUNDS * changes.get('per_round', 1)
  config.save_every, config.keep = config.steps // KEEP, KEEP + 1
  config.loss = changes['loss']
  config.optimizer = dict(
    name='adamw', learning_rate=1e-3, schedule='constant', warmup_steps=10, b2=0.95
  )
  if 'source' in changes:
    offline(config, changes['source'])
    return config
  config.environment = dict(name='language', part='train', world=config.get_ref('seed'))
  config.rollouts = dict(
    prompts=PROMPTS,
    group=GROUP,
    max_new_tokens=language.LENGTH,
    batch_size=PROMPTS * GROUP,
    workers=0,
    show_every=0,
  )
  if arm == 'expert_iteration':
    config.algorithm = dict(name=arm, batch_size=128, per_prompt=GROUP)
    return config
  config.algorithm = {'name': 'grpo', **changes.get('algorithm', {})}
  for section in ('advantage', 'value'):
    if section in changes:
      config[section] = changes[section]
  return config


def offline(config, kind):
  config.source = dict(
    name=f'experiments.2026_li_free_energy.config:{kind}',
    base='stage://base',
    rounds=ROUNDS,
    world=config.get_ref('seed'),
    seed=config.get_ref('seed'),
  )
  records = dict(verified='documents', pairs='pairs', labelled='unpaired')[kind]
  config.algorithm = dict(name='sft' if kind == 'verified' else 'dpo')
  config.data = dict(
    records=records, batch_size=256, max_length=8, seed=config.get_ref('seed')
  )


# The records of arms that train on data: what the base drew, judged by the verifier.


def verified(*, base: str, rounds: int, world: int, seed: int) -> list[dict]:
  """Every verified completion of the base, as often as it was drawn."""
  return [
    {'prompt': row['prompt'], 'completion': row['completion']}
    for drawn in samples(base, rounds, world, seed)
    for row in drawn
    if row['outcome'] == 'verified'
  ]


def pairs(*, base: str, rounds: int, world: int, seed: int) -> list[dict]:
  """Of every group with a right and a wrong completion, the first of each."""
  return [
    {name: row[name] for name in ('prompt', 'chosen', 'rejected')}
    for drawn in samples(base, rounds, world, seed)
    for row in label(drawn)[0]
  ]


def labelled(*, base: str, rounds: int, world: int, seed: int) -> list[dict]:
  """The same completions, apart, shuffled: KTO's mismatched rows are their neighbours."""
  rows = [
    {'prompt': pair['prompt'], 'completion': pair[side], 'label': side == 'chosen'}
    for pair in pairs(base=base, rounds=rounds, world=world, seed=seed)
    for side in ('chosen', 'rejected')
  ]
  return random.Random(seed).sample(rows, len(rows))


@functools.lru_cache(maxsize=1)
def samples(base: str, rounds: int, world: int, seed: int) -> list[list[dict]]:
  """Rows of rollouts of the base, `rounds` times GROUP of each train prompt.

  Raises ValueError where `base` is no run.
  """
  model, params, tokenizer = open_policy(base)
  environment = language.make(part='train', world=world)
  return [
    list(
      collect(
        model,
        params,
        tokenizer,
        environment,
        environment.prompts,
        group=GROUP,
        key=jax.random.fold_in(jax.random.key(seed), number),
        max_new_tokens=language.LENGTH,
        batch_size=PROMPTS * GROUP,
      ).transcripts
    )
    for number in range(rounds)
  ]
