"""Weights from a GGUF file (llama.cpp's format), dequantised by the `gguf` package.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from educe import paths
from educe.models import policy, weights
from educe.models.architecture import Architecture
from educe.types import Model, Params


def load(
  *,
  path: str,
  param_dtype: str = 'float32',
  compute_dtype: str = 'float32',
  remat: str = 'none',
  logprob: str = 'auto',
  attention: str = 'auto',
) -> tuple[Model, Params]:
  """The model in a GGUF file, its params in host memory (NumPy).

  Raises ValueError, naming the file and the tensor or field, for a truncated file,
  another family than Llama, and tensors that are missing, left over or misshapen.
  """
  reader, file = _open(path)
  architecture = dataclasses.replace(
    _architecture(reader, file),
    param_dtype=param_dtype,
    compute_dtype=compute_dtype,
    remat=remat,
    logprob=logprob,
    attention=attention,
  )
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  rows = weights.plan(architecture, 'gguf', _found(reader), file=file)

  def dequantised(name: str) -> np.ndarray:
    from gguf import quants

    tensor = tensors[name]
    return quants.dequantize(tensor.data, tensor.tensor_type)

  params = weights.read(architecture, 'gguf', rows, dequantised)
  return policy.build(architecture), params


def describe(*, path: str, **options: Any) -> tuple[Model, Params]:
  """What `load` would give, from the header alone; see `safetensors.describe`."""
  reader, file = _open(path)
  model = policy.build(dataclasses.replace(_architecture(reader, file), **options))
  return model, model.init(jax.random.key(0))


def report(*, path: str) -> list[weights.Mapped]:
  """Every tensor of the file and where it goes; reads no weights."""
  reader, file = _open(path)
  return weights.plan(_architecture(reader, file), 'gguf', _found(reader), file=file)


def _open(path: str):
  try:
    import gguf
  except ImportError as error:
    raise ImportError(f'{path}: reading GGUF needs `pip install gguf`') from error

  file = paths.resolve(path)
  with open(file, 'rb') as stream:
    magic = stream.read(4)
  if magic != b'GGUF':
    raise ValueError(f"{file}: starts with {magic!r}, not b'GGUF'; not a GGUF file")
  try:
    return gguf.GGUFReader(file), file
  except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
    raise ValueError(
      f'{file}: the GGUF file is truncated or damaged ({error}); fetch it again'
    ) from error


def _found(reader) -> dict[str, weights.Found]:
  # GGUF lists dimensions innermost first.
  return {
    tensor.name: weights.Found(
      tuple(int(n) for n in reversed(tensor.shape)), tensor.tensor_type.name
    )
    for tensor in reader.tensors
  }


def _architecture(reader, file: pathlib.Path) -> Architecture:
  family = _field(reader, file, 'general.architecture')
  if family != 'llama':
    raise ValueError(
      f"{file}: general.architecture is {family!r}; only 'llama' can be loaded"
    )

  def value(name: str, default=None):
    return _field(reader, file, f'llama.{name}', default)

  if (scaling := value('rope.scaling.type', 'none')) != 'none':
    raise ValueError(f'{file}: llama.rope.scaling.type = {scaling!r} is not supported')
  if experts := value('expert_count', 0):
    raise ValueError(f'{file}: llama.expert_count = {experts} is not supported')
  dim, heads = value('embedding_length'), value('attention.head_count')
  names = {tensor.name: tensor for tensor in reader.tensors}
  if 'token_embd.weight' not in names:
    raise ValueError(f"{file}: no tensor 'token_embd.weight'; the file is incomplete")
  head_dim = value('attention.key_length', dim // heads)
  if (turned := value('rope.dimension_count', head_dim)) != head_dim:
    raise ValueError(
      f'{file}: llama.rope.dimension_count = {turned} of a head of {head_dim}: '
      'partial rotation is not supported'
    )
  try:
    return Architecture(
      vocab_size=int(names['token_embd.weight'].shape[1]),
      dim=dim,
      layers=value('block_count'),
      heads=heads,
      kv_heads=value('attention.head_count_kv', heads),
      head_dim=head_dim,
      ffn=value('feed_forward_length'),
      max_length=value('context_length'),
      rope_theta=float(value('rope.freq_base', 10_000.0)),
      # A float32 in the file: the shortest decimal that rounds to it is what was meant.
      norm_eps=float(str(np.float32(value('attention.layer_norm_rms_epsilon')))),
      tied='output.weight' not in names,
    )
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from error


def _field(reader, file: pathlib.Path, name: str, default=None):
  field = reader.get_field(name)
  if field is not None:
    return field.contents()
  if default is None:
    raise ValueError(f'{file}: no field {name!r}; the file describes no Llama model')
  return default
