"""What a policy of the chain world says to a prompt, with its exact chance.

A prompt has one right response: its trace and the stop token. So p(C|x) is what teacher
forcing gives, with nothing left to sample; and a response of depth 2 has three tokens,
few enough to list them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from educe.data.chat import encode_prompt
from educe.data.tokenizer import Tokenizer
from educe.environments import chain
from educe.measurement import enumeration
from educe.measurement.sequence_logp import sequence_logp
from educe.types import Model, Params

DEEP = 384  # prompts of depth 3, of 1,728


def prompt_sets(world: int = 0) -> dict[str, list[dict[str, Any]]]:
  """What is asked: pairs that RL trains on, pairs that it never sees, and other depths."""
  parts: dict[str, dict[str, Any]] = {
    'trained': dict(depth=2, part='train'),
    'heldout': dict(depth=2, part='heldout'),
    'deeper': dict(depth=3, size=DEEP),
    'single': dict(depth=1),
  }
  return {
    name: list(chain.make(world=world, **part).prompts) for name, part in parts.items()
  }


def right_logp(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  records: Sequence[Mapping[str, Any]],
  *,
  temperature: float = 1.0,
) -> Float[np.ndarray, 'P']:
  """log p(C|x), nats: of the trace and the stop token, records of one depth."""
  (stop,) = tokenizer.eos_ids
  prompts = [encode_prompt(tokenizer, record['prompt']) for record in records]
  traces = [[*tokenizer.encode(record['answer']), stop] for record in records]
  mask = [[0] * len(x) + [1] * len(y) for x, y in zip(prompts, traces, strict=True)]
  tokens = [[*x, *y] for x, y in zip(prompts, traces, strict=True)]
  rows = jnp.asarray(tokens), jnp.asarray(mask, jnp.float32)
  return sequence_logp(
    model, params, *rows, temperature=temperature, batch_size=len(records)
  )


def distribution(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  records: Sequence[Mapping[str, Any]],
) -> tuple[Float[np.ndarray, 'P Y'], Float[np.ndarray, 'P Y']]:
  """(p, correct) over all responses to prompts of depth 2, of three tokens at most.

  A response that has ended is one response, whatever would come after its stop token:
  its mass lies on the first of those, and the others have none.
  """
  (stop,) = tokenizer.eos_ids
  size = tokenizer.vocab_size
  prompts = np.array([encode_prompt(tokenizer, x['prompt']) for x in records])
  logp = enumeration.sequence_logp(model, params, prompts, np.arange(size), 3)
  p = np.exp(logp).reshape(-1, size, size, size)
  for ended in (p[:, stop].reshape(len(p), 1, -1), p[:, :, stop]):  # views
    total = ended.sum(-1)
    ended[...] = 0
    ended[..., 0] = total
  correct = np.zeros(p.shape)
  for row, record in zip(correct, records, strict=True):
    row[(*tokenizer.encode(record['answer']), stop)] = 1
  return p.reshape(len(p), -1), correct.reshape(len(p), -1)
