"""From prompts to texts: the sampler between a tokenizer's encode and decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from jaxtyping import Array, Key

from educe import hosts
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

  At most batch_size rows run side by side, the next entering as one ends. That number
  and the order of the prompts do not change what is sampled.

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
  table = stop_table(tokenizer, stop, vocabulary_size(model, params))
  if not ids:
    return []
  hidden = show is None or not hosts.is_first()
  with tqdm.tqdm(total=len(ids), desc=show, disable=hidden, leave=False) as bar:
    samples = sample(
      model,
      params,
      ids,
      key,
      max_new_tokens=max_new_tokens,
      eos_ids=tokenizer.eos_ids,
      stop=table,
      seeds=seeds,
      batch_size=batch_size,
      progress=bar.update,
      **sampling,
    )
  out = []
  for row, length in enumerate(samples.length):
    tokens = samples.tokens[row, :length].tolist()
    out.append(
      Completion(
        tokenizer.decode(tokens, skip_special=True, continuation=True),
        tokens,
        samples.logp[row, :length].tolist(),
        bool(samples.stopped[row]),
        samples.kept[row, :length].tolist(),
      )
    )
  return out


def stop_table(
  tokenizer: Tokenizer, stop: Sequence[str], vocabulary: int
) -> np.ndarray | None:
  """What `sampler.sample` is told of texts that end a completion; None: of none.

  vocabulary: of the model, which may be larger than the tokenizer's
  """
  if not stop:
    return None
  texts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
  return stop_strings.automaton(stop, texts + [b''] * (vocabulary - len(texts)))
