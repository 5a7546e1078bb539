"""Plans: the programs of a run, as shapes that lie where the run would put them.

`runs.train` with nothing loaded, sampled or allocated: the same sections called in the same
order, the model's params as shapes, and of the batches what their algorithm says of them
(`Algorithm.fields`). compile.py compiles what comes out for chips that are not here.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from educe import config as config_lib
from educe import mesh_checks, roofline, sections, sharding
from educe.algorithms import on_policy
from educe.data.chat import encode_prompt
from educe.data.sharing import bucket
from educe.data.tokenizer import Tokenizer
from educe.models import scratch, value_head
from educe.rollouts import sampler, slots, texts
from educe.roofline import Work
from educe.types import Algorithm, Batch, Model, TrainState

# What a model section may say beside where its weights are.
OPTIONS = inspect.signature(scratch.load).parameters.keys() - {'preset', 'seed'}
MODELS = ('model', 'teacher')  # sections whose weights are files


class Program(NamedTuple):
  """One that a run jits. `lower()` makes it, for the mesh's devices."""

  lower: Callable[[], Any]
  work: Work
  beside: float = 0.0  # bytes a device holds that are none of its operands
  kept: bool = False  # its results are its arguments, changed in a few places


class Plan(NamedTuple):
  model: Model
  method: Algorithm
  mesh: Mesh
  state: TrainState  # of shapes with shardings
  batch: Batch
  rows: int  # of the global batch
  length: int  # tokens, before rows share a prompt
  programs: dict[str, Program]


def plan(
  config: Mapping[str, Any],
  mesh: Mesh,
  *,
  preset: str | None = None,
  prompt: int | None = None,
  rows: int | None = None,
) -> Plan:
  """The programs of a run on this mesh, whose devices need not be here.

  Args:
    config: one run's sections, expanded (`config.expand(…, runs.train)`)
    preset: an architecture in place of the config's model; dtypes and choices stay
    prompt: tokens of the longest prompt; None: of the environment's
    rows: of the global batch; None: the config's

  Raises ValueError for what `train` would refuse, and for log-probs that are to be
  computed beforehand (`algorithm.precompute`).
  """
  call, given = config_lib.call, dict(config)
  if preset is not None:
    options = {k: x for k, x in given['model'].items() if k in OPTIONS}
    given['model'] = {'name': 'scratch', 'preset': preset, **options}
    given['init_from'] = given['value_from'] = None
  if given['algorithm'].get('precompute') is not None:
    raise config_lib.ConfigError(
      'config.algorithm.precompute would score all data, which takes the chips; plan with '
      '--config.algorithm.precompute=None: that holds the reference beside'
    )
  given = described(given)
  later = (x for x in ('init_from', 'value_from') if sections.to_come(given[x]))
  sections.check(given | dict.fromkeys(later))
  tx = sections.optimizer_of(given)
  words = sections.tokenizer_of(given)
  batches = given['data'] and sections.opened(
    given['data'],
    mesh,
    source=given['source'] and call('source', given['source']),
    tokenizer=words,
  )
  world = given['environment'] and call('environment', given['environment'])
  criterion = sections.loss_of(given)
  built: dict[str, Any] = {}

  def start() -> TrainState:
    net, params = sections.policy_of(given, words)
    supply = dict(
      model=net,
      params=params,
      tokenizer=words,
      environment=world,
      seed=given['seed'],
    )
    # Nobody is asked here: neither processes that verify, nor a judge.
    section = given['rollouts'] and {**given['rollouts'], 'workers': 0, 'server': None}
    judge = _silent if given['judge'] else None
    method = sections.algorithm_of(
      given['algorithm'],
      given['advantage'],
      **supply,
      data=batches,
      rollouts=section and call('rollouts', section, **supply, judge=judge),
      loss=criterion,
      place=_refuse,
      mesh=mesh,
      run_dir=pathlib.Path(os.devnull),
    )
    built.update(net=net, method=method)
    key = jax.random.key(given['seed'])
    return sections.state_of(given, method, params, tx, key)

  shapes = jax.eval_shape(start)
  net, method = built['net'], built['method']
  state = placed(shapes, net.axes, mesh)
  mesh_checks.check_params(state.params, mesh)
  state, rows = sections.offloaded(given, state), rows or method.rows
  sections.check_rows(given, method, mesh, rows)
  parts = given['microbatches']
  start_of_rows, new = 1, 0
  if world:
    new = given['rollouts']['max_new_tokens']
    most = net.architecture.max_length - new
    start_of_rows = prompt or longest(words, world.prompts, most)
  length = bucket(start_of_rows + new) if world else given['data']['max_length']
  length += method.longer
  if start_of_rows + new > net.architecture.max_length:
    raise config_lib.ConfigError(
      f'a prompt of {start_of_rows} tokens with config.rollouts.max_new_tokens={new} more '
      f'does not fit the context of the model, {net.architecture.max_length}'
    )
  batch = batch_of(
    method,
    rows,
    length,
    start_of_rows,
    mesh,
    # Of rows that several processes share, none shares a prompt.
    lambda batch: sections.shared(
      given, batch, method.shares, mesh, not batches or hosts_of(mesh) == 1
    ),
  )
  step = sections.step_of(
    net, method, tx, parts, jax.tree.map(lambda x: x.sharding, state)
  )
  programs = {
    'train': Program(
      lambda: _on(mesh, step, state, batch),
      sections.work_of(
        net, state.params, tx, method, roofline.reading(batch), rows * length
      ),
    )
  }
  if world:
    scored = batch
    if net.values is not None:  # a value is read behind the last token too (`reader`)
      scored = batch_of(method, rows, length + 1, start_of_rows, mesh)
    programs['score'] = _scoring(net, method, mesh, state, scored, rows * length)
    if given['rollouts']['server'] is None:  # or an engine samples
      programs |= _sampler(net, mesh, state, words, given['rollouts'], start_of_rows)
  return Plan(net, method, mesh, state, batch, rows, length, programs)


def hosts_of(mesh: Mesh) -> int:
  return len({device.process_index for device in mesh.devices.flat})


def _on(mesh: Mesh, jitted: Any, *operands: Any, **options: Any) -> Any:
  with sharding.using(mesh):
    return jitted.lower(*operands, **options)


def described(config: Any, section: str = '') -> Any:
  """A config whose models are described, where whoever reads their weights can do that."""
  if not isinstance(config, Mapping):
    return config
  values = {key: described(x, key) for key, x in config.items()}
  return config_lib.describing(section, values) if section in MODELS else values


def _silent(records: Sequence[Any], completions: Sequence[str]) -> list[None]:
  """A judge of nothing."""
  return [None] * len(completions)


def _refuse(*_: Any) -> Any:
  raise AssertionError('nothing is placed in a plan')


def longest(words: Tokenizer, prompts: Sequence[Mapping[str, Any]], most: int) -> int:
  """Tokens of the longest prompt of up to `most`: longer ones a run drops, or refuses."""
  lengths = (
    len(encode_prompt(words, record['prompt'], tools=record.get('tools')))
    for record in prompts
  )
  return max(length for length in lengths if length <= most)


def placed(tree: Any, axes: Any, mesh: Mesh) -> Any:
  """Shapes of a TrainState with the shardings that a run gives it.

  What belongs to a param (the param, its moments, its copy in a reference) has its path's
  names in its own, and lies as the param does; the rest is everywhere.
  """
  paths = jax.tree_util.tree_flatten_with_path(
    axes, is_leaf=lambda x: isinstance(x, tuple)
  )[0]
  known = {_names(path): axes for path, axes in paths}

  def put(path, leaf):
    of_param = known.get(_names(path))
    spec = sharding.spec(of_param, leaf.shape, mesh) if of_param else PartitionSpec()
    return jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
    )

  return jax.tree_util.tree_map_with_path(put, tree)


def _names(path: Any) -> tuple[str, ...]:
  return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def held(tree: Any) -> float:
  """Bytes that a device holds of shapes with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if x.sharding.memory_kind != sharding.HOST
  )


def batch_of(
  method: Algorithm,
  rows: int,
  length: int,
  start: int,
  mesh: Mesh,
  shared: Callable[[Batch], Batch] = lambda batch: batch,
) -> Batch:
  """Shapes of a batch that is as full as it can be: rows of `length` tokens, of which all
  from `start` on are trained on.

  shared: what a run does with rows that begin with the same prompt, of `start` tokens
  """
  mask = np.zeros((rows, length), np.float32)
  mask[:, start:] = 1
  arrays: dict[str, Any] = dict(tokens=np.zeros((rows, length), np.int32), mask=mask)
  for name in method.fields:
    shape = (rows,) if name == 'labels' else (rows, length)
    kind = np.int32 if name in ('positions', 'segments') else np.float32
    arrays[name] = np.zeros(shape, kind)
  batch = shared(Batch(**arrays))
  over = NamedSharding(mesh, sharding.BATCH)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over), batch
  )


def _scoring(
  net: Model, method: Algorithm, mesh: Mesh, state, batch: Batch, tokens: int
) -> Program:
  """What the policy, and a reference, says of a round's tokens, a step's rows at a time."""
  parts = on_policy.scoring(net, method.temperature)
  told = ('tokens', 'mask', 'positions', 'segments', 'prefix')
  known = {name: x for name, x in batch._asdict().items() if name in told}
  batch = Batch(**known)
  flops = roofline.forward(net, state.params, roofline.reading(batch))
  return Program(
    lambda: _on(mesh, parts, state.params, batch),
    Work(flops, 0.0, tokens),
    beside=held(state) - held(state.params),
  )


def _sampler(
  net: Model,
  mesh: Mesh,
  state: TrainState,
  words: Tokenizer,
  rollouts: Mapping[str, Any],
  prompt: int,
) -> dict[str, Program]:
  """prefill: prompts read into their slots · decode: one token more of every slot, with
  the longest ring. Where all rows have a slot at once, they enter with the first ring."""
  functions = slots.Functions(net.head, net.init_cache, net.decode)
  count, new = rollouts['prompts'] * rollouts['group'], rollouts['max_new_tokens']
  size = sampler.sizes(
    count, prompt, new, rollouts['batch_size'], sharding.row_parts(mesh)
  )
  params = value_head.without(state.params)
  first = size.rings[0 if count <= size.rows else -1]
  prompts = size.read(-(-min(count, size.rows) // rollouts['group']))

  @functools.cache
  def weights():
    with sharding.using(mesh):
      specs = slots.layout(params)
    return _out(mesh, slots.prepare, params, model=functions, specs=specs)

  def free(room: int):
    how: Any = dict(model=functions, rows=size.rows, width=size.width, room=room)
    return _out(mesh, slots.empty, **how)

  def prefill():
    entries = slots.nobody(prompts, size.width, size.rows)
    return _on(
      mesh, slots.enter, weights().params, free(first), entries, model=functions
    )

  def decode():
    vocabulary = sampler.vocabulary_size(net, params)
    return _on(
      mesh,
      slots.advance,
      weights(),
      free(size.rings[-1]),
      jax.eval_shape(lambda: jax.random.key(0)),
      sampler.drawing(
        *(rollouts[k] for k in ('temperature', 'top_k', 'top_p', 'min_p'))
      ),
      jax.ShapeDtypeStruct((len(words.eos_ids),), np.int32),
      texts.stop_table(words, rollouts['stop'], vocabulary),
      np.int32(0),
      np.int32(new),
      model=functions,
      width=size.width,
    )

  read, beside = prompts * size.width, held(state)
  entered = roofline.Reading(read, read * (size.width + first), 0)
  seen = size.width + size.rings[-1]
  alone = net._replace(values=None)
  drawn = roofline.Reading(size.rows, size.rows * seen, size.rows)
  return {
    'prefill': Program(
      prefill,
      Work(roofline.forward(alone, params, entered), 0.0, read),
      beside,
      kept=True,
    ),
    'decode': Program(
      decode,
      Work(roofline.forward(alone, params, drawn), 0.0, size.rows),
      beside,
      kept=True,
    ),
  }


def _out(mesh: Mesh, jitted: Any, *operands: Any, **options: Any) -> Any:
  """The shapes of what comes out, where the compiler puts it."""
  with jax.set_mesh(mesh):  # of what has no operands, nothing else says where
    lowered = jitted.lower(*operands, **options)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    lowered.out_info,
    lowered.compile().output_shardings,
  )
