"""Finished models, whatever they lie in: files of weights, Hugging Face folders, runs.

As a section of a config, the model of another run is dict(name='educe.policies',
path='runs/teacher').
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax

from educe import config as config_lib
from educe import paths, sharding
from educe.data import tokenizer as tokenizers
from educe.models import gguf, llama2c, lora, peft, policy, quantized, safetensors
from educe.rollouts.sampler import vocabulary_size
from educe.training import checkpoint
from educe.types import Model, Params

LOADERS = {'.gguf': gguf, '.bin': llama2c}


def load(*, path: str) -> tuple[Model, Params]:
  """The model of a run, its newest params: what a section `model` or `teacher` names. An
  adapter is merged into them.

  Raises ValueError for what is no run, and CheckpointError for one without a checkpoint.
  """
  model, params, _ = _of_run(_run(path))
  return model._replace(axes=lora.plain_axes(model.axes)), lora.merged(params)


def describe(*, path: str) -> tuple[Model, Params]:
  """What `load` would give, from the run's config and what its checkpoint says of itself;
  its params are random ones, and meant to be traced (jax.eval_shape), where none is made.

  Raises as `load` does.
  """
  where = _run(path)
  config = read_config(where / 'config.json')
  model, params = _as_trained(
    {**config, 'model': config_lib.describing('model', config['model'])}
  )
  params = checkpoint.saved_params(where / 'checkpoints', params)
  return model._replace(axes=lora.plain_axes(model.axes)), lora.merged(params)


def open_values(path: str):
  """(model, params, tokenizer) of a run that trained a value head, with that head; split
  over the devices of this process, which may ask it what the others do not.

  Raises ValueError for what is no run, and CheckpointError for one without a checkpoint or
  without a value head.
  """
  where = _run(path)
  config = read_config(where / 'config.json')
  with sharding.on_host():
    model, params = _as_trained(config)
    model, params = checkpoint.saved_with_value(where / 'checkpoints', model, params)
  words = tokenizers.load(path=config['tokenizer']['path'])
  check_vocabulary(model, params, words)
  own = sharding.mesh_over(jax.local_devices(), fsdp=-1)
  return model, sharding.place(params, model.axes, own), words


def _run(path: str) -> pathlib.Path:
  where = pathlib.Path(path).expanduser()
  if not (where / 'checkpoints').is_dir():
    raise ValueError(f'path={path!r} is not the folder of a run')
  return where


def open_policy(path: str, tokenizer: str | None = None, flag: str = '--model'):
  """(model, params, tokenizer) from a .gguf file, a Hugging Face folder, a PEFT folder
  whose base is here, a llama2c .bin (which needs `tokenizer`), or a run folder (its newest
  checkpoint). An adapter is beside the weights, not in them.

  flag: what errors call the path

  Raises ValueError for what is none of these, a .bin without a tokenizer and a tokenizer
  too large for the model; CheckpointError for a run without a checkpoint.
  """
  loader = loader_of(path, flag)
  if loader is None:
    model, params, config = _of_run(paths.resolve(path))
    words = tokenizers.load(path=tokenizer or config['tokenizer']['path'])
  else:
    if loader is llama2c and tokenizer is None:
      raise ValueError(f'{path} carries no tokenizer: add --tokenizer=…/tok512.bin')
    model, params = loader.load(path=path)
    words = tokenizers.load(path=tokenizer or path)
  check_vocabulary(model, params, words)
  return model, params, words


def _of_run(where: pathlib.Path) -> tuple[Model, Params, dict[str, Any]]:
  config = read_config(where / 'config.json')
  model, params = _as_trained(config)
  return model, checkpoint.saved_params(where / 'checkpoints', params), config


def _as_trained(config: dict[str, Any]) -> tuple[Model, Params]:
  """The model of a run's config, with its adapter; params are those it would start with."""
  return with_adapter(config, *config_lib.call('model', config['model']))


def with_adapter(
  config: dict[str, Any], model: Model, params: Params
) -> tuple[Model, Params]:
  """(model, params) with the adapter of a config; without one, whatever the model came
  with goes into its weights."""
  if not config.get('adapter'):
    return model._replace(axes=lora.plain_axes(model.axes)), lora.merged(params)
  return config_lib.call('adapter', config['adapter'], model=model, params=params)


def started_from(
  run: str, model: Model, params: Params, *, values: bool = False
) -> tuple[Model, Params]:
  """(model, params) with the newest weights of a run of the same architecture, and with its
  adapter, if it has one; with `values` also with its value head. Of `params` the shapes are
  enough. Raises CheckpointError.
  """
  file = pathlib.Path(run) / 'config.json'
  config = read_config(file) if file.exists() else {}

  def as_there(params):
    plain = model._replace(axes=lora.plain_axes(model.axes))
    return with_adapter(config, plain, quantized.restored(lora.without(params)))

  there, like = policy.described(as_there, params)
  where = file.parent / 'checkpoints'
  if values:
    return checkpoint.saved_with_value(where, there, like)
  return there, checkpoint.saved_params(where, like)


def loader_of(path: str, flag: str = '--model') -> Any:
  """The module that reads a model file or folder; None for a run folder.

  Raises ValueError for a path that is not there, or is none of these.
  """
  try:
    where = paths.resolve(path)
  except FileNotFoundError as error:
    raise ValueError(f'{flag}={error}') from None
  if (where / 'checkpoints').is_dir():
    return None
  if inside := sorted(x.parent.name for x in where.glob('*/checkpoints')):
    raise ValueError(
      f'{flag}={path} holds the runs {", ".join(inside)}; name one, as '
      f'{flag}={path}/{inside[-1]}'
    )
  if where.is_dir():
    return peft if (where / peft.CONFIG).exists() else safetensors
  if where.suffix not in LOADERS:
    raise ValueError(
      f'{flag}={path}: not a {", ".join(LOADERS)}, a model folder or a run'
    )
  return LOADERS[where.suffix]


def check_vocabulary(model: Model, params: Params, words: tokenizers.Tokenizer) -> None:
  """Raises ValueError if the tokenizer can write an id that the model cannot embed."""
  vocab = vocabulary_size(model, params)
  if words.vocab_size > vocab:
    raise ValueError(
      f'the tokenizer has {words.vocab_size} tokens, the model {vocab} embeddings; '
      'use the tokenizer that belongs to the model'
    )


def read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{path} is damaged ({error}); delete it and train again'
    ) from None
