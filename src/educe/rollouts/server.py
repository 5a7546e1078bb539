"""An OpenAI-compatible engine in another process: sampling of tokens, and judging.

Sampling is token in, token out: a prompt goes as ids to POST /v1/completions, and what
comes back must be the ids that were drawn and the engine's log-prob of each. vLLM (0.10.2
or newer) and SGLang answer so when asked with `return_token_ids`; an engine that sends text
alone is refused, for that text, tokenised again, may be other tokens than those drawn.

What a log-prob is differs: the losses need it at the sampling temperature and before
truncation. vLLM's is at temperature 1 (--logprobs-mode=raw_logprobs, the default), or of
all that the engine did to the logits (processed_logprobs); SGLang's is at the temperature,
before top-k, top-p and min-p. They agree at temperature 1 without truncation; any other
temperature needs `tempered`. Truncation is refused: no engine says how much mass it kept.

Engine and trainer round differently even with the same weights: loss.sampler_correction
weighs that, and `sampling/logp_difference` shows it. How the engine comes by the policy's
weights is rollouts/publishing.py.

Several processes ask the one engine for a share of the rows each, and tell each other what
they heard; a seed belongs to its row, so that it matters to nobody who asked.
"""

from __future__ import annotations

import re
import socket
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Key

from educe import hosts
from educe.data.tokenizer import Tokenizer
from educe.rollouts import http_client, stop_strings
from educe.rollouts.http_client import Body, Client, EndpointError, Unread
from educe.rollouts.sampler import vocabulary_size
from educe.rollouts.texts import Completion
from educe.types import Model, Params

T = TypeVar('T')
LEAST = -3.4e38  # of float32, as the losses read it
TOKEN_BYTES = 1 << 10  # of an answer, a token: its id, text, offset and log-probs

# What tells an engine to read new weights: POSTs, in this order, to the root of its url.
# Prefixes that were read with the old weights must be forgotten; SGLang does it itself.
RELOADS: dict[str, tuple[tuple[str, Body], ...]] = {
  'vllm': (
    (
      '/collective_rpc',
      {'method': 'reload_weights', 'kwargs': {'weights_path': '{folder}'}},
    ),
    ('/reset_prefix_cache', {}),
  ),
  'sglang': (('/update_weights_from_disk', {'model_path': '{folder}'}),),
}


class Server(NamedTuple):
  client: Client
  tempered: bool
  export_every: int
  reload: Sequence[tuple[str, Body]]


def connect(
  *,
  url: str,
  model: str,
  reload: str | Sequence[Any] = 'vllm',
  export_every: int = 1,
  tempered: bool = False,
  api_key_env: str | None = None,
  timeout: float = 600.0,
  retries: int = 3,
  backoff: float = 1.0,
) -> Server:
  """The engine that rollouts are sampled by; asks it nothing yet.

  Args:
    url: of the engine, up to and with /v1
    model: its name there (--served-model-name)
    reload: how it is told to read new weights: 'vllm', 'sglang', or POSTs of your own,
      each (path, JSON), in which {folder} stands for the exported folder and {step} for
      its name.
    export_every: rounds from one export of the policy's weights to the next; those in
      between are sampled by an older policy (`sampling/staleness_steps`).
    tempered: the engine's log-probs are at the sampling temperature: SGLang's, and vLLM's
      under --logprobs-mode=processed_logprobs.
    api_key_env: name of the environment variable that holds the key; None sends none.
    timeout: seconds for one completion, or for new weights to be read.
    retries, backoff (seconds): see http_client.Client

  Raises ValueError for settings out of range.
  """
  section = 'rollouts.server'
  if export_every < 1:
    raise ValueError(f'{section}.{export_every=} must be at least 1')
  if isinstance(reload, str) and reload not in RELOADS:
    raise ValueError(
      f'{section}.reload={reload!r} must be one of {list(RELOADS)}, or POSTs as '
      "(('/path', {'model_path': '{folder}'}),)"
    )
  posts = RELOADS[reload] if isinstance(reload, str) else tuple(reload)
  for post in posts:
    if not (
      isinstance(post, list | tuple)
      and len(post) == 2
      and str(post[0]).startswith('/')
      and isinstance(post[1], Mapping)
    ):
      raise ValueError(f"{section}.reload: {post!r} should be ('/path', {{…}})")
  client = http_client.connect(
    section,
    url=url,
    model=model,
    api_key_env=api_key_env,
    timeout=timeout,
    retries=retries,
    backoff=backoff,
  )
  return Server(client, tempered, export_every, posts)


def check(server: Server, *, temperature, top_k, top_p, min_p) -> None:
  """Raises ValueError for sampling whose log-probs the engine would not tell, and for a
  url that is another engine on another host. All processes must call it."""
  if top_k or top_p < 1 or min_p:
    raise ValueError(
      f'rollouts: {top_k=}, {top_p=}, {min_p=} with rollouts.server: no engine says how '
      'much probability they cut off; leave them off'
    )
  if temperature != 1 and not server.tempered:
    raise ValueError(
      f'rollouts.{temperature=} with rollouts.server: an engine may report log-probs at '
      'temperature 1; if these are at the sampling temperature (SGLang, or vLLM with '
      '--logprobs-mode=processed_logprobs) set rollouts.server.tempered=True'
    )
  host = urllib.parse.urlsplit(server.client.url).hostname or ''
  if re.fullmatch(r'localhost|127\.[\d.]+|::1|0\.0\.0\.0', host):
    machines = set(hosts.exchange(socket.gethostname()))
    if len(machines) > 1:  # and the weights are told to one engine alone
      raise ValueError(
        f'rollouts.server.url={server.client.url!r} is another engine on each of '
        f'{len(machines)} machines; write the name that all of them know it by'
      )


def chat(
  client: Client,
  questions: Sequence[str],
  read: Callable[[str], T | None],
  *,
  temperature: float,
  max_tokens: int,
) -> list[T | None]:
  """What `read` reads in the answer to each question, in order; None where it has none.

  read: the answer's text, without what was thought, -> a verdict, or None to ask again

  Raises EndpointError as http_client.ask does.
  """

  def verdict(_, answer) -> T:
    try:
      content = answer['choices'][0]['message']['content']
    except (KeyError, IndexError, TypeError):
      raise Unread(f'no chat completion: {answer!r:.120}') from None
    if not isinstance(content, str):
      raise Unread(f'no text in the answer: {content!r:.120}')
    text = content.rpartition('</think>')[2]  # what was thought is no verdict
    found = read(text)
    if found is None:
      raise Unread(f'no verdict in {" ".join(text.split())[:120]!r}')
    return found

  bodies = [
    {
      'model': client.model,
      'messages': [{'role': 'user', 'content': question}],
      'temperature': temperature,
      'max_tokens': max_tokens,
    }
    for question in questions
  ]
  return http_client.ask(client, '/chat/completions', bodies, verdict)


def generate(
  server: Server,
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  ids: Sequence[Sequence[int]],
  *,
  key: Key[Array, ''],
  max_new_tokens: int,
  temperature: float = 1.0,
  batch_size: int = 64,
  stop: Sequence[str] = (),
  seeds: Sequence[int] | None = None,
  **off: Any,
) -> list[Completion]:
  """What `texts.generate` is, by the engine: one completion for each prompt of token ids.

  One request a row, batch_size of them under way at once, each with a seed of its own
  made from (key, the row's seed); whether the engine keeps to it is the engine's affair.
  What it draws behind an EOS of the tokenizer or a stop string is left out. All processes
  must call it with the same rows; each asks for its share of them, with its share of
  batch_size, and all return the same.

  params: only their shapes are read; the engine has weights of its own
  off: truncations, which `check` has refused

  Raises EndpointError for an engine that does not answer, or not with tokens and finite
  log-probs; where it is another process that hears so, ValueError with its words.
  """
  seeds = range(len(ids)) if seeds is None else seeds
  if len(seeds) != len(ids):
    raise ValueError(f'{len(seeds)} seeds for {len(ids)} prompts')
  vocabulary, table = vocabulary_size(model, params), None
  if stop:
    texts = [tokenizer.token_bytes(token) for token in range(vocabulary)]
    table = stop_strings.automaton(stop, texts)
  bits = np.asarray(jax.random.key_data(key)).ravel().tolist()
  settings = {
    'model': server.client.model,
    'max_tokens': max_new_tokens,
    'temperature': temperature,
    # Neutral, and said: engines take what is left out from generation_config.json.
    'top_p': 1.0,
    'top_k': -1,
    'min_p': 0.0,
    'repetition_penalty': 1.0,
    'presence_penalty': 0.0,
    'frequency_penalty': 0.0,
    'stop': list(stop),
    'stop_token_ids': list(tokenizer.eos_ids),
    'add_special_tokens': False,
    'logprobs': 1,
    'return_token_ids': True,
  }
  bodies = [
    {
      **settings,
      'prompt': [int(token) for token in prompt],
      'seed': int(np.random.SeedSequence([*bits, seed]).generate_state(1)[0] >> 1),
    }
    for prompt, seed in zip(ids, seeds, strict=True)
  ]
  client = server.client._replace(
    concurrency=max(1, batch_size // hosts.count()),
    largest=http_client.LARGEST + TOKEN_BYTES * max_new_tokens,
  )

  def read(row, answer) -> Completion:
    tokens, logp, why = _drawn(client, answer, bodies[row]['prompt'])
    wrong = [t for t in tokens if not (type(t) is int and 0 <= t < vocabulary)]
    if wrong:
      raise EndpointError(
        f'{client.name}: token {wrong[0]!r} is not of the {vocabulary} that the policy '
        'knows; does it serve another model?'
      )
    if len(tokens) > max_new_tokens:
      raise EndpointError(
        f'{client.name}: {len(tokens)} tokens, of {max_new_tokens} asked for'
      )
    end = _end(tokens, tokenizer.eos_ids, table)
    if end is None and (why != 'length' or len(tokens) < max_new_tokens):
      raise EndpointError(
        f'{client.name}: a completion ended after {len(tokens)} of {max_new_tokens} '
        f"tokens (finish_reason {why!r}) without an EOS of the policy's tokenizer, "
        f'{list(tokenizer.eos_ids)}, or a stop string: is its context shorter '
        '(--max-model-len), or its EOS another one?'
      )
    tokens, logp = tokens[:end], logp[:end]
    text = tokenizer.decode(tokens, skip_special=True, continuation=True)
    return Completion(text, tokens, logp, end is not None, [1.0] * len(tokens))

  def ask(rows: list[int]) -> list[Completion | None]:
    mine = [bodies[row] for row in rows]
    return http_client.ask(
      client, '/completions', mine, lambda index, answer: read(rows[index], answer)
    )

  # error_limit is 0: there is one for every row.
  return [Completion(*done) for done in hosts.shared(len(ids), 1, ask)]


def _drawn(client: Client, answer: Any, prompt) -> tuple[list[int], list[float], str]:
  """(ids, log-probs, finish_reason) of a completion, as many of the one as of the other."""
  try:
    choice = answer['choices'][0]
    tokens, why = choice.get('token_ids'), choice.get('finish_reason')
    read, told = choice.get('prompt_token_ids'), choice.get('logprobs') or {}
    logp = told.get('token_logprobs')
  except (KeyError, IndexError, TypeError, AttributeError):
    raise Unread(f'no completion: {answer!r:.120}') from None
  if why not in (
    'stop',
    'length',
  ):  # 'abort', say: it was shut down, or short of memory
    raise Unread(f'finish_reason {why!r}')
  if not isinstance(tokens, list) or not tokens:
    raise EndpointError(
      f'{client.name}: it answers without token_ids, and its text is not tokenised again: '
      'the tokens trained on must be those drawn; use vLLM 0.10.2 or newer, or SGLang'
    )
  if not isinstance(logp, list) or len(logp) != len(tokens):
    count = len(logp) if isinstance(logp, list) else 'no'
    raise EndpointError(
      f'{client.name}: {count} log-probs (logprobs.token_logprobs) for {len(tokens)} tokens'
    )
  for value in logp:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not LEAST < value < 1e-3:
      raise EndpointError(
        f'{client.name}: {value!r} is no log-prob; are the weights that it serves finite, '
        'and its log-probs no logits (--logprobs-mode)?'
      )
  if isinstance(read, list) and read != prompt:
    raise EndpointError(
      f'{client.name}: it read a prompt of {len(read)} tokens that is not the one of '
      f'{len(prompt)} that was sent'
    )
  return tokens, [float(value) for value in logp], why


def _end(tokens: Sequence[int], eos_ids: Sequence[int], table) -> int | None:
  """How many tokens there are with the first that ends it; None if none does."""
  state = 0
  for count, token in enumerate(tokens, 1):
    if table is not None:
      state = table[state, token]
      if state == len(table) - 1:
        return count
    if token in eos_ids:
      return count
  return None
