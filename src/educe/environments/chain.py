"""Compositions of random permutations: a world small enough to train from nothing.

F_0 … F_5 are random derangements of the symbols a … h. A prompt names functions, a
symbol and '='; the response is the trace, innermost function first:

  21d=   →   b1 = F_1(d), b2 = F_2(b1), written  b1b2

so one response of 8^depth is right. In the corpus that a base model is trained on
(`records`) depth 1 is always right and depth 2 is right with probability `exposure` (ρ),
else a shortcut that repeats the symbol: 21d= → dd. A derangement moves every symbol, so
a shortcut is never a right trace, and the base model's chance on a depth-2 prompt is
the dial ρ: how often it saw the composition. `make` is the environment that rewards it.

Every prompt and response is 16 different tokens: tokenizer path
'characters:012345abcdefgh=' (`ALPHABET`), whose last token ends a response.

The generator is this project's own; its question, whether rewards compose skills that a
base model has, is that of 'From f(x) and g(x) to f(g(x))' (arXiv:2509.25123).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from educe.environments import answers, problems
from educe.types import Environment, Turn

SYMBOLS = 'abcdefgh'
FUNCTIONS = '012345'
ALPHABET = f'{FUNCTIONS}{SYMBOLS}='
DEEPEST = 5  # 6^5 compositions are still listed in a moment
HELD_OUT = 1 / 3  # of the compositions of each depth: 12 of the 36 pairs


def make(
  *,
  depth: int,
  size: int | None = None,
  part: str = 'all',
  reward: str = 'process',
  world: int = 0,
  seed: int = 0,
) -> Environment:
  """Prompts of one depth, each once: 8 symbols for each composition of the part.

  size: that many of them, drawn with `seed`; None is all (depth 2: 192 in 'train', 96
    in 'heldout')
  part: 'train', 'heldout' (a third of the compositions, whatever the symbol) or 'all'.
    Depth 1 is no composition and has only 'all'
  reward: 'process' pays 1 for the whole trace; 'outcome' pays 1 for a response of the
    right length whose last symbol is right, so a shortcut pays where the composition
    happens to fix the symbol
  world: seed of the permutations and of the held-out compositions

  Turn.info has `outcome`: 'unparsable' is a response that is not `depth` symbols.

  Raises ValueError for values out of range.
  """
  if reward not in ('process', 'outcome'):
    raise ValueError(f"reward={reward!r}: must be 'process' or 'outcome'")
  tables = permutations(world)
  questions = [
    (names, symbol)
    for names in compositions(depth, part=part, world=world)
    for symbol in range(len(SYMBOLS))
  ]
  if size is not None:
    problems.at_least_one(size)
    if size > len(questions):
      raise ValueError(
        f'size={size}: depth {depth} has {len(questions)} prompts in part {part!r}'
      )
    questions = random.Random(seed).sample(questions, size)
  prompts = []
  for names, symbol in questions:
    prompt, answer = _write(tables, names, symbol)
    prompts.append({'id': prompt, 'prompt': prompt, 'answer': answer})
  return Environment(prompts, functools.partial(_respond, reward))


def records(
  *,
  size: int,
  exposure: float,
  exposure_deeper: float = 0.0,
  shares: Sequence[float] = (1.0, 1.0, 1.0),
  part: str = 'all',
  world: int = 0,
  seed: int = 0,
) -> Corpus:
  """A corpus for the base model: records of `prompt` and `completion` strings.

  exposure: ρ, the share of depth-2 records whose trace is right; the rest are shortcuts
  exposure_deeper: the same for every greater depth
  shares: relative number of records of depth 1, 2, …
  part: of the compositions, as in `make`; depth 1 always has all its functions
  world, seed: of the permutations; of what is drawn

  Functions and symbols are uniform. Of n records of a depth, ρ·n have right traces, up
  to a rounding that is fair: exact in expectation and within 1 in every corpus. With
  exposure=1, shares=(0, 1) and part='train' these are gold demonstrations for SFT.

  Raises ValueError for values out of range.
  """
  problems.at_least_one(size)
  for name, value in (('exposure', exposure), ('exposure_deeper', exposure_deeper)):
    if not 0 <= value <= 1:
      raise ValueError(f'{name}={value}: must be in 0..1')
  weights = np.asarray(shares, float)
  if weights.ndim != 1 or not 1 <= len(weights) <= DEEPEST:
    raise ValueError(
      f'shares={shares}: must be 1 to {DEEPEST} numbers, for depth 1, 2…'
    )
  if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
    raise ValueError(f'shares={shares}: must be at least 0, and not all 0')
  rng = np.random.default_rng(seed)
  depths = rng.choice(1 + len(weights), size, p=[0, *(weights / weights.sum())])
  names = np.zeros((size, len(weights)), np.int8)
  right = np.ones(size, bool)
  for depth in range(1, 1 + len(weights)):
    (rows,) = np.nonzero(depths == depth)
    options = compositions(depth, part=part if depth > 1 else 'all', world=world)
    names[rows, :depth] = np.asarray(options)[
      rng.integers(len(options), size=len(rows))
    ]
    if depth > 1:
      rate = exposure if depth == 2 else exposure_deeper
      count = int(rate * len(rows) + rng.random())
      right[rng.permutation(rows)[count:]] = False
  symbols = rng.integers(len(SYMBOLS), size=size).astype(np.int8)
  return Corpus(permutations(world), depths.astype(np.int8), names, symbols, right)


@dataclasses.dataclass(frozen=True)
class Corpus(Sequence[dict[str, str]]):
  """Records, written when they are read: a million take 10 MB. Picklable."""

  tables: tuple[tuple[int, ...], ...]  # tables[f][a] = F_f(a)
  depths: np.ndarray  # [N]
  names: np.ndarray  # [N, depths]: functions, outermost first
  symbols: np.ndarray  # [N]
  right: np.ndarray  # [N] bool: a trace, and no shortcut

  def __len__(self) -> int:
    return len(self.depths)

  @property
  def fingerprint(self) -> str:
    """Changes when the records do: a run resumes only on its own corpus."""
    digest = hashlib.blake2b(repr(self.tables).encode(), digest_size=8)
    for array in (self.depths, self.names, self.symbols, self.right):
      digest.update(array.tobytes())
    return digest.hexdigest()

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    index = range(len(self))[index]
    depth = int(self.depths[index])
    names, symbol = self.names[index, :depth].tolist(), int(self.symbols[index])
    prompt, answer = _write(self.tables, names, symbol)
    completion = answer if self.right[index] else SYMBOLS[symbol] * depth
    return {'prompt': prompt, 'completion': completion}


@functools.cache
def permutations(world: int) -> tuple[tuple[int, ...], ...]:
  """Six different random derangements of range(8): [f][a] is F_f(a)."""
  rng = random.Random(f'permutations {world}')
  found: dict[tuple[int, ...], None] = {}
  while len(found) < len(FUNCTIONS):
    order = list(range(len(SYMBOLS)))
    rng.shuffle(order)
    if all(a != b for a, b in enumerate(order)):
      found[tuple(order)] = None
  return tuple(found)


def compositions(depth: int, *, part: str, world: int) -> list[tuple[int, ...]]:
  """The tuples of functions, outermost first, of a part. Raises ValueError."""
  if not 1 <= depth <= DEEPEST:
    raise ValueError(f'depth={depth}: must be in 1..{DEEPEST}')
  if part not in problems.PARTS:
    raise ValueError(f"part must be 'all', 'train' or 'heldout', got {part!r}")
  every = list(itertools.product(range(len(FUNCTIONS)), repeat=depth))
  if part == 'all':
    return every
  if depth == 1:
    raise ValueError(f"part={part!r}: depth 1 composes nothing; it has part='all' only")
  drawn = random.Random(f'held out {world} {depth}').sample(
    every, round(HELD_OUT * len(every))
  )
  held_out = set(drawn)
  return [names for names in every if (names in held_out) == (part == 'heldout')]


def _write(tables, names, symbol: int) -> tuple[str, str]:
  """(prompt, trace) as text."""
  prompt = ''.join(FUNCTIONS[name] for name in names) + SYMBOLS[symbol] + '='
  trace = ''
  for name in reversed(names):  # F_i F_j a is F_i(F_j(a))
    symbol = tables[name][symbol]
    trace += SYMBOLS[symbol]
  return prompt, trace


def _respond(reward: str, prompt: Mapping[str, Any], transcript: Sequence[str]) -> Turn:
  response, trace = (answers.visible(transcript[-1]) or '').strip(), prompt['answer']
  if len(response) != len(trace) or not set(response) <= set(SYMBOLS):
    return Turn(None, 0.0, True, {'outcome': 'unparsable', 'answer': response})
  right = response == trace if reward == 'process' else response[-1] == trace[-1]
  outcome = 'verified' if right else 'wrong'
  return Turn(None, float(right), True, {'outcome': outcome, 'answer': response})
