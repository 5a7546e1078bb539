"""Arrays as text, bit by bit: what a position in rollouts is saved as."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np


def pack(arrays: Mapping[str, np.ndarray]) -> str:
  """Arrays as text, bit by bit."""
  file = io.BytesIO()
  np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
  return base64.b64encode(file.getvalue()).decode()


def unpack(text: str) -> dict[str, np.ndarray]:
  with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as file:
    return dict(file)
