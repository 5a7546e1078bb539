"""Weights from a llama2.c checkpoint (`model.bin`, the format without a magic number).

Andrej Karpathy, https://github.com/karpathy/llama2.c: seven int32 (dim, ffn, layers,
heads, kv heads, ±vocabulary, longest sequence), then float32 tensors without names, all
layers of one kind together. A negative vocabulary size says that the head is separate.
RoPE turns neighbouring pairs, its base is 10,000; the norm's epsilon is 1e-5.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import jax
import numpy as np

from educe import paths
from educe.models import policy, weights
from educe.models.architecture import Architecture
from educe.types import Model, Params

HEADER = ('dim', 'ffn', 'layers', 'heads', 'kv_heads', 'vocab_size', 'max_length')


def load(
  *,
  path: str,
  param_dtype: str = 'float32',
  compute_dtype: str = 'float32',
  remat: str = 'none',
  logprob: str = 'auto',
  attention: str = 'auto',
) -> tuple[Model, Params]:
  """The model in a llama2.c `.bin` file, its params in host memory (NumPy).

  Raises ValueError, naming the file, if it is truncated or its header is not one.
  """
  architecture, tensors, file = _open(
    path,
    param_dtype=param_dtype,
    compute_dtype=compute_dtype,
    remat=remat,
    logprob=logprob,
    attention=attention,
  )
  rows = weights.plan(architecture, 'llama2c', _found(tensors), file=file)
  params = weights.read(architecture, 'llama2c', rows, tensors.__getitem__)
  return policy.build(architecture), params


def describe(*, path: str, **options: Any) -> tuple[Model, Params]:
  """What `load` would give, from the header alone; see `safetensors.describe`."""
  model = policy.build(_open(path, **options)[0])
  return model, model.init(jax.random.key(0))


def report(*, path: str) -> list[weights.Mapped]:
  """Every tensor of the file and where it goes; reads no weights."""
  architecture, tensors, file = _open(path)
  return weights.plan(architecture, 'llama2c', _found(tensors), file=file)


def _found(tensors: dict[str, np.ndarray]) -> dict[str, weights.Found]:
  return {name: weights.Found(x.shape, str(x.dtype)) for name, x in tensors.items()}


def _open(
  path: str, **options
) -> tuple[Architecture, dict[str, np.ndarray], pathlib.Path]:
  file = paths.resolve(path)
  size = file.stat().st_size
  if size < 4 * len(HEADER):
    raise ValueError(f'{file}: {size} bytes hold no llama2.c header; fetch it again')
  head = dict(zip(HEADER, np.fromfile(file, '<i4', len(HEADER)).tolist(), strict=True))
  tied = head['vocab_size'] > 0
  head['vocab_size'] = abs(head['vocab_size'])
  if min(head.values()) < 1 or head['dim'] % head['heads']:
    raise ValueError(f'{file}: its first 28 bytes are no llama2.c header: {head}')
  try:
    architecture = Architecture(
      head_dim=head['dim'] // head['heads'], tied=tied, **head
    )
  except ValueError as error:
    raise ValueError(f'{file}: no llama2.c checkpoint: {error}') from error
  architecture = dataclasses.replace(architecture, **options)
  return architecture, _tensors(architecture, file, size), file


def _tensors(a: Architecture, file: pathlib.Path, size: int) -> dict[str, np.ndarray]:
  """Views into the mapped file, by our names for its tensors."""
  L, D, F = a.layers, a.dim, a.ffn
  q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
  layout = {
    'token_embedding': (a.vocab_size, D),
    'rms_att': (L, D),
    'wq': (L, q, D),
    'wk': (L, kv, D),
    'wv': (L, kv, D),
    'wo': (L, D, q),
    'rms_ffn': (L, D),
    'w1': (L, F, D),
    'w2': (L, D, F),
    'w3': (L, F, D),
    'rms_final': (D,),
    'freq_cis_real': (a.max_length, a.head_dim // 2),  # tables that are computed today
    'freq_cis_imag': (a.max_length, a.head_dim // 2),
  }
  if not a.tied:
    layout['wcls'] = (a.vocab_size, D)
  whole = 4 * (len(HEADER) + sum(math.prod(shape) for shape in layout.values()))
  if size != whole:
    raise ValueError(
      f'{file}: {size:,} bytes, but its header describes {whole:,}; '
      'the file is truncated or not a llama2.c checkpoint'
    )
  data = np.memmap(file, '<f4', 'r', 4 * len(HEADER))
  tensors: dict[str, np.ndarray] = {}
  start = 0
  for name, shape in layout.items():
    stop = start + math.prod(shape)
    array = data[start:stop].reshape(shape)
    start = stop
    if name.startswith('freq_cis'):
      continue
    if len(shape) == 3 or name in ('rms_att', 'rms_ffn'):
      tensors |= {f'{name}.{layer}': array[layer] for layer in range(L)}
    else:
      tensors[name] = array
  return tensors
