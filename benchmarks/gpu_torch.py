"""What torch and transformers make of the same work as gpu.py; a process of its own.

  python benchmarks/gpu_torch.py logprob '{"tokens": 16384, "width": 4096, …}'

logprob  forward, and forward + backward, of log-prob and entropy: full logits; in chunks
         that are made again backward, compiled; linear_cross_entropy, where torch has one
         (the loss alone, without entropy)
train    a step of a Llama of transformers with AdamW, autocast to bfloat16, its logits
         whole; as it is, and through torch.compile
decode   its `generate`, sampling

Prints one JSON object: rows, of which those that did not run say why.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
ENTROPY = 0.01


def settle():
  if CUDA:
    torch.cuda.synchronize()


def measure(way: Callable[[], Any], repeats: int) -> dict[str, Any]:
  """Median seconds after two calls that compile and warm up, and memory at the peak."""
  try:
    for _ in range(2):
      way()
    settle()
    if CUDA:
      torch.cuda.reset_peak_memory_stats()
      before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
      start = time.perf_counter()
      way()
      settle()
      times.append(time.perf_counter() - start)
  except Exception as error:  # no compiler, no memory
    return {'skipped': f'{type(error).__name__}: {error}'.splitlines()[0][:300]}
  row = {'seconds': statistics.median(times)}
  if CUDA:
    row['above_mb'] = (torch.cuda.max_memory_allocated() - before) / 1e6
  return row


def scores(hidden, head, targets):
  """(log-probs, entropies) of `[N]` targets from all logits, in float32."""
  log_p = (hidden @ head).float().log_softmax(-1)
  return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def logprob(tokens: int, width: int, vocab: int, chunks, repeats: int) -> dict:
  def draw(*shape):
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

  hidden, head = draw(tokens, width), draw(width, vocab) / width**0.5
  hidden.requires_grad_()
  head.requires_grad_()
  targets = torch.randint(vocab, (tokens,), device=DEVICE)
  worth = torch.randn(tokens, device=DEVICE)

  def in_chunks(one, rows):
    cuts = range(0, tokens, rows)
    done = [one(hidden[i : i + rows], head, targets[i : i + rows]) for i in cuts]
    return tuple(map(torch.cat, zip(*done, strict=True)))

  # A tile's logits are not kept, but made again in the backward pass.
  again = functools.partial(checkpoint, torch.compile(scores), use_reentrant=False)
  ways = {
    'full logits': lambda: scores(hidden, head, targets),
    'full logits, compiled': functools.partial(
      torch.compile(scores), hidden, head, targets
    ),
    **{
      f'chunked {rows}, compiled': functools.partial(in_chunks, again, rows)
      for rows in chunks
    },
  }
  rows = {}
  for name, way in ways.items():

    def both(way=way):
      hidden.grad = head.grad = None
      logp, entropy = way()
      (worth * (logp + ENTROPY * entropy)).sum().backward()

    with torch.no_grad():
      rows[f'{name}, forward'] = measure(way, repeats)
    rows[f'{name}, forward + backward'] = measure(both, repeats)
  name = 'linear_cross_entropy, forward + backward'
  fused = getattr(F, 'linear_cross_entropy', None)
  if fused is None:
    rows[name] = {'skipped': f'torch {torch.__version__} has none'}
  else:
    weight = head.detach().T.contiguous().requires_grad_()

    def total():
      hidden.grad = weight.grad = None
      fused(hidden, weight, targets).backward()

    rows[name] = measure(total, repeats)
  return {'rows': rows}


def llama(a: dict[str, Any]):
  import transformers

  config = transformers.LlamaConfig(
    vocab_size=a['vocab_size'],
    hidden_size=a['dim'],
    intermediate_size=a['ffn'],
    num_hidden_layers=a['layers'],
    num_attention_heads=a['heads'],
    num_key_value_heads=a['kv_heads'],
    head_dim=a['head_dim'],
    max_position_embeddings=a['max_length'],
    tie_word_embeddings=a['tied'],
    attn_implementation='sdpa',
    eos_token_id=None,
    pad_token_id=0,
  )
  with torch.device(DEVICE):
    return transformers.LlamaForCausalLM(config)


def sft(logp, before, advantage):
  return -logp.mean()


def dpo(logp, before, advantage, beta=0.1):
  margin = (logp - before).sum(1)
  return -F.logsigmoid(beta * (margin[::2] - margin[1::2])).mean()


def grpo(logp, before, advantage, clip=0.2):
  ratio = (logp - before).exp()
  worse = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
  return -worse.mean()


def train(architecture, rows: int, length: int, losses, repeats: int) -> dict:
  V = architecture['vocab_size']
  ids = torch.randint(V, (rows, length), device=DEVICE)
  before = torch.full((rows, length - 1), -float(torch.tensor(V).log()), device=DEVICE)
  advantage = torch.randn(rows, 1, device=DEVICE)
  of = {'sft': sft, 'dpo': dpo, 'grpo': grpo}
  found = {}
  for how in ('eager', 'compiled'):
    model = llama(architecture).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=CUDA)
    net = torch.compile(model) if how == 'compiled' else model
    for name in losses:

      def step(loss=of[name], net=net, optimizer=optimizer):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16):
          logits = net(input_ids=ids, use_cache=False).logits[:, :-1]
        log_p = logits.float().log_softmax(-1)
        logp = log_p.gather(2, ids[:, 1:, None])[..., 0]
        loss(logp, before, advantage).backward()
        optimizer.step()

      row = measure(step, repeats)
      if 'seconds' in row:
        row['tokens_per_second'] = rows * length / row['seconds']
      found[f'{name}, {how}'] = row
    del model, net, optimizer
  return {'rows': {name: row for name, row in found.items()}}


def decode(architecture, batches, prompt: int, new_tokens: int, repeats: int) -> dict:
  model = llama(architecture).eval().to(torch.bfloat16)
  found = {}
  for many in batches:
    ids = torch.randint(architecture['vocab_size'], (many, prompt), device=DEVICE)

    def run(new, ids=ids):
      model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        min_new_tokens=new,
        max_new_tokens=new,
      )

    whole, one = (
      measure(functools.partial(run, new), min(repeats, 3)) for new in (new_tokens, 1)
    )
    row = whole
    if 'seconds' in whole and 'seconds' in one:
      step = (whole['seconds'] - one['seconds']) / (new_tokens - 1)
      row = {
        'seconds': step,
        'tokens_per_second': many / step,
        'prefill_seconds': one['seconds'],
        'tokens_per_second_with_prefill': many * new_tokens / whole['seconds'],
      }
    found[f'{many} rows'] = row
  return {'rows': found}


if __name__ == '__main__':
  part, work = sys.argv[1:]
  made = {'logprob': logprob, 'train': train, 'decode': decode}[part](
    **json.loads(work)
  )
  print(json.dumps({**made, 'version': torch.__version__}))
