"""Makes the golden folders of the other families. Run by hand; needs torch, transformers.

  python tests/golden/make_golden_families.py            writes the folders and their .npz
  python tests/golden/make_golden_families.py exported   transformers reads what we export

The first writes what transformers alone says, in float32: logits, loss, the norm of every
gradient under the name of its tensor on disk, and the load-balancing loss of each row and
layer. Nothing of ours runs there.
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
# Every dimension differs where a family lets it, so that a swapped one cannot pass.
SHAPE = dict(
  vocab_size=97,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
  rms_norm_eps=1e-6,
  rope_parameters={'rope_type': 'default', 'rope_theta': 5000.0},
  tie_word_embeddings=False,
  initializer_range=0.2,
)
SPARSE = dict(num_experts_per_tok=2, output_router_logits=True)
CONFIGS = {
  'tiny_olmoe': transformers.OlmoeConfig(
    # Of a padding token torch would make no gradient.
    **SHAPE,
    **SPARSE,
    intermediate_size=20,
    num_experts=6,
    pad_token_id=None,
  ),
  'tiny_mixtral': transformers.MixtralConfig(
    **SHAPE, **SPARSE, intermediate_size=20, num_local_experts=6, head_dim=12
  ),
  'tiny_qwen3_moe': transformers.Qwen3MoeConfig(
    **SHAPE,
    **SPARSE,
    intermediate_size=40,
    moe_intermediate_size=20,
    num_experts=6,
    head_dim=12,
    norm_topk_prob=True,
  ),
  'tiny_qwen3': transformers.Qwen3Config(**SHAPE, intermediate_size=56, head_dim=12),
}


def on_disk(name, gradient):
  """[(name of the tensor on disk, its gradient)]: experts lie stacked in memory."""
  mixtral = '.mlp.' in name and MIXTRAL
  names = ('w1', 'w3', 'w2') if mixtral else ('gate_proj', 'up_proj', 'down_proj')
  if mixtral:
    name = name.replace('.mlp.', '.block_sparse_moe.')
  parts = []
  for number, part in enumerate(gradient) if '.experts.' in name else ():
    start = f'{name.rsplit(".", 1)[0]}.{number}'
    if name.endswith('gate_up_proj'):
      gate, up = part.chunk(2)
      parts += [
        (f'{start}.{names[0]}.weight', gate),
        (f'{start}.{names[1]}.weight', up),
      ]
    else:
      parts.append((f'{start}.{names[2]}.weight', part))
  return parts or [(name, gradient)]


def make(name, config):
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  for key, x in model.named_parameters():
    if 'norm' in key:
      x.data.uniform_(0.5, 1.5)
    elif key.endswith('mlp.gate.weight'):  # a router starts at zero in some families
      x.data.normal_(0, 0.2)
  model.save_pretrained(HERE / name)
  tokens = np.random.default_rng(0).integers(0, 97, (2, 17)).astype(np.int32)
  ids = torch.tensor(tokens).long()
  out = model(ids)
  logp = torch.log_softmax(out.logits[:, :-1], -1)
  loss = -logp.gather(-1, ids[:, 1:, None]).mean()
  loss.backward()
  norms = {
    place: float(part.norm())
    for key, x in model.named_parameters()
    for place, part in on_disk(key, x.grad)
  }
  found = {}
  if routers := getattr(out, 'router_logits', None):
    module = sys.modules[type(model).__module__]
    found['balance'] = np.array(
      [
        [
          float(module.load_balancing_loss_func((layer[row],), 6, 2))
          for layer in (x.reshape(2, 17, 6) for x in routers)
        ]
        for row in range(2)
      ]
    )
    found['router_logits'] = torch.stack([x.reshape(2, 17, 6) for x in routers])
    found['router_logits'] = found['router_logits'].detach().numpy()
  np.savez_compressed(
    HERE / f'{name}.npz',
    tokens=tokens,
    logits=out.logits.detach().numpy(),
    loss=loss.item(),
    gradient_names=np.array(list(norms)),
    gradient_norms=np.array(list(norms.values())),
    **found,
  )
  print(name, loss.item(), found.get('balance'))


def exported():
  """Our logits against those of transformers, of the folder that we write."""
  import jax

  from educe.models import safetensors as ours

  for name in CONFIGS:
    model, params = ours.load(path=str(HERE / name))
    with tempfile.TemporaryDirectory() as folder:
      ours.export(folder, model.architecture, params, shard_bytes=30_000)
      theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype='auto', output_loading_info=True
      )
    tokens = np.random.default_rng(1).integers(0, 97, (2, 33)).astype(np.int32)
    states, _ = jax.jit(model.hidden)(params, tokens)
    logits = np.asarray(states @ model.head(params).matrix, np.float32)
    with torch.no_grad():
      other = theirs(torch.tensor(tokens).long()).logits.numpy()
    assert not any(info[f'{kind}_keys'] for kind in ('missing', 'unexpected')), info
    print(type(theirs).__name__, float(np.abs(logits - other).max()))


if __name__ == '__main__':
  if sys.argv[1:] == ['exported']:
    exported()
  else:
    for name, config in CONFIGS.items():
      MIXTRAL = name == 'tiny_mixtral'
      make(name, config)
