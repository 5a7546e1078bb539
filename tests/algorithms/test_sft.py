import contextlib
import functools
import zlib

import numpy as np
import pytest

from educe.algorithms import sft as algorithm
from educe.losses import sft as losses


class Rows:
  """Two rows of a pipeline, and its counts."""

  batch_size = 2
  records = 'documents'

  def __init__(self, packing=False):
    self.read, self.packing = 0, packing

  def __next__(self):
    self.read += 2
    shape = (2, 4)
    return {
      'tokens': np.full(shape, self.read, np.int32),
      'mask': np.ones(shape, np.float32),
      'positions': np.full(shape, 3, np.int32),
      'segments': np.full(shape, 1, np.int32),
      'ids': np.full(shape, self.read, np.int32)[:, ::-1],
    }

  def holding(self):
    return contextlib.nullcontext()

  def counts(self):
    return {'records': self.read}


def test_batches_come_in_order_with_a_fingerprint_of_their_examples():
  method = algorithm.make(Rows(), losses.loss)
  first, info = method.next_batch(None)
  second, other = method.next_batch(None)
  assert (first.tokens[0, 0], second.tokens[0, 0]) == (2, 4)
  assert info['data/ids_crc32'] == zlib.crc32(np.full((2, 4), 2, np.int32).tobytes())
  assert info['data/ids_crc32'] != other['data/ids_crc32']
  assert other['data/records'] == 4


def test_positions_and_segments_go_to_the_model_only_when_packed():
  plain, _ = algorithm.make(Rows(), losses.loss).next_batch(None)
  assert plain.positions is None
  assert plain.segments is None
  packed, _ = algorithm.make(Rows(packing=True), losses.loss).next_batch(None)
  assert (packed.positions == 3).all()
  assert (packed.segments == 1).all()


@pytest.mark.parametrize(
  ('packed', 'setting', 'message'),
  [
    (True, {'aggregate': 'sequence_mean'}, 'packing=False'),
    (False, {'aggregate': 'mean'}, "aggregate='mean' is not one of"),
    (False, {'label_smoothing': 2.0}, 'label_smoothing=2.0'),
  ],
)
def test_what_the_loss_refuses_is_refused_before_the_first_batch(
  packed, setting, message
):
  data = Rows(packed)
  with pytest.raises(ValueError, match=message):
    algorithm.make(data, functools.partial(losses.loss, **setting))
  assert data.read == 0


def test_preferences_are_not_imitated():
  data = Rows()
  data.records = 'pairs'
  with pytest.raises(ValueError, match=r"config\.data\.records='pairs'"):
    algorithm.make(data, losses.loss)
