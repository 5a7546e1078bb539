"""Rows of preferences: cut, padded, laid next to each other."""

import numpy as np
import pytest

from educe.data import chat, packing, pairs, preference_rows

PAD, BOS = 99, 1


def said(prompt, *completions, labels=None, targets=None):
  rows = tuple(
    chat.Encoded(np.array(c, np.int32), np.ones(len(c), np.float32))
    for c in completions
  )
  targets = None if targets is None else np.array(targets, np.float32)
  return pairs.Said(np.array(prompt, np.int32), rows, labels, targets)


def fit(one, record=7, **options):
  options = dict(max_length=8, overlong='truncate', bos_id=BOS) | options
  return preference_rows.fit(one, record, **options)


def tokens(document):
  """Each row's tokens, those that are not trained negative."""
  signed = np.where(document['mask'] > 0, 1, -1) * document['tokens']
  return [row.tolist() for row in np.split(signed, np.cumsum(document['lengths'])[:-1])]


def test_what_fits_is_left_alone():
  document = fit(said([1, 2, 3], [4, 5], [6, 7, 8, 9, 10], labels=(2.0, 1.0)))
  assert document['fate'] == packing.KEPT
  assert tokens(document) == [[-1, -2, -3, 4, 5], [-1, -2, -3, 6, 7, 8, 9, 10]]
  assert document['labels'].tolist() == [2, 1]


def test_the_prompt_is_cut_first_at_its_start_and_alike_in_both_rows():
  document = fit(said([2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12]))
  assert document['fate'] == packing.TRUNCATED
  # 8 − 3 tokens are left to the prompt, and it needs no BOS that it never had.
  assert tokens(document) == [
    [-3, -4, -5, -6, -7, 8, 9],
    [-3, -4, -5, -6, -7, 10, 11, 12],
  ]


def test_bos_stays_in_front_of_a_cut_prompt():
  document = fit(said([BOS, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12]))
  assert tokens(document)[0] == [-BOS, -4, -5, -6, -7, 8, 9]


@pytest.mark.parametrize(('least', 'kept'), [(None, 4), (2, 2), (6, 6)])
def test_then_the_completions_at_their_end(least, kept):
  prompt, long = [*range(20, 27)], [*range(30, 38)]
  document = fit(said(prompt, long, [40, 41]), max_prompt_length=least)
  assert tokens(document) == [
    [*(-t for t in prompt[-kept:]), *long[: 8 - kept]],
    [*(-t for t in prompt[-kept:]), *[40, 41][: 8 - kept]],
  ]


def test_a_prompt_shorter_than_its_share_leaves_the_rest_to_the_completions():
  document = fit(said([2, 3], [*range(30, 40)], [40]))
  assert tokens(document) == [[-2, -3, 30, 31, 32, 33, 34, 35], [-2, -3, 40]]


@pytest.mark.parametrize(
  ('one', 'overlong', 'fate'),
  [
    (said([2] * 4, [3] * 9, [4]), 'drop', packing.OVERLONG),
    # What they differ in is cut off.
    (said([2] * 4, [3] * 8 + [4], [3] * 8 + [5]), 'truncate', packing.MASKED),
    (said([2] * 4, [3] * 9, targets=[np.nan] * 8 + [1]), 'truncate', packing.MASKED),
  ],
)
def test_a_record_is_dropped_whole(one, overlong, fate):
  document = fit(one, overlong=overlong)
  assert document['fate'] == fate
  assert not document['tokens'].size
  assert document['lengths'].sum() == 0


def batch(*documents, **options):
  rows = [
    preference_rows.pad(fit(d, i), max_length=8, pad_id=PAD)
    for i, d in enumerate(documents)
  ]
  stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  if 'fill' in options:
    stacked = preference_rows.fill_rows(
      stacked, batch_size=options.pop('fill'), pad_id=PAD
    )
  return preference_rows.rows(stacked, pad_id=PAD, **options)


def test_pairs_lie_next_to_each_other():
  made = batch(
    said([1, 2], [3], [4, 5], labels=(2.0, 1.0)),
    said([1], [6, 7], [8], labels=(4.0, 0.5)),
    records='pairs',
  )
  assert made['tokens'][:, :5].tolist() == [
    [1, 2, 3, PAD, PAD], [1, 2, 4, 5, PAD], [1, 6, 7, PAD, PAD], [1, 8, PAD, PAD, PAD],
  ]  # fmt: skip
  assert made['mask'][:, :5].tolist() == [
    [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0],
  ]  # fmt: skip
  assert made['ids'][:, :3].tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, -1]]
  assert made['labels'].tolist() == [2, 1, 4, 0.5]
  assert made['positions'][1, :5].tolist() == [0, 1, 2, 3, 0]
  assert made['segments'].sum(-1).tolist() == [3, 4, 3, 2]


def test_an_unpaired_record_is_followed_by_its_prompt_with_the_next_ones_completion():
  made = batch(
    said([1, 2], [3, 4], labels=(1.0,)),
    said([5], [6, 7, 8, 9, 10, 11, 12], labels=(0.0,)),
    said([20, 21, 22], [23], labels=(1.0,)),
    records='unpaired',
  )
  np.testing.assert_array_equal(made['labels'], [1, np.nan, 0, np.nan, 1, np.nan])
  assert made['tokens'][1].tolist() == [1, 2, 6, 7, 8, 9, 10, 11]  # cut at T
  assert made['mask'][1].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
  assert made['ids'][1].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
  assert made['tokens'][3].tolist() == [5, 23, *[PAD] * 6]
  assert made['tokens'][5].tolist() == [20, 21, 22, 3, 4, PAD, PAD, PAD]
  assert made['mask'][5].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
  assert made['segments'][5].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
  assert made['positions'][5].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


def test_a_record_is_not_its_own_mismatch_when_it_comes_twice():
  documents = [said([1, t], [t], labels=(1.0,)) for t in (3, 4)]
  rows = [
    preference_rows.pad(fit(documents[i], i), max_length=8, pad_id=PAD)
    for i in (0, 0, 1)
  ]
  stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  made = preference_rows.rows(stacked, records='unpaired', pad_id=PAD)
  assert made['tokens'][1::2, :3].tolist() == [[1, 3, 4], [1, 3, 4], [1, 4, 3]]


def test_steps_keep_their_targets_in_place():
  nan = np.nan
  made = batch(said([1, 2], [3, 4, 5], targets=[nan, 0, 1]), records='steps')
  np.testing.assert_array_equal(made['targets'], [[nan, nan, nan, 0, 1, nan, nan, nan]])


def test_a_short_batch_is_filled_with_rows_of_padding():
  made = batch(said([1, 2], [3], [4, 5], labels=(2.0, 1.0)), records='pairs', fill=2)
  assert made['tokens'].shape == (4, 8)
  assert (made['tokens'][2:] == PAD).all()
  assert (made['ids'][2:] == -1).all()
  assert not made['mask'][2:].any()
  assert made['labels'].tolist() == [2, 1, 0, 0]


def test_rows_of_padding_have_no_steps_to_be_judged():
  """A target of 0 there would be a step that is wrong."""
  nan = np.nan
  made = batch(said([1, 2], [3, 4], targets=[0, 1]), records='steps', fill=3)
  np.testing.assert_array_equal(made['targets'][0, :5], [nan, nan, 0, 1, nan])
  assert np.isnan(made['targets'][1:]).all()
  assert not made['mask'][1:].any()
