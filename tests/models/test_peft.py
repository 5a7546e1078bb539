"""Adapters that PEFT wrote (tests/golden/make_golden_peft.py), and ours read back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from educe.models import lora, peft

KINDS = ('lora', 'dora')


@pytest.fixture(scope='module')
def golden(request):
  return request.config.rootpath / 'tests' / 'golden'


def logits_of(model, params, tokens):
  def logits(params, tokens):
    return model.hidden(params, tokens)[0] @ model.head(params).matrix

  return jax.jit(logits)(params, jnp.asarray(tokens))


@pytest.mark.parametrize('kind', KINDS)
def test_an_adapter_of_peft_gives_the_logits_that_it_has_there(golden, kind):
  folder = golden / f'tiny_llama_{kind}'
  model, params = peft.load(path=str(folder))
  with np.load(folder / 'logits.npz') as file:
    tokens, want = file['tokens'], file['logits']
  got = logits_of(model, params, tokens)
  assert np.abs(want).max() > 3
  np.testing.assert_allclose(got, want, atol=2e-4)  # float32; logits of about 4
  merged = logits_of(model, lora.merged(params), tokens)
  np.testing.assert_allclose(merged, want, atol=2e-4)
  bare = logits_of(model, lora.without(params), tokens)
  assert np.abs(bare - want).max() > 0.5


@pytest.mark.parametrize('kind', KINDS)
def test_a_description_is_of_what_is_loaded(golden, kind):
  section = dict(path=str(golden / f'tiny_llama_{kind}'), remat='dots')
  known = {}

  def start():
    known['model'], params = peft.describe(**section)
    return params

  def told(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)

  like = jax.eval_shape(start)
  model, params = peft.load(**section)
  assert known['model'].architecture == model.architecture
  assert known['model'].axes == model.axes
  assert told(like) == told(params)


def test_a_description_compares_its_adapter_with_another(golden):
  path = str(golden / 'tiny_llama_lora')
  own = json.loads((golden / 'tiny_llama_lora' / peft.CONFIG).read_text())
  rank = own['r']
  targets = peft.load(path=path)[1]['adapter']['layers']
  targets = tuple(name for module in targets.values() for name in module)

  def start(alpha):
    return lora.attach(
      *peft.describe(path=path), rank=rank, alpha=alpha, targets=targets
    )[1]

  alpha = float(own['lora_alpha'])
  assert 'adapter' in jax.eval_shape(lambda: start(alpha))
  with pytest.raises(ValueError, match='scale is'):
    jax.eval_shape(lambda: start(2 * alpha))


@pytest.mark.parametrize('kind', KINDS)
def test_what_was_read_is_written_as_it_was(golden, kind, tmp_path):
  folder = golden / f'tiny_llama_{kind}'
  _, params = peft.load(path=str(folder))
  names = peft.export(tmp_path / 'out', params, base='../base')
  theirs, ours = (
    safetensors.numpy.load_file(where / peft.FILE)
    for where in (folder, tmp_path / 'out')
  )
  assert names == sorted(theirs) == sorted(ours)
  for name in names:
    assert ours[name].dtype == np.float32
    # Through ‖W‖ and back: two roundings of numbers of about 1.
    tolerance = 1e-6 if 'magnitude' in name else 0
    np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance, err_msg=name)
  a, b = (
    json.loads((where / peft.CONFIG).read_text())
    for where in (folder, tmp_path / 'out')
  )
  assert b['base_model_name_or_path'] == '../base'
  assert sorted(a['target_modules']) == sorted(b['target_modules'])
  assert (a['r'], a['use_dora']) == (b['r'], b['use_dora'])
  scale = a['lora_alpha'] / (a['r'] ** 0.5 if a['use_rslora'] else a['r'])
  assert b['lora_alpha'] / b['r'] == pytest.approx(scale, rel=1e-6)
  with pytest.raises(FileExistsError, match='already holds an adapter'):
    peft.export(tmp_path / 'out', params, base=None)
  with pytest.raises(ValueError, match='has no adapter'):
    peft.export(tmp_path / 'other', lora.without(params), base=None)


def test_what_is_no_adapter_of_this_model_is_one_line(golden, tmp_path):
  folder = tmp_path / 'adapter'
  shutil.copytree(golden / 'tiny_llama_dora', folder)
  base = str(golden / 'tiny_llama')
  config = json.loads((folder / peft.CONFIG).read_text())
  whole = safetensors.numpy.load_file(folder / peft.FILE)
  with pytest.raises(ValueError, match=r"its base '../tiny_llama' is no folder here"):
    peft.load(path=str(folder))
  peft.load(path=str(folder), base=base)
  for change, message in (
    (dict(bias='all'), "bias = 'all' is not supported; only 'none'"),
    (dict(peft_type='IA3'), "peft_type = 'IA3' is not supported"),
    (dict(rank_pattern={'q_proj': 2}), 'rank_pattern = .* is not supported'),
    (dict(r='4'), "r = '4' should be a number"),
  ):
    (folder / peft.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
      peft.load(path=str(folder), base=base)
  (folder / peft.CONFIG).write_text(json.dumps(config))
  name = 'base_model.model.model.layers.1.mlp.up_proj.lora_B.weight'
  for change, message in (
    ({name: whole[name][:, :2].copy()}, rf"{name}' is of shape \[56, 2\]"),
    (
      {'base_model.model.lm_head.lora_A.weight': whole[name]},
      'lm_head.* have no place',
    ),
  ):
    safetensors.numpy.save_file(whole | change, folder / peft.FILE)
    with pytest.raises(ValueError, match=message):
      peft.load(path=str(folder), base=base)
  less = {key: x for key, x in whole.items() if key != name}
  safetensors.numpy.save_file(less, folder / peft.FILE)
  with pytest.raises(ValueError, match=f"{name}' is absent"):
    peft.load(path=str(folder), base=base)
  (folder / peft.FILE).write_bytes(b'no')
  with pytest.raises(ValueError, match='truncated or no safetensors file'):
    peft.load(path=str(folder), base=base)
  with pytest.raises(ValueError, match=f'no {peft.CONFIG}'):
    peft.load(path=base)
