"""The samples table: what two policies say to the same prompts, and what both think of it.

From the base and from the policy, N completions of each prompt under one way of decoding;
of each its text, its reward, and its log-prob under both models. Every measurement of the
two reads this table, so that a new one needs no new samples.

A folder holds one table:

  header.json                     what it is of: both models, the environment, the decoding
  base/00003-000000-000015.jsonl  samples 0 to 15 of the prompts of block 3, and so on
  policy/…

A sample depends on the header, its prompt and its number alone. So a table that was stopped
goes on where it was, one with N samples becomes one with more by drawing those, in any
batch size, and processes share the blocks among themselves. A file is whole or not there.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Float

from educe import paths
from educe.data.tokenizer import Tokenizer
from educe.losses.logprobs import score
from educe.progress import say
from educe.rollouts import transcripts
from educe.rollouts.collect import Verifier, collect
from educe.types import Batch, Environment, Model, Params, Rollouts

SIDES = ('base', 'policy')
BLOCK = 16  # prompts of one file
HEADER = 'header.json'


class Side(NamedTuple):
  """Samples drawn from one of the two, P prompts × N."""

  rewards: Float[np.ndarray, 'P N']  # NaN: not scored
  logp_base: Float[np.ndarray, 'P N']  # nats, of the whole completion
  logp_policy: Float[np.ndarray, 'P N']
  lengths: Float[np.ndarray, 'P N']  # tokens, the stop token too
  stopped: Float[np.ndarray, 'P N']  # 1: ended by itself; 0: cut off at max_new_tokens
  texts: list[list[str]]
  outcomes: list[list[str]]
  parsed: list[list[Any]]  # the answer that was read in it; None: none


class Table(NamedTuple):
  header: dict[str, Any]
  ids: list[Any]  # of the P prompts
  prompts: list[Any]
  answers: list[Any]
  base: Side
  policy: Side


def draw(
  folder: pathlib.Path,
  models: Mapping[str, tuple[Model, Params]],
  tokenizer: Tokenizer,
  environment: Environment,
  header: Mapping[str, Any],
  *,
  samples: int,
  max_new_tokens: int,
  temperature: float = 1.0,
  batch_size: int = 64,
  seed: int = 0,
  verifier: Verifier | None = None,
) -> None:
  """Draws what is missing of a table of `samples` completions a prompt from each side.

  models: {'base': …, 'policy': …}, of one vocabulary
  header: names what the table is of, plain values; the decoding is added to it
  samples: N; a table that has more keeps them

  Raises ValueError for numbers that cannot be, and for a folder that holds another table.
  """
  if samples < 1 or batch_size < 1 or max_new_tokens < 1:
    raise ValueError(
      f'{samples=}, {batch_size=} and {max_new_tokens=} must be at least 1'
    )
  if not 0 < temperature < float('inf'):
    raise ValueError(f'{temperature=} must be above 0: log-probs are of what is drawn')
  decoding = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
  _keep_header(folder, {**header, 'decoding': decoding})
  parts = [
    (side, block, missing)
    for side in SIDES
    for block in range(-(-len(environment.prompts) // BLOCK))
    if block % jax.process_count() == jax.process_index()
    and (missing := _missing(folder / side, block, samples))
  ]
  records = [{'id': i, **record} for i, record in enumerate(environment.prompts)]
  if not parts:
    say(f'{folder} has its {samples} samples of each prompt already')
  group = max(1, batch_size // min(BLOCK, len(records)))
  for side, block, missing in tqdm.tqdm(parts, 'drawing', unit='block', leave=False):
    key = jax.random.fold_in(jax.random.key(seed), SIDES.index(side))
    asked = records[block * BLOCK : (block + 1) * BLOCK]
    for numbers in _runs(missing, group):
      drawn = collect(
        *models[side],
        tokenizer,
        environment,
        asked,
        group=len(numbers),
        key=jax.random.fold_in(key, block),
        seeds=[i << 24 | n for i in range(len(asked)) for n in numbers],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        verifier=verifier,
      )
      logp = {
        name: sequence_logp(*models[name], drawn, temperature, batch_size)
        for name in SIDES
      }
      rows = [
        {
          **row,
          'sample': numbers[at % len(numbers)],
          **{f'logp_{name}': float(logp[name][at]) for name in SIDES},
        }
        for at, row in enumerate(drawn.transcripts)
      ]
      name = f'{block:05}-{numbers[0]:06}-{numbers[-1]:06}.jsonl'
      transcripts.save(rows, folder / side / name)


def sequence_logp(
  model: Model, params: Params, rollouts: Rollouts, temperature: float, batch_size: int
) -> Float[np.ndarray, 'B']:
  """Σ_t log π(y_t) of each completion (nats), at the temperature it was drawn at.

  Samples that are equal are scored once: short answers often are.
  """
  # A static argument, compiled once: without what cannot be hashed, or is not asked.
  model = model._replace(axes=None, architecture=None, values=None)
  rows = np.concatenate([rollouts.tokens, rollouts.mask], -1)
  _, first, back = np.unique(rows, axis=0, return_index=True, return_inverse=True)
  parts = []
  for at in range(0, len(first), batch_size):
    chosen = first[at : at + batch_size]
    # One shape, one program: the last batch is filled up with its first row.
    chosen = np.pad(chosen, (0, min(batch_size, len(rows)) - len(chosen)), 'edge')
    batch = Batch(rollouts.tokens[chosen], rollouts.mask[chosen])
    parts.append(np.asarray(_logp(model, params, batch, temperature), np.float64))
  return np.concatenate(parts)[back.ravel()]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logp(model, params, batch: Batch, temperature: float):
  logp = score(model, params, batch, temperature=temperature).logp
  return jnp.where(batch.mask > 0, logp, 0.0).sum(-1)


def load(folder: pathlib.Path, samples: int | None = None) -> Table:
  """The table in `folder`, its first `samples` of each prompt.

  samples: None: as many as every prompt has, from both sides

  Raises ValueError for a folder without a table, and one with fewer samples.
  """
  header = read_header(folder)
  rows = {side: _read(folder / side) for side in SIDES}
  ids = list(dict.fromkeys(name for name, _ in [*rows['base'], *rows['policy']]))
  if not ids:
    raise ValueError(f'{folder}: the table has no samples yet; run measure again')
  have = min(_count(rows[side], name) for side in SIDES for name in ids)
  if samples is None:
    samples = have
  if not 1 <= samples <= have:
    raise ValueError(
      f'{folder}: samples={samples} asked of a table that has {have} of every prompt; '
      'draw more, with --samples'
    )

  def side(name: str) -> Side:
    grid = [[rows[name][i, n] for n in range(samples)] for i in ids]

    def array(key: str) -> np.ndarray:
      values = [[np.nan if x[key] is None else x[key] for x in line] for line in grid]
      return np.array(values, np.float64)

    return Side(
      rewards=array('reward'),
      logp_base=array('logp_base'),
      logp_policy=array('logp_policy'),
      lengths=array('length'),
      stopped=array('stopped'),
      texts=[[x['completion'] for x in line] for line in grid],
      outcomes=[[x['outcome'] for x in line] for line in grid],
      parsed=[[x['parsed'] for x in line] for line in grid],
    )

  first = [rows['base'][i, 0] for i in ids]
  return Table(
    header,
    ids,
    [row['prompt'] for row in first],
    [row['answer'] for row in first],
    side('base'),
    side('policy'),
  )


def read_header(folder: pathlib.Path) -> dict[str, Any]:
  file = folder / HEADER
  try:
    return json.loads(file.read_text())
  except FileNotFoundError:
    raise ValueError(f'{folder} holds no samples table: no {HEADER}') from None
  except json.JSONDecodeError as error:
    raise ValueError(f'{file} is damaged ({error}); draw into a new folder') from None


def _keep_header(folder: pathlib.Path, header: dict[str, Any]) -> None:
  header = json.loads(json.dumps(header))
  if not (folder / HEADER).exists():
    if jax.process_index() == 0:
      paths.write(folder / HEADER, json.dumps(header, indent=2) + '\n')
    return
  old = read_header(folder)
  for key in sorted(old.keys() | header.keys()):
    if old.get(key) != header.get(key):
      raise ValueError(
        f'{folder} holds a table of {key}={old.get(key)!r}, and this one is of '
        f'{header.get(key)!r}: name another folder'
      )


def _missing(folder: pathlib.Path, block: int, samples: int) -> list[int]:
  """The numbers of the samples that no file of this block has."""
  there: set[int] = set()
  for file in folder.glob(f'{block:05}-*.jsonl'):
    first, last = map(int, file.stem.split('-')[1:])
    there |= set(range(first, last + 1))
  return [n for n in range(samples) if n not in there]


def _runs(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
  """Consecutive numbers, at most `size` together."""
  run: list[int] = []
  for number in numbers:
    if run and (len(run) == size or number != run[-1] + 1):
      yield run
      run = []
    run.append(number)
  if run:
    yield run


def _read(folder: pathlib.Path) -> dict[tuple[Any, int], dict[str, Any]]:
  """{(prompt's id, sample): row}, in the order of the prompts."""
  files = sorted(folder.glob('*.jsonl'))
  rows = [row for file in files for row in transcripts.load(file)]
  return {(row['id'], row['sample']): row for row in rows}


def _count(rows: Mapping[tuple[Any, int], Any], name: Any) -> int:
  """How many samples of a prompt there are without a gap, from number 0 on."""
  count = 0
  while (name, count) in rows:
    count += 1
  return count
