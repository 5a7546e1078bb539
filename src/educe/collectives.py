"""What a compiled program moves between devices, read from its HLO text.

  found = collectives.read(compiled.as_text())

A line for every collective of the program: what goes in and what comes out, among how many
devices, and how often: those in the body of a loop (the scan over layers, microbatches)
run once a trip, and loops lie in loops. HLO's format is that of openxla.org/xla; how many
trips a loop makes it says itself (`known_trip_count`, which the compiler for TPUs leaves
out), or its condition does: counter < constant.

Of a ring of g devices each one sends at least, of n bytes a device that go in,

  all-gather      (g − 1)·n        reduce-scatter, all-to-all    (g − 1)/g·n
  all-reduce   2·(g − 1)/g·n       collective-permute                      n

Pitch Patarasuk and Xin Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", 2009, §3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

# → bytes that a device sends, in units of those that go in, among g.
SENT = {
  'all-gather': lambda g: g - 1,
  'all-reduce': lambda g: 2 * (g - 1) / g,
  'reduce-scatter': lambda g: (g - 1) / g,
  'all-to-all': lambda g: (g - 1) / g,
  'ragged-all-to-all': lambda g: (g - 1) / g,
  'collective-broadcast': lambda g: (g - 1) / g,
  'collective-permute': lambda g: 1,
}


class Array(NamedTuple):
  dtype: str  # as HLO names it: bf16, f32, s32
  shape: tuple[int, ...]

  @property
  def bytes(self) -> float:
    bits = (
      8 if self.dtype == 'pred' else int((re.findall(r'\d+', self.dtype) or [0])[0])
    )
    return math.prod(self.shape) * bits / 8

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.shape))}]'


class Collective(NamedTuple):
  """One of a program, and what one device of it does."""

  op: str
  ins: tuple[Array, ...]
  outs: tuple[Array, ...]  # of an all-gather the whole, of a reduce-scatter the part
  group: int  # devices among which it is; of a collective-permute the pairs
  times: int  # in one run of the program
  open: bool  # in a loop whose trips are not known, of which one is counted
  where: str  # the op_name that JAX gave it

  @property
  def bytes(self) -> float:
    """Sent by a device, all times together."""
    return self.times * SENT[self.op](self.group) * sum(x.bytes for x in self.ins)


class _Line(NamedTuple):
  """name = shape op(operands), …"""

  shape: str
  op: str
  operands: tuple[str, ...]  # their names
  shapes: tuple[str, ...]  # of those, where they are written beside them
  rest: str  # operands and attributes


class _Computation(NamedTuple):
  lines: dict[str, _Line]
  root: list[str]  # the name of its result

  def result(self) -> _Line | None:
    return self.lines.get(self.root[0]) if self.root else None

  def made(self, name: str) -> _Line | None:
    """The line that computes it, behind those that hand it on."""
    line = self.lines.get(name)
    while line and line.op in _PASSED_ON and line.operands:
      line = self.lines.get(line.operands[0])
    return line


_HEADER = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*-> .*\{$')
_END = re.compile(r'^\}(?!\})|^\s*$')
_LINE = re.compile(r'^\s*(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$')
# Of a dimension that is bounded, f32[<=4], room is made for the most.
_ARRAY = re.compile(r'\b([a-z]\w*)\[([<=\d,]*)\]')
_OPERAND = re.compile(r'(?:/\*.*?\*/)?\s*(?:(.*?)\s+)?%?([\w.-]+)')
_CALLS = re.compile(
  r'(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
# Of a collective that runs beside other work, TPUs have a fusion for its start (where this
# is −1), each step and its end, and all of them name it.
_STEP = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')
_PASSED_ON = ('copy', 'bitcast', 'convert', 'optimization-barrier')


def read(text: str) -> list[Collective]:
  """The collectives of a compiled program, in the order of its text.

  Of a conditional both branches count, each as if it were taken. Raises ValueError for a
  text that is no HLO module, and for a collective of operands that it does not describe.
  """
  computations, entry = _computations(text)
  parts = re.search(r'num_partitions=(\d+)', text[: text.find('\n')])
  everyone = int(parts[1]) if parts else 1
  runs: dict[str, list[tuple[int, bool]]] = {}
  _count(computations, entry, 1, False, runs)
  found = []
  for name, computation in computations.items():
    times = sum(count for count, _ in runs.get(name, ()))
    unknown = any(known for _, known in runs.get(name, ()))
    for line in computation.lines.values():
      op = line.op.removesuffix('-start')
      if op not in SENT or not times or _STEP.search(line.rest):
        continue
      ins = _ins(computation, line)
      group = _group(line.rest, everyone)
      if name.startswith('all-reduce-scatter'):  # as a TPU's compiler writes one
        op, outs = (
          'reduce-scatter',
          _arrays(computation.lines[computation.root[0]].shape),
        )
      else:
        outs = _outs(op, ins, group, line.rest)
      where = re.search(r'op_name="([^"]*)"', line.rest)
      said = where[1] if where else ''
      found.append(Collective(op, ins, outs, group, times, unknown, said))
  return found


def total(found: Iterable[Collective]) -> dict[str, float]:
  """Bytes that a device sends in one run of the program, by op, the most first."""
  sums: dict[str, float] = {}
  for each in found:
    sums[each.op] = sums.get(each.op, 0.0) + each.bytes
  return dict(sorted(sums.items(), key=lambda item: -item[1]))


def calls(text: str, target: str) -> list[str]:
  """Of each custom call of this target in a compiled program the name of its Pallas kernel:
  the scope that JAX lowered it in, or else what the instruction itself is called."""
  found = []
  for computation in _computations(text)[0].values():
    for name, line in computation.lines.items():
      if line.op == 'custom-call' and f'custom_call_target="{target}"' in line.rest:
        said = re.search(r'op_name="(?:[^"]*/)?([^"/]+)/pallas_call"', line.rest)
        found.append(said[1] if said else name)
  return found


def _ins(computation: _Computation, line: _Line) -> tuple[Array, ...]:
  """What goes in, as it is described where it is made, or else beside the operand."""
  found: list[Array] = []
  for name, beside in zip(line.operands, line.shapes, strict=True):
    made = computation.lines.get(name)
    arrays = _arrays(made.shape if made else beside)
    if not arrays:
      raise ValueError(
        f'HLO: {line.op} reads {name!r}, which its computation does not describe; give '
        'the whole text of the compiled program'
      )
    found += arrays
  return tuple(found)


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
  """(by name, the entry's name)."""
  out: dict[str, _Computation] = {}
  entry, current, last = None, None, None
  for row in text.splitlines():
    if header := _HEADER.match(row):
      current, last = _Computation({}, []), None
      out[header[2]] = current
      entry = header[2] if header[1] else entry
    elif current is None:
      continue
    elif match := _LINE.match(row):
      root, last, shape, op, rest = match.groups()
      found = [_OPERAND.fullmatch(x.strip()) for x in _operands(rest)]
      named = [(x[2], x[1] or '') for x in found if x]
      names, shapes = zip(*named, strict=True) if named else ((), ())
      current.lines[last] = _Line(shape, op, names, shapes, rest)
      if root:
        current.root.append(last)
    elif last is not None and not _END.match(row):  # an attribute with a line break
      line = current.lines[last]
      current.lines[last] = line._replace(rest=line.rest + row)
  if entry is None:
    raise ValueError(f'this is no HLO module with an entry: {text[:60]!r}')
  return out, entry


def _operands(rest: str) -> list[str]:
  """What stands between the brackets, at the commas that are in no others."""
  depth, start, found = 1, 0, []
  for at, letter in enumerate(rest):
    depth += (letter in '([{') - (letter in ')]}')
    if not depth or (depth == 1 and letter == ','):
      found.append(rest[start:at])
      start = at + 1
    if not depth:
      break
  return found


def _arrays(shape: str) -> tuple[Array, ...]:
  return tuple(
    Array(dtype, tuple(int(x.strip('<=')) for x in dims.split(',') if x))
    for dtype, dims in _ARRAY.findall(shape)
  )


def _group(rest: str, everyone: int) -> int:
  """The size of a replica group, in any of the ways that they are written."""
  if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}', rest):
    return pairs[1].count('{')
  if found := re.search(r"replica_groups=mesh\[(.*?)\].*? \{((?:'[^}]*)?)\}", rest):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    # 'axis', or a part of it: 'axis':(what is before it)its size.
    named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part or sizes[axis]) for axis, part in named)
  if found := re.search(r'replica_groups=\[\d+,(\d+)\]<=', rest):
    return int(found[1])
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', rest):
    return found[1].count(',') + 1
  return everyone


def _outs(op: str, ins: tuple[Array, ...], group: int, rest: str) -> tuple[Array, ...]:
  if op not in ('all-gather', 'reduce-scatter'):
    return ins
  found = re.search(r'dimensions=\{(\d+)', rest)
  along = int(found[1]) if found else 0

  def scaled(size: int) -> int:
    return size * group if op == 'all-gather' else size // group

  return tuple(
    x._replace(
      shape=tuple(scaled(n) if i == along else n for i, n in enumerate(x.shape))
    )
    for x in ins
  )


def _count(computations, name, times, unknown, runs) -> None:
  """Into runs: how often a computation, and what it calls, is run, and if that is all
  known; a number for each place that calls it."""
  if name not in computations:
    raise ValueError(
      f'HLO: a loop runs {name!r}, which is not there; give the whole text of the '
      'compiled program'
    )
  runs.setdefault(name, []).append((times, unknown))
  for line in computations[name].lines.values():
    if line.op == 'while':
      body = re.search(r'body=%?([\w.-]+)', line.rest)
      trips = _trips(computations, computations[name], line)
      if body:
        often = times * (1 if trips is None else trips)
        _count(computations, body[1], often, unknown or trips is None, runs)
    elif not line.op.endswith(('-done', '-update')):
      called = _CALLS.findall(line.rest)
      for branches in _BRANCHES.findall(line.rest):
        called += re.findall(r'%?([\w.-]+)', branches)
      for each in called:
        if each in computations:
          _count(computations, each, times, unknown, runs)


def _trips(computations: Mapping[str, _Computation], here, line: _Line) -> int | None:
  """Of a while loop that counts up to a constant, as those of `lax.scan` do; else None."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line.rest):
    return int(known[1])
  condition = re.search(r'condition=%?([\w.-]+)', line.rest)
  if condition is None or condition[1] not in computations:
    return None
  test = computations[condition[1]]
  last = test.result()
  if last is None:
    return None
  operands, wrapped = last.operands, _CALLS.search(last.rest)
  if last.op == 'fusion' and wrapped and len(operands) == 2:
    inner = computations[wrapped[1]]
    last = inner.result()
    order = [inner.lines.get(x) for x in last.operands] if last else []
    # Its own parameters, in the order of the fusion's operands.
    places = [x.rest.split(')')[0] for x in order if x and x.op == 'parameter']
    if last is None or len(places) < len(order):
      return None
    operands = tuple(operands[int(i)] for i in places)
  if last.op != 'compare' or 'direction=LT' not in last.rest:
    return None
  counter, end = test.lines.get(operands[0]), _constant(test, operands[1])
  index = counter and re.search(r'index=(\d+)', counter.rest)
  if not counter or counter.op != 'get-tuple-element' or not index or end is None:
    return None
  start, step, place = 0, 1, int(index[1])
  given = here.lines.get(line.operands[0])
  if given and given.op == 'tuple':
    start = _constant(here, given.operands[place]) or 0
  body = re.search(r'body=%?([\w.-]+)', line.rest)
  if body and body[1] in computations:
    step = _step(computations[body[1]], place)
  return max(0, -(-(end - start) // step))


def _step(body: _Computation, place: int) -> int:
  """What is added to the counter: more than one where iterations are done two at a time."""
  result = body.result()
  if result is None or result.op != 'tuple':
    return 1
  line = body.made(result.operands[place])
  if line is None or line.op not in ('add', 'fusion'):
    return 1
  return next((n for x in line.operands if (n := _constant(body, x))), 1)


def _constant(computation: _Computation, name: str) -> int | None:
  line = computation.made(name)
  found = re.match(r'(-?\d+)\)', line.rest) if line and line.op == 'constant' else None
  return int(found[1]) if found else None
