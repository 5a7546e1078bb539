"""Problems of the PyPI package reasoning-gym, verified by code.

Reasoning Gym (Stojanovski et al. 2025, arXiv:2505.24760) generates problems of about a
hundred families. Here each becomes an Environment, or records for SFT, and two things
are put right:

*Splits.* Different seeds of a small family repeat the same problems, so a seed is no
split. Whether a problem is held out is decided by a hash of its text: part='train' and
part='heldout' never share a problem, whatever the seeds and sizes, and no set holds one
problem twice.

*Scores.* A reward is 1 for a verified answer and 0 otherwise. The package's partial
credit (0.25 to any word in `acre`, up to 0.17 to nonsense in `spell_backward`, 0.01
elsewhere) is never paid. `game_of_life_halting`, which accepts any text, and three
families that run the model's text through Python's `eval`, are compared with their one
right answer instead. Families that need `eval` to judge an answer are refused.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from educe.types import Environment, Turn

HELD_OUT = 0.2  # the share of all problems that part='heldout' draws from

# One right answer; the package's own scorer is wrong (the first) or calls eval.
EXACT = frozenset(
  {'game_of_life_halting', 'binary_matrix', 'spiral_matrix', 'string_insertion'}
)
# Many right answers, and the scorer hands the model's text to eval (sympy's parse_expr
# is eval too). Text from a model is never evaluated in this process.
EVALUATES = frozenset(
  {
    'countdown',
    'intermediate_integration',
    'n_queens',
    'polynomial_multiplication',
    'puzzle24',
    'simple_integration',
  }
)
# The scorer raises this on text that is no answer at all.
RAISES = {'prime_factorization': ValueError}

_NUMBER = re.compile(r'(?<![\w)])-?\d+(?:,\d{3})*(?:\.\d+)?|\d+(?:,\d{3})*(?:\.\d+)?')
_PREFIX = re.compile(r'^(?:the )?(?:final )?answer(?: is|:)\s*:?\s*', re.IGNORECASE)


def make(
  *,
  task: str,
  size: int,
  seed: int = 0,
  part: str = 'all',
  instruction: str = '',
  system: str | None = None,
  **options: Any,
) -> Environment:
  """A single-turn environment of `size` different problems.

  task: family name, as in `reasoning_gym.create_dataset`
  part: 'train', 'heldout' (one problem in five) or 'all'; see the top of this file
  instruction: added to every question, after a blank line
  system: a system message before the question; None leaves it to the chat template
  options: the family's own settings, such as max_digits=2

  `respond` extracts an answer (see `extract`) and pays 1.0 if it is verified, else 0.0.
  Turn.info has `outcome`: 'verified', 'wrong', 'unparsable' (no answer in the text) or
  'error' (the scorer raised; `info['error']` says what), and `answer`, the text judged.

  Raises ValueError for an unknown family or setting, for one whose scorer evaluates
  text, and if the family does not have `size` different problems.
  """
  dataset, entries = _generate(task, size, seed, part, options)
  prompts = [_record(task, entry, instruction, system) for entry in entries]
  return Environment(prompts, functools.partial(_respond, task, dataset))


def records(
  *,
  task: str,
  size: int,
  seed: int = 0,
  part: str = 'all',
  instruction: str = '',
  system: str | None = None,
  completion: str = '{answer}',
  **options: Any,
) -> list[dict[str, Any]]:
  """The same problems as `make`, with `prompt` and `completion` messages for SFT.

  completion: what the assistant says; {answer} stands for the reference answer

  Raises ValueError as `make` does, and for families without reference answers.
  """
  if '{answer}' not in completion:
    raise ValueError(f'completion={completion!r} must contain {{answer}}')
  _, entries = _generate(task, size, seed, part, options)
  out = []
  for entry in entries:
    if entry['answer'] is None:
      raise ValueError(f'reasoning-gym task {task!r} has no reference answers')
    text = completion.replace('{answer}', str(entry['answer']))
    message = {'role': 'assistant', 'content': text}
    record = _record(task, entry, instruction, system)
    out.append({**record, 'completion': [message]})
  return out


def extract(text: str, reference: str | None) -> str | None:
  """The answer in a completion, or None. The first of these rules that applies:

  1. the last <answer>…</answer>
  2. the last \\boxed{…}
  3. if the reference is a number: the last number (thousands separators dropped, and
     '.0' if the reference is whole)
  4. if the reference has several lines: the whole text
  5. the last line that is not blank, without 'Answer:' or 'The answer is' before it or
     a full stop after it

  Only what follows </think> counts; a block that is never closed leaves nothing.
  """
  if '<think>' in text or '</think>' in text:
    _, closed, text = text.rpartition('</think>')
    if not closed or '<think>' in text:
      return None
  tagged = re.findall(r'<answer>((?:(?!<answer>).)*?)</answer>', text, re.DOTALL)
  if tagged:
    return tagged[-1].strip() or None
  boxed = re.findall(r'\\boxed\{([^{}]*)\}', text)
  if boxed:
    return boxed[-1].strip() or None
  reference = reference or ''
  if _NUMBER.fullmatch(reference):
    numbers = _NUMBER.findall(text.replace('−', '-'))
    if not numbers:
      return None
    number = numbers[-1].replace(',', '')
    return number if '.' in reference else re.sub(r'\.0+$', '', number)
  if '\n' in reference:
    return text.strip('\n') or None
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if not lines:
    return None
  line = _PREFIX.sub('', lines[-1])
  return (line if reference.endswith('.') else line.removesuffix('.')) or None


def _respond(
  task: str, dataset: Any, prompt: Mapping[str, Any], transcript: Sequence[str]
) -> Turn:
  answer = extract(transcript[-1], prompt['answer'])
  outcome, info = 'unparsable', {'answer': answer}
  if answer is not None:
    try:
      verified = _verify(task, dataset, answer, prompt)
      outcome = 'verified' if verified else 'wrong'
    except RAISES.get(task, ()):
      pass
    except Exception as error:
      outcome, info['error'] = 'error', f'{type(error).__name__}: {error}'
  return Turn(None, float(outcome == 'verified'), True, {'outcome': outcome, **info})


def _verify(task, dataset, answer, prompt) -> bool:
  if task in EXACT:
    return answer.split() == str(prompt['answer']).split()
  entry = {name: prompt[name] for name in ('question', 'answer', 'metadata')}
  return bool(dataset.score_answer(answer, entry) >= 1)


def _record(task, entry, instruction, system) -> dict[str, Any]:
  question = entry['question'].strip()
  content = f'{question}\n\n{instruction}' if instruction else question
  messages = [{'role': 'user', 'content': content}]
  if system is not None:
    messages.insert(0, {'role': 'system', 'content': system})
  return {
    'id': f'{task}-{_digest(entry)[:12]}',
    'prompt': messages,
    'answer': entry['answer'],
    'question': entry['question'],
    'metadata': entry['metadata'],
  }


def _digest(entry) -> str:
  return hashlib.sha256(' '.join(entry['question'].split()).encode()).hexdigest()


def _generate(task, size, seed, part, options) -> tuple[Any, list[Any]]:
  """(the package's data set, `size` different problems of this part)"""
  if part not in ('all', 'train', 'heldout'):
    raise ValueError(f"part must be 'all', 'train' or 'heldout', got {part!r}")
  if size < 1:
    raise ValueError(f'size must be at least 1, got {size}')
  dataset = _create(task, {**options, 'size': 100, 'seed': seed})
  found: dict[str, Any] = {}
  barren = 0
  while True:
    before = len(found)
    for index in range(len(dataset)):
      entry = dataset[index]
      digest = _digest(entry)
      held_out = int(digest[:8], 16) < HELD_OUT * 2**32
      if part == 'all' or held_out == (part == 'heldout'):
        found.setdefault(digest, entry)
      if len(found) == size:
        return dataset, list(found.values())
    barren = barren + 1 if len(found) == before else 0
    if barren == 20:
      raise ValueError(
        f'reasoning-gym task {task!r} with {options} has only about {len(found)} '
        f'different problems in part {part!r}; {size} were asked for'
      )
    # Problem i of seed s is drawn with random seed s + i: go on where this one ended.
    seed += len(dataset)
    dataset = _create(task, {**options, 'size': 100, 'seed': seed})


def _create(task: str, options: dict[str, Any]) -> Any:
  if task in EVALUATES:
    raise ValueError(
      f"reasoning-gym task {task!r} is refused: its scorer evaluates the model's text "
      'as code'
    )
  try:
    gym = importlib.import_module('reasoning_gym')
    factory = importlib.import_module('reasoning_gym.factory')
  except ModuleNotFoundError as error:
    raise ValueError(
      'environment reasoning_gym needs the package reasoning-gym; '
      '`pip install reasoning-gym` brings it'
    ) from error
  if task not in factory.DATASETS:
    raise ValueError(
      f'reasoning-gym has no task {task!r}; '
      f'it has {", ".join(sorted(factory.DATASETS))}'
    )
  try:
    return gym.create_dataset(task, **options)
  except (TypeError, AssertionError, ValueError) as error:
    known = sorted(factory.DATASETS[task][1].__dataclass_fields__)
    raise ValueError(
      f'reasoning-gym task {task!r}: {error or "a setting is out of range"}; '
      f'its settings are {", ".join(known)}'
    ) from error
