"""A round, and arrays, as text bit by bit: what a position in rollouts is saved as."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from educe.rollouts.joining import ARRAYS
from educe.types import Rollouts


class Round(NamedTuple):
  rollouts: Rollouts
  greedy: np.ndarray | None  # [P], reward of the greedy completion of each prompt
  number: int  # from 0
  step: int  # of the policy that sampled it
  info: dict[str, Any]
  chosen: Sequence[int] = ()  # the prompts, by their place in the pool


def pack(arrays: Mapping[str, np.ndarray]) -> str:
  """Arrays as text, bit by bit."""
  file = io.BytesIO()
  np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
  return base64.b64encode(file.getvalue()).decode()


def unpack(text: str) -> dict[str, np.ndarray]:
  with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as file:
    return dict(file)


def encode(current: Round) -> dict[str, Any]:
  """A Round as plain JSON, its arrays bit by bit."""
  r = current.rollouts
  arrays = {n: np.asarray(x) for n in ARRAYS if (x := getattr(r, n)) is not None}
  if current.greedy is not None:
    arrays['greedy'] = np.asarray(current.greedy)
  return {
    'arrays': pack(arrays),
    'transcripts': json.dumps(list(r.transcripts), default=str),
    'rest': [r.group, current.number, current.step, current.info],
    'chosen': [int(index) for index in current.chosen],
  }


def decode(state: dict[str, Any]) -> Round:
  arrays = unpack(state['arrays'])
  greedy = arrays.pop('greedy', None)
  group, number, step, info = state['rest']
  rows = json.loads(state['transcripts'])
  return Round(
    Rollouts(**arrays, group=group, transcripts=rows),  # type: ignore[arg-type]
    greedy,
    number,
    step,
    info,
    state['chosen'],
  )
