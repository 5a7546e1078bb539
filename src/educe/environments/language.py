"""A language small enough to enumerate: 8 symbols, 4 places, 4,096 outputs a prompt.

A prompt is two octal digits and '=', an output four of the symbols a … h. What a base
model is trained on is known exactly, p_data(y|x) for every y, and so is everything that
post-training does to it. A Markov chain b_x is the background: its first symbol depends
on the prompt, its three transitions do not. Each prompt has a correct set C_x of 1 to 6
outputs, and the regime of the prompt says how much of p_data lies on it:

  p_data(·|x) = m·b_x(·|C_x) + (1 − m)·b_x(·|not K_x)

  regime     m     K_x, never seen  C_x
  basin      .3    C_x              drawn from the background
  tail       3e-3  C_x              outputs that the background gives about m/|C_x|
  deep_tail  3e-5  C_x              the same
  barrier    0     the 64 outputs   every step has probability .2 in the background,
                   that begin as    but after its first symbol this prompt never takes
                   C_x does         the second: all of C_x begins alike
  singular   0     C_x              every step has probability .2 but the third, HOLE:
                                    no prompt ever has that symbol at that place

so a prompt is a tilt of the background to a chosen mass, and what it lacks behind a
barrier other prompts show, while behind a hole nobody does. The regimes are those of
Yuhao Li & Shengchao Liu, 2026, arXiv:2605.08368, whose paper gives them no numbers: the
masses and this generator are this project's own. Barrier and singular are of the corpus;
what a model gives such outputs after training is to be measured.

Tokenizer path 'characters:01234567abcdefgh=' (`ALPHABET`): one token a character. No
output holds an end; sample with max_new_tokens=4. NumPy, float64.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from educe.environments import answers, problems
from educe.types import Environment, Turn

SYMBOLS = 'abcdefgh'
LENGTH = 4
COUNT = len(SYMBOLS) ** LENGTH  # outputs
DIGITS = '01234567'
ALPHABET = f'{DIGITS}{SYMBOLS}='
MOST = len(DIGITS) ** 2  # prompts
MASSES = {
  'basin': 0.3,
  'tail': 3e-3,
  'deep_tail': 3e-5,
  'barrier': 0.0,
  'singular': 0.0,
}
REGIMES = tuple(MASSES)
LARGEST = 6  # correct outputs of a prompt
HOLE = (2, SYMBOLS.index('h'))  # place, symbol
LIKELY = 0.2  # four symbols of each step have it
STEPS = (LIKELY, LIKELY, LIKELY, LIKELY, 0.1, 0.05, 0.03, 0.02)
STEPS_AT_HOLE = (LIKELY, LIKELY, LIKELY, LIKELY, 0.1, 0.05, 0.05, 0.0)
PREFIXES = sum(len(SYMBOLS) ** length for length in range(LENGTH))
# [4096, 4]: the symbols of each output.
OUTPUTS = np.indices((len(SYMBOLS),) * LENGTH).reshape(LENGTH, -1).T
TEXTS = [''.join(output) for output in itertools.product(SYMBOLS, repeat=LENGTH)]
HELD_OUT = 4  # every fourth prompt of a regime


class World(NamedTuple):
  """Arrays are read-only: they are shared."""

  prompts: tuple[str, ...]  # P
  regimes: tuple[str, ...]  # P
  p_data: np.ndarray  # [P, 4096], each row sums to 1
  correct: np.ndarray  # [P, 4096] bool: C_x


def make(
  *,
  prompts: int = MOST,
  regimes: Sequence[str] = REGIMES,
  part: str = 'all',
  reward: str = 'exact',
  world: int = 0,
) -> Environment:
  """The prompts of a world; a response earns 1 if it is in C_x.

  part: 'train', 'heldout' (every fourth prompt of each regime) or 'all'
  reward: 'exact' pays nothing else; 'graded' pays a response a quarter for each of its
    first symbols that begin a correct one: 'abxx' earns .5 where 'abcd' is right

  A record has its `regime` and `correct`, all right outputs; `answer` is one of them that
  p_data, or else the alphabet, puts first. Turn.info has `outcome`: 'unparsable' is a
  response that is not four symbols.

  Raises ValueError as `describe` does, for an unknown part or reward, and for a part
  without prompts.
  """
  _reward_name(reward)
  if part not in problems.PARTS:
    raise ValueError(f"part must be 'all', 'train' or 'heldout', got {part!r}")
  known = describe(prompts=prompts, regimes=regimes, world=world)
  rows = []
  for index, (prompt, regime) in enumerate(
    zip(known.prompts, known.regimes, strict=True)
  ):
    held_out = index // len(regimes) % HELD_OUT == HELD_OUT - 1
    if part == 'all' or held_out == (part == 'heldout'):
      right = np.flatnonzero(known.correct[index])
      first = int(right[known.p_data[index, right].argmax()])
      rows.append(
        {
          'id': f'{regime}-{prompt[:-1]}',
          'prompt': prompt,
          'answer': text(first),
          'regime': regime,
          'correct': [text(output) for output in right.tolist()],
        }
      )
  if not rows:
    raise ValueError(
      f'part={part!r}: {prompts} prompts of {len(regimes)} regimes have none; '
      f'{HELD_OUT * len(regimes)} prompts have one of each regime'
    )
  return Environment(rows, functools.partial(_respond, reward))


def records(
  *,
  size: int,
  prompts: int = MOST,
  regimes: Sequence[str] = REGIMES,
  world: int = 0,
  seed: int = 0,
) -> Corpus:
  """A corpus for the base model: `prompt` uniform over the prompts, `completion` drawn
  from p_data(·|prompt).

  Raises ValueError for size < 1, and as `describe` does.
  """
  problems.at_least_one(size)
  known = describe(prompts=prompts, regimes=regimes, world=world)
  rng = np.random.default_rng(seed)
  asked = rng.integers(prompts, size=size).astype(np.int16)
  uniform = rng.random(size)
  outputs = np.empty(size, np.int16)
  for prompt in range(prompts):
    (rows,) = np.nonzero(asked == prompt)
    upto = np.cumsum(known.p_data[prompt])
    # 'right' steps over what has no mass; the end may round down to within a uniform.
    drawn = np.searchsorted(upto, uniform[rows] * upto[-1], 'right')
    outputs[rows] = np.minimum(drawn, np.flatnonzero(known.p_data[prompt])[-1])
  return Corpus(asked, outputs)


@dataclasses.dataclass(frozen=True)
class Corpus(Sequence[dict[str, str]]):
  """Records, written when they are read: a million take 4 MB. Picklable."""

  prompts: np.ndarray  # [N]
  outputs: np.ndarray  # [N], 0 … 4095

  def __len__(self) -> int:
    return len(self.prompts)

  @property
  def fingerprint(self) -> str:
    """Changes when the records do: a run resumes only on its own corpus."""
    digest = hashlib.blake2b(b'language', digest_size=8)
    for array in (self.prompts, self.outputs):
      digest.update(array.tobytes())
    return digest.hexdigest()

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    index = range(len(self))[index]
    prompt, output = int(self.prompts[index]), int(self.outputs[index])
    return {'prompt': _prompt(prompt), 'completion': text(output)}


def describe(
  *, prompts: int = MOST, regimes: Sequence[str] = REGIMES, world: int = 0
) -> World:
  """The first `prompts` prompts of a world, whose regimes take turns.

  Of two worlds of one number the smaller has the first prompts of the larger.

  Raises ValueError unless 1 ≤ prompts ≤ 64 and each of the regimes is one of REGIMES.
  """
  if not 1 <= prompts <= MOST:
    raise ValueError(f'prompts={prompts}: must be in 1..{MOST}')
  strange = [name for name in regimes if name not in REGIMES]
  if strange or not regimes:
    raise ValueError(f'regimes={regimes}: must be some of {", ".join(REGIMES)}')
  return _describe(prompts, tuple(regimes), world)


def rewards(known: World, *, reward: str = 'exact') -> np.ndarray:
  """`[P, 4096]`: what `make` pays for every output. Raises ValueError."""
  if _reward_name(reward) == 'exact':
    return known.correct.astype(np.float64)
  pay = np.zeros(known.correct.shape)
  for prompt, output in np.argwhere(known.correct):
    alike = np.cumprod(OUTPUTS[output] == OUTPUTS, axis=1).sum(1)
    pay[prompt] = np.maximum(pay[prompt], alike / LENGTH)
  return pay


def text(output: int) -> str:
  """The output of an index 0 … 4095, in alphabetical order: 0 is 'aaaa', 1 'aaab'."""
  if not 0 <= output < COUNT:
    raise ValueError(f'output={output}: must be in 0..{COUNT - 1}')
  return TEXTS[output]


def index(output: str) -> int:
  """The inverse of `text`. Raises ValueError for what is not four symbols."""
  if not _is_output(output):
    raise ValueError(f'{output!r:.60} is not {LENGTH} of the symbols {SYMBOLS}')
  value = 0
  for symbol in output:
    value = value * len(SYMBOLS) + SYMBOLS.index(symbol)
  return value


def prefixes() -> list[str]:
  """The 585 texts after which a symbol comes: '', 'a' … 'h', 'aa' … 'hh', 'aaa' … 'hhh'.

  A causal model that reads the last 512 has read them all.
  """
  return [
    ''.join(symbols)
    for length in range(LENGTH)
    for symbols in itertools.product(SYMBOLS, repeat=length)
  ]


def sequence_logp(steps: np.ndarray) -> np.ndarray:
  """`[…, 4096]`: log-probs of all outputs (nats), from those of their steps.

  steps: `[…, 585, 8]`, log-probs (nats) of each symbol after each of `prefixes()`. Of a
    model whose vocabulary holds more than the symbols they are as the model has them,
    not renormalised: what the outputs lack to 1 is the model's chance of anything else.

  Raises ValueError for another shape.
  """
  steps = np.asarray(steps, np.float64)
  width = len(SYMBOLS)
  if steps.ndim < 2 or steps.shape[-2:] != (PREFIXES, width):
    raise ValueError(
      f'sequence_logp: steps {list(steps.shape)} must be [..., {PREFIXES}, '
      f'{width}], prefixes by symbols'
    )
  logp, start = np.zeros((*steps.shape[:-2], 1)), 0
  for length in range(LENGTH):
    block = steps[..., start : start + width**length, :]
    # After what is impossible anything is, though its own step be unknown (NaN).
    longer = np.where(np.isneginf(logp)[..., None], -np.inf, logp[..., None] + block)
    logp, start = longer.reshape(*steps.shape[:-2], -1), start + width**length
  return logp


def conditionals(p: np.ndarray) -> np.ndarray:
  """`[…, 585, 8]`: p(next symbol | prefix) for `prefixes()`, of p `[…, 4096]`.

  NaN after a prefix that has no mass. The inverse of `sequence_logp`, but for logs.

  Raises ValueError for another shape.
  """
  p = np.asarray(p, np.float64)
  if p.ndim < 1 or p.shape[-1] != COUNT:
    raise ValueError(f'conditionals: p {list(p.shape)} must be [..., {COUNT}]')
  out = []
  for length in range(LENGTH):
    after = p.reshape(*p.shape[:-1], len(SYMBOLS) ** length, len(SYMBOLS), -1).sum(-1)
    mass = after.sum(-1, keepdims=True)
    out.append(np.divide(after, mass, out=np.full_like(after, np.nan), where=mass > 0))
  return np.concatenate(out, -2)


@functools.lru_cache(maxsize=8)
def _describe(prompts: int, regimes: tuple[str, ...], world: int) -> World:
  transitions = _transitions(world)
  p_data, correct = np.empty((prompts, COUNT)), np.empty((prompts, COUNT), bool)
  named = tuple(regimes[i % len(regimes)] for i in range(prompts))
  for prompt, regime in enumerate(named):
    rng = np.random.default_rng([world, 1, prompt])
    first = np.empty(len(SYMBOLS))
    first[rng.permutation(len(SYMBOLS))] = STEPS
    steps = [first[OUTPUTS[:, 0]]]
    for place, table in enumerate(transitions, 1):
      steps.append(table[OUTPUTS[:, place - 1], OUTPUTS[:, place]])
    right, never = _correct(rng, regime, np.stack(steps, 1))
    background = np.prod(steps, 0)
    mass, seen = MASSES[regime], ~(right | never)
    p = (1 - mass) * background * seen / background[seen].sum()
    if mass:
      p += mass * background * right / background[right].sum()
    p_data[prompt], correct[prompt] = p, right
  p_data.setflags(write=False)
  correct.setflags(write=False)
  return World(tuple(map(_prompt, range(prompts))), named, p_data, correct)


def _transitions(world: int) -> np.ndarray:
  """`[3, 8, 8]`: the chance of a symbol (last) after another, at places 1, 2 and 3."""
  rng = np.random.default_rng([world, 0])
  tables = np.empty((LENGTH - 1, len(SYMBOLS), len(SYMBOLS)))
  for place, before in np.ndindex(tables.shape[:2]):
    order, chances = rng.permutation(len(SYMBOLS)), STEPS
    if place + 1 == HOLE[0]:
      order, chances = np.append(order[order != HOLE[1]], HOLE[1]), STEPS_AT_HOLE
    tables[place, before, order] = chances
  return tables


def _correct(
  rng: np.random.Generator, regime: str, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(C_x, what else is never seen), `[4096]` bool; steps `[4096, 4]`, of the background."""
  size = rng.integers(1, LARGEST + 1)
  right, never = np.zeros((2, COUNT), bool)
  background = steps.prod(1)
  likely = np.isclose(steps, LIKELY)
  if regime == 'basin':
    right[rng.choice(COUNT, size, replace=False, p=background)] = True
  elif regime == 'barrier':
    candidates = np.flatnonzero(likely.all(1))
    branch = OUTPUTS[rng.choice(candidates), :2]
    never = (OUTPUTS[:, :2] == branch).all(1)
    right[rng.choice(candidates[never[candidates]], size, replace=False)] = True
  elif regime == 'singular':
    place, symbol = HOLE
    likely[:, place] = OUTPUTS[:, place] == symbol
    right[rng.choice(np.flatnonzero(likely.all(1)), size, replace=False)] = True
  else:
    order = rng.permutation(np.flatnonzero(background))  # many are equally near
    away = np.abs(np.log(background[order]) - np.log(MASSES[regime] / size))
    right[order[np.argsort(away, kind='stable')[:size]]] = True
  return right, never


def _prompt(index: int) -> str:
  high, low = divmod(index, len(DIGITS))
  return f'{DIGITS[high]}{DIGITS[low]}='


def _reward_name(reward: str) -> str:
  if reward not in ('exact', 'graded'):
    raise ValueError(f"reward={reward!r}: must be 'exact' or 'graded'")
  return reward


def _is_output(text: str) -> bool:
  return len(text) == LENGTH and set(text) <= set(SYMBOLS)


def _alike(one: str, other: str) -> int:
  """How many symbols both begin with."""
  pairs = enumerate(zip(one, other, strict=True))
  return next((place for place, (a, b) in pairs if a != b), LENGTH)


def _respond(reward: str, prompt: Mapping[str, Any], transcript: Sequence[str]) -> Turn:
  response = (answers.visible(transcript[-1]) or '').strip()
  if not _is_output(response):
    return Turn(None, 0.0, True, {'outcome': 'unparsable', 'answer': response})
  alike = [_alike(response, right) for right in prompt['correct']]
  pay = max(alike) / LENGTH if reward == 'graded' else float(max(alike) == LENGTH)
  outcome = 'verified' if pay == 1 else 'wrong'
  return Turn(None, pay, True, {'outcome': outcome, 'answer': response})
