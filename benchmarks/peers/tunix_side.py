"""Tunix's side of peers.py: its trainers' own jitted steps, and its sampler.

What differs from its defaults: no KL in GRPO (beta=0), and an optimizer that clips, as
the others' does. The model is its Llama, which rotates with a base of 1,000,000 whatever
it is told.
"""

from __future__ import annotations

import importlib.metadata
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import worker
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.rl import algo_core, common
from tunix.rl import trainer as rl_trainer
from tunix.rl.grpo import grpo_learner
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer

FOLDER, SETTINGS, ARRAYS = worker.given()
PAD = 0  # no prompt and no completion holds it
END = SETTINGS['vocab_size']  # never drawn


class Tokenizer:
  """What the sampler asks of one; its texts are ids with spaces between."""

  def encode(self, text):
    return [int(word) for word in text.split()]

  def decode(self, ids):
    return ' '.join(map(str, ids))

  def bos_id(self):
    return None

  def eos_id(self):
    return END

  def pad_id(self):
    return PAD


def load():
  names = ('vocab_size', 'num_layers', 'embed_dim', 'hidden_dim', 'num_heads')
  config = llama.ModelConfig(
    **{name: SETTINGS[name] for name in names},
    num_kv_heads=SETTINGS['num_heads'],
    head_dim=SETTINGS['head_dim'],
    norm_eps=SETTINGS['norm_eps'],
    rope_theta=SETTINGS['rope_theta'],
  )
  return llama_params.create_model_from_safe_tensors(
    str(FOLDER), config, dtype=jnp.float32
  )


def optimizer(case: str):
  o = {**SETTINGS['optimizer'], 'learning_rate': SETTINGS['learning_rates'][case]}
  return optax.chain(optax.clip_by_global_norm(o.pop('clip_norm')), optax.adamw(**o))


def train(trainer, batch):
  """One pass through its loop, but for what that logs."""
  step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

  def run() -> float:
    loss, *_ = step(trainer._prepare_inputs(batch))
    return float(jax.block_until_ready(loss))

  return run


def prepare_sft():
  tokens, mask = ARRAYS['sft_tokens'], ARRAYS['sft_mask']
  config = peft_trainer.TrainingConfig(eval_every_n_steps=1000)
  trainer = peft_trainer.PeftTrainer(load(), optimizer('sft'), config)
  real = jnp.ones(tokens.shape, bool)
  trainer.with_gen_model_input_fn(
    lambda batch: {
      'input_tokens': batch.input_tokens,
      'input_mask': batch.input_mask,
      'positions': common.build_positions_from_mask(real),
      'attention_mask': common.make_causal_attn_mask(real),
    }
  )
  return train(
    trainer, peft_trainer.TrainingInput(input_tokens=tokens, input_mask=mask)
  )


def prepare_dpo():
  tokens, mask, prompt = ARRAYS['dpo_tokens'], ARRAYS['dpo_mask'], SETTINGS['prompt']
  ones = np.ones_like(tokens[::2, :prompt])
  batch = dpo_trainer.TrainingInput(
    prompt_ids=tokens[::2, :prompt],
    prompt_mask=ones,
    chosen_ids=tokens[::2, prompt:],
    chosen_mask=mask[::2, prompt:].astype(np.int32),
    rejected_ids=tokens[1::2, prompt:],
    rejected_mask=mask[1::2, prompt:].astype(np.int32),
  )
  config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=1000, beta=SETTINGS['beta'])
  return train(dpo_trainer.DPOTrainer(load(), load(), optimizer('dpo'), config), batch)


def prepare_grpo():
  tokens, prompt = ARRAYS['grpo_tokens'], SETTINGS['prompt']
  config = grpo_learner.GRPOConfig(num_generations=len(tokens), beta=0.0)
  config.temperature = 1.0  # which its learner takes from the rollouts' settings
  trainer = rl_trainer.Trainer(
    load(),
    optimizer('grpo'),
    peft_trainer.TrainingConfig(eval_every_n_steps=1000),
    dict,
  )
  # As its learner sets its trainer up.
  trainer.with_loss_fn(
    lambda model, train_example, algo_config: algo_core.grpo_loss_fn(
      model, train_example, algo_config=config, pad_id=PAD, eos_id=END
    ),
    has_aux=True,
  )
  trainer.with_gen_model_input_fn(
    lambda batch: {'train_example': batch, 'algo_config': config}
  )
  batch = common.TrainExample(
    prompt_ids=tokens[:, :prompt],
    prompt_mask=np.ones_like(tokens[:, :prompt]),
    completion_ids=tokens[:, prompt:],
    completion_mask=ARRAYS['grpo_mask'][:, prompt:],
    advantages=ARRAYS['grpo_advantages'],
    ref_per_token_logps=None,
    old_per_token_logps=ARRAYS['grpo_old_logp'][:, prompt:],
  )
  return train(trainer, batch)


def prepare_generate(rows: int):
  new, layers = SETTINGS['new_tokens'], SETTINGS['num_layers']
  cache = sampler_lib.CacheConfig(
    SETTINGS['prompt'] + new, layers, SETTINGS['num_heads'], SETTINGS['head_dim']
  )
  sampler = sampler_lib.Sampler(load(), Tokenizer(), cache)
  prompts = [' '.join(map(str, row)) for row in ARRAYS['prompts'][:rows]]
  seed = 0

  def run() -> float:
    nonlocal seed
    seed += 1
    out = sampler(prompts, new, temperature=1.0, top_p=1.0, seed=seed)
    return float(sum(map(len, out.tokens)))

  return run


def main():
  warnings.simplefilter('ignore', DeprecationWarning)
  a = jnp.ones((worker.SIZE, worker.SIZE))
  product = jax.jit(jnp.matmul)
  worker.serve(
    {
      'sft': prepare_sft,
      'dpo': prepare_dpo,
      'grpo': prepare_grpo,
      'generate_8': lambda: prepare_generate(8),
      'generate_64': lambda: prepare_generate(64),
    },
    lambda: float(product(a, a).block_until_ready()[0, 0]),
    {
      'google-tunix': importlib.metadata.version('google-tunix'),
      'jax': jax.__version__,
    },
  )


if __name__ == '__main__':
  main()
