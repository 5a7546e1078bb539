"""Questions in words with a mathematical answer: GSM8K, MATH, any JSONL of that kind.

  make(path='data://gsm8k_test.jsonl.gz')                      # GSM8K, arXiv:2110.14168
  make(path='math.jsonl', question='problem', answer='solution')  # MATH, arXiv:2103.03874

The answer in a completion is the last <answer>…</answer> or \\boxed{…} outside the
thinking, else the last number (see `answers.extract`). It is verified exactly where both
sides are plain numbers ('$1,234.50', '18 dollars', '1/2'), and otherwise by math-verify
(PyPI), which compares numbers, expressions, sets, intervals and matrices with sympy.

A percent sign is a unit, which the references leave out: 50\\% answers 50 and 50\\%, and
does not answer 0.5 (math-verify would accept both).

Untrusted text is never evaluated. sympy's `parse_expr` is Python's `eval`, and
math-verify uses it for plain expressions; only its LaTeX reader is used here, a grammar
(ANTLR) that builds expressions from the tokens that it knows. What a grammar cannot stop
is a small text with a huge value (9^{9^{9^9}}): math-verify's own limit is an alarm,
which works in a main thread only and is therefore off, and the clock is that of
`verifiers.worker_pool`. Call `respond` directly only on text that you trust to be short
work.
"""

from __future__ import annotations

import functools
import logging
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from educe.environments import answers, problems
from educe.types import Environment, Turn

try:  # here and not at the first use: a worker's clock starts after its imports
  import math_verify
except ModuleNotFoundError:
  math_verify = None

LONGEST = 400  # characters of an answer; longer ones are no answer
_CALCULATOR = re.compile(r'<<[^<>]*>>')  # GSM8K's annotations, such as <<48/2=24>>
_COMMAND = re.compile(r'\\[a-zA-Z]+')
_WORD = re.compile(r'[^\W\d_]{2}')
_INLINE = re.compile(r'\$([^$]+)\$')


def make(
  *,
  path: str = 'data://gsm8k_test.jsonl.gz',
  question: str = 'question',
  answer: str = 'answer',
  size: int | None = None,
  part: str = 'all',
  instruction: str = 'Put the final answer in \\boxed{}.',
  system: str | None = None,
  seed: int = 0,
) -> Environment:
  """A single-turn environment of different problems from a JSONL file.

  question, answer: the columns. An answer counts from after its '####' (GSM8K), else
    it is its last \\boxed{…} (a MATH solution), else the whole of it; numbers are fine
  size: that many, drawn with `seed`; None is all, in the file's order
  part: 'train', 'heldout' (one problem in five, by a hash of the question) or 'all'
  instruction, system: see `problems.chat`

  Records have `answer` and, as `solution`, the worked solution: what precedes '####',
  without GSM8K's <<calculator>> marks, or the whole column.

  The reward is 1 or 0. Turn.info has `outcome` ('unparsable': no answer that can be
  read) and `answer`, the text judged. `respond` raises where the reference itself
  cannot be compared: `verifiers.worker_pool` counts that as an error.

  Raises ValueError for files, columns and sizes that do not fit, and without the
  package math-verify.
  """
  _library()
  rows = _rows(path, question, answer, size, part, seed)
  prompts = [
    {
      'id': problems.digest(text)[:12],
      'prompt': problems.chat(text, instruction, system),
      'answer': gold,
      'solution': solution,
    }
    for text, gold, solution in rows
  ]
  return Environment(prompts, _respond)


def verify(answer: str, gold: str) -> bool | None:
  """Whether two mathematical texts are equal; None if `answer` cannot be read.

  Raises ValueError if the gold answer cannot even be compared with itself.
  """
  left, right = answers.number(answer), answers.number(gold)
  if left is not None and right is not None:
    return left == right
  if right is not None and _WORD.search(_COMMAND.sub(' ', answer)):
    return False  # more than a unit ('18 million', '4 or 5'), which sympy would drop
  library = _library()
  reference, parsed = _parse(gold), _parse(answer)
  if not reference:  # words, such as a name
    return ' '.join(answer.split()).casefold() == ' '.join(gold.split()).casefold()
  if not parsed:
    return None
  equal = functools.partial(
    library.verify, reference, timeout_seconds=None, raise_on_error=True
  )
  try:
    return bool(equal(parsed))
  except Exception as error:
    # sympy fails on odd answers, which are wrong; a verifier that fails on the right
    # one as well is broken, and must not look like a policy that is.
    try:
      sound = equal(reference)
    except Exception:
      sound = False
    if not sound:
      raise ValueError(f'reference answer {gold!r:.80} is not comparable') from error
    return False


def _respond(prompt: Mapping[str, Any], transcript: Sequence[str]) -> Turn:
  answer = answers.extract(transcript[-1], prompt['answer'])
  right = None
  if answer is not None:
    inline = _INLINE.findall(answer)
    answer = inline[-1].strip() if inline else answer
    right = verify(answer, prompt['answer']) if len(answer) <= LONGEST else None
  outcome = 'unparsable' if right is None else 'verified' if right else 'wrong'
  info = {'outcome': outcome, 'answer': answer}
  return Turn(None, float(right or 0), True, info)


def _parse(text: str) -> list[Any]:
  """sympy expressions; [] if there is nothing to read."""
  library = _library()
  plain = text.replace('\\%', '').replace('%', '').replace('$', '')
  return library.parse(
    f'${plain}$',
    extraction_config=[library.LatexExtractionConfig()],
    fallback_mode='no_fallback',
    parsing_timeout=None,
  )


@functools.cache
def _library():
  if math_verify is None:
    raise ValueError(
      'environment math_qa needs the package math-verify; `pip install math-verify` '
      'brings it'
    )
  # It warns, once a process, that its alarm is off. That is on purpose.
  logging.getLogger('math_verify').setLevel(logging.ERROR)
  return math_verify


def _rows(path, question, answer, size, part, seed) -> list[tuple[str, str, str]]:
  """(question, answer, solution) of different problems."""
  found: dict[str, tuple[str, str, str]] = {}
  for where, row in problems.read(path):
    text = problems.column(row, question, where)
    full = problems.column(row, answer, where)
    if not isinstance(text, str) or not text.strip():
      raise ValueError(f'{where}: {question}={text!r:.60}: must be text')
    if isinstance(full, bool) or not isinstance(full, str | int | float):
      raise ValueError(f'{where}: {answer}={full!r:.60}: must be text or a number')
    gold, solution = _gold(str(full))
    if not gold:
      raise ValueError(f'{where}: {answer}={full!r:.60} holds no answer')
    name = problems.digest(text)
    if problems.in_part(name, part):
      found.setdefault(name, (text.strip(), gold, solution))
  rows = list(found.values())
  if size is None:
    size = max(len(rows), 1)
  else:
    problems.at_least_one(size)
    random.Random(seed).shuffle(rows)
  if size > len(rows):
    raise ValueError(f'{path}: part {part!r} has {len(rows)} problems, not size={size}')
  return rows[:size]


def _gold(full: str) -> tuple[str, str]:
  """(answer, worked solution) of the answer column."""
  before, mark, after = full.rpartition('####')
  if mark:
    return after.strip(), _CALCULATOR.sub('', before).strip()
  inside = answers.boxed(full)
  return (full.strip() if inside is None else inside), full.strip()
