"""Adapters from and to a PEFT folder: adapter_config.json and adapter_model.safetensors.

https://huggingface.co/docs/peft, "PEFT checkpoint format": a layer's A is [r, in] there,
B [out, r], DoRA's m [out].

  config.model = dict(name='peft', path='folder of an adapter', base='folder of a model')
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from educe import paths
from educe.models import lora, weights
from educe.models import safetensors as huggingface
from educe.types import Model, Params

CONFIG, FILE = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
LEAVES = {
  'a': 'lora_A.weight',
  'b': 'lora_B.weight',
  'magnitude': 'lora_magnitude_vector',
}
# What PEFT can be told and lora.py does not do.
FIXED = {
  'peft_type': 'LORA',
  'bias': 'none',
  'fan_in_fan_out': False,
  'lora_bias': False,
  'rank_pattern': {},
  'alpha_pattern': {},
}
# Ours · what a layer calls it · Hugging Face's name of its tensor, without the layer.
NAMES = {
  f'{module}/{name}': next(
    row[1].removesuffix('.weight')
    for row in weights.TABLE
    if row[0] == f'layers/{module}/{name}'
  )
  for name, (module, _) in lora.WEIGHTS.items()
}


def load(
  *,
  path: str,
  base: str | None = None,
  param_dtype: str = 'float32',
  compute_dtype: str = 'float32',
  remat: str = 'none',
  logprob: str = 'auto',
  attention: str = 'auto',
  balance_coef: float = 0.0,
  router_z_coef: float = 0.0,
) -> tuple[Model, Params]:
  """The model `base` with the adapter in a PEFT folder beside it.

  base: a Hugging Face folder; None: the one that the adapter names, where that is here

  Raises ValueError, naming the file and the key or tensor, for what is no adapter, one of
  another kind than LoRA and DoRA, and one of another model.
  """
  folder, config = _open(path)
  model, params = huggingface.load(
    path=_base(folder, config, base),
    param_dtype=param_dtype,
    compute_dtype=compute_dtype,
    remat=remat,
    logprob=logprob,
    attention=attention,
    balance_coef=balance_coef,
    router_z_coef=router_z_coef,
  )
  try:
    found = safetensors.numpy.load_file(folder / FILE)
  except (OSError, safetensors.SafetensorError) as error:
    raise _damaged(folder, error) from error
  present = _present(folder, found)
  model, params = _attached(model, params, config, present)
  layers = params[lora.KEY]['layers']
  for place in present:
    module, name = place.split('/')
    for leaf, like in layers[module][name].items():
      parts = []
      for layer in range(len(like)):
        key = f'{PREFIX}{NAMES[place].format(layer)}.{LEAVES[leaf]}'
        x, shape = found.pop(key, None), like.shape[1:]
        if x is None or x.size != math.prod(shape):
          size = 'absent' if x is None else f'of shape {list(x.shape)}'
          raise ValueError(f'{folder / FILE}: {key!r} is {size}; it must fill {shape}')
        parts.append(x.T.reshape(shape).astype(np.float32))
      layers[module][name][leaf] = jnp.asarray(np.stack(parts))
  if found:
    raise ValueError(
      f'{folder / FILE}: {min(found)!r} and {len(found) - 1} more tensors have no place in '
      'this model; only adapters of its attention and MLP are read'
    )
  if config.get('use_dora'):
    for module, norms in lora.norms(params).items():
      for name, norm in norms.items():
        layers[module][name]['magnitude'] -= norm
  return model, params


def describe(
  *, path: str, base: str | None = None, **options: Any
) -> tuple[Model, Params]:
  """What `load` would give, from the configs and the names of the adapter's tensors; see
  `safetensors.describe`."""
  folder, config = _open(path)
  model, params = huggingface.describe(path=_base(folder, config, base), **options)
  try:
    with safetensors.safe_open(folder / FILE, framework='np') as file:
      present = _present(folder, file.keys())
  except (OSError, safetensors.SafetensorError) as error:
    raise _damaged(folder, error) from error
  return _attached(model, params, config, present)


def _damaged(folder: pathlib.Path, error: Exception) -> ValueError:
  return ValueError(
    f'{folder / FILE}: truncated or no safetensors file ({error}); fetch it again'
  )


def _present(folder: pathlib.Path, found: Iterable[str]) -> list[str]:
  """Which of NAMES have an adapter among these tensors."""
  names = set(found)
  present = [
    name for name in NAMES
    if PREFIX + f'{NAMES[name].format(0)}.{LEAVES["a"]}' in names
  ]  # fmt: skip
  if not present:
    raise ValueError(f'{folder / FILE}: no tensor of an adapter of this model')
  return present


def _attached(
  model: Model, params: Params, config: dict[str, Any], present: list[str]
) -> tuple[Model, Params]:
  """With a new adapter, as adapter_config.json says."""
  return lora.attach(
    model,
    params,
    rank=config['r'],
    alpha=float(config['lora_alpha']),
    kind='dora' if config.get('use_dora') else 'lora',
    targets=tuple(name.split('/')[1] for name in present),
    stabilised=bool(config.get('use_rslora')),
  )


def report(*, path: str) -> list[weights.Mapped]:
  """The tensors of the base that an adapter names; safetensors.report."""
  return huggingface.report(path=_base(*_open(path), None))


def export(folder: str | os.PathLike, params: Params, *, base: str | None) -> list[str]:
  """Writes the adapter of `params` as a folder that PEFT loads; returns its tensors' names.

  base: the folder or name of the model that it belongs to, for adapter_config.json

  Raises ValueError for params without an adapter, FileExistsError where one is already.
  """
  if lora.KEY not in params:
    raise ValueError('the model has no adapter: its run has no section config.adapter')
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if (folder / CONFIG).exists():
    raise FileExistsError(
      f'{folder}: already holds an adapter; export to another folder'
    )
  norms, arrays, targets = lora.norms(params), {}, []
  rank, kinds = 0, set()
  for place, theirs in NAMES.items():
    module, name = place.split('/')
    leaves = params[lora.KEY]['layers'].get(module, {}).get(name, {})
    for leaf, stack in leaves.items():
      if leaf == 'magnitude':
        stack = stack + norms[module][name]
      kinds.add(leaf)
      for layer, x in enumerate(np.asarray(stack, np.float32)):
        if leaf == 'a':
          rank = x.shape[-1]
          x = x.reshape(-1, rank)
        else:
          x = x.reshape(rank, -1) if leaf == 'b' else x.reshape(-1)
        key = f'{PREFIX}{theirs.format(layer)}.{LEAVES[leaf]}'
        arrays[key] = np.ascontiguousarray(x.T)
    targets += [theirs.split('.')[-1]] if leaves else []
  with paths.whole(folder / FILE) as temporary:
    safetensors.numpy.save_file(arrays, temporary, {'format': 'pt'})
  said = {
    **FIXED,
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'r': rank,
    'lora_alpha': round(float(params[lora.KEY]['scale']) * rank, 5),
    'lora_dropout': 0.0,
    'use_dora': 'magnitude' in kinds,
    'target_modules': targets,
    'inference_mode': True,
  }
  paths.write(folder / CONFIG, json.dumps(said, indent=2, sort_keys=True) + '\n')
  return sorted(arrays)


def _open(path: str) -> tuple[pathlib.Path, dict[str, Any]]:
  """(folder, its config), refused where it says what we do not do."""
  folder = paths.resolve(path)
  file = folder / CONFIG
  try:
    config = json.loads(file.read_text())
  except FileNotFoundError:
    raise ValueError(f'{folder}: no {CONFIG}; give the folder of an adapter') from None
  except ValueError as error:
    raise ValueError(f'{file}: no JSON ({error}); fetch it again') from error
  for key, value in FIXED.items():
    if (config.get(key) or value) != value:
      raise ValueError(
        f'{file}: {key} = {config[key]!r} is not supported; only {value!r}'
      )
  for key in ('r', 'lora_alpha'):
    if not isinstance(config.get(key), int | float):
      raise ValueError(f'{file}: {key} = {config.get(key)!r} should be a number')
  return folder, config


def _base(folder: pathlib.Path, config: dict[str, Any], base: str | None) -> str:
  if base is not None:
    return base
  named = config.get('base_model_name_or_path') or ''
  for where in (folder / named, pathlib.Path(named).expanduser()):
    if named and where.is_dir():
      return str(where)
  raise ValueError(
    f'{folder / CONFIG}: its base {named!r} is no folder here; name it, as '
    "config.model = dict(name='peft', path=…, base='folder of the model')"
  )
