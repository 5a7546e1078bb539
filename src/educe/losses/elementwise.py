"""Is the gradient of a loss at a token a function of that token's own scores?

Then it can be formed while the token's logits are there (kernels/logprob/chunked.py:
one_pass), and they are not made a second time. SFT, and policy gradients by token, are
such losses; DPO and GSPO, which add up a sequence first, are not.

Nobody has to say so of a loss: it is read off the operations of its gradient. What is
not known to be elementwise, or to keep rows apart, is taken not to be, so a new operation
costs time and never a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from educe.types import Batch, LossFn, Scores

# Operations whose result at a place is made of their operands at that place.
ELEMENTWISE = frozenset(
  """
  abs add add_any and ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1
  floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter
  not or pow rem round rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh xor
  """.split()  # noqa: SIM905
)
# Operations that run a program of their own, on their operands in order.
CALLS = (
  'jit',
  'pjit',
  'closed_call',
  'core_call',
  'custom_jvp_call',
  'custom_vjp_call',
)


def elementwise(loss: LossFn, scores: Scores, batch: Batch) -> bool:
  """Whether the cotangents of `loss` at a token read that token's scores alone.

  scores, batch: arrays or their shapes; what the loss raises, this raises
  """

  jaxpr = _cotangents(loss, scores, batch)
  read = len(jax.tree.leaves(scores))
  inputs = [index < read for index in range(len(jaxpr.invars))]
  return _follow(jaxpr, inputs, _in_place) is not None


def couples_rows(loss: LossFn, scores: Scores, batch: Batch) -> bool:
  """Whether the cotangents of `loss` in a row may read another row, as of advantages that
  it whitens itself, or how many rows there are: a device's own would not do."""
  jaxpr = _cotangents(loss, scores, batch)
  if _follow(jaxpr, [True] * len(jaxpr.invars), _in_row) is None:
    return True

  def twice(x):
    return jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype)

  try:
    more = _cotangents(loss, *jax.tree.map(twice, (scores, batch)))
  except (TypeError, ValueError):  # such as an array of its own, with so many rows
    return True
  return _numbers(jaxpr) != _numbers(more)


def _cotangents(loss: LossFn, scores: Scores, batch: Batch) -> Any:
  """The program of ∂total/∂scores."""

  def cotangents(scores, batch):
    return jax.grad(lambda scores: loss(scores, batch)[0].total)(scores)

  return jax.make_jaxpr(cotangents)(scores, batch).jaxpr


def _in_place(eqn: Any, shapes: list[Any]) -> bool:
  """Whether a place of the result is made of that place of its operands, `shapes`."""
  shape = eqn.outvars[0].aval.shape
  return eqn.primitive.name in ELEMENTWISE and all(x == shape for x in shapes)


def _in_row(eqn: Any, shapes: list[Any]) -> bool:
  """… and a row of the result of that row of its operands."""
  rows, name, given = eqn.outvars[0].aval.shape[:1], eqn.primitive.name, eqn.params
  if not rows or any(shape[:1] != rows for shape in shapes):
    return False
  if name.startswith(('reduce_', 'arg')) and 'axes' in given:
    return 0 not in given['axes']
  if name.startswith('cum'):
    return given['axis'] != 0
  if name in ('sort', 'concatenate'):
    return given['dimension'] != 0
  if name == 'broadcast_in_dim':
    return 0 in given['broadcast_dimensions'][:1]
  if name == 'transpose':
    return 0 in given['permutation'][:1]
  if name == 'rev':
    return 0 not in given['dimensions']
  if name == 'pad':
    return given['padding_config'][0] == (0, 0, 0)
  # Of reshape and slice: as many rows as before are the same rows.
  return name in ELEMENTWISE or name in ('reshape', 'slice')


def _follow(
  jaxpr: Any, tainted: list[bool], keeps: Callable[[Any, list[Any]], bool]
) -> list[bool] | None:
  """Which outputs hold what the tainted inputs do, each at its own place; None: an
  operation does not keep it there.

  keeps(operation, shapes of its operands that hold something)
  """
  needed = _needed(jaxpr)
  holds = {v for v, yes in zip(jaxpr.invars, tainted, strict=True) if yes}

  def is_held(v):
    return not isinstance(v, core.Literal) and v in holds

  for eqn in jaxpr.eqns:
    held = [is_held(v) for v in eqn.invars]
    if not any(held) or not any(v in needed for v in eqn.outvars):
      continue
    inner = _body(eqn)
    if inner is not None:
      out = _follow(inner, held, keeps)
    else:
      shapes = [v.aval.shape for v in eqn.invars if is_held(v)]
      out = [True] * len(eqn.outvars) if keeps(eqn, shapes) else None
    if out is None:
      return None
    holds |= {v for v, yes in zip(eqn.outvars, out, strict=True) if yes}
  return [is_held(v) for v in jaxpr.outvars]


def _numbers(jaxpr: Any) -> list[str]:
  """What its outputs are made of beside its inputs: literals, and what is counted."""
  needed, found = _needed(jaxpr), [str(v.aval.shape) for v in jaxpr.constvars]
  for eqn in jaxpr.eqns:
    if not any(v in needed for v in eqn.outvars):
      continue
    found += [str(v.val) for v in eqn.invars if isinstance(v, core.Literal)]
    if eqn.primitive.name == 'iota':
      found.append(str(eqn.params['shape'][eqn.params['dimension']]))
    inner = _body(eqn)
    if inner is not None:
      found += _numbers(inner)
  return found + [str(v.val) for v in jaxpr.outvars if isinstance(v, core.Literal)]


def _body(eqn: Any) -> Any:
  """The program inside of a call."""
  if eqn.primitive.name not in CALLS:
    return None
  for name in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    inner = eqn.params.get(name)
    inner = getattr(inner, 'jaxpr', inner)
    if inner is not None and len(inner.invars) == len(eqn.invars):
      return inner
  return None


def _needed(jaxpr: Any) -> set[Any]:
  """The variables that the outputs are made of."""
  needed = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
  for eqn in reversed(jaxpr.eqns):
    if any(v in needed for v in eqn.outvars):
      needed |= {v for v in eqn.invars if not isinstance(v, core.Literal)}
  return needed
