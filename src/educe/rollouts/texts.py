"""From prompts to texts: the sampler between a tokenizer's encode and decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jaxtyping import Array, Key

from educe.data.chat import encode_prompt
from educe.data.tokenizer import Tokenizer
from educe.rollouts import stop_strings
from educe.rollouts.sampler import sample, vocabulary_size
from educe.types import Model, Params

Prompt = str | Sequence[Mapping[str, Any]]  # text to continue, or messages


class Completion(NamedTuple):
  text: str  # special tokens left out, a stop string kept
  tokens: list[int]  # everything generated, the stop token included
  logp: list[float]  # of each token, as `Samples.logp` (nats)
  stopped: bool  # False: cut off at max_new_tokens
  kept: list[float]  # at each token, as `Samples.kept`


def complete(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  prompts: Sequence[Prompt],
  **options: Any,
) -> list[Completion]:
  """One completion a prompt, in order: `generate` from what `encode_prompt` makes.

  options: those of `generate`
  """
  ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
  return generate(model, params, tokenizer, ids, **options)


def generate(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  ids: Sequence[Sequence[int]],
  *,
  key: Key[Array, ''],
  max_new_tokens: int,
  batch_size: int = 64,
  stop: Sequence[str] = (),
  seeds: Sequence[int] | None = None,
  show: str | None = None,
  **sampling: Any,
) -> list[Completion]:
  """One completion for each prompt of token ids; it ends at any EOS of the tokenizer.

  Prompts of like length go together, every batch is filled up to batch_size rows, and
  row seeds follow the order given: so few programs are compiled, and batch_size does
  not change what is sampled.

  stop: texts that end a completion too
  seeds: one integer a prompt; 0, 1, 2 … by default
  show: label of a progress bar on stderr; None shows none
  sampling: temperature, top_k, top_p, min_p of `sampler.sample`
  """
  if batch_size < 1:
    raise ValueError(f'batch_size must be at least 1, got {batch_size}')
  seeds = range(len(ids)) if seeds is None else seeds
  if len(seeds) != len(ids):
    raise ValueError(f'{len(seeds)} seeds for {len(ids)} prompts')
  table = None
  if stop:
    texts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    texts += [b''] * (vocabulary_size(model, params) - len(texts))
    table = stop_strings.automaton(stop, texts)
  params = jax.tree.map(jax.numpy.asarray, params)  # on the device once, not per batch
  order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
  batch_size = min(batch_size, len(order))
  out: dict[int, Completion] = {}
  with tqdm.tqdm(total=len(ids), desc=show, disable=show is None, leave=False) as bar:
    for start in range(0, len(order), max(batch_size, 1)):
      rows = order[start : start + batch_size]
      filled = rows + rows[-1:] * (batch_size - len(rows))
      samples = sample(
        model,
        params,
        [ids[row] for row in filled],
        key,
        max_new_tokens=max_new_tokens,
        eos_ids=tokenizer.eos_ids,
        stop=table,
        seeds=[seeds[row] for row in filled],
        **sampling,
      )
      host = jax.tree.map(np.asarray, samples)
      for index, row in enumerate(rows):
        length = host.length[index]
        tokens = host.tokens[index, :length].tolist()
        out[row] = Completion(
          tokenizer.decode(tokens, skip_special=True, continuation=True),
          tokens,
          host.logp[index, :length].tolist(),
          bool(host.stopped[index]),
          host.kept[index, :length].tolist(),
        )
      bar.update(len(rows))
  return [out[row] for row in range(len(ids))]
