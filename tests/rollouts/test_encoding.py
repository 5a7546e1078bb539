"""Arrays survive being text, to the last bit."""

import numpy as np

from educe.rollouts.encoding import pack, unpack


def test_arrays_come_back_bit_by_bit():
  arrays = {
    'a': np.array([[1.0, np.nan], [-np.inf, 1e-45]], np.float32),
    'b': np.arange(3, dtype=np.int32),
    'c': np.zeros((0, 4)),
  }
  text = pack(arrays)
  assert isinstance(text, str)
  back = unpack(text)
  assert back.keys() == arrays.keys()
  for name, x in arrays.items():
    assert back[name].dtype == x.dtype
    assert back[name].tobytes() == x.tobytes()
    assert back[name].shape == x.shape
