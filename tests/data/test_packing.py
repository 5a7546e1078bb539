"""Rows: every document once, whole, numbered, and never predicted by another."""

import grain
import numpy as np
import pytest

from educe.data import chat, packing

T, PAD = 16, 7


def document(length, record, prompt=1):
  """Tokens 100·record + 0, 1, 2 …; trained after `prompt` tokens."""
  tokens = 100 * record + np.arange(length, dtype=np.int32)
  mask = (np.arange(length) >= prompt).astype(np.float32)
  return chat.Encoded(tokens, mask)


def fit(encoded, record=0, overlong='drop'):
  return packing.fit(encoded, record, max_length=T, overlong=overlong)


def without_fate(fitted):
  return {name: value for name, value in fitted.items() if name != 'fate'}


def packed_rows(lengths, bins=4, seed=0):
  documents = [without_fate(fit(document(n, i), i)) for i, n in enumerate(lengths)]
  stream = grain.MapDataset.source(documents).to_iter_dataset()
  return list(packing.pack(stream, max_length=T, pad_id=PAD, bins=bins, seed=seed))


def test_padding_by_hand():
  documents = [without_fate(fit(document(n, i), i)) for n, i in ((6, 4), (3, 5))]
  rows = packing.pad(documents, max_length=6, pad_id=PAD)
  expected = dict(
    tokens=[500, 501, 502, PAD, PAD, PAD],
    mask=[0, 1, 1, 0, 0, 0],
    segments=[1, 1, 1, 0, 0, 0],
    positions=[0, 1, 2, 0, 0, 0],
    ids=[5, 5, 5, -1, -1, -1],
  )
  for name, values in expected.items():
    np.testing.assert_array_equal(rows[name][1], values, err_msg=name)
    assert rows[name].dtype == (np.float32 if name == 'mask' else np.int32)
  assert set(rows) == set(expected)
  np.testing.assert_array_equal(rows['tokens'][0], documents[0]['tokens'])
  np.testing.assert_array_equal(rows['positions'][0], np.arange(6))


def test_packing_by_hand():
  (row,) = packed_rows([3, 2, 4], bins=1)
  expected = dict(
    tokens=[0, 1, 2, 100, 101, 200, 201, 202, 203] + [PAD] * 7,
    mask=[0, 1, 1, 0, 1, 0, 1, 1, 1] + [0] * 7,
    segments=[1, 1, 1, 2, 2, 3, 3, 3, 3] + [0] * 7,
    positions=[0, 1, 2, 0, 1, 0, 1, 2, 3] + [0] * 7,
    ids=[0, 0, 0, 1, 1, 2, 2, 2, 2] + [-1] * 7,
  )
  for name, values in expected.items():
    np.testing.assert_array_equal(row[name], values, err_msg=name)
    assert row[name].dtype == (np.float32 if name == 'mask' else np.int32)
  assert set(row) == set(expected)


def test_every_document_once_and_whole():
  rng = np.random.default_rng(0)
  lengths = rng.integers(2, T + 1, 60)
  rows = packed_rows(lengths)
  found = {}
  for row in rows:
    for segment in range(1, row['segments'].max() + 1):
      at = np.flatnonzero(row['segments'] == segment)
      assert (np.diff(at) == 1).all()
      np.testing.assert_array_equal(row['positions'][at], np.arange(len(at)))
      (record,) = set(row['ids'][at])
      assert record not in found
      found[record] = row['tokens'][at]
      np.testing.assert_array_equal(row['mask'][at], np.arange(len(at)) >= 1)
    empty = row['segments'] == 0
    assert (row['ids'][empty] == -1).all()
    assert (row['tokens'][empty] == PAD).all()
    assert not row['mask'][empty].any()
    assert not row['positions'][empty].any()
  assert sorted(found) == list(range(60))
  for record, tokens in found.items():
    np.testing.assert_array_equal(tokens, document(lengths[record], record).tokens)


def test_no_trained_token_is_predicted_from_another_document():
  rows = packed_rows(np.random.default_rng(1).integers(2, 9, 40))
  for row in rows:
    trained = np.flatnonzero(row['mask'])
    assert 0 not in trained
    same = row['segments'][trained] == row['segments'][trained - 1]
    assert same.all()


def test_packing_saves_rows_and_more_bins_save_more():
  lengths = np.random.default_rng(2).integers(2, 13, 200)
  one, many = packed_rows(lengths, bins=1), packed_rows(lengths, bins=32)
  assert len(many) < len(one) < 200
  full = np.mean([row['segments'] > 0 for row in many])
  assert full > 0.9


def test_rows_of_a_set_are_shuffled_by_the_seed():
  lengths = np.random.default_rng(3).integers(2, 9, 80)
  first, again, other = (
    [row['ids'].tolist() for row in packed_rows(lengths, bins=16, seed=seed)]
    for seed in (0, 0, 1)
  )
  assert first == again
  assert first != other
  assert sorted(first) == sorted(other)


def test_overlong_documents():
  whole = fit(document(T, 0))
  assert (len(whole['tokens']), whole['fate']) == (T, packing.KEPT)
  dropped = fit(document(T + 1, 0))
  assert (len(dropped['tokens']), dropped['fate']) == (0, packing.OVERLONG)
  cut = fit(document(T + 1, 3), 3, 'truncate')
  assert (len(cut['tokens']), cut['fate']) == (T, packing.TRUNCATED)
  np.testing.assert_array_equal(cut['tokens'], document(T + 1, 3).tokens[:T])
  assert len(cut['mask']) == len(cut['ids']) == T
  # Only the prompt is left: nothing to learn from.
  masked = fit(document(T + 4, 0, prompt=T), 0, 'truncate')
  assert (len(masked['tokens']), masked['fate']) == (0, packing.MASKED)
  one = fit(document(T + 4, 0, prompt=T - 1), 0, 'truncate')
  assert one['fate'] == packing.TRUNCATED


@pytest.mark.parametrize('rows', [1, 3, 4])
def test_fill_rows(rows):
  some = [without_fate(fit(document(5, i), i)) for i in range(rows)]
  batch = packing.pad(some, max_length=T, pad_id=PAD)
  full = packing.fill_rows(batch, batch_size=4, pad_id=PAD)
  for name, values in full.items():
    assert values.shape == (4, T)
    assert values.dtype == batch[name].dtype
    np.testing.assert_array_equal(values[:rows], batch[name])
  assert not full['mask'][rows:].any()
  assert not full['segments'][rows:].any()
  assert (full['tokens'][rows:] == PAD).all()
  assert (full['ids'][rows:] == -1).all()
