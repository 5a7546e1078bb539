"""What a run did to the policy it started from: samples of both, and what they tell.

  python -m educe measure --policy=runs/demo/grpo

draws from both on the same prompts, scores every sample under both, keeps it all in
`<policy>/measure` (measurement/table.py), and writes the report there.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from educe import config as config_lib
from educe import hosts, paths
from educe.environments import verifiers
from educe.measurement import report, report_figures, table
from educe.measurement.findings import REACH
from educe.policies import loader_of, open_policy, read_config
from educe.progress import say
from educe.types import Environment


def measure(
  policy: str,
  to: str | None = None,
  *,
  base: str | None = None,
  environment: Mapping[str, Any] | None = None,
  samples: int = 64,
  size: int | None = None,
  max_new_tokens: int | None = None,
  temperature: float = 1.0,
  batch_size: int = 64,
  workers: int = 2,
  seed: int = 0,
  budget: int = REACH,
) -> report.Report | None:
  """The report on two policies; the samples are drawn as far as they are missing.

  Of several processes the first writes it, and the others return None.

  Args:
    policy: as `policies.open_policy` takes it; usually the folder of a run
    to: where table and report are kept; None: `measure` in the folder of the run
    base: what it is compared with; None: what the run started from
    environment: a section; None: what the run was evaluated on, or else trained on
    size: of its prompts so many, the first
    max_new_tokens: None: as many as where the environment is from
    workers: processes that judge; 0 judges in this one
    budget: samples of the base, k, within which what is gained counts as elicited

  Raises ValueError for what a policy that is no run leaves unsaid, tokenizers that
  differ, and as `table.draw` and `report.write` do.
  """
  for name, value, least in (('samples', samples, 2), ('budget', budget, 1)):
    if value < least:
      raise ValueError(f'--{name}={value}: must be at least {least}')
  report_figures.check()
  run = _config_of(policy)
  base = base or _start_of(policy, run)
  section, tokens = _environment(policy, run, environment, max_new_tokens)
  if to is None:
    if run is None:
      raise ValueError(f'--to is missing: {policy} is no run, to keep the table in')
    to = str(paths.resolve(policy) / 'measure')
  folder = paths.output(to, '--to')
  world: Environment = config_lib.call(
    'environment', config_lib.expand_section('environment', section, 'environment')
  )
  if size is not None:
    if not 1 <= size <= len(world.prompts):
      raise ValueError(
        f'--size={size}: the environment has {len(world.prompts)} prompts'
      )
    world = world._replace(prompts=world.prompts[:size])
  say(
    f'{folder}: {samples} samples of each of {len(world.prompts)} prompts, from {base} '
    f'and from {policy}'
  )
  models, words = {}, {}
  for side, path in (('base', base), ('policy', policy)):
    model, params, words[side] = open_policy(path, flag=f'--{side}')
    models[side] = model, params
  if words['base'].definition != words['policy'].definition:
    raise ValueError(
      f'--base={base} and --policy={policy} have different tokenizers: a log-prob of one '
      'says nothing of the other; name two models of one vocabulary'
    )
  header = dict(base=base, policy=policy, environment=dict(section), size=size)
  options: dict[str, Any] = dict(
    samples=samples,
    max_new_tokens=tokens,
    temperature=temperature,
    batch_size=batch_size,
    seed=seed,
  )
  if not workers:
    table.draw(folder, models, words['policy'], world, header, **options)
  else:
    with verifiers.worker_pool(world.respond, workers=workers) as pool:
      table.draw(
        folder, models, words['policy'], world, header, verifier=pool, **options
      )
  hosts.exchange(None)  # the others may still be drawing
  if not hosts.is_first():
    return None
  written = report.write(table.load(folder, samples), folder, budget=budget)
  say(f'\n{written.verdict.sentence}\n')
  say(f'the report: {written.page}\nin a picture: {written.picture}')
  return written


def _config_of(policy: str) -> dict[str, Any] | None:
  """Of a run; None of any other policy."""
  if loader_of(policy, '--policy') is not None:
    return None
  return read_config(paths.resolve(policy) / 'config.json')


def _start_of(policy: str, run: dict[str, Any] | None) -> str:
  if run is None:
    raise ValueError(
      f'--base is missing: {policy} is no run, that says where it started'
    )
  if run['init_from'] is not None:
    return _beside(policy, run['init_from'])
  path = run['model'].get('path')
  if path is None:
    raise ValueError(
      f'--base is missing: {policy} started from random weights; name a policy, such as '
      'the stage before it'
    )
  return path


def _beside(policy: str, start: str) -> str:
  """The stage before, where a sequence was moved as a whole since it was run."""
  moved = paths.resolve(policy).parent / pathlib.Path(start).name
  try:
    paths.resolve(start)
  except FileNotFoundError:
    return str(moved) if moved.exists() else start
  return start


def _environment(
  policy: str,
  run: dict[str, Any] | None,
  environment: Mapping[str, Any] | None,
  max_new_tokens: int | None,
) -> tuple[Mapping[str, Any], int]:
  """(its section, tokens a completion)."""
  run = run or {}
  exam = run.get('evaluation') or {}
  found = exam.get('environment') or run.get('environment')
  tokens = exam.get('max_new_tokens') or (run.get('rollouts') or {}).get(
    'max_new_tokens'
  )
  environment, tokens = environment or found, max_new_tokens or tokens
  if environment is None:
    raise ValueError(
      f'--environment is missing: {policy} was neither evaluated nor trained on one; name '
      'it, as --environment=chain --environment.depth=2'
    )
  if tokens is None:
    raise ValueError('--max_new_tokens is missing: how long a completion may be')
  return environment, tokens
