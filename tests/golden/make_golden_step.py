"""Makes step.json: three AdamW steps of the tiny Llama in torch, none of our code.

  python tests/golden/make_golden_step.py        # needs torch and transformers

Token mean over the masked batch, gradient clipped to norm 1, decay on all but norms and
embeddings, linear warm-up over 2 updates then a linear decay to 0 at update 10.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
RATE, STEPS, WARMUP = 0.01, 10, 2


def batch(vocab, rows=8, length=12):
  """The same NumPy recipe stands in tests/training/test_step.py."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
  trained = np.arange(length)[None] < rng.integers(2, length + 1, (rows, 1))
  mask = trained.astype(np.float32)
  mask[:, 0] = 0
  mask[2] = 0
  return tokens, mask


def rate(update):
  if update < WARMUP:
    return RATE * (update + 1) / (WARMUP + 1)
  return RATE * (1 - (update - WARMUP) / (STEPS - WARMUP))


def main():
  torch.set_default_dtype(torch.float64)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    HERE / 'tiny_llama', dtype=torch.float64, attn_implementation='eager'
  )
  names = dict(model.named_parameters())
  spared = [p for n, p in names.items() if 'norm' in n or 'embed' in n]
  decayed = [p for n, p in names.items() if not ('norm' in n or 'embed' in n)]
  optimizer = torch.optim.AdamW(
    [
      {'params': decayed, 'weight_decay': 0.1},
      {'params': spared, 'weight_decay': 0.0},
    ],
    betas=(0.9, 0.95),
    eps=1e-8,
  )
  tokens, mask = batch(model.config.vocab_size)
  ids, mask = torch.tensor(tokens, dtype=torch.long), torch.tensor(mask)
  history = []
  for update in range(3):
    logits = model(input_ids=ids).logits[:, :-1]
    log_p = torch.log_softmax(logits, -1)
    logp = log_p.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    count = mask[:, 1:].sum()
    loss = -(logp * mask[:, 1:]).sum() / count
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
      group['lr'] = rate(update)
    optimizer.step()
    history.append(
      {
        'loss': loss.item(),
        'entropy': ((entropy * mask[:, 1:]).sum() / count).item(),
        'grad_norm': norm.item(),
        'learning_rate': rate(update),
        'num_tokens': count.item(),
      }
    )
  # A fingerprint of the params after three updates.
  after = {
    'sum': sum(p.sum().item() for p in names.values()),
    'sum_of_squares': sum((p**2).sum().item() for p in names.values()),
  }
  golden = {'steps': history, 'params': after, 'torch': torch.__version__}
  (HERE / 'step.json').write_text(json.dumps(golden, indent=1) + '\n')


if __name__ == '__main__':
  main()
