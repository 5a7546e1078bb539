"""The policy's weights for an engine in another process, while training goes on.

run_dir/server/<step>    a Hugging Face folder with its tokenizer: there whole or not at all
run_dir/server/current   a link to the newest whole one, for an engine that is started anew

The engine is told to read a folder whose name it has not seen before, and the folder of
before is deleted once it has said that it did. Folders lie where the engine can read them:
on the same machine, or on a disk that both see. Of several processes the first writes and
tells; if it cannot, all of them hear of it.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

from educe import hosts, sharding
from educe.data.tokenizer import Tokenizer
from educe.models import lora, safetensors
from educe.rollouts import http_client
from educe.rollouts.http_client import EndpointError
from educe.rollouts.server import Server
from educe.types import Model, Params

FOLDER, CURRENT = 'server', 'current'


class Publisher:
  """Keeps an engine at the policy that rounds of rollouts are to be sampled by."""

  def __init__(
    self, server: Server, model: Model, tokenizer: Tokenizer, run_dir: pathlib.Path
  ):
    """Raises ValueError for a model that no engine could read."""
    try:
      safetensors.family_of(model.architecture)
    except ValueError as error:
      raise ValueError(f'rollouts.server: {error}') from None
    self.every = server.export_every
    self.step: int | None = None  # of the policy that the engine serves
    self._told = False  # by this process: an engine may have been started since
    self._server, self._model, self._tokenizer = server, model, tokenizer
    self._root = run_dir.absolute() / FOLDER

  def __call__(self, params: Params, step: int, number: int) -> int:
    """Sees to it that the engine serves what round `number` is sampled by: these params,
    of `step`, or in the rounds between two exports those of the last. Their step.
    All processes must call it.

    Raises OSError for weights that cannot be written, and EndpointError for an engine
    that does not take them; it then still has, and still finds, those of before.
    """
    due = self.step is None or number % self.every == 0
    if not (due or self._told):  # going on: is the last export there still?
      due = not hosts.agreed(self._folder(self.step).is_dir())
    if due:
      whole = sharding.fetch(lora.merged(params), keep=hosts.is_first())
      hosts.by_first(lambda: self._hand_over(whole, step))
      self.step = step
      hosts.by_first(self._delete_others)
    elif not self._told:
      hosts.by_first(lambda: tell(self._server, self._folder(self.step)))
    self._told = True
    assert self.step is not None
    return self.step

  def _folder(self, step: int | None) -> pathlib.Path:
    return self._root / f'{step:08}'

  def _hand_over(self, whole: Params, step: int) -> None:
    self._export(whole, step)
    tell(self._server, self._folder(step))

  def _export(self, whole: Params, step: int) -> None:
    target = self._folder(step)
    partial = self._root / f'.{step:08}.partial'
    _remove(partial)
    try:
      safetensors.export(
        partial,
        self._model.architecture,
        whole,
        bos_token_id=self._tokenizer.bos_id,
        eos_token_id=self._tokenizer.eos_ids,
      )
      self._tokenizer.save(partial)
      _remove(target)  # of a run that went on from before this step
      os.replace(partial, target)
      link = self._root / f'.{CURRENT}.partial'
      link.unlink(missing_ok=True)
      link.symlink_to(target.name)
      os.replace(link, self._root / CURRENT)
    except BaseException as error:
      _remove(partial)
      if not isinstance(error, OSError):
        raise
      raise OSError(
        f'{target}: the weights for rollouts.server could not be written ({error}); is '
        'the disk full, or the folder read-only?'
      ) from error

  def _delete_others(self) -> None:
    for other in self._root.iterdir():
      if other.name not in (f'{self.step:08}', CURRENT):
        _remove(other)


def tell(server: Server, folder: pathlib.Path) -> None:
  """Tells the engine to read the weights in `folder`; returns once it says that it has.

  Raises EndpointError, naming the folder, if it does not.
  """
  root = server.client.url.rstrip('/').removesuffix('/v1')
  client = server.client._replace(url=root)
  names = {'{folder}': str(folder), '{step}': folder.name}

  def read(_, answer):
    if isinstance(answer, dict) and answer.get('success') is False:
      raise EndpointError(f'{client.name}: {answer.get("message")}')

  for path, body in server.reload:
    try:
      http_client.ask(client, path, [_filled(body, names)], read)
    except EndpointError as error:
      raise EndpointError(
        f'{error} (POST {path}: the engine does not read the weights in {folder}; is '
        'it up, that folder on a disk that it sees, and rollouts.server.reload what it '
        'understands?)'
      ) from None


def _filled(value: Any, names: Mapping[str, str]) -> Any:
  """JSON in whose texts the names in braces are replaced."""
  if isinstance(value, Mapping):
    return {key: _filled(x, names) for key, x in value.items()}
  if isinstance(value, list | tuple):
    return [_filled(x, names) for x in value]
  if isinstance(value, str):
    value = re.sub(
      '|'.join(map(re.escape, names)), lambda found: names[found[0]], value
    )
  return value


def _remove(folder: pathlib.Path) -> None:
  """Deletes a folder that may not be there; what cannot be deleted stays."""
  shutil.rmtree(folder, ignore_errors=True)
