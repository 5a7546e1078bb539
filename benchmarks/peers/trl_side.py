"""TRL's side of peers.py: its trainers' own steps, on torch's CPU backend.

What differs from its defaults: float32, no gradient checkpointing (which would compute
the forward pass twice), a constant learning rate, nothing logged or saved.
"""

from __future__ import annotations

import tempfile

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
import worker

FOLDER, SETTINGS, ARRAYS = worker.given()
torch.set_num_threads(SETTINGS['threads'])


def tokenizer():
  """A word a token, for trainers that ask; its end is no token that the model can draw."""
  words = SETTINGS['vocab_size']
  vocabulary = {f'w{i}': i for i in range(words)} | {'<eos>': words}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='w1'))
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, pad_token='w0', eos_token='<eos>', unk_token='w1'
  )


def load():
  model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
  model.generation_config.eos_token_id = None
  return model


def options(case: str, rows: int):
  o = SETTINGS['optimizer']
  return dict(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=rows,
    learning_rate=SETTINGS['learning_rates'][case],
    adam_beta1=o['b1'],
    adam_beta2=o['b2'],
    adam_epsilon=o['eps'],
    weight_decay=o['weight_decay'],
    max_grad_norm=o['clip_norm'],
    lr_scheduler_type='constant',
    max_steps=1000,
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=True,
    report_to=[],
    save_strategy='no',
  )


def train(trainer, inputs, count=None):
  """One update as transformers' Trainer makes it: backward, clip, step, zero."""
  trainer.current_gradient_accumulation_steps = 1  # as its loop says
  trainer.create_optimizer()
  model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
  bound = trainer.args.max_grad_norm

  def run() -> float:
    loss = trainer.training_step(model, dict(inputs), count)
    trainer.accelerator.clip_grad_norm_(model.parameters(), bound)
    optimizer.step()
    model.zero_grad()
    return float(loss)

  return run


def tensor(name: str):
  return torch.from_numpy(ARRAYS[name])


def prepare_sft():
  tokens, mask = tensor('sft_tokens').long(), tensor('sft_mask').bool()
  labels = tokens.masked_fill(~mask, -100)
  rows = {'input_ids': tokens.tolist(), 'labels': labels.tolist()}
  config = trl.SFTConfig(
    **options('sft', len(tokens)),
    max_length=tokens.shape[1],
    dataset_kwargs={'skip_prepare_dataset': True},
  )
  trainer = trl.SFTTrainer(
    load(),
    config,
    train_dataset=datasets.Dataset.from_dict(rows),
    processing_class=tokenizer(),
  )
  inputs = trainer.data_collator([dict(row) for row in trainer.train_dataset])
  assert (inputs['labels'] == labels).all()
  return train(trainer, inputs, mask.sum())


def prepare_dpo():
  # Its batches have all chosen rows first.
  order = np.r_[0 : len(ARRAYS['dpo_tokens']) : 2, 1 : len(ARRAYS['dpo_tokens']) : 2]
  tokens, mask = tensor('dpo_tokens')[order].long(), tensor('dpo_mask')[order].long()
  text = {'prompt': ['w1'], 'chosen': [' w2'], 'rejected': [' w3']}
  trainer = trl.DPOTrainer(
    load(),
    args=trl.DPOConfig(
      **options('dpo', len(tokens) // 2),
      beta=SETTINGS['beta'],
      max_length=tokens.shape[1],
    ),
    train_dataset=datasets.Dataset.from_dict(text),
    processing_class=tokenizer(),
  )
  inputs = {
    'input_ids': tokens,
    'attention_mask': torch.ones_like(tokens),
    'completion_mask': mask,
  }
  return train(trainer, inputs)


def grpo_trainer(rows: int, *, group: int, **more):
  return trl.GRPOTrainer(
    load(),
    lambda completions, **_: [0.0] * len(completions),
    args=trl.GRPOConfig(
      **options('grpo', rows),
      num_generations=group,
      max_completion_length=SETTINGS['new_tokens'],
      steps_per_generation=1,
      **more,
    ),
    train_dataset=datasets.Dataset.from_dict({'prompt': ['w1']}),
    processing_class=tokenizer(),
  )


def prepare_grpo():
  tokens, prompt = tensor('grpo_tokens').long(), SETTINGS['prompt']
  rows = len(tokens)
  # A round that is read for many steps, so that none of them samples a new one.
  trainer = grpo_trainer(rows, group=rows, num_iterations=1000)
  mask = tensor('grpo_mask')[:, prompt:].long()
  trainer._step = 1
  trainer._buffered_inputs = [
    {
      'prompt_ids': tokens[:, :prompt],
      'prompt_mask': torch.ones_like(tokens[:, :prompt]),
      'completion_ids': tokens[:, prompt:],
      'completion_mask': mask,
      'advantages': tensor('grpo_advantages'),
      'old_per_token_logps': tensor('grpo_old_logp')[:, prompt:],
      'num_items_in_batch': mask.sum(),
    }
  ]
  return train(trainer, {})


def prepare_generate(rows: int):
  trainer = grpo_trainer(rows, group=8)
  trainer.model_wrapped = trainer.model
  prompts = ARRAYS['prompts'][:rows].tolist()

  def run() -> float:
    completions, _ = trainer._generate_single_turn(prompts, None, {}, 1)
    return float(sum(map(len, completions)))

  return run


def main():
  a = torch.ones(worker.SIZE, worker.SIZE)
  worker.serve(
    {
      'sft': prepare_sft,
      'dpo': prepare_dpo,
      'grpo': prepare_grpo,
      'generate_8': lambda: prepare_generate(8),
      'generate_64': lambda: prepare_generate(64),
    },
    lambda: float((a @ a)[0, 0]),
    {x.__name__: x.__version__ for x in (trl, torch, transformers)},
  )


if __name__ == '__main__':
  main()
