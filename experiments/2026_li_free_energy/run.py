"""One seed of the Gibbs audit: a world, a base, every arm, all of it measured exactly.

  python experiments/2026_li_free_energy/run.py --seed=0     # → results/seed0.json
  python experiments/2026_li_free_energy/run.py --seed=0 --debug --to=debug.json

The seed is the world's number, the base's and the arms'. Runs lie in --runs, and a stopped
one goes on. What is written is for judge.py, summary.py and figure.py.

The outcomes of a prompt are its 4,096 outputs and, last, anything else: what a policy
writes that is none of them, whatever it is, is one outcome without a reward.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import logging
import multiprocessing
import pathlib
import sys
import time

import jax
import numpy as np
import tqdm

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [
  str(HERE.parents[1]),
  str(HERE),
]  # config.py is named by its import path

import config as audit  # noqa: E402
import tables  # noqa: E402

from educe import config as config_lib  # noqa: E402
from educe import stages  # noqa: E402
from educe.data import tokenizer as tokenizers  # noqa: E402
from educe.environments import language, tabular  # noqa: E402
from educe.measurement import enumeration, free_energy, frontier  # noqa: E402
from educe.policies import read_config  # noqa: E402
from educe.progress import say  # noqa: E402
from educe.training import checkpoint  # noqa: E402

logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax, of files it does not need

# name → how a tabular arm is sampled. `early` is as many visits as an arm has.
SAMPLED = {
  'rloo': dict(visits=6000, early=audit.ROUNDS, rate=16.0, copies=2),
  'grpo': dict(
    visits=1000, early=audit.ROUNDS, rate=4.0, copies=2, advantage='group_relative'
  ),
  'rloo_k1_reward': dict(
    visits=1000, early=audit.ROUNDS, rate=4.0, copies=2, beta=audit.BETA
  ),
}


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--seed', type=int, required=True)
  parser.add_argument('--to', type=pathlib.Path)
  parser.add_argument('--runs', type=pathlib.Path)
  parser.add_argument('--arms', default=','.join(audit.ARMS))
  parser.add_argument('--debug', action='store_true', help='a few steps of everything')
  parser.add_argument(
    '--workers', type=int, default=2, help='arms trained side by side'
  )
  asked = parser.parse_args(argv)
  to = asked.to or HERE / 'results' / f'seed{asked.seed}.json'
  runs = asked.runs or pathlib.Path('runs', HERE.name, f'seed{asked.seed}')
  arms = asked.arms.split(',')
  result = audited(asked.seed, runs, arms, debug=asked.debug, workers=asked.workers)
  to.parent.mkdir(parents=True, exist_ok=True)
  to.write_text(json.dumps(rounded(result), separators=(',', ':')) + '\n')
  say(f'{to}: {to.stat().st_size / 1e3:.0f} kB, {result["seconds"] / 60:.1f} min')


def audited(
  seed: int, runs: pathlib.Path, arms: list[str], *, debug: bool, workers: int
) -> dict:
  began = time.perf_counter()
  world = language.describe(world=seed)
  p_data, correct = (and_else(x) for x in (world.p_data, world.correct))
  trained = {row['prompt'] for row in language.make(part='train', world=seed).prompts}
  train = np.array([prompt in trained for prompt in world.prompts])
  trained_runs(seed, runs, arms, debug=debug, workers=workers)
  enumerated = reader(runs / 'base', world)
  p0 = enumerated(runs / 'base')
  entropy = -(p_data * log(p_data)).sum(-1)
  result = {
    'seed': seed,
    'debug': debug,
    'group': audit.GROUP,
    'rounds': audit.ROUNDS,
    'regimes': world.regimes,
    'train': train.tolist(),
    'base': {
      'data_entropy': entropy.mean(),  # nats an output
      'data_kl': tabular.kl(p_data, p0),  # cross-entropy − entropy
      **ending(p0, correct),
    },
    'arms': {},
  }
  for arm in arms:
    say(f'measuring {arm}')
    beta, curve = audit.BETAS.get(arm, 0.0), []
    for step in steps_of(runs / arm):
      policy = enumerated(runs / arm, step)
      curve.append({'step': step, **numbers(policy, p0, correct, train, beta)})
    result['arms'][arm] = {
      'beta': beta,
      'curve': curve,
      'log_ratio': log(policy / p0).max(-1),
      **ending(policy, correct),
      **to_fixed_points(policy, p0, correct, beta),
    }
  result |= tabular_arms(p0, correct, seed, debug=debug)
  return result | {'seconds': time.perf_counter() - began}


def trained_runs(
  seed: int, runs: pathlib.Path, arms: list[str], *, debug: bool, workers: int
) -> None:
  """The base, then the arms, `workers` at a time: one keeps hardly more than a core busy.

  What an arm prints is in <runs>/<arm>.txt.
  """
  one = functools.partial(trained_run, seed, runs, debug)
  one('base')
  spawned = multiprocessing.get_context('spawn')  # a fork of JAX's threads may hang
  with concurrent.futures.ProcessPoolExecutor(workers, spawned) as pool:
    asked = {pool.submit(one, arm): arm for arm in arms}
    bar = tqdm.tqdm(concurrent.futures.as_completed(asked), total=len(arms), unit='arm')
    for done in bar:
      if error := done.exception():
        pool.shutdown(cancel_futures=True)
        name = asked[done]
        raise SystemExit(f'{name}: {error}; its output is in {runs / name}.txt')


def trained_run(seed: int, runs: pathlib.Path, debug: bool, arm: str) -> None:
  # Arms share most of their programs: half a minute of each was compiling.
  jax.config.update('jax_compilation_cache_dir', str(runs / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  word = f'{arm},debug' if debug else arm
  argv = [f'--config={HERE / "config.py"}:{word}', f'--config.base.seed={seed}']
  if arm != 'base':
    argv += [f'--config.{arm}.seed={seed}']
  if debug:  # of a base that has learned nothing no sample is verified
    learn = dict(steps=100, save_every=100)
    argv += [f'--config.base.{key}={value}' for key, value in learn.items()]
    argv += ['--config.base.data.batch_size=128']
  runs.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    if arm != 'base':
      output = stack.enter_context((runs / f'{arm}.txt').open('a'))
      stack.enter_context(contextlib.redirect_stdout(output))
      stack.enter_context(contextlib.redirect_stderr(output))
    stages.run_all(argv, runs, sweep=False)
  folder = runs / arm
  if not folder.is_dir() or steps_of(folder)[-1:] != [steps_asked(folder)]:
    raise RuntimeError(f'{folder} was stopped; the same command goes on from there')


def tabular_arms(p0, correct, seed: int, *, debug: bool) -> dict:
  exact, drawn = [], {}
  few = 5 if debug else len(p0)
  say('tabular arms, exact')
  for fixed in tables.exact(p0[:few], correct[:few], audit.BETA):
    apart = tabular.total_variation(fixed.reached, fixed.predicted)
    moved = tabular.total_variation(p0[:few], fixed.predicted)
    row = {'name': fixed.name, 'tv': apart, 'moved': moved}
    exact.append(row | ending(fixed.reached, correct[:few]))
  for name, how in SAMPLED.items():
    say(f'tabular arms, sampled: {name}')
    how = how | (dict(visits=8, early=4) if debug else {})
    out = tables.sampled(p0, correct, group=audit.GROUP, seed=seed, **how)
    beta = how.get('beta', 0.0)
    drawn[name] = {**how, 'first': out.first, 'half': out.half}
    for when, policies in (('early', out.early), ('final', out.final)):
      drawn[name][when] = [
        ending(policy, correct) | to_fixed_points(policy, p0, correct, beta)
        for policy in policies
      ]
  return {'exact': exact, 'sampled': drawn}


def reader(run: pathlib.Path, world):
  """enumerate(run, step) -> π `[64, 4097]`, of runs of this model: one program for all."""
  config = read_config(run / 'config.json')
  words = tokenizers.load(path=config['tokenizer']['path'])
  model, like = config_lib.call('model', config['model'])
  ids = np.array([words.encode(prompt) for prompt in world.prompts])
  symbols = np.array(words.encode(language.SYMBOLS))

  def enumerated(run: pathlib.Path, step: int | None = None):
    params = checkpoint.saved_params(run / 'checkpoints', like, step)
    return enumeration.distribution(model, params, ids, symbols, language.LENGTH)

  return enumerated


def and_else(outputs):
  """`[P, 4096]` and a last column, 0: of the corpus and of C, anything else is no part."""
  return np.pad(outputs, ((0, 0), (0, 1)))


def steps_asked(run: pathlib.Path) -> int:
  return read_config(run / 'config.json')['steps']


def steps_of(run: pathlib.Path) -> list[int]:
  return sorted(
    int(x.name) for x in (run / 'checkpoints').iterdir() if x.name.isdigit()
  )


def numbers(policy, p0, correct, train, beta: float) -> dict:
  """Means over prompts, of the trained and the held-out ones.

  policy, p0, correct: `[P, Y]`, anything else last · train: `[P]` bool
  """
  book = free_energy.ledger(policy, p0, correct)
  apart = to_fixed_points(policy, p0, correct, beta)
  out = {}
  for part, rows in (('train', train), ('heldout', ~train)):
    where = policy[rows], p0[rows], correct[rows]
    out[part] = {
      'reward': (where[0] * where[2]).sum(-1).mean(),
      'outside': where[0][:, -1].mean(),
      'eta': frontier.efficiency(*where).eta.mean,
      **{name: getattr(book, name)[rows].mean() for name in book._fields},
      **{name: x[rows].mean() for name, x in apart.items()},
    }
  return out


def ending(policy, correct) -> dict:
  """Of each prompt π(C) and π of anything else; π of each correct output, in a row."""
  return {
    'solved': (policy * correct).sum(-1),
    'outside': policy[:, -1],
    'right': policy[correct],
  }


def to_fixed_points(policy, p0, correct, beta: float) -> dict:
  """TV `[P]` to Gibbs at β and to β·p0/(λ − r); nothing where β is 0."""
  if not beta:
    return {}
  reward = correct.astype(np.float64)
  return {
    'gibbs': tabular.total_variation(policy, tabular.gibbs(p0, reward, beta)),
    'k3': tabular.total_variation(policy, tabular.k3_fixed_point(p0, reward, beta)),
  }


def log(p):
  """Of 0 the least that float64 has."""
  return np.log(np.maximum(p, np.finfo(np.float64).tiny))


def rounded(value):
  """Plain JSON of six digits."""
  if isinstance(value, dict):
    return {name: rounded(x) for name, x in value.items()}
  if isinstance(value, np.ndarray | list | tuple):
    return [rounded(x) for x in value]
  if isinstance(value, float | np.floating):
    return float(f'{value:.6g}') if np.isfinite(value) else None
  return value.item() if isinstance(value, np.generic) else value


if __name__ == '__main__':
  main()
