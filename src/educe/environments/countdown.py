"""Countdown: make a target from given numbers with + - * / and parentheses.

  Using the numbers 3, 5 and 7, make 22.   →   3 * 5 + 7

Problems are generated backwards, from an expression, so each has a solution; or they are
the 1,362 puzzles of the game of 24 (`game24`). Two orders of the same numbers are one
problem, and a hash of it decides whether it is held out: 'train' and 'heldout' share
none, whatever the seeds.

An answer is read by a parser of its own (`evaluate`), exactly, with fractions. Nothing
is ever run: its grammar has whole numbers, four operators and parentheses, and the text
may have at most 200 characters.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from educe.environments import answers, problems
from educe.types import Environment, Turn

LONGEST = 200  # characters of an expression; bounds time, depth and the size of values
_TOKEN = re.compile(r'\s*(?:(\d{1,9})(?!\d)|([-+*/()]))', re.ASCII)
_SIGNS = (
  ('−', '-'), ('×', '*'), ('·', '*'), ('÷', '/'), ('\\times', '*'), ('\\cdot', '*'),
  ('\\div', '/'), ('\\left', ''), ('\\right', ''), ('$', ''),
)  # fmt: skip
_USES = {
  'all': 'each number exactly once',
  'at_most_once': 'each number at most once',
}
_BARREN = 2000  # draws without a new problem after which there are no more


def make(
  *,
  size: int,
  numbers: int = 4,
  max_number: int = 20,
  max_target: int = 100,
  use: str = 'all',
  part: str = 'all',
  instruction: str = 'Answer with the expression only.',
  system: str | None = None,
  seed: int = 0,
) -> Environment:
  """A single-turn environment of `size` different generated problems.

  numbers: how many are given, from 1 to max_number each
  max_target: targets are whole, from 1 to this
  use: 'all' numbers must be used, each as often as it is given, or 'at_most_once'
  part: 'train', 'heldout' (one problem in five) or 'all'
  instruction, system: see `problems.chat`

  The reward is 1 for an expression that makes the target from the numbers, else 0;
  Turn.info has `outcome` ('unparsable' if there is no expression) and `answer`. Each
  record has `numbers`, `target` and, as `answer`, one solution.

  Raises ValueError for values out of range, and if there are not so many problems.
  """
  found = _generate(size, numbers, max_number, max_target, part, seed)
  return _environment(found, use, instruction, system)


def game24(
  *,
  size: int | None = None,
  path: str = 'data://game24.jsonl.gz',
  column: str = 'Puzzles',
  target: int = 24,
  use: str = 'all',
  part: str = 'all',
  instruction: str = 'Answer with the expression only.',
  system: str | None = None,
) -> Environment:
  """Puzzles from a file: `column` holds the numbers, as in '1 1 4 6'. See `make`.

  size: the first so many of the part; None is all

  Raises ValueError for a puzzle that has no solution, and if there are too few.
  """
  if size is not None:
    problems.at_least_one(size)
  found: list[tuple[list[int], int, str]] = []
  for where, row in problems.read(path):
    text = problems.column(row, column, where)
    if not re.fullmatch(r'\d{1,9}(?:\s+\d{1,9})*', str(text), re.ASCII):
      raise ValueError(f'{where}: {column}={text!r} is no list of numbers')
    given = [int(word) for word in str(text).split()]
    if problems.in_part(_name(given, target), part) and len(found) != size:
      solution = solve(given, target)
      if solution is None:
        raise ValueError(f'{where}: {target} cannot be made from {given}')
      found.append((given, target, solution))
  if not found or (size is not None and len(found) < size):
    raise ValueError(f'{path}: part {part!r} has {len(found)} puzzles, not size={size}')
  return _environment(found, use, instruction, system)


def evaluate(text: str) -> tuple[Fraction, list[int]]:
  """Value of an expression, and the numbers that it uses, in order.

  expression = [-] term { (+|-) term } · term = factor { (*|/) factor }
  factor = number | ( expression )

  (A sign before an expression reaches no target ≥ 0 that could not be reached without.)

  Raises ValueError for anything else, a division by zero, and more than 200 characters.
  """
  if len(text) > LONGEST:
    raise ValueError(f'more than {LONGEST} characters')
  tokens, at = [], 0
  text = text.strip()
  while at < len(text):
    match = _TOKEN.match(text, at)
    if match is None:
      raise ValueError(f'unexpected {text[at : at + 10]!r}')
    tokens.append(match[1] or match[2])
    at = match.end()
  tokens.append('end')
  used: list[int] = []
  value, rest = _expression(tokens, 0, used)
  if tokens[rest] != 'end':
    raise ValueError(f'unexpected {tokens[rest]!r}')
  return value, used


def _expression(tokens: list[str], at: int, used: list[int]) -> tuple[Fraction, int]:
  negative = tokens[at] == '-'
  value, at = _term(tokens, at + negative, used)
  value = -value if negative else value
  while tokens[at] in ('+', '-'):
    right, after = _term(tokens, at + 1, used)
    value = value + right if tokens[at] == '+' else value - right
    at = after
  return value, at


def _term(tokens: list[str], at: int, used: list[int]) -> tuple[Fraction, int]:
  value, at = _factor(tokens, at, used)
  while tokens[at] in ('*', '/'):
    right, after = _factor(tokens, at + 1, used)
    if tokens[at] == '/' and right == 0:
      raise ValueError('division by zero')
    value = value * right if tokens[at] == '*' else value / right
    at = after
  return value, at


def _factor(tokens: list[str], at: int, used: list[int]) -> tuple[Fraction, int]:
  if tokens[at] == '(':
    value, at = _expression(tokens, at + 1, used)
    if tokens[at] != ')':
      raise ValueError('a parenthesis is not closed')
    return value, at + 1
  if not tokens[at].isdigit():
    raise ValueError(f'a number is missing before {tokens[at]!r}')
  used.append(int(tokens[at]))
  return Fraction(used[-1]), at + 1


def solve(numbers: Sequence[int], target: int) -> str | None:
  """An expression that uses every number and makes the target, or None. Exhaustive."""
  return _search([(Fraction(n), str(n)) for n in numbers], Fraction(target))


def _search(values: list[tuple[Fraction, str]], target: Fraction) -> str | None:
  if len(values) == 1:
    value, text = values[0]
    return text.removeprefix('(').removesuffix(')') if value == target else None
  for i, j in itertools.permutations(range(len(values)), 2):
    (a, left), (b, right) = values[i], values[j]
    rest = [value for k, value in enumerate(values) if k not in (i, j)]
    options = [(a - b, '-')]
    if i < j:  # these two do not care for the order
      options += [(a + b, '+'), (a * b, '*')]
    if b:
      options.append((a / b, '/'))
    for value, sign in options:
      found = _search([*rest, (value, f'({left} {sign} {right})')], target)
      if found is not None:
        return found
  return None


def _name(numbers: Sequence[int], target: int) -> str:
  return problems.digest(f'{sorted(numbers)} {target}')


def _generate(size, numbers, max_number, max_target, part, seed):
  """`size` different (numbers, target, solution) of this part."""
  problems.at_least_one(size)
  for name, value, low, high in (
    ('numbers', numbers, 2, 8),
    ('max_number', max_number, 1, 10**6),
    ('max_target', max_target, 1, 10**9),
  ):
    if not low <= value <= high:
      raise ValueError(f'{name}={value}: must be in {low}..{high}')
  rng = random.Random(seed)
  found: dict[str, tuple[list[int], int, str]] = {}
  barren = 0
  while len(found) < size:
    given = [rng.randint(1, max_number) for _ in range(numbers)]
    target, solution = _combine(rng, given)
    name = _name(given, target)
    barren += 1
    if target <= max_target and name not in found and problems.in_part(name, part):
      found[name] = (given, target, solution)
      barren = 0
    if barren == _BARREN:
      raise ValueError(
        f'only about {len(found)} different problems in part {part!r} with numbers='
        f'{numbers}, max_number={max_number}, max_target={max_target}; size={size}'
      )
  return list(found.values())


def _combine(rng: random.Random, numbers: list[int]) -> tuple[int, str]:
  """A random expression of all the numbers whose every step is a whole number ≥ 1."""
  values = [(number, str(number)) for number in numbers]
  while len(values) > 1:
    rng.shuffle(values)
    (a, left), (b, right) = values.pop(), values.pop()
    options = [(a + b, '+'), (a * b, '*')]
    if a > b:
      options.append((a - b, '-'))
    if a % b == 0:
      options.append((a // b, '/'))
    value, sign = rng.choice(options)
    values.append((value, f'({left} {sign} {right})'))
  return values[0][0], values[0][1][1:-1]


def _environment(found, use, instruction, system) -> Environment:
  if use not in _USES:
    raise ValueError(f"use={use!r}: must be 'all' or 'at_most_once'")
  prompts = []
  for given, target, solution in found:
    listed = f'{", ".join(map(str, given[:-1]))} and {given[-1]}'
    question = (
      f'Using the numbers {listed}, make {target}. You may use +, -, *, / and '
      f'parentheses, and {_USES[use]}.'
    )
    prompts.append(
      {
        'id': f'countdown-{_name(given, target)[:12]}',
        'prompt': problems.chat(question, instruction, system),
        'answer': solution,
        'numbers': given,
        'target': target,
      }
    )
  return Environment(prompts, functools.partial(_respond, use))


def _respond(use: str, prompt: Mapping[str, Any], transcript: Sequence[str]) -> Turn:
  answer = answers.extract(transcript[-1], prompt['answer'])
  outcome = 'unparsable'
  if answer is not None:
    try:
      right = _verify(answer, prompt['numbers'], prompt['target'], use)
      outcome = 'verified' if right else 'wrong'
    except ValueError:
      pass
  info = {'outcome': outcome, 'answer': answer}
  return Turn(None, float(outcome == 'verified'), True, info)


def _verify(answer: str, numbers: Sequence[int], target: int, use: str) -> bool:
  """Raises ValueError for what is no expression."""
  for written, sign in _SIGNS:
    answer = answer.replace(written, sign)
  # '3 * 5 + 7 = 22' is the expression and a claim, which must be true as well.
  expression, equals, claim = answer.partition('=')
  value, used = evaluate(expression)
  if equals and evaluate(claim)[0] != target:
    return False
  given, spent = Counter(numbers), Counter(used)
  fits = spent == given if use == 'all' else spent <= given
  return fits and value == target
