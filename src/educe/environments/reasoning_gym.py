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
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from educe.environments import answers, problems
from educe.types import Environment, Turn

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

  `respond` pays 1.0 if the answer (see `answers.extract`) is verified, else 0.0.
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


def _respond(
  task: str, dataset: Any, prompt: Mapping[str, Any], transcript: Sequence[str]
) -> Turn:
  answer = answers.extract(transcript[-1], prompt['answer'])
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
  return {
    'id': f'{task}-{problems.digest(entry["question"])[:12]}',
    'prompt': problems.chat(entry['question'].strip(), instruction, system),
    'answer': entry['answer'],
    'question': entry['question'],
    'metadata': entry['metadata'],
  }


def _generate(task, size, seed, part, options) -> tuple[Any, list[Any]]:
  """(the package's data set, `size` different problems of this part)"""
  problems.at_least_one(size)
  dataset = _create(task, {**options, 'size': 100, 'seed': seed})
  found: dict[str, Any] = {}
  barren = 0
  while True:
    before = len(found)
    for index in range(len(dataset)):
      entry = dataset[index]
      digest = problems.digest(entry['question'])
      if problems.in_part(digest, part):
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
