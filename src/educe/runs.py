"""Runs: a config from its sections to a finished folder.

This file only wires: what it calls is in the folders below, and `train` reads from top
to bottom as the story of a run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import json
import pathlib
from typing import Any

import jax

from educe import config as config_lib
from educe import hosts, mesh_checks, paths, roofline, sections, sharding
from educe.measurement import curves, reliability, transcript_page
from educe.models import policy, quantized
from educe.models.parts import over
from educe.policies import open_values, read_config
from educe.progress import say
from educe.rollouts import transcripts
from educe.training import checkpoint, loop, metrics
from educe.types import Batch

# The sections that `train` itself reads; the others must be read by one another.
READ = (
  'model', 'adapter', 'value', 'tokenizer', 'algorithm', 'loss', 'optimizer', 'evaluation',
  'mesh',
)  # fmt: skip
PAGE = 64  # completions on the page of transcripts


def train(
  run_dir: pathlib.Path,
  *,
  steps: int,
  model: dict,
  tokenizer: dict,
  algorithm: dict,
  loss: dict,
  optimizer: dict,
  mesh: dict,
  source: dict | None = None,
  data: dict | None = None,
  environment: dict | None = None,
  rollouts: dict | None = None,
  advantage: dict | None = None,
  judge: dict | None = None,
  init_from: str | None = None,
  adapter: dict | None = None,
  value: dict | None = None,
  value_from: str | None = None,
  seed: int = 0,
  microbatches: int = 1,
  offload: tuple[str, ...] = (),
  save_every: int = 100,
  keep: int = 2,
  evaluation: dict | None = None,
  evaluate_every: int = 0,
  abort_after: int = 10,
  tensorboard: bool = False,
) -> bool:
  """Runs a config, or goes on with it. The keywords are the sections of a config file.

  Returns whether it finished; False when SIGTERM stopped it, saved and resumable.

  Args:
    run_dir: gets config.json, metrics.jsonl, checkpoints/, samples/ and curves.png; of
      rollouts also rollouts/ and transcripts.html.
    steps: updates.
    source, data: records and batches, for algorithms that train on data.
    environment, rollouts, advantage: for those that train on the policy's own samples.
    judge: of those, in place of the environment's rewards.
    init_from: a run folder (or stage://name of a stage before this one); its newest
      weights take the place of the model's. An adapter of that run goes into the
      weights, unless this one has a section adapter too (see its `merge`).
    adapter: LoRA or DoRA on them; all else is frozen, but for a value head.
    value: a value head on them, for a reward model or a critic.
    value_from: likewise; the head starts as the one that it trained, with a trunk of
      its own if ours is separate.
    seed: of the samples and the training state's random key.
    microbatches: parts a batch is cut into; memory goes down, the result stays.
    offload: 'opt_state' or 'reference', or both: kept in the memory of the host between
      the steps and passes that read them.
    save_every, keep: steps between checkpoints, and how many of the newest stay.
    evaluation: what to measure before, after, and every `evaluate_every` steps.
    abort_after: updates in a row that may be skipped for non-finite gradients.
  """
  config = {name: value for name, value in locals().items() if name != 'run_dir'}
  call = config_lib.call

  # Whatever can be wrong without the model comes first.
  run_dir = paths.output(run_dir, '--run_dir')
  sections.check(config)
  tx = sections.optimizer_of(config)
  words = sections.tokenizer_of(config)
  grid = call('mesh', mesh)
  if offload:
    mesh_checks.check_host()
  batches = data and sections.opened(
    data, grid, source=source and call('source', source), tokenizer=words
  )
  world: Any = environment and call('environment', environment)
  exam: Any = evaluation and config_lib.bound(
    'evaluation', evaluation, open_values=open_values
  )
  opinion: Any = judge and call('judge', judge, open_values=open_values)
  criterion = sections.loss_of(config)

  # The policy, on the mesh.
  say(headline(run_dir, config))
  rows = batches.batch_size if batches else None  # of a batch that processes share

  def place(batch: Batch, shares: int = 1) -> Batch:
    whole = rows is None or len(batch.tokens) == rows
    batch = sections.shared(config, batch, shares, grid, whole)
    return sharding.place_batch(batch, grid, rows)

  with sharding.on_host():
    net, params = sections.policy_of(config, words)
  whole = jax.eval_shape(quantized.restored, params)
  size = policy.count(whole)
  params = sharding.place(params, net.axes, grid)
  mesh_checks.check_params(params, grid)
  if whole_axes := mesh_checks.left_whole(params, net.axes, grid):
    say(whole_axes)
  if teacher := algorithm.get('teacher'):
    with sharding.on_host():
      algorithm = {**algorithm, 'teacher': call('teacher', teacher)}

  with contextlib.ExitStack() as closing:  # also when something below is refused
    # Where batches come from.
    supply = dict(
      model=net, params=params, tokenizer=words, environment=world, seed=seed
    )
    rounds = rollouts and call(
      'rollouts', rollouts, **supply, judge=opinion, run_dir=run_dir
    )
    if rounds:
      closing.callback(rounds.close)
    method = sections.algorithm_of(
      algorithm,
      advantage,
      **supply,
      data=batches,
      rollouts=rounds,
      loss=criterion,
      place=place,
      mesh=grid,
      run_dir=run_dir,
    )
    closing.callback(method.data.close)
    sections.check_rows(config, method, grid)
    # What an evaluation compares with: the policy that the run starts from, or the
    # reference, which is that one unless it follows the policy.
    asks = inspect.signature(exam.func).parameters if exam else ()
    implicit = exam and exam.keywords.get('reward', 'implicit') == 'implicit'
    compares = 'start' in asks or ('reference' in asks and implicit)
    kept = sections.copies(method) and (
      'reference' in asks or not method.reference_every
    )
    # On the host, where it is in nobody's way.
    began = sharding.fetch(tx.split(params)[0]) if compares and not kept else None
    state = sections.state_of(config, method, params, tx, jax.random.key(seed))
    state = sections.offloaded(config, sharding.replicate_rest(state, grid))
    del params, supply  # the state owns them now

    # Where it stood, if it ran before.
    run_dir.mkdir(parents=True, exist_ok=True)
    manager = checkpoint.open_manager(run_dir / 'checkpoints', keep=keep)
    closing.callback(manager.close)
    resumed = checkpoint.restore(manager, state, method.data)
    if resumed is not None:
      state = resumed
    say(
      f'{"resuming from" if resumed else "starting at"} step {int(state.step)} of '
      f'{steps}: {size:,} parameters on {jax.device_count()} '
      f'{jax.devices()[0].platform} device(s); the first step also compiles'
    )
    if int(state.step) < steps:
      hosts.by_first(lambda: write_config(run_dir, config))
    else:
      say(f'no step is left: {run_dir / "config.json"} stays as it is')
    log = metrics.Log(run_dir, step=int(state.step), tensorboard=tensorboard)
    closing.callback(log.close)

    def evaluate(state) -> dict[str, Any]:
      step = int(state.step)
      against: tuple = ()
      if compares:
        trained = tx.split(state.params)[0]
        start = sharding.place_like(began, trained) if began is not None else None
        start = sharding.to_device(state.reference) if start is None else start
        against = (over(state.params, start),)
      score = exam(net, state.params, words, *against)
      file = run_dir / 'samples' / f'{step}.jsonl'
      hosts.by_first(lambda: transcripts.save(score.transcripts, file))
      if 'completion' in score.transcripts[0]:
        say(f'\n{transcripts.show(score.transcripts, limit=3)}')
      say(f'\nstep {step}: {score.verb} {score}')
      return score.metrics()

    work = functools.cache(functools.partial(sections.work_of, net, whole, tx, method))
    layout = jax.tree.map(lambda x: x.sharding, state)
    step = sections.step_of(net, method, tx, microbatches, layout)
    state, finished = loop.run(
      state,
      step,
      method,
      steps=steps,
      run_dir=run_dir,
      manager=manager,
      config=config,
      place=place,
      log=log,
      evaluate=evaluate if exam else None,
      evaluate_every=evaluate_every,
      save_every=save_every,
      abort_after=abort_after,
      flops=lambda batch: work(roofline.reading(batch)).flops,
    )
    checkpoint.wait(manager)
  if finished and hosts.is_first():
    say(f'done: {", ".join(map(str, [run_dir, *pictures(run_dir)]))}')
  elif not finished:
    say(
      f'stopped at step {int(state.step)}, saved; the same command goes on from there'
    )
  return finished


def write_config(run_dir: pathlib.Path, config: dict[str, Any]) -> None:
  """config.json, defaults and all. Says what changed if the run goes on with another."""
  path = run_dir / 'config.json'
  if path.exists():
    for key, before, after in changes(read_config(path), config):
      say(f'{path}: {key} was {before}, is now {after}')
  paths.write(path, json.dumps(config, indent=2) + '\n')


def changes(old: dict, new: dict) -> list[tuple[str, Any, Any]]:
  """(key, before, after) of what differs between two configs."""
  before, after = flat(old), flat(json.loads(json.dumps(new)))
  keys = sorted(before.keys() | after.keys())
  found = [(key, before.get(key), after.get(key)) for key in keys]
  return [(key, x, y) for key, x, y in found if x != y]


def flat(values: dict[str, Any], path: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} as {'a.b': 1}."""
  out: dict[str, Any] = {}
  for key, value in values.items():
    inner = isinstance(value, dict) and value
    out |= flat(value, f'{path}{key}.') if inner else {f'{path}{key}': value}
  return out


def headline(run_dir: pathlib.Path, config: dict[str, Any]) -> str:
  """What is about to happen, in a line: where results go, which model, on what."""

  def named(section: str) -> str:
    values = config[section] or {}
    what = [values.get(key) for key in ('name', 'path', 'preset', 'dataset', 'task')]
    inner = values.get('environment') or {}
    what += [inner.get(key) for key in ('name', 'path', 'task')]
    return ' '.join(str(x) for x in what if x)

  parts = [f'model {named("model")}']
  parts += [f'{x} {named(x)}' for x in ('source', 'environment', 'judge') if config[x]]
  if config['init_from']:
    parts.append(f'from the weights of {config["init_from"]}')
  return f'{run_dir}: {config["steps"]} steps of {named("algorithm")}; ' + ', '.join(
    parts
  )


def pictures(run_dir: pathlib.Path) -> list[pathlib.Path]:
  """What to look at: the curves, and a page of the last rollouts if there are any."""
  made, title = [], '/'.join(run_dir.parts[-2:])
  if importlib.util.find_spec('matplotlib') is not None:
    made.append(curves.draw(run_dir, title=title))
    made += filter(None, [reliability.draw(run_dir, title=title)])
  if files := sorted((run_dir / 'rollouts').glob('*.jsonl'), reverse=True):
    full = (file for file in files if 'log_ratio' in transcripts.load(file, 1)[0])
    file = next(full, files[0])  # not every run has such a one
    rows = transcripts.load(file, PAGE)
    title += f' · rollouts/{file.name}, the first {len(rows)}'
    html = run_dir / 'transcripts.html'
    made.append(transcript_page.page(rows, html, title=title))
  return made
