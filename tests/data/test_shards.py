"""A batch that processes share is one batch, whoever reads it, and goes on as it was."""

import functools
import json

import numpy as np
import pytest

from educe import hosts
from educe.data import pipeline, sources, tokenizer
from educe.data.shards import Shards
from educe.types import StateMismatch

BYTE = tokenizer.load(path='byte')
# Some are too long: what is dropped moves all that comes after, in its own shard alone.
TEXTS = [{'text': 'x' * (3 + 20 * (i % 7 == 2)) + str(i)} for i in range(40)]
PAIRS = [dict(prompt=f'{i}', chosen='a' * (1 + i % 3), rejected='b') for i in range(40)]


def opener(records='documents', data=TEXTS, batch_size=4, **options):
  opened = []

  def open_shard(shard, of, looks):
    opened.append((shard, of, looks))
    return pipeline.make(
      sources.memory(records=data), BYTE, shard, of, looks=looks, max_length=12,
      batch_size=batch_size // of, records=records, seed=3, **options,
    )  # fmt: skip

  open_shard.opened = opened
  return open_shard


def ids(rows):
  return rows['ids'][:, 0].tolist()


def halves(index, count=2):
  """The rows of one of several processes."""
  return lambda rows: np.array_split(np.arange(rows), count)[index]


def read(as_processes, count, steps, *, state=None, rows=halves, **options):
  """(ids of the whole batches that `count` processes read, the state behind them)."""

  def run(index):
    shards = Shards(opener(**options), count, functools.partial(rows(index, count)))
    if state is not None:
      shards.set_state(state)
    parts = [ids(next(shards)) for _ in range(steps)]
    return parts, json.loads(json.dumps(shards.get_state())), shards.mine

  found = as_processes(count, run)
  for one in found:
    if isinstance(one, Exception):
      raise one
  states = [one[1] for one in found]
  assert all(each == states[0] for each in states)
  batches = []
  for step in range(steps):
    whole = {}
    for parts, _, mine in found:
      for row, record in zip(mine.tolist(), parts[step], strict=True):
        assert whole.setdefault(row, record) == record
    batches.append([whole[row] for row in sorted(whole)])
  return batches, states[0]


def test_one_process_reads_what_its_pipeline_reads():
  open_shard = opener()
  plain, shards = open_shard(0, 1, True), Shards(opener())
  for _ in range(12):
    np.testing.assert_equal(next(shards), next(plain))
  assert shards.counts() == plain.counts()
  assert shards.batch_size == 4


@pytest.mark.parametrize('records', ['documents', 'pairs'])
def test_a_batch_is_a_part_of_each_shard_and_all_records_come_once(
  as_processes, records
):
  data = TEXTS if records == 'documents' else PAIRS
  kept = {i for i, text in enumerate(data) if len(text.get('text', '')) < 12}
  group = 1 if records == 'documents' else 2
  batches, _ = read(as_processes, 2, len(kept) // 4 - 1, records=records, data=data)
  for shard, size in ((0, 2), (1, 2)):
    alone = opener(records, data)(shard, 2, True)
    cut = slice(shard * size * group, (shard + 1) * size * group)
    for batch in batches:
      assert batch[cut] == ids(next(alone))
  seen = [i for batch in batches for i in batch[::group]]
  assert len(seen) == len(set(seen))
  assert set(seen) <= kept


@pytest.mark.parametrize('records', ['documents', 'pairs'])
@pytest.mark.parametrize('later', [1, 2, 4])
def test_other_processes_go_on_with_the_same_batches(as_processes, records, later):
  options = dict(records=records, data=TEXTS if records == 'documents' else PAIRS)
  whole, _ = read(as_processes, 2, 9, **options)
  first, state = read(as_processes, 2, 4, **options)
  assert len(state['shards']) == 2
  rest, after = read(as_processes, later, 5, state=state, **options)
  assert first + rest == whole
  assert len(after['shards']) == 2


def test_a_run_of_one_goes_on_with_two(as_processes):
  whole, _ = read(as_processes, 1, 9)
  first, state = read(as_processes, 1, 4)
  rest, _ = read(as_processes, 2, 5, state=state)
  assert first + rest == whole


def test_rows_need_not_lie_together(as_processes):
  """As on a torus, or where a tensor axis goes across hosts."""

  def torus(index, count):
    return lambda rows: np.arange(rows).reshape(2, 2, 2)[:, index].ravel()

  def same(index, count):
    return lambda rows: np.arange(rows)

  whole, _ = read(as_processes, 2, 5, batch_size=8)
  for rows in (torus, same):
    assert read(as_processes, 2, 5, batch_size=8, rows=rows)[0] == whole


def test_shards_divide_the_records_of_a_batch(as_processes):
  _, state = read(as_processes, 4, 1, batch_size=6)
  assert len(state['shards']) == 2


def test_the_first_records_are_tried_once():
  open_shard = opener()
  Shards(open_shard, 2, halves(1))
  assert open_shard.opened == [(0, 1, True), (1, 2, False)]


def test_what_a_failed_block_read_comes_again():
  shards, lost = Shards(opener(), 2), []

  def fail():
    with shards.holding():
      lost.extend(ids(next(shards)))
      raise OSError('disk full')

  with pytest.raises(OSError, match='disk full'):
    fail()
  assert ids(next(shards)) == lost


def test_another_batch_size_or_data_set_is_one_line():
  state = Shards(opener(), 2).get_state()
  with pytest.raises(
    StateMismatch, match='batch_size=4 but this pipeline has batch_siz'
  ):
    Shards(opener(batch_size=8)).set_state(state)
  with pytest.raises(
    StateMismatch, match='records=40 but this pipeline has records=39'
  ):
    Shards(opener(data=TEXTS[1:])).set_state(state)


def test_what_one_process_cannot_read_is_its_own_error(as_processes):
  def run(index):
    shards = Shards(opener(data=TEXTS), 2, halves(index))
    if index:
      shards._read = {1: Broken()}
    return ids(next(shards))

  found = as_processes(2, run)
  assert isinstance(found[1], hosts.Alone)
  assert str(found[1]) == 'no such file'
  assert len(found[0]) == 2
  one = Shards(opener())
  one._read = {0: Broken()}
  with pytest.raises(OSError, match='no such file'):
    next(one)


class Broken:
  def __next__(self):
    raise OSError('no such file')
