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
elsewhere) is never paid. Where its scorer is wrong, another one judges:

- `game_of_life_halting` accepts any text: compared with the one right answer.
- `binary_matrix`, `spiral_matrix`, `string_insertion` run the model's text through
  Python's `eval`: compared with the one right answer.
- `n_queens` does too: compared with the list of right boards.
- `countdown` and `puzzle24` use sympy's `parse_expr`, which is `eval`, and `puzzle24`
  never looks at which numbers were given: judged by `countdown.evaluate`.
- `polynomial_multiplication` and the two `*_integration` families need `parse_expr`: an
  answer reaches it only if it is numbers, + - * / ** ( ), the problem's own variable,
  C and elementary functions (`_algebra`). No name or attribute of Python can be written
  so. `Integral` cannot either, for the integral of the question, unsolved, would pass;
  problems whose reference is such a one are left out. What stays possible is a small
  text with a huge value; time is limited by `verifiers.worker_pool`.
- `basic_arithmetic` without parentheses works from left to right, × after + or not, and
  where it asks 4 / 1 expects what another division, or even a product, gives: problems
  whose answer is not the value of what they ask, or that hold a /, are left out.
- `complex_arithmetic` accepts nan, and `coin_flip` the first of several numbers: such
  text is 'unparsable'.
- Some (`prime_factorization`, `boxnet`, `game_of_life` …) raise on text that is no
  answer. That is 'unparsable', unless the reference answer makes the scorer raise as
  well: then the scorer is broken, and it is an 'error'.

*Families that cannot be done:* none. `boxnet`, `graph_color`, `propositional_logic`,
`rubiks_cube` and `rush_hour` have no reference answers, so no `records`; `composite`
takes datasets=[dict(name=…, weight=…, config=…)] and each part is judged as above;
`acre`, `composite`, `gsm_symbolic` and `list_functions` have no curriculum. `jugs` from
level 2 and `zebra_puzzles` at level 5 take seconds a problem to generate.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from educe.environments import answers, countdown, problems
from educe.spelling import near
from educe.types import Environment, Turn

# One right answer; the package's own scorer is wrong (the first) or calls eval.
EXACT = frozenset(
  {'game_of_life_halting', 'binary_matrix', 'spiral_matrix', 'string_insertion'}
)
NUMBERS = {'countdown', 'puzzle24'}  # expressions of given numbers
ALGEBRA = {
  'intermediate_integration',
  'polynomial_multiplication',
  'simple_integration',
}
# Curricula that break the limits of their own family: field → (least, most).
BOUNDS = {
  'caesar_cipher': {'max_rotation': (1, 25)},
  'knight_swap': {'min_nodes': (6, 10**9), 'max_nodes': (6, 10**9)},
  'modulo_grid': {'max_target': (1, 10**9)},
  'rubiks_cube': {'cube_size': (2, 6)},
  'survo': {'max_empty': (1, 9)},
}
_ALGEBRA = re.compile(
  r'\s*(?:\d{1,20}(?:\.\d{1,20})?|([A-Za-z]+)|\*\*|[-+*/()])', re.ASCII
)
_NAMES = {'sin', 'cos', 'tan', 'sec', 'csc', 'cot', 'sinh', 'cosh', 'tanh'} | {
  'asin', 'acos', 'atan', 'exp', 'log', 'sqrt', 'pi', 'E', 'C'
}  # fmt: skip
_TOWER = re.compile(r'\*\*[^-+*/]*\*\*')  # 9**9**9 has more digits than memory


def make(
  *,
  task: str,
  size: int,
  seed: int = 0,
  part: str = 'all',
  level: int | None = None,
  instruction: str = '',
  system: str | None = None,
  **options: Any,
) -> Environment:
  """A single-turn environment of `size` different problems.

  task: family name, as in `reasoning_gym.create_dataset`
  part: 'train', 'heldout' (one problem in five) or 'all'; see the top of this file
  level: of the family's curriculum, from 0 (easiest); an attribute with fewer levels
    stays at its last. None: the family's defaults
  instruction: added to every question, after a blank line
  system: a system message before the question; None leaves it to the chat template
  options: the family's own settings, such as max_digits=2; they go before the level's

  `respond` pays 1.0 if the answer (see `answers.extract`) is verified, else 0.0.
  Turn.info has `outcome`: 'verified', 'wrong', 'unparsable' (no answer in the text) or
  'error' (a broken scorer: no reward; `info['error']` says what), and `answer`, the
  text judged.

  Raises ValueError for an unknown family, level or setting, and if the family does not
  have `size` different problems.
  """
  dataset, entries = _generate(task, size, seed, part, level, options)
  prompts = [_record(task, entry, instruction, system) for entry in entries]
  return Environment(prompts, functools.partial(_respond, task, dataset))


def _respond(
  task: str, dataset: Any, prompt: Mapping[str, Any], transcript: Sequence[str]
) -> Turn:
  answer = answers.extract(transcript[-1], prompt['answer'])
  task, dataset = _family(task, dataset, prompt['metadata'])
  verified, info = None, {'answer': answer}
  if answer is not None:
    try:
      verified = _verify(task, dataset, answer, prompt)
    except Exception as error:
      if _sound(task, dataset, prompt):
        return Turn(None, 0.0, True, {'outcome': 'unparsable', **info})
      info |= {'outcome': 'error', 'error': f'{type(error).__name__}: {error}'}
      return Turn(None, None, True, info)
  outcome = 'unparsable' if verified is None else 'verified' if verified else 'wrong'
  return Turn(None, float(verified or 0), True, {'outcome': outcome, **info})


def _family(task: str, dataset: Any, metadata: Mapping[str, Any]) -> tuple[str, Any]:
  """Whose problem it is, with its data set: composite's are those of its parts."""
  if task != 'composite':
    return task, dataset
  part = metadata['source_dataset']
  return part, dataset.datasets[part]


def _sound(task, dataset, prompt) -> bool:
  """Whether the scorer works, at least on the right answer."""
  if prompt['answer'] is None:
    return task == 'boxnet'  # it has none, and reads JSON of one shape only
  try:
    return bool(_verify(task, dataset, str(prompt['answer']), prompt))
  except Exception:
    return False


def _verify(task, dataset, answer, prompt) -> bool | None:
  """None: the text is no answer of this kind."""
  metadata = prompt['metadata']
  if task in EXACT:
    return answer.split() == str(prompt['answer']).split()
  if task == 'n_queens':
    return answer.split() in [board.split() for board in metadata['valid_answers']]
  if task in NUMBERS:
    try:
      value, used = countdown.evaluate(answer)
    except ValueError:
      return None
    given = sorted(metadata['numbers'])
    return sorted(used) == given and value == metadata.get('target', 24)
  if task in ALGEBRA:
    answer = answer.replace('^', '**')
    own = metadata.get('variables') or [metadata['variable']]
    if not _algebra(answer, set(own)):
      return None
  if task == 'complex_arithmetic' and re.search('nan|inf', answer, re.IGNORECASE):
    return None
  if task == 'coin_flip' and answers.number(answer) is None:
    return None
  entry = {name: prompt[name] for name in ('question', 'answer', 'metadata')}
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of numpy, about text that is no matrix
    return bool(dataset.score_answer(answer, entry) >= 1)


def _algebra(text: str, variables: set[str]) -> bool:
  """Whether a text has only the tokens of elementary expressions in the variables."""
  at = 0
  while at < len(text):
    match = _ALGEBRA.match(text, at)
    if match is None or (match[1] and match[1] not in _NAMES | variables):
      return False
    at = match.end()
  return 0 < at <= 1000 and not _TOWER.search(text)


def _record(task, entry, instruction, system) -> dict[str, Any]:
  return {
    'id': f'{task}-{problems.digest(entry["question"])[:12]}',
    'prompt': problems.chat(entry['question'].strip(), instruction, system),
    'answer': entry['answer'],
    'question': entry['question'],
    'metadata': entry['metadata'],
  }


def _generate(task, size, seed, part, level, options) -> tuple[Any, list[Any]]:
  """(the package's data set, `size` different problems of this part)"""
  problems.at_least_one(size)
  options = {**_level(task, level), **options}
  dataset = _create(task, {**options, 'size': 100, 'seed': seed})
  found: dict[str, Any] = {}
  barren = 0
  while True:
    before = len(found)
    for index in range(len(dataset)):
      entry = dataset[index]
      digest = problems.digest(entry['question'])
      if problems.in_part(digest, part) and not _spoilt(task, dataset, entry):
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


def _spoilt(task: str, dataset: Any, entry: Mapping[str, Any]) -> bool:
  """Whether the reference answer is not one to the question."""
  task, dataset = _family(task, dataset, entry['metadata'])
  if task in ALGEBRA:
    return 'Integral' in entry['answer']
  if task == 'basic_arithmetic' and not dataset.config.allow_parentheses:
    asked = entry['metadata']['expression']
    return '/' in asked or countdown.evaluate(asked)[0] != int(entry['answer'])
  return False


def _level(task: str, level: int | None) -> dict[str, Any]:
  """The settings of a level of the family's curriculum. Raises ValueError."""
  if level is None:
    return {}
  factory = _library(task)[1]
  if task not in factory.CURRICULA:
    raise ValueError(f'reasoning-gym task {task!r} has no curriculum; leave level out')
  curriculum = factory.create_curriculum(task)
  attributes = curriculum.attributes.values()
  last = max(len(attribute.levels) for attribute in attributes) - 1
  if not 0 <= level <= last:
    raise ValueError(f'level={level}: reasoning-gym task {task!r} has levels 0..{last}')
  for attribute in attributes:
    curriculum.set_attr_level(attribute.name, min(level, len(attribute.levels) - 1))
  settings = vars(curriculum.generate_configuration()).copy()
  for name, (low, high) in BOUNDS.get(task, {}).items():
    settings[name] = min(max(settings[name], low), high)
  return settings


def _create(task: str, options: dict[str, Any]) -> Any:
  gym, factory = _library(task)
  if task == 'composite':
    options = {**options, 'datasets': _specs(options.get('datasets'))}
  try:
    return gym.create_dataset(task, **options)
  except (TypeError, AssertionError, ValueError) as error:
    known = sorted(factory.DATASETS[task][1].__dataclass_fields__)
    raise ValueError(
      f'reasoning-gym task {task!r}: {error or "a setting is out of range"}; '
      f'its settings are {", ".join(known)}'
    ) from error


def _specs(datasets: Any) -> list[Any]:
  """composite's parts from plain dicts, as a config holds them."""
  kind = importlib.import_module('reasoning_gym.composite').DatasetSpec
  specs = []
  for part in datasets or ():
    if not isinstance(part, Mapping) or 'name' not in part:
      raise ValueError(
        f"reasoning-gym task 'composite': datasets has {part!r:.60}; each is "
        'dict(name=…, weight=1.0, config={})'
      )
    _library(part['name'])
    specs.append(kind(**{'weight': 1.0, 'config': {}, **part}))
  return specs


def _library(task: str) -> tuple[Any, Any]:
  """The package and its list of families. Raises ValueError."""
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
      f'reasoning-gym has no task {task!r}' + near(task, factory.DATASETS)
    )
  return gym, factory
