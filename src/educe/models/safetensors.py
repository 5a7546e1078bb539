"""Weights from and to a Hugging Face folder: config.json and safetensors files.

https://huggingface.co/docs/safetensors and, of `transformers`, LlamaForCausalLM, dense
Qwen3ForCausalLM, and OlmoeForCausalLM, MixtralForCausalLM and Qwen3MoeForCausalLM.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from educe import paths
from educe.models import policy, weights
from educe.models.architecture import Architecture
from educe.types import Model, Params

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
# config.json's key for each of our fields.
KEYS = {
  'vocab_size': 'vocab_size',
  'dim': 'hidden_size',
  'layers': 'num_hidden_layers',
  'heads': 'num_attention_heads',
  'kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'ffn': 'intermediate_size',
  'max_length': 'max_position_embeddings',
  'norm_eps': 'rms_norm_eps',
  'tied': 'tie_word_embeddings',
}
# What every family can be told and this decoder does not do.
FIXED = {
  'hidden_act': 'silu',
  'attention_bias': False,
  'quantization_config': None,
}


class Family(NamedTuple):
  """What `transformers` calls a kind of decoder, and how its folders differ."""

  name: str  # of the class
  qk_norm: str = 'none'
  experts: str | None = None  # config.json's key of their number; None: dense
  renormalise: bool | None = False  # None: the file says so, as norm_topk_prob
  ffn: str = 'intermediate_size'
  form: str = 'huggingface'  # of weights.COLUMNS
  fixed: Mapping[str, Any] = MappingProxyType({})


NO_WINDOW = MappingProxyType({'use_sliding_window': False})
FAMILIES = {
  'llama': Family('LlamaForCausalLM', fixed={'mlp_bias': False}),
  'qwen3': Family('Qwen3ForCausalLM', 'head', fixed=NO_WINDOW),
  'olmoe': Family(
    'OlmoeForCausalLM', 'whole', 'num_experts', None, fixed={'clip_qkv': None}
  ),
  'mixtral': Family(
    'MixtralForCausalLM',
    'none',
    'num_local_experts',
    True,
    form='mixtral',
    fixed={'sliding_window': None},
  ),
  'qwen3_moe': Family(
    'Qwen3MoeForCausalLM',
    'head',
    'num_experts',
    None,
    'moe_intermediate_size',
    # Every layer has experts.
    fixed={'decoder_sparse_step': 1, 'mlp_only_layers': [], **NO_WINDOW},
  ),
}


def family_of(architecture: Architecture) -> str:
  """The model_type of folders that hold it.

  Raises ValueError where `transformers` has none.
  """
  a = architecture
  for kind, family in FAMILIES.items():
    sparse = family.experts is not None
    if (sparse, family.qk_norm) != (a.experts > 0, a.qk_norm):
      continue
    if family.renormalise not in (None, a.renormalise):
      continue
    if kind == 'olmoe' and a.heads * a.head_dim != a.dim:
      continue  # its config.json has no head_dim
    return kind
  raise ValueError(
    f'architecture: experts={a.experts}, qk_norm={a.qk_norm!r}, renormalise='
    f'{a.renormalise}, head_dim={a.head_dim} is of no family that transformers knows; '
    f'there are {list(FAMILIES)}'
  )


def load(
  *,
  path: str,
  param_dtype: str = 'float32',
  compute_dtype: str = 'float32',
  remat: str = 'none',
  logprob: str = 'auto',
  attention: str = 'auto',
  balance_coef: float = 0.0,
  router_z_coef: float = 0.0,
) -> tuple[Model, Params]:
  """The model in a Hugging Face folder, its params in host memory (NumPy).

  balance_coef, router_z_coef: of a mixture's auxiliary losses; those in the file are of its
    pretraining, and not read

  Raises ValueError, naming the file and the tensor or key, for a truncated file,
  another family than FAMILIES, and tensors that are missing, left over or misshapen.
  """
  architecture, form, files, folder = _open(
    path,
    param_dtype=param_dtype,
    compute_dtype=compute_dtype,
    remat=remat,
    logprob=logprob,
    attention=attention,
    balance_coef=balance_coef,
    router_z_coef=router_z_coef,
  )
  rows = weights.plan(architecture, form, _found(files), file=folder)

  def tensor(name: str) -> np.ndarray:
    return files[name].get_tensor(name)

  params = weights.read(architecture, form, rows, tensor)
  return policy.build(architecture), params


def describe(*, path: str, **options: Any) -> tuple[Model, Params]:
  """What `load` would give, from config.json alone; its params are random ones, and meant
  to be traced (jax.eval_shape), where none is made.

  options: of `load`

  Raises ValueError as `load` does for that file.
  """
  architecture, _ = _architecture(paths.resolve(path) / 'config.json')
  model = policy.build(dataclasses.replace(architecture, **options))
  return model, model.init(jax.random.key(0))


def report(*, path: str) -> list[weights.Mapped]:
  """Every tensor of the folder and where it goes; reads no weights."""
  architecture, form, files, folder = _open(path)
  return weights.plan(architecture, form, _found(files), file=folder)


def export(
  folder: str | os.PathLike,
  architecture: Architecture,
  params: Params,
  *,
  bos_token_id: int | None = None,
  eos_token_id: int | Sequence[int] | None = None,
  shard_bytes: int = 4_000_000_000,
) -> list[weights.Mapped]:
  """Writes a folder that `transformers` loads; returns the report of what went where.

  Params keep their dtype. The tokenizer, which knows the chat template and the stop
  tokens (generation_config.json), is the caller's to save.
  Every file appears whole or not at all, config.json last, so a folder that has one is
  complete. One shard is held in host memory at a time.

  Raises ValueError for an architecture that `transformers` has no class for.
  """
  kind = family_of(architecture)
  family = FAMILIES[kind]
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if (folder / 'config.json').exists():
    raise FileExistsError(f'{folder}: already holds a model; export to another folder')
  ours = weights.leaves(params)
  dtype = np.dtype(ours['embedding'].dtype)
  rows = [
    row._replace(source_dtype=str(dtype))
    for row in weights.expected(architecture, family.form)
  ]
  shards: list[list[weights.Mapped]] = [[]]
  room = shard_bytes
  for row in rows:
    size = dtype.itemsize * math.prod(row.shape)
    if shards[-1] and size > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(row)
    room -= size
  where = {}
  for number, shard in enumerate(shards, 1):
    name = f'model-{number:05}-of-{len(shards):05}.safetensors'
    name = SINGLE if len(shards) == 1 else name
    arrays = {}
    for row in shard:
      arrays[row.source] = weights.to_file(row, np.asarray(row.of(ours[row.name])))
      where[row.source] = name
    _save(folder / name, arrays)
  if len(shards) > 1:
    total = dtype.itemsize * sum(math.prod(row.shape) for row in rows)
    _write(folder / INDEX, {'metadata': {'total_size': total}, 'weight_map': where})
  tokens = {'bos_token_id': bos_token_id, 'eos_token_id': eos_token_id}
  keys = keys_of(family)
  config = {ours: getattr(architecture, field) for field, ours in keys.items()}
  if family.experts:
    config['router_aux_loss_coef'] = architecture.balance_coef
  _write(
    folder / 'config.json',
    {
      'architectures': [family.name],
      'model_type': kind,
      **config,
      **FIXED,
      **family.fixed,
      **tokens,
      'rope_theta': architecture.rope_theta,
      'rope_scaling': None,
      'initializer_range': 0.02,
      'torch_dtype': str(dtype),
    },
  )
  return rows


def _save(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  with paths.whole(file) as temporary:
    try:
      safetensors.numpy.save_file(arrays, temporary, {'format': 'pt'})
    except safetensors.SafetensorError as error:
      raise OSError(str(error)) from error


def _write(file: pathlib.Path, value: dict) -> None:
  present = {key: x for key, x in value.items() if x is not None}
  paths.write(file, json.dumps(present, indent=2, sort_keys=True) + '\n')


def _json(file: pathlib.Path) -> dict:
  try:
    value = json.loads(file.read_text())
  except FileNotFoundError:
    raise ValueError(
      f'{file.parent}: no {file.name}; give a Hugging Face model folder'
    ) from None
  except ValueError as error:
    raise ValueError(f'{file}: no JSON ({error}); fetch it again') from error
  if not isinstance(value, dict):
    raise ValueError(f'{file}: holds no JSON object; fetch it again')
  return value


def _open(path: str, **options):
  """(architecture, its form in weights.COLUMNS, tensor name -> open file, folder)."""
  folder = paths.resolve(path)
  architecture, form = _architecture(folder / 'config.json')
  # What the file says and what the user chose are refused apart.
  architecture = dataclasses.replace(architecture, **options)
  if (folder / INDEX).exists():
    index = _json(folder / INDEX).get('weight_map')
    if not isinstance(index, dict) or not index:
      raise ValueError(f'{folder / INDEX}: no weight_map; fetch it again')
    names = sorted(set(index.values()))
  else:
    index, names = None, [SINGLE]
  files: dict[str, Any] = {}
  for name in names:
    try:
      opened = safetensors.safe_open(folder / name, framework='np')
    except FileNotFoundError:
      raise ValueError(
        f'{folder}: no {name}; the folder is incomplete, fetch it again'
      ) from None
    except safetensors.SafetensorError as error:
      raise ValueError(
        f'{folder / name}: truncated or no safetensors file ({error}); fetch it again'
      ) from error
    names_inside = opened.keys()
    files |= {
      key: opened for key in names_inside if index is None or index.get(key) == name
    }
  if index is not None and (lost := sorted(index.keys() - files.keys())):
    raise ValueError(
      f'{folder / index[lost[0]]}: no tensor {lost[0]!r}, which {INDEX} places there'
    )
  # transformers 4 sometimes saved the tied head beside the embedding, twice the same.
  if architecture.tied:
    files.pop('lm_head.weight', None)
  # Buffers of old Llama checkpoints, computed today.
  files = {
    key: x for key, x in files.items() if not key.endswith('rotary_emb.inv_freq')
  }
  return architecture, form, files, folder


def _found(files: dict) -> dict[str, weights.Found]:
  found = {}
  for name, file in files.items():
    part = file.get_slice(name)
    found[name] = weights.Found(tuple(part.get_shape()), part.get_dtype())
  return found


def keys_of(family: Family) -> dict[str, str]:
  """config.json's key for each of our fields."""
  keys = {**KEYS, 'ffn': family.ffn}
  if family.experts:
    keys |= {'experts': family.experts, 'experts_per_token': 'num_experts_per_tok'}
    if family.renormalise is None:
      keys['renormalise'] = 'norm_topk_prob'
  return keys


def _architecture(file: pathlib.Path) -> tuple[Architecture, str]:
  config = _json(file)
  kind = config.get('model_type')
  if kind not in FAMILIES:
    raise ValueError(
      f'{file}: model_type is {kind!r}; only {list(FAMILIES)} can be loaded'
    )
  family = FAMILIES[kind]
  keys = keys_of(family)
  if family.experts:  # transformers 5 writes the one for the other
    config.setdefault(family.experts, config.get('num_local_experts'))
  for key, value in (FIXED | dict(family.fixed)).items():
    if config.get(key, value) != value:
      raise ValueError(
        f'{file}: {key} = {config[key]!r} is not supported; it must be {value!r}'
      )
  # transformers 5 keeps both under rope_parameters.
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  if (kind := rope.get('rope_type', rope.get('type', 'default'))) != 'default':
    raise ValueError(f'{file}: rope type {kind!r} is not supported')
  config.setdefault('num_key_value_heads', config.get('num_attention_heads'))
  config.setdefault('tie_word_embeddings', False)
  if config.get('head_dim') is None and config.get('num_attention_heads'):
    config['head_dim'] = config.get('hidden_size', 0) // config['num_attention_heads']
  kinds = {'norm_eps': float, 'tied': bool, 'renormalise': bool}
  for field, key in keys.items():
    if config.get(key) is None:
      raise ValueError(f'{file}: no key {key!r}; the file describes no {family.name}')
    want = kinds.get(field, int)
    if type(config[key]) is not want:
      raise ValueError(
        f'{file}: {key} = {config[key]!r} should be {want.__name__}; fetch it again'
      )
  theta = rope.get('rope_theta', config.get('rope_theta', 10_000.0))
  try:
    architecture = Architecture(
      **{'renormalise': bool(family.renormalise)}
      | {field: config[key] for field, key in keys.items()},
      qk_norm=family.qk_norm,
      rope_theta=float(theta),
    )
    return architecture, family.form
  except (TypeError, ValueError) as error:
    raise ValueError(f'{file}: {error}') from error
