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


NAMES = ['tiny_llama', 'tiny_qwen3', 'tiny_olmoe', 'tiny_mixtral', 'tiny_qwen3_moe']


def form_of(architecture):
  return ours.FAMILIES[ours.family_of(architecture)].form


@pytest.mark.parametrize('name', NAMES)
def test_a_description_is_of_what_is_loaded(golden, name):
  section = dict(path=str(golden / name), param_dtype='bfloat16', remat='dots')
  known = {}

  def start():
    known['model'], params = ours.describe(**section)
    return params

  def told(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)

  like = jax.eval_shape(start)
  model, params = ours.load(**section)
  assert known['model'].architecture == model.architecture
  assert known['model'].axes == model.axes
  assert told(like) == told(params)


@pytest.mark.parametrize('name', NAMES)
def test_logits_and_every_gradient_are_those_of_transformers(golden, name):
  model, params = ours.load(path=str(golden / name))
  want = np.load(golden / f'{name}.npz')
  tokens = want['tokens']

  def loss(params):
    states, aux = model.hidden(params, tokens)
    logits = states @ model.head(params).matrix
    logp = jax.nn.log_softmax(logits[:, :-1])
    loss = -jnp.take_along_axis(logp, tokens[:, 1:, None], -1).mean()
    return loss, (logits, aux)

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, (logits, aux)), slope = run(params)
  assert np.abs(logits - want['logits']).max() <= 1e-5
  assert float(value) == pytest.approx(float(want['loss']), abs=1e-6)
  slope = weights.leaves(slope)
  norms = dict(zip(want['gradient_names'], want['gradient_norms'], strict=True))
  for row in weights.expected(model.architecture, form_of(model.architecture)):
    norm = float(jnp.linalg.norm(row.of(slope[row.name]).ravel()))
    assert norm == pytest.approx(norms.pop(row.source), rel=1e-4), row.source
  assert not norms
  assert bool(aux) == ('balance' in want)
  if aux:
    x = want['router_logits'].astype(np.float64)  # layers, rows, tokens, experts
    z = np.log(np.exp(x).sum(-1)) ** 2
    assert float(aux['load_balance'].value) == pytest.approx(want['balance'].mean())
    assert float(aux['router_z'].value) == pytest.approx(z.mean(), rel=1e-5)


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


@pytest.mark.parametrize('name', NAMES)
def test_what_transformers_saved_comes_back_from_us_byte_for_byte(
  golden, tmp_path, name
):
  model, params = ours.load(path=str(golden / name))
  ours.export(tmp_path, model.architecture, params, bos_token_id=1, eos_token_id=[2, 5])
  theirs = safetensors.numpy.load_file(golden / name / 'model.safetensors')
  written = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  assert theirs.keys() == written.keys()
  for tensor, array in theirs.items():
    np.testing.assert_array_equal(array, written[tensor])
  want = json.loads((golden / name / 'config.json').read_text())
  got = json.loads((tmp_path / 'config.json').read_text())
  if name == 'tiny_qwen3_moe':  # transformers 5 renames what its own files are read by
    want['num_experts'] = want.pop('num_local_experts')
    del want['intermediate_size']  # of dense layers, and there are none
  if name == 'tiny_olmoe':
    want['head_dim'] = want['hidden_size'] // want['num_attention_heads']
  names = ours.keys_of(ours.FAMILIES[got['model_type']]).values()
  for key in (*names, 'architectures', 'model_type', 'hidden_act'):
    assert got[key] == want[key], key
  again, loaded = ours.load(path=str(tmp_path))
  assert again.architecture == model.architecture
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
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
    (_config(model_type='mamba'), r"model_type is 'mamba'; only \['llama', 'qwen3'"),
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


@pytest.mark.parametrize(
  ('name', 'edit', 'complaint'),
  [
    (
      'olmoe',
      _config(clip_qkv=8.0),
      r'clip_qkv = 8\.0 is not supported; it must be None',
    ),
    ('olmoe', _config(norm_topk_prob=None), r"no key 'norm_topk_prob'; .* no OlmoeFor"),
    ('olmoe', _config(num_experts_per_tok=7), r'experts_per_token = 7 must be in 1…6'),
    (
      'olmoe',
      _config(num_experts=7),
      r"no tensor '.*mlp\.gate\.weight'|has shape \[6, 32",
    ),
    ('mixtral', _config(sliding_window=8), 'sliding_window = 8 is not supported'),
    ('qwen3_moe', _config(mlp_only_layers=[1]), r'mlp_only_layers = \[1\] is not'),
    ('qwen3_moe', _config(decoder_sparse_step=2), 'decoder_sparse_step = 2 is not'),
    ('qwen3', _config(use_sliding_window=True), 'use_sliding_window = True is not'),
    (
      'mixtral',
      _tensors(lambda t: t.pop('model.layers.1.block_sparse_moe.experts.5.w2.weight')),
      r"no tensor '.*experts\.5\.w2\.weight' of shape \[32, 20\]",
    ),
  ],
)
def test_what_a_family_cannot_be_is_refused_by_name(
  golden, tmp_path, name, edit, complaint
):
  folder = shutil.copytree(golden / f'tiny_{name}', tmp_path / 'copy')
  edit(folder)
  with pytest.raises(ValueError, match=complaint):
    ours.load(path=str(folder))


def test_the_coefficients_of_a_mixture_are_the_users_and_go_into_the_file(
  golden, tmp_path
):
  path = str(golden / 'tiny_mixtral')
  model, params = ours.load(path=path, balance_coef=0.25, router_z_coef=0.5)
  assert model.aux_coefs == {'load_balance': 0.25, 'router_z': 0.5}
  assert ours.load(path=path)[0].aux_coefs == {'load_balance': 0.0, 'router_z': 0.0}
  ours.export(tmp_path, model.architecture, params)
  written = json.loads((tmp_path / 'config.json').read_text())
  assert written['router_aux_loss_coef'] == 0.25
  with pytest.raises(ValueError, match=r'^balance_coef = 0\.1: this model has no exp'):
    ours.load(path=str(golden / 'tiny_llama'), balance_coef=0.1)


@pytest.mark.parametrize(
  'change',
  [
    dict(qk_norm='none', renormalise=False),
    dict(qk_norm='whole', head_dim=6),
    dict(qk_norm='whole', experts=0, experts_per_token=0, renormalise=False),
  ],
)
def test_a_decoder_that_transformers_does_not_know_is_not_exported(tmp_path, change):
  architecture = dataclasses.replace(presets.debug_moe, **change)
  with pytest.raises(ValueError, match='is of no family that transformers knows'):
    ours.export(tmp_path, architecture, {})
