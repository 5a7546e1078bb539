"""Weights from and to a Hugging Face folder: config.json and safetensors files.

https://huggingface.co/docs/safetensors and `transformers`' LlamaForCausalLM.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from educe import paths
from educe.models import policy, weights
from educe.models.transformer import Architecture
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
# What LlamaForCausalLM can be told and this decoder does not do.
FIXED = {
  'hidden_act': 'silu',
  'attention_bias': False,
  'mlp_bias': False,
  'quantization_config': None,
}


def load(
  *,
  path: str,
  param_dtype: str = 'float32',
  compute_dtype: str = 'float32',
  remat: str = 'none',
  logprob: str = 'auto',
  attention: str = 'auto',
) -> tuple[Model, Params]:
  """The model in a Hugging Face folder, its params in host memory (NumPy).

  Raises ValueError, naming the file and the tensor or key, for a truncated file,
  another family than Llama, and tensors that are missing, left over or misshapen.
  """
  architecture, files, folder = _open(
    path,
    param_dtype=param_dtype,
    compute_dtype=compute_dtype,
    remat=remat,
    logprob=logprob,
    attention=attention,
  )
  rows = weights.plan(architecture, 'huggingface', _found(files), file=folder)

  def tensor(name: str) -> np.ndarray:
    return files[name].get_tensor(name)

  params = weights.read(architecture, 'huggingface', rows, tensor)
  return policy.build(architecture), params


def describe(*, path: str, **options: Any) -> Architecture:
  """What `load` would build, from config.json alone.

  options: of `load`

  Raises ValueError as `load` does for that file.
  """
  return dataclasses.replace(
    _architecture(paths.resolve(path) / 'config.json'), **options
  )


def report(*, path: str) -> list[weights.Mapped]:
  """Every tensor of the folder and where it goes; reads no weights."""
  architecture, files, folder = _open(path)
  return weights.plan(architecture, 'huggingface', _found(files), file=folder)


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
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if (folder / 'config.json').exists():
    raise FileExistsError(f'{folder}: already holds a model; export to another folder')
  ours = weights.leaves(params)
  dtype = np.dtype(ours['embedding'].dtype)
  rows = [
    row._replace(source_dtype=str(dtype))
    for row in weights.expected(architecture, 'huggingface')
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
      array = np.asarray(
        ours[row.name] if row.layer is None else ours[row.name][row.layer]
      )
      arrays[row.source] = weights.to_file(row, array)
      where[row.source] = name
    _save(folder / name, arrays)
  if len(shards) > 1:
    total = dtype.itemsize * sum(math.prod(row.shape) for row in rows)
    _write(folder / INDEX, {'metadata': {'total_size': total}, 'weight_map': where})
  tokens = {'bos_token_id': bos_token_id, 'eos_token_id': eos_token_id}
  config = {ours: getattr(architecture, field) for field, ours in KEYS.items()}
  _write(
    folder / 'config.json',
    {
      'architectures': ['LlamaForCausalLM'],
      'model_type': 'llama',
      **config,
      **FIXED,
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
  """(architecture, tensor name -> open file that holds it, folder)."""
  folder = paths.resolve(path)
  # What the file says and what the user chose are refused apart.
  architecture = describe(path=path, **options)
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
  return architecture, files, folder


def _found(files: dict) -> dict[str, weights.Found]:
  found = {}
  for name, file in files.items():
    part = file.get_slice(name)
    found[name] = weights.Found(tuple(part.get_shape()), part.get_dtype())
  return found


def _architecture(file: pathlib.Path) -> Architecture:
  config = _json(file)
  if (family := config.get('model_type')) != 'llama':
    raise ValueError(f"{file}: model_type is {family!r}; only 'llama' can be loaded")
  for key, value in FIXED.items():
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
  for key in KEYS.values():
    if config.get(key) is None:
      raise ValueError(f'{file}: no key {key!r}; the file describes no Llama model')
    kind = {'rms_norm_eps': float, 'tie_word_embeddings': bool}.get(key, int)
    if type(config[key]) is not kind:
      raise ValueError(
        f'{file}: {key} = {config[key]!r} should be {kind.__name__}; fetch it again'
      )
  theta = rope.get('rope_theta', config.get('rope_theta', 10_000.0))
  try:
    return Architecture(
      **{field: config[key] for field, key in KEYS.items()},
      rope_theta=float(theta),
    )
  except (TypeError, ValueError) as error:
    raise ValueError(f'{file}: {error}') from error
