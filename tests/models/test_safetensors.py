"""Hugging Face folders: against transformers, round trips, and broken folders."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from educe.models import policy, presets, scratch, weights
from educe.models import safetensors as ours


@pytest.fixture
def golden(request):
  return request.config.rootpath / 'tests' / 'golden'


@pytest.fixture
def folder(golden, tmp_path):
  """A copy of the tiny Llama, to be broken."""
  return shutil.copytree(golden / 'tiny_llama', tmp_path / 'copy')


def test_logits_and_every_gradient_are_those_of_transformers(tiny, golden):
  model, params = tiny
  want = np.load(golden / 'tiny_llama.npz')
  tokens = want['tokens']

  def loss(params):
    logits = model.hidden(params, tokens)[0] @ model.head(params).matrix
    logp = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], -1).mean(), logits

  (value, logits), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  assert np.abs(logits - want['logits']).max() <= 1e-5
  assert float(value) == pytest.approx(float(want['loss']), abs=1e-6)
  slope = weights.leaves(slope)
  norms = dict(zip(want['gradient_names'], want['gradient_norms'], strict=True))
  for row in weights.expected(model.architecture, 'huggingface'):
    got = slope[row.name] if row.layer is None else slope[row.name][row.layer]
    norm = float(jnp.linalg.norm(got.ravel()))
    assert norm == pytest.approx(norms.pop(row.source), rel=1e-4), row.source
  assert not norms


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shard_bytes', [4_000_000_000, 30_000])
@pytest.mark.parametrize('tied', [False, True])
def test_export_then_load_is_bitwise(tmp_path, dtype, shard_bytes, tied):
  architecture = dataclasses.replace(
    presets.get('debug'), param_dtype=dtype, tied=tied, rope_theta=123.0
  )
  model = policy.build(architecture)
  params = model.init(jax.random.key(0))
  folder = tmp_path / 'out'
  rows = ours.export(folder, architecture, params, shard_bytes=shard_bytes)
  assert (folder / ours.INDEX).exists() == (shard_bytes < 1e6)
  again, loaded = ours.load(path=str(folder), param_dtype=dtype)
  assert again.architecture == architecture
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}
  names = {'float32': 'F32', 'bfloat16': 'BF16'}
  assert {row.source_dtype for row in ours.report(path=str(folder))} == {names[dtype]}
  assert [row.source for row in rows] == [x.source for x in ours.report(path=folder)]
  assert not list(folder.glob('.*'))


def test_what_transformers_saved_comes_back_from_us_byte_for_byte(
  tiny, golden, tmp_path
):
  model, params = tiny
  ours.export(tmp_path, model.architecture, params, bos_token_id=1, eos_token_id=[2, 5])
  theirs = safetensors.numpy.load_file(golden / 'tiny_llama' / 'model.safetensors')
  written = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  assert theirs.keys() == written.keys()
  for name, array in theirs.items():
    np.testing.assert_array_equal(array, written[name])
  want = json.loads((golden / 'tiny_llama' / 'config.json').read_text())
  got = json.loads((tmp_path / 'config.json').read_text())
  for key in (*ours.KEYS.values(), 'architectures', 'model_type', 'hidden_act'):
    assert got[key] == want[key], key
  assert got['rope_theta'] == want['rope_parameters']['rope_theta']
  assert got['eos_token_id'] == [2, 5]


def test_export_does_not_overwrite_a_model(tiny, tmp_path):
  model, params = tiny
  ours.export(tmp_path, model.architecture, params)
  with pytest.raises(FileExistsError, match='already holds a model'):
    ours.export(tmp_path, model.architecture, params)


def test_a_failed_write_is_one_line_and_leaves_no_half_file(
  tiny, tmp_path, monkeypatch
):
  def full(arrays, file, metadata):
    file.write_bytes(b'half')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(ours.safetensors.numpy, 'save_file', full)
  model, params = tiny
  with pytest.raises(OSError, match=r'model\.safetensors: could not be .*disk full'):
    ours.export(tmp_path, model.architecture, params)
  assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_refused_wherever_it_was_cut(folder):
  file = folder / 'model.safetensors'
  whole = file.read_bytes()
  for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
    file.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r'model\.safetensors: truncated.*fetch it'):
      ours.load(path=str(folder))
  file.unlink()
  with pytest.raises(ValueError, match=r'no model\.safetensors; the folder is incom'):
    ours.load(path=str(folder))


def _tensors(change):
  def edit(folder):
    file = folder / 'model.safetensors'
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)

  return edit


def _config(**values):
  def edit(folder):
    file = folder / 'config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

  return edit


UP = 'model.layers.1.mlp.up_proj.weight'


@pytest.mark.parametrize(
  ('edit', 'complaint'),
  [
    (_tensors(lambda t: t.pop(UP)), f"no tensor '{UP}' of shape"),
    (
      _tensors(lambda t: t.update({UP: t[UP].T.copy()})),
      rf"'{UP}' has shape \[32, 56\].*\[56, 32\]",
    ),
    (
      _tensors(lambda t: t.update({'extra.bias': np.ones(3, np.float32)})),
      "'extra.bias' and 0 more",
    ),
    (_config(model_type='mamba'), "model_type is 'mamba'; only 'llama'"),
    (_config(attention_bias=True), 'attention_bias = True is not supported'),
    (_config(hidden_act='gelu'), "hidden_act = 'gelu' is not supported"),
    (_config(rope_parameters={'rope_type': 'llama3'}), "rope type 'llama3' is not"),
    (_config(hidden_size=None), r"config\.json: no key 'hidden_size'"),
    (_config(num_attention_heads=3), 'multiple of kv_heads = 2'),
    (
      _config(num_hidden_layers=2),
      "'model.layers.2.input_layernorm.weight' and 8 more",
    ),
    (_config(num_hidden_layers='2'), r'config\.json: '),
    (lambda f: (f / 'config.json').write_text('{"a'), r'config\.json: no JSON'),
    (lambda f: (f / 'config.json').write_text('[]'), 'holds no JSON object'),
    (lambda f: (f / 'config.json').unlink(), r'no config\.json; give a Hugging Face'),
  ],
)
def test_a_broken_folder_is_refused_by_name(folder, edit, complaint):
  edit(folder)
  with pytest.raises(ValueError, match=complaint):
    ours.load(path=str(folder))


def test_an_index_that_promises_a_missing_tensor_or_shard_is_refused(tmp_path):
  model = policy.build(presets.get('debug'))
  ours.export(
    tmp_path, model.architecture, model.init(jax.random.key(0)), shard_bytes=30_000
  )
  index = json.loads((tmp_path / ours.INDEX).read_text())
  name, shard = next(iter(index['weight_map'].items()))
  tensors = safetensors.numpy.load_file(tmp_path / shard)
  tensors['other'] = tensors.pop(name)
  safetensors.numpy.save_file(tensors, tmp_path / shard)
  with pytest.raises(ValueError, match=f'no tensor {name!r}, which .*index.json'):
    ours.load(path=str(tmp_path))
  (tmp_path / shard).unlink()
  with pytest.raises(ValueError, match=f'no {shard}; the folder is incomplete'):
    ours.load(path=str(tmp_path))


@pytest.mark.parametrize(
  'content', ['{}', '{"weight_map": ["a"]}', '{"weight_map": {}}']
)
def test_an_index_without_a_map_is_refused(tmp_path, content):
  model, params = scratch.load(preset='debug')
  ours.export(tmp_path / 'm', model.architecture, params)
  (tmp_path / 'm' / ours.INDEX).write_text(content)
  with pytest.raises(ValueError, match=r'index.json: no weight_map; fetch it again'):
    ours.load(path=str(tmp_path / 'm'))


def test_a_setting_that_cannot_be_is_not_blamed_on_the_file(folder):
  with pytest.raises(ValueError, match=r"^remat = 'dotz' is none of"):
    ours.load(path=str(folder), remat='dotz')
  with pytest.raises(ValueError, match=r"^logprob = 'palas' is none of"):
    ours.load(path=str(folder), logprob='palas')
