"""Records in order from any position; pipelines are tested in test_pipeline.py."""

import pytest

from educe.data import packing, reading

FATES = [
  packing.KEPT,
  packing.TRUNCATED,
  packing.OVERLONG,
  packing.MASKED,
  packing.KEPT,
]


def encode(index):
  return dict(id=index, fate=FATES[index % 5])


def read(start=0, shuffle=False, share=(0, 1), epochs=None, limit=10):
  def documents(at):
    order = (shuffle, 3, epochs, *share)
    return reading.in_order(at, count=10, encode=encode, order=order)

  records = reading.Records(documents, workers=0, limit=limit, hint='hint')
  iterator = iter(records)
  if start:
    iterator.set_state(start)
  return iterator


def test_dropped_documents_are_counted_and_left_out():
  iterator = read()
  assert [next(iterator)['id'] for _ in range(4)] == [0, 1, 4, 5]
  assert iterator.counts == dict(
    records=6, truncated=1, dropped_overlong=1, dropped_masked=1
  )


def test_the_position_is_a_count():
  iterator = read(shuffle=True)
  before = [next(iterator)['id'] for _ in range(3)]
  state = iterator.get_state()
  after = [next(iterator)['id'] for _ in range(9)]
  again = read(start=state, shuffle=True)
  assert [next(again)['id'] for _ in range(9)] == after
  assert sorted(before + after[:3]) == [0, 1, 4, 5, 6, 9]
  assert before + after[:3] != [0, 1, 4, 5, 6, 9]


def test_processes_take_turns():
  parts = [read(share=(process, 2), epochs=1) for process in (0, 1)]
  assert [[d['id'] for d in part] for part in parts] == [[0, 4, 6], [1, 5, 9]]


def test_an_epoch_without_a_document_is_refused():
  iterator = read(limit=2)
  assert [next(iterator)['id'] for _ in range(2)] == [0, 1]
  with pytest.raises(ValueError, match=r'a whole epoch was dropped .*hint'):
    next(iterator)
