"""The vocabulary: every noun that crosses from one file to another.

Dimensions, here and everywhere:
  B rows (= P prompts × G completions, group-major) · T tokens · D model width
  V vocabulary · N flat tokens (= B·T) or samples · S cache slots · L layers

Units: log-probabilities, entropies and KL are in nats. Masks are 0/1 floats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Params = Any  # a pytree of arrays
Cache = Any  # a pytree of arrays


class Batch(NamedTuple):
  """Tokens and everything known about them before the step. `[B, T]` unless noted."""

  tokens: Int[Array, 'B T']
  mask: Float[Array, 'B T']  # 1 where tokens[b, t] is trained on
  positions: Int[Array, 'B T'] | None = None  # only when packed
  segments: Int[Array, 'B T'] | None = None  # 0 = padding, 1.. = documents
  sampler_logp: Float[Array, 'B T'] | None = None  # as the sampler reported it (nats)
  old_logp: Float[Array, 'B T'] | None = None  # at the start of this update (nats)
  ref_logp: Float[Array, 'B T'] | None = (
    None  # under the reference, or the teacher (nats)
  )
  advantages: Float[Array, 'B T'] | None = None
  returns: Float[Array, 'B T'] | None = None
  old_values: Float[Array, 'B T'] | None = None
  labels: Float[Array, 'B'] | None = None  # per-row label, margin or target
  # What B/P rows each go on from, −1 = padding at its end; `tokens` then are the rest,
  # from the prompt's last token on, with `positions` of their own (data/sharing.py).
  prefix: Int[Array, 'P S'] | None = None


class Scores(NamedTuple):
  """What a policy says of a batch, aligned to the token it scores: column 0 is 0."""

  logp: Float[Array, 'B T']  # log p(tokens[b, t] | tokens[b, :t]) (nats)
  entropy: Float[Array, 'B T']  # of the distribution that tokens[b, t] came from (nats)
  values: Float[Array, 'B T'] | None = None  # of tokens[b, :t], from a value head
  mean_logp: Float[Array, 'B T'] | None = None  # Σ_v log p(v) / V (nats); smoothing
  divergence: Float[Array, 'B T'] | None = None  # to a teacher's distribution (nats)
  aux: Any = (
    None  # dict[str, Mean] of a sparse model's auxiliary losses; no loss reads it
  )


class Mean(NamedTuple):
  """A sum and a count. Adding two of them is exact; averaging two means is not."""

  total: Any
  count: Any

  def __add__(self, other):  # a tuple's own + would concatenate
    return Mean(self.total + other.total, self.count + other.count)

  @property
  def value(self):
    return self.total / self.count


class Max(NamedTuple):
  """A maximum; adding two of them takes the larger. For metrics that are never negative:
  sums of them start at 0."""

  value: Any

  def __add__(self, other):
    return Max(jnp.maximum(self.value, other.value))


class Split(NamedTuple):
  """How operands lie on a mesh: rows over `rows`, the other dimension that is split (the
  vocabulary, heads) over `across`, the tokens of a row over `along`, the width of a head
  over `stored`: there it is kept in parts, and read whole. Each divides by its axes."""

  mesh: Any  # jax.sharding.Mesh or AbstractMesh
  rows: tuple[str, ...] = ()
  across: str | None = None
  along: str | None = None
  stored: str | None = None


class Head(NamedTuple):
  """hidden @ matrix · scale, soft-capped, are the logits."""

  matrix: Float[Array, 'D V']
  scale: float = 1.0
  softcap: float | None = None


class Model(NamedTuple):
  """A language model as pure functions of its params.

  init(key) -> params
  hidden(params, tokens, positions=None, segments=None, prefix=None, real=None)
      -> (states [B, T, D], aux)
      Causal; positions default to 0..T-1; tokens attend only inside their segment, or
      to their prefix and their own row (see Batch).
      aux: dict[str, Mean] of auxiliary losses (empty for a dense model), of the tokens
      that are `real` [B, T]; None: of all that are no padding.
  head(params) -> Head
  init_cache(batch_size, length) -> cache with `length` empty slots a row
  decode(params, cache, tokens [B, T], positions [B, T], slot) -> (states, cache)
      Writes T keys at slots slot..slot+T-1 of every row, then attends to each key
      whose stored position is in 0..position. A position of -1 marks padding.
  axes: params-shaped tree of tuples of logical axis names (see sharding.py)
  architecture: the frozen description that `convert` writes into config.json
  values(params, states [B, T, D], tokens, …) -> ([B, T], aux)
      float32, the value of what has been read up to and with token t; None without a
      value head (models/value_head.py). `states` are those of `hidden`, and so are the
      other arguments; aux: of a trunk of its own.
  aux_coefs: the weight in the objective of what is in aux, by name; what is not named is a
      metric alone. None: aux is always empty, and `real` need not be known
  """

  init: Callable[..., Params]
  hidden: Callable[..., tuple[Array, dict[str, Mean]]]
  head: Callable[[Params], Head]
  init_cache: Callable[..., Cache]
  decode: Callable[..., tuple[Array, Cache]]
  axes: Any
  architecture: Any
  values: Callable[..., tuple[Array, dict[str, Mean]]] | None = None
  aux_coefs: Mapping[str, float] | None = None


class Samples(NamedTuple):
  """What the sampler drew, one row a prompt."""

  tokens: Int[Array, 'B T']  # generated ids; 0 after the end
  logp: Float[Array, 'B T']  # at the sampling temperature, before truncation (nats)
  kept: Float[Array, 'B T']  # probability mass that top-k/top-p/min-p left standing
  length: Int[Array, 'B']  # tokens generated, the stop token included
  stopped: Int[Array, 'B']  # 1: an EOS id or stop string · 0: ran out of room


class Rollouts(NamedTuple):
  """P prompts × G completions, group-major: rows i·G … i·G+G−1 share prompt i."""

  tokens: Int[Array, 'B T']  # prompt, then completion, then 0s
  mask: Float[Array, 'B T']  # 1 where the policy drew tokens[b, t], its stop token too
  sampler_logp: Float[Array, 'B T']  # as `Samples.logp` where mask is 1, else 0 (nats)
  stopped: Int[Array, 'B']  # 1: ended by itself · 0: ran out of room
  rewards: Float[Array, 'B']  # NaN: not scored
  group: int  # G
  transcripts: Sequence[dict[str, Any]]  # a row each: id, prompt, completion, answer,
  # reward, rewards (each named part), outcome, length (tokens), stopped
  # Mass that top-k/top-p/min-p left standing where mask is 1, else 1; None: they cut
  # nothing off. The tokens came from log-probs of sampler_logp − log kept.
  kept: Float[Array, 'B T'] | None = None


class TrainState(NamedTuple):
  """Arrays only: exactly what a checkpoint holds."""

  step: Int[Array, '']
  params: Params
  opt_state: Any
  key: Key[Array, '']
  # Where the loss needs one: a frozen or lagging policy (what is trained of it; laid over
  # params by models/parts.over), or a teacher of another shape.
  reference: Params | None = None


class StateMismatch(ValueError):
  """A saved position belongs to other data or settings; the message names which."""


class Turn(NamedTuple):
  """What an environment answers to a transcript.

  info may hold `outcome` (one of OUTCOMES), `rewards` (each named part of the reward,
  None where it does not apply), `answer` (the text judged) and `error`.
  """

  observation: str | None  # shown to the policy next, None when done
  reward: float | None  # None: not scored
  done: bool
  info: Mapping[str, Any]


# 'judged': scored by someone to whom no answer is right or wrong.
OUTCOMES = ('verified', 'wrong', 'unparsable', 'timeout', 'error', 'judged')


class Environment(NamedTuple):
  """Prompts and what answers back. A single-turn one always says done.

  prompts: records with at least `prompt` (str or list of messages) and `answer`
  respond(prompt, transcript) -> Turn; transcript: the completion's text, turn by turn
  """

  prompts: Sequence[Mapping[str, Any]]
  respond: Callable[[Mapping[str, Any], Sequence[str]], Turn]


LossFn = Callable[[Scores, Batch], tuple[Mean, dict[str, Mean | Max]]]
ScoreFn = Callable[[Params, Params | None, Batch], Scores]


class Algorithm(NamedTuple):
  """Where batches come from.

  next_batch(state) -> (Batch of host arrays, info: dict of plain host values)
  loss: hyperparameters already bound
  data: whatever must survive a restart; has get_state() and set_state(state)
  temperature: of the distribution whose log-probs the loss sees
  rows: of a batch of this process
  reference_every: None: no reference is kept · 0: the initial policy, for ever · n: the
      policy as it was at the last step that n divides
  reference_alpha: share of the policy in what the reference then becomes; 1 is a copy
  asks_policy: next_batch reads the state's params, and so waits for its step
  group: rows that belong together, next to each other: a pair is two
  couples: the loss of a row depends on the others, so that a batch must not be cut
  shares: rows next to each other that may begin with the same prompt
  reference: params that the state's reference starts with, a teacher's; None: a copy
      of the policy's, where one is kept
  score: (params, the state's reference, batch) -> Scores, where it is more than
      losses/logprobs.score of the policy
  teacher: the model whose params that reference is, where `score` reads them
  fields: what a batch has beside tokens and mask, as `Batch` names it
  longer: tokens that its rows have more than those that they are made of
  """

  next_batch: Callable[[TrainState], tuple[Batch, dict[str, Any]]]
  loss: LossFn
  data: Any
  rows: int
  temperature: float = 1.0
  reference_every: int | None = None
  asks_policy: bool = False
  reference_alpha: float = 1.0
  group: int = 1
  couples: bool = False
  shares: int = 1
  reference: Params | None = None
  score: ScoreFn | None = None
  teacher: Model | None = None
  fields: tuple[str, ...] = ()
  longer: int = 0
