"""Params by the names of their leaves; in two parts, what is trained and what is frozen.

Only the trained part is differentiated, has optimizer state, or is kept as a reference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from educe.types import Params

# Each dense matrix of a layer: where it is, and how many of its axes are inputs.
WEIGHTS = {
  'query': ('attention', 1),
  'key': ('attention', 1),
  'value': ('attention', 1),
  'out': ('attention', 2),
  'gate': ('mlp', 1),
  'up': ('mlp', 1),
  'down': ('mlp', 1),
}


def paths(params: Params, function: Callable[[str], Any]) -> Any:
  """`function(path)` for every leaf; a path reads layers/attention/q."""

  return jax.tree_util.tree_map_with_path(
    lambda keys, _: function(path_text(keys)), params
  )


def path_text(keys: Any) -> str:
  """The path to a leaf, as JAX has it: layers/attention/q, whatever the containers are."""
  return jax.tree_util.keystr(keys, simple=True, separator='/')


def hit(patterns: tuple[str, ...], path: str) -> bool:
  return any(re.search(pattern, path) for pattern in patterns)


def split(params: Params, frozen: tuple[str, ...]) -> tuple[Params, Params]:
  """(the trained leaves, the frozen ones), each with None where the other has a leaf.

  frozen: regular expressions; a leaf whose path matches one is frozen
  """
  stays = paths(params, lambda path: hit(frozen, path))
  trained = jax.tree.map(lambda x, stay: None if stay else x, params, stays)
  return trained, jax.tree.map(lambda x, stay: x if stay else None, params, stays)


def over(params: Params, part: Params) -> Params:
  """`part`, with the leaves of `params` where it has None: a reference as a whole policy,
  or the two parts of `split` as one. A key that `part` does not have is left out."""
  if isinstance(part, Mapping):
    params = {name: params[name] for name in part}
  return jax.tree.map(
    lambda mine, theirs: theirs if mine is None else mine,
    part,
    params,
    is_leaf=lambda x: x is None,
  )


def without(params: Params, key: str) -> Params:
  """Params but for what is under this key; as they are where there is none."""
  if not isinstance(params, Mapping) or key not in params:
    return params
  return {name: x for name, x in params.items() if name != key}
