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
from educe import roofline, sharding
from educe.algorithms import on_policy
from educe.data.chat import encode_prompt
from educe.data.sharing import bucket, share
from educe.data.tokenizer import Tokenizer
from educe.models import policy, scratch, value_head
from educe.policies import check_vocabulary
from educe.rollouts import sampler, slots
from educe.rollouts.sampler import MANY
from educe.roofline import Work
from educe.sections import check_context, check_offload, optimizer_of, step_of
from educe.training.step import init_state
from educe.types import Algorithm, Batch, Model, TrainState

# What a model section may say beside where its weights are.
OPTIONS = inspect.signature(scratch.load).parameters.keys() - {'preset', 'seed'}


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
  if given['algorithm'].get('precompute') is not None:
    raise config_lib.ConfigError(
      'config.algorithm.precompute would score all data, which takes the chips; plan with '
      '--config.algorithm.precompute=None: that holds the reference beside'
    )
  check_offload(given['offload'])
  tx = optimizer_of(given)
  words = call('tokenizer', given['tokenizer'])
  batches = given['data'] and call(
    'data',
    given['data'],
    source=given['source'] and call('source', given['source']),
    tokenizer=words,
  )
  world = given['environment'] and call('environment', given['environment'])
  built: dict[str, Any] = {}

  def start() -> TrainState:
    net, params = _model(given['model'])
    check_vocabulary(net, params, words)
    if given['adapter']:
      net, params = call('adapter', given['adapter'], model=net, params=params)
    if given['value']:
      net, params = call('value', given['value'], model=net, params=params)
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
    rounds = section and call('rollouts', section, **supply, judge=judge)
    method = call(
      'algorithm',
      given['algorithm'],
      **supply,
      data=batches,
      rollouts=rounds,
      advantage=given['advantage']
      and config_lib.bound('advantage', given['advantage']),
      loss=config_lib.bound('loss', given['loss']),
      place=_refuse,
      mesh=mesh,
      run_dir=pathlib.Path(os.devnull),
    )
    built.update(net=net, method=method)
    copied = method.reference_every is not None and method.reference is None
    state = init_state(params, tx, jax.random.key(0), reference=copied)
    return state if copied else state._replace(reference=method.reference)

  shapes = jax.eval_shape(start)
  net, method = built['net'], built['method']
  state = placed(shapes, net.axes, mesh)
  sharding.check_params(state.params, mesh)
  away = {name: sharding.to_host(getattr(state, name)) for name in given['offload']}
  state, rows = state._replace(**away), rows or method.rows
  # Of rows that several processes share, none shares a prompt (`runs.train`).
  together = (not batches or hosts_of(mesh) == 1) and sharding.in_parts(mesh) == 1
  parts = given['microbatches']
  check_context(mesh, given['data'], method.longer)
  sharding.check_batch(rows, parts, mesh, method.group, method.couples)
  start_of_rows, new = 1, 0
  if world:
    start_of_rows = prompt or longest(words, world.prompts)
    new = given['rollouts']['max_new_tokens']
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
    shares=method.shares if together else 1,
    parts=sharding.ways(mesh) * parts,
  )
  step = step_of(net, method, tx, parts, jax.tree.map(lambda x: x.sharding, state))
  programs = {
    'train': Program(
      lambda: _on(mesh, step, state, batch),
      roofline.update(net.architecture, reading(batch), rows * length),
    )
  }
  if world:
    programs['score'] = _scoring(net, method, mesh, state, batch, rows * length)
    if given['rollouts']['server'] is None:  # or an engine samples
      programs |= _sampler(net, mesh, state, words, given['rollouts'], start_of_rows)
  return Plan(net, method, mesh, state, batch, rows, length, programs)


def hosts_of(mesh: Mesh) -> int:
  return len({device.process_index for device in mesh.devices.flat})


def _on(mesh: Mesh, jitted: Any, *operands: Any, **options: Any) -> Any:
  with sharding.using(mesh):
    return jitted.lower(*operands, **options)


def _model(section: Mapping[str, Any]) -> tuple[Model, Any]:
  """A section's model, and params as shapes where only they are traced; a folder of
  weights is asked for its description alone."""
  loader = inspect.getmodule(config_lib.resolve('model', section['name']))
  describe = getattr(loader, 'describe', None)
  if describe is None:
    return config_lib.call('model', section)
  net = policy.build(describe(**{k: x for k, x in section.items() if k != 'name'}))
  return net, net.init(jax.random.key(0))


def _silent(records: Sequence[Any], completions: Sequence[str]) -> list[None]:
  """A judge of nothing."""
  return [None] * len(completions)


def _refuse(*_: Any) -> Any:
  raise AssertionError('nothing is placed in a plan')


def longest(words: Tokenizer, prompts: Sequence[Mapping[str, Any]]) -> int:
  """Tokens of the longest prompt."""
  return max(
    len(encode_prompt(words, record['prompt'], tools=record.get('tools')))
    for record in prompts
  )


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
  *,
  shares: int = 1,
  parts: int = 1,
) -> Batch:
  """Shapes of a batch that is as full as it can be: rows of `length` tokens, of which all
  from `start` on are trained on.

  shares: rows next to each other that begin with one prompt, of `start` tokens
  parts: that the rows are cut into
  """
  mask = np.zeros((rows, length), np.float32)
  mask[:, start:] = 1
  arrays: dict[str, Any] = dict(tokens=np.zeros((rows, length), np.int32), mask=mask)
  for name in method.fields:
    shape = (rows,) if name == 'labels' else (rows, length)
    kind = np.int32 if name in ('positions', 'segments') else np.float32
    arrays[name] = np.zeros(shape, kind)
  batch = share(Batch(**arrays), shares, parts)
  over = NamedSharding(mesh, sharding.BATCH)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over), batch
  )


def reading(batch: Batch) -> roofline.Reading:
  rows, length = batch.tokens.shape
  if batch.prefix is None:
    return roofline.full(rows, length)
  prompts, start = batch.prefix.shape
  return roofline.forked(prompts, start, rows, length - 1)


def _scoring(
  net: Model, method: Algorithm, mesh: Mesh, state, batch: Batch, tokens: int
) -> Program:
  """What the policy, and a reference, says of a round's tokens, a step's rows at a time."""
  parts = on_policy.scoring(net, method.temperature)
  told = ('tokens', 'mask', 'positions', 'segments', 'prefix')
  known = {name: x for name, x in batch._asdict().items() if name in told}
  batch = Batch(**known)
  flops = roofline.forward(net.architecture, reading(batch))
  return Program(
    lambda: _on(mesh, parts, state.params, batch),
    Work(flops, 0.0, tokens),
    beside=held(state) - held(state.params),
  )


def _sampler(
  net: Model, mesh: Mesh, state, words: Tokenizer, rollouts, prompt: int
) -> dict[str, Program]:
  """prefill: prompts read into their slots · decode: one token more of every slot."""
  functions = slots.Functions(net.head, net.init_cache, net.decode)
  ways = sharding.ways(mesh)
  rows = min(rollouts['batch_size'], rollouts['prompts'] * rollouts['group'])
  rows = -(-rows // ways) * ways
  width, room = bucket(max(prompt - 1, 1)), rollouts['max_new_tokens']
  params = value_head.without(state.params)

  @functools.cache
  def weights():
    with sharding.using(mesh):
      how: Any = dict(model=functions, specs=slots.layout(params))
      prepare = functools.partial(slots.prepare, **how)
      return _out(_on(mesh, slots.prepare, params, **how), prepare, params)

  def cached():
    options: Any = dict(model=functions, rows=rows, width=width, room=room)
    found = jax.eval_shape(functools.partial(slots.empty, **options))

    def put(x):  # as `slots.empty` and `init_cache` lay them
      axes = (None,) if x.ndim < 2 else ('rows', 'kv_heads')[: x.ndim - 1]
      axes += (None,) * (x.ndim - len(axes))
      where = NamedSharding(mesh, sharding.spec(axes[: x.ndim], x.shape, mesh))
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(put, found)

  many = min(max(1, MANY // width // ways) * ways, rows)
  each: Any = jax.ShapeDtypeStruct((rows,), np.int32)
  entries = slots.Entries(
    prompts=jax.ShapeDtypeStruct((many, width), np.int32),  # type: ignore[arg-type]
    lengths=jax.ShapeDtypeStruct((many,), np.int32),  # type: ignore[arg-type]
    real=np.int32(many),
    slot=each,
    prompt=each,
    token=each,
    seed=jax.ShapeDtypeStruct((rows,), np.uint32),  # type: ignore[arg-type]
  )

  def prefill():
    return _on(mesh, slots.enter, weights().params, cached(), entries, model=functions)

  def decode():
    return _on(
      mesh,
      slots.advance,
      weights(),
      cached(),
      jax.eval_shape(lambda: jax.random.key(0)),
      sampler.drawing(
        *(rollouts[k] for k in ('temperature', 'top_k', 'top_p', 'min_p'))
      ),
      jax.ShapeDtypeStruct((len(words.eos_ids),), np.int32),
      None,
      np.int32(0),
      np.int32(room),
      model=functions,
      width=width,
    )

  a, seen = net.architecture, width + room
  entered = roofline.Reading(many * width, many * width * seen, 0)
  drawn = roofline.Reading(rows, rows * seen, rows)
  beside = held(state)
  return {
    'prefill': Program(
      prefill, Work(roofline.forward(a, entered), 0.0, many * width), beside, kept=True
    ),
    'decode': Program(
      decode, Work(roofline.forward(a, drawn), 0.0, rows), beside, kept=True
    ),
  }


def _out(lowered: Any, function: Any, *operands: Any) -> Any:
  """The shapes of what comes out, where the compiler puts it."""
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    jax.eval_shape(function, *operands),
    lowered.compile().output_shardings,
  )
