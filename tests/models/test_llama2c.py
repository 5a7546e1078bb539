"""llama2.c checkpoints: stories260K against float64 NumPy, and broken files."""

import struct

import jax
import numpy as np
import pytest

from educe import paths
from educe.models import llama2c, presets, weights

STORIES = 'data://models/stories260K/stories260K.bin'


@pytest.fixture(scope='module')
def stories():
  if paths.data_root() is None:
    pytest.skip('no data folder')
  return llama2c.load(path=STORIES)


def test_stories260k_tells_the_documented_story(stories, request):
  """257 greedy tokens; the golden run is NumPy with llama2.c's own rotation."""
  model, params = stories
  assert model.architecture == presets.get('stories260k')
  golden = np.load(request.config.rootpath / 'tests' / 'golden' / 'stories260k.npz')

  @jax.jit
  def generate(params):
    matrix = model.head(params).matrix

    def step(carry, n):
      cache, token = carry
      states, cache = model.decode(params, cache, token, n[None, None], n)
      return (cache, (states[:, 0] @ matrix).argmax(-1)[:, None]), token[0, 0]

    start = model.init_cache(1, 258), np.ones((1, 1), np.int32)
    return jax.lax.scan(step, start, np.arange(258))[1]

  np.testing.assert_array_equal(generate(params), golden['tokens'])
  tokens = golden['tokens'][None, :-1]
  logits = jax.jit(model.hidden)(params, tokens)[0][0] @ model.head(params).matrix
  assert np.abs(np.asarray(logits)[::16] - golden['logits']).max() <= 1e-4


def test_report(stories):
  rows = llama2c.report(path=STORIES)
  lines = weights.describe(rows, stories[0].architecture).splitlines()
  assert 'wq.4 float32 [64, 64] -> layers/attention/query[4] [64, 8, 8] float32' in [
    ' '.join(line.split()) for line in lines
  ]
  assert lines[-1] == '47 tensors, 260,032 parameters'


def write(file, *, vocab=11, cut=0):
  """dim 8, ffn 12, 2 layers, 2 heads, 1 kv head, 5 positions; weights 0, 1, 2, …"""
  V, D, F, L, kv, T = abs(vocab), 8, 12, 2, 4, 5
  size = V * D + L * (2 * D + 2 * D * D + 2 * kv * D + 3 * D * F) + D + T * 4
  size += V * D if vocab < 0 else 0
  body = np.arange(size, dtype='<f4').tobytes()
  whole = struct.pack('<7i', D, F, L, 2, 1, vocab, T) + body
  file.write_bytes(whole[: len(whole) - cut])
  return str(file)


def test_a_negative_vocabulary_means_a_separate_head_at_the_end(tmp_path):
  _, params = llama2c.load(path=write(tmp_path / 'm.bin', vocab=-11))
  assert params['head'].shape == (8, 11)
  _, tied = llama2c.load(path=write(tmp_path / 't.bin', vocab=11))
  assert 'head' not in tied
  rest = {key: value for key, value in params.items() if key != 'head'}
  jax.tree.map(np.testing.assert_array_equal, rest, tied)
  last = np.arange(10_000, dtype=np.float32)
  first = params['norm']['scale'][-1] + 1 + 5 * 4  # past the two rotary tables
  np.testing.assert_array_equal(
    params['head'].T.ravel(), last[int(first) : int(first) + 88]
  )


def test_a_description_is_of_what_is_loaded(tmp_path):
  file = write(tmp_path / 'm.bin', vocab=-11)
  section = dict(path=file, param_dtype='bfloat16', remat='dots')
  known = {}

  def start():
    known['model'], params = llama2c.describe(**section)
    return params

  def told(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)

  like = jax.eval_shape(start)
  model, params = llama2c.load(**section)
  assert known['model'].architecture == model.architecture
  assert known['model'].axes == model.axes
  assert told(like) == told(params)


def test_rows_of_neighbouring_pairs_become_halves(tmp_path):
  _, params = llama2c.load(path=write(tmp_path / 'm.bin'))
  start = 11 * 8 + 2 * 8
  rows = start + 8 * np.arange(8)  # the first number of each row of wq[0]
  got = params['layers']['attention']['query'][0, 0]
  np.testing.assert_array_equal(got[0], rows[[0, 2, 1, 3]])
  np.testing.assert_array_equal(got[1], rows[[4, 6, 5, 7]])
  got = params['layers']['attention']['value'][0, 0, 0]
  assert list(np.diff(got)) == [8, 8, 8]


@pytest.mark.parametrize(('cut', 'vocab'), [(4, 11), (1, 11), (300, -11)])
def test_a_truncated_file_is_refused(tmp_path, cut, vocab):
  with pytest.raises(ValueError, match=r'm\.bin: .* bytes, but its header describes'):
    llama2c.load(path=write(tmp_path / 'm.bin', cut=cut, vocab=vocab))


def test_what_is_no_checkpoint_is_refused(tmp_path):
  file = tmp_path / 'm.bin'
  for junk, complaint in [
    (b'', '0 bytes hold no llama2.c header'),
    (b'GGUF' + bytes(100), 'no llama2.c header'),
    (
      struct.pack('<7i', 8, 12, 2, 8, 8, 11, 5) + bytes(90),
      'head_dim = 1 must be even',
    ),
  ]:
    file.write_bytes(junk)
    with pytest.raises(ValueError, match=complaint):
      llama2c.load(path=str(file))


def test_a_setting_that_cannot_be_is_not_blamed_on_the_file(tmp_path):
  with pytest.raises(ValueError, match=r"^remat = 'dotz' is none of"):
    llama2c.load(path=write(tmp_path / 'm.bin'), remat='dotz')
  with pytest.raises(ValueError, match=r"^logprob = 'palas' is none of"):
    llama2c.load(path=write(tmp_path / 'm.bin'), logprob='palas')
