"""Against the toy's table, row by row; equal rows are scored once."""

import numpy as np
import pytest
import toy

from educe.measurement import sequence_logp as module
from educe.measurement.sequence_logp import sequence_logp

MODEL, PARAMS = toy.model(vocabulary=7)


def rows(count=11, width=9, seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(7, size=(count, width)).astype(np.int32)
  mask = (np.arange(width) >= rng.integers(1, width, (count, 1))).astype(np.float32)
  return tokens, mask


def by_hand(tokens, mask, temperature):
  out = []
  for row, there in zip(tokens, mask, strict=True):
    total = 0.0
    for at in np.flatnonzero(there):
      steps = toy.log_softmax(toy.logits(PARAMS, row[:at]) / temperature)
      total += steps[row[at]]
    out.append(total)
  return np.array(out)


@pytest.mark.parametrize('batch_size', [1, 4, 64])
@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_the_sum_over_the_completion(batch_size, temperature):
  tokens, mask = rows()
  tokens[5], mask[5] = tokens[2], mask[2]  # one and the same sample
  got = sequence_logp(
    MODEL, PARAMS, tokens, mask, temperature=temperature, batch_size=batch_size
  )
  np.testing.assert_allclose(got, by_hand(tokens, mask, temperature), atol=2e-5)
  assert got[5] == got[2]


def test_equal_rows_are_scored_once_and_other_masks_are_other_rows(monkeypatch):
  tokens, mask = rows(count=3)
  tokens[:] = tokens[0]
  mask[:] = mask[0]
  mask[2, -1] = 0
  seen = []
  real = module._logp
  monkeypatch.setattr(
    module, '_logp', lambda *a: seen.append(len(a[2].tokens)) or real(*a)
  )
  got = sequence_logp(MODEL, PARAMS, tokens, mask)
  assert seen == [2]
  assert got[0] == got[1] != got[2]
