"""The table of names: each of our params once, and shapes that invert."""

import dataclasses

import numpy as np
import pytest

from educe.models import policy, presets, weights

# Every dimension differs, so that swapping two cannot pass.
ARCHITECTURE = dataclasses.replace(
  presets.get('debug'), dim=20, heads=6, kv_heads=2, head_dim=4, ffn=28, layers=3
)


@pytest.mark.parametrize('form', list(weights.COLUMNS))
def test_a_complete_file_fills_every_param_once(form):
  rows = list(weights.expected(ARCHITECTURE, form))
  assert len({row.source for row in rows}) == len(rows)
  assert sum(int(np.prod(row.shape)) for row in rows) == policy.count(
    policy.shapes(ARCHITECTURE)
  )
  tied = dataclasses.replace(ARCHITECTURE, tied=True)
  assert len(list(weights.expected(tied, form))) == len(rows) - 1


MIXTURE = dataclasses.replace(
  presets.get('debug_moe'), dim=20, heads=6, kv_heads=2, head_dim=4, ffn=28, layers=3
)


@pytest.mark.parametrize('qk_norm', ['head', 'whole'])
@pytest.mark.parametrize('form', ['huggingface', 'mixtral'])
def test_a_complete_file_fills_every_expert_once(form, qk_norm):
  architecture = dataclasses.replace(MIXTURE, qk_norm=qk_norm)
  rng = np.random.default_rng(0)
  rows = list(weights.expected(architecture, form))
  assert len({row.source for row in rows}) == len(rows)
  file = {x.source: rng.normal(size=x.source_shape).astype(np.float32) for x in rows}
  params = weights.read(architecture, form, rows, file.__getitem__)
  ours = weights.leaves(params)
  assert sum(x.size for x in file.values()) == policy.count(params)
  for row in rows:
    part = row.of(ours[row.name])
    np.testing.assert_array_equal(weights.to_file(row, part), file[row.source])
  name = {
    'huggingface': 'model.layers.2.mlp.experts.5.up_proj.weight',
    'mixtral': 'model.layers.2.block_sparse_moe.experts.5.w3.weight',
  }[form]
  up = params['layers']['experts']['up'][2, 5]
  np.testing.assert_array_equal(up.T, file[name])
  assert f'{name} ' in weights.describe(rows, architecture)
  assert 'layers/experts/up[2][5] [20, 28]' in weights.describe(rows, architecture)


def test_to_file_and_to_ours_are_inverse_and_read_fills_by_name():
  rng = np.random.default_rng(0)
  form = 'huggingface'
  rows = list(weights.expected(ARCHITECTURE, form))
  file = {x.source: rng.normal(size=x.source_shape).astype(np.float32) for x in rows}
  params = weights.read(ARCHITECTURE, form, rows, file.__getitem__)
  ours = weights.leaves(params)
  for row in rows:
    part = row.of(ours[row.name])
    np.testing.assert_array_equal(weights.to_file(row, part), file[row.source])
  q = file['model.layers.1.self_attn.q_proj.weight']  # [heads · head_dim, dim]
  x = rng.normal(size=20).astype(np.float32)
  want = (q @ x).reshape(6, 4)
  got = np.einsum('d,dnh->nh', x, params['layers']['attention']['query'][1])
  np.testing.assert_allclose(got, want, atol=1e-5)
  o = file['model.layers.2.self_attn.o_proj.weight']  # [dim, heads · head_dim]
  y = rng.normal(size=(6, 4)).astype(np.float32)
  got = np.einsum('nh,nhd->d', y, params['layers']['attention']['out'][2])
  np.testing.assert_allclose(got, o @ y.ravel(), atol=1e-5)


def test_an_error_in_a_thread_is_not_lost():
  rows = list(weights.expected(ARCHITECTURE, 'gguf'))

  def broken(name):
    raise ValueError(f'cannot read {name}')

  with pytest.raises(ValueError, match='cannot read token_embd'):
    weights.read(ARCHITECTURE, 'gguf', rows, broken)
