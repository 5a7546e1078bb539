"""Two samplings put together: every row as it was, whatever the widths."""

import numpy as np
import pytest

from educe.rollouts import joining
from educe.types import Rollouts


def rollouts_of(first, groups=3, group=2, width=4, kept=False):
  """Rows that say who they are: first, first + 1, … in every array."""
  rows = groups * group
  names = first + np.arange(rows)
  flat = (names[:, None] * np.ones(width)).astype(np.float32)
  return Rollouts(
    flat.astype(np.int32),
    np.ones((rows, width), np.float32),
    -flat,
    (names % 2).astype(np.int32),
    np.where(names % 5, names, np.nan).astype(np.float32),
    group,
    [{'id': int(i)} for i in names],
    kept=1 / flat if kept else None,
  )


def check(got, names, parts):
  """Each row is the one of that name in its part, filled up."""
  known = {row['id']: (p, at) for p in parts for at, row in enumerate(p.transcripts)}
  width = max(p.tokens.shape[1] for p in parts)
  assert [row['id'] for row in got.transcripts] == list(names)
  for at, name in enumerate(names):
    part, row = known[name]
    own = part.tokens.shape[1]
    for field in ('tokens', 'mask', 'sampler_logp'):
      ours, theirs = getattr(got, field), getattr(part, field)
      assert ours.dtype == theirs.dtype
      assert ours.shape == (len(names), width)
      np.testing.assert_array_equal(ours[at, :own], theirs[row])
      assert not ours[at, own:].any()
    for field in ('stopped', 'rewards'):
      np.testing.assert_array_equal(getattr(got, field)[at], getattr(part, field)[row])
    if all(p.kept is None for p in parts):
      assert got.kept is None
      continue
    assert got.kept.dtype == np.float32
    assert (got.kept[at, own:] == 1).all()
    want = 1.0 if part.kept is None else part.kept[row]
    np.testing.assert_array_equal(got.kept[at, :own], want)


BOTH = pytest.mark.parametrize('kept', [(), (0,), (1,), (0, 1)])
WIDTHS = pytest.mark.parametrize('widths', [(4, 4), (4, 7), (7, 4)])


def two(kept, widths):
  return [
    rollouts_of(first, width=width, kept=part in kept)
    for part, (first, width) in enumerate(zip((10, 20), widths, strict=True))
  ]


@BOTH
@WIDTHS
def test_one_behind_the_other(kept, widths):
  parts = two(kept, widths)
  got = joining.joined(*parts)
  check(got, [*range(10, 16), *range(20, 26)], parts)
  assert got.group == 2


@BOTH
@WIDTHS
def test_side_by_side_prompt_by_prompt(kept, widths):
  parts = two(kept, widths)
  got = joining.side_by_side(*parts)
  check(got, [10, 11, 20, 21, 12, 13, 22, 23, 14, 15, 24, 25], parts)
  assert got.group == 4


@BOTH
@WIDTHS
def test_groups_take_the_places_of_others(kept, widths):
  parts = two(kept, widths)
  before = [x.tokens.copy() for x in parts]
  got = joining.replace_groups(parts[0], [2, 0], parts[1], [1, 2])
  check(got, [24, 25, 12, 13, 22, 23], parts)
  for part, tokens in zip(parts, before, strict=True):
    np.testing.assert_array_equal(part.tokens, tokens)  # copies


def test_no_place_is_no_change():
  mine, others = two((1,), (4, 7))
  assert joining.replace_groups(mine, [], others, []) is mine


def test_rows_of_groups():
  assert joining.rows_of([2, 0], 3).tolist() == [6, 7, 8, 0, 1, 2]
