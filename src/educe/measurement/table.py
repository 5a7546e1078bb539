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

import collections
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Float

from educe import hosts, paths
from educe.data.tokenizer import Tokenizer
from educe.measurement.sequence_logp import sequence_logp
from educe.progress import say
from educe.rollouts import transcripts
from educe.rollouts.collect import Verifier, collect
from educe.types import Environment, Model, Params

SIDES = ('base', 'policy')
BLOCK = 16  # prompts of one file
ROUNDS = 4  # times batch_size samples are drawn, scored and written together
HEADER = 'header.json'
COLUMNS = {
  *('id', 'sample', 'prompt', 'answer', 'completion', 'parsed', 'outcome', 'stopped'),
  *('reward', 'length', 'logp_base', 'logp_policy'),
}


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

  A table is of two models as they were: of other weights, though under the same name, it
  is another. Where they lie may change.

  Raises ValueError for numbers that cannot be, prompts of one id, and for a folder that
  holds another table.
  """
  if samples < 1 or batch_size < 1 or max_new_tokens < 1:
    raise ValueError(
      f'{samples=}, {batch_size=} and {max_new_tokens=} must be at least 1'
    )
  if not 0 < temperature < float('inf'):
    raise ValueError(f'{temperature=} must be above 0: log-probs are of what is drawn')
  decoding = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
  records = [{'id': i, **record} for i, record in enumerate(environment.prompts)]
  twice = [x for x, n in collections.Counter(r['id'] for r in records).items() if n > 1]
  if twice:
    raise ValueError(
      f'the environment has {len(twice)} ids of several prompts, such as {twice[0]!r}; a '
      'sample is known by the id of its prompt: give each its own, or none'
    )
  weights = {side: fingerprint(models[side][1]) for side in SIDES}
  _keep_header(folder, {**header, 'decoding': decoding, 'weights': weights})
  blocks = [records[at : at + BLOCK] for at in range(0, len(records), BLOCK)]
  group = max(1, ROUNDS * batch_size // len(blocks[0]))
  parts = [
    (side, block, numbers)
    for side in SIDES
    for block in range(hosts.index(), len(blocks), hosts.count())
    for numbers in _runs(_missing(folder / side, block, samples), group)
  ]
  if not parts:
    say(f'{folder} has its {samples} samples of each prompt already')
  total = sum(len(blocks[block]) * len(numbers) for _, block, numbers in parts)
  bar = tqdm.tqdm(
    total=total, desc='drawing', unit='sample', leave=False, disable=not parts
  )
  for side, block, numbers in parts:
    key = jax.random.fold_in(jax.random.key(seed), SIDES.index(side))
    drawn = collect(
      *models[side],
      tokenizer,
      environment,
      blocks[block],
      group=len(numbers),
      key=jax.random.fold_in(key, block),
      seeds=[i << 24 | n for i in range(len(blocks[block])) for n in numbers],
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      batch_size=batch_size,
      verifier=verifier,
    )
    logp = {
      name: sequence_logp(
        *models[name],
        drawn.tokens,
        drawn.mask,
        temperature=temperature,
        batch_size=batch_size,
      )
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
    bar.update(len(rows))
  bar.close()


def fingerprint(params: Params) -> str:
  """Changes when a bit of the params does; the same on any number of devices."""
  digest = hashlib.blake2b(digest_size=8)
  for total in jax.tree.leaves(jax.tree.map(_bits, params)):
    digest.update(np.asarray(total).tobytes())
  return digest.hexdigest()


@jax.jit
def _bits(x: jax.Array) -> jax.Array:
  """Σ_i (2i+1)·bits(x_i), mod 2³²: whole numbers add up alike in any order."""
  same = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
  bits = jax.lax.bitcast_convert_type(x, same).ravel()
  odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
  return (bits.astype(jnp.uint32) * odd).sum(dtype=jnp.uint32)


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
    if hosts.is_first():
      paths.write(folder / HEADER, json.dumps(header, indent=2) + '\n')
    return
  old = read_header(folder)
  for key in sorted((old.keys() | header.keys()) - set(SIDES)):  # paths may change
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
  rows: dict[tuple[Any, int], dict[str, Any]] = {}
  for file in sorted(folder.glob('*.jsonl')):
    first, last = map(int, file.stem.split('-')[1:])
    try:
      found = transcripts.load(file)
      if lost := {name for row in found for name in COLUMNS - row.keys()}:
        raise ValueError(f'rows without {", ".join(sorted(lost))}')
      if len(found) % (last + 1 - first):
        raise ValueError(f'cut off after {len(found)} rows')
    except ValueError as error:
      raise ValueError(
        f'{file} is damaged ({error}): delete it and run measure again'
      ) from None
    keys = [(row['id'], row['sample']) for row in found]
    rows.update(zip(keys, found, strict=True))
  return rows


def _count(rows: Mapping[tuple[Any, int], Any], name: Any) -> int:
  """How many samples of a prompt there are without a gap, from number 0 on."""
  count = 0
  while (name, count) in rows:
    count += 1
  return count
