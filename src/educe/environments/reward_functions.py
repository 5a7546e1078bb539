"""A plain Python function over (prompt, completion, columns) is an environment.

  def short(prompt, completion, columns):
    return 1.0 if len(completion) < columns['limit'] else 0.0

  environment = make(prompts=records, functions=short)

Several are a dict of names, each with a weight:

  make(prompts=records, functions={'right': right, 'short': short}, weights={'short': 0.1})

The reward is Σ weight·reward over the functions that scored. None means *not scored*
(the function does not apply to this row): it adds nothing, and where every function says
None the row's reward is None, which keeps it out of its group's mean. Weights are not
renormalised: a row that fewer functions score has a smaller range of rewards.

Functions run wherever `respond` does. In a run that is a worker process
(`verifiers.worker_pool`): they need no time limit of their own, may come from a notebook,
and whatever they do or return is one sample's 'error', not the end of the run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from educe.environments import verifiers, worker
from educe.types import Environment, Turn

Reward = Callable[[Any, str, Mapping[str, Any]], float | None]


def make(
  *,
  prompts: Sequence[Mapping[str, Any]],
  functions: Reward | Sequence[Reward] | Mapping[str, Reward],
  weights: Mapping[str, float] | None = None,
  verified_by: str | None = None,
) -> Environment:
  """A single-turn environment out of reward functions.

  prompts: records with at least `prompt` (str or messages); `answer` is None if absent
  functions: one, several (under their own names), or a dict of names; each is called
    with the record's prompt, the completion's text and the whole record, and returns a
    finite number, or None for "not scored"
  weights: of each name; 1 where not mentioned
  verified_by: the reward that says 'verified' (1 or more) or 'wrong'; None: the sum.
    Where it is None the outcome is 'unparsable'

  Turn.info has `rewards` (each named part, unweighted) and `outcome`.

  Raises ValueError for records without a prompt, no functions, two of one name, and
  weights or `verified_by` of unknown names. `respond` raises ValueError, naming the
  function, for a return value that is no reward: NaN, a bool, a string, a list.
  """
  named = _named(functions)
  weights = dict(weights or {})
  for argument, names in (('weights', weights), ('verified_by', [verified_by])):
    for name in names:
      if name is not None and name not in named:
        raise ValueError(
          f'{argument} names {name!r}, but the reward functions are {", ".join(named)}'
        )
  for name, weight in weights.items():
    if verifiers.real(weight, f'weights[{name!r}]') is None:
      raise ValueError(f'weights[{name!r}] is None: leave the function out instead')
  records = [{'answer': None, **record} for record in prompts]
  if not records:
    raise ValueError('prompts is empty')
  for index, record in enumerate(records):
    if 'prompt' not in record:
      raise ValueError(
        f"prompts[{index}] has no column 'prompt' (its columns: {', '.join(record)})"
      )
  parts = {name: (call, weights.get(name, 1.0)) for name, call in named.items()}
  return Environment(records, functools.partial(_respond, parts, verified_by))


def _respond(
  parts: Mapping[str, tuple[Reward, float]],
  verified_by: str | None,
  prompt: Mapping[str, Any],
  transcript: Sequence[str],
) -> Turn:
  rewards = {}
  for name, (function, _) in parts.items():
    try:
      value = function(prompt['prompt'], transcript[-1], prompt)
    except Exception as error:
      raise ValueError(f'reward {name!r} raised {worker.one_line(error)}') from error
    rewards[name] = verifiers.real(value, f'reward {name!r}')
  scored = [parts[name][1] * r for name, r in rewards.items() if r is not None]
  reward = sum(scored) if scored else None
  judged = reward if verified_by is None else rewards[verified_by]
  outcome = verifiers.outcome(Turn(None, judged, True, {}))
  return Turn(None, reward, True, {'outcome': outcome, 'rewards': rewards})


def _named(functions) -> dict[str, Reward]:
  if isinstance(functions, Mapping):
    named = dict(functions)
  else:
    several = [functions] if callable(functions) else list(functions)
    names = [_name(function) for function in several]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
      raise ValueError(
        f'functions: two are called {twice[0]!r}; give a dict of different names'
      )
    named = dict(zip(names, several, strict=True))
  if not named:
    raise ValueError('functions is empty: an environment needs at least one reward')
  for name, function in named.items():
    if not callable(function):
      raise ValueError(f'functions[{name!r}]={function!r:.60}: not a function')
  return named


def _name(function: Any) -> str:
  """Partials and instances have no __name__ of their own."""
  while isinstance(function, functools.partial):
    function = function.func
  return getattr(function, '__name__', type(function).__name__)
