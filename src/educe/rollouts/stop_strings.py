"""Stop strings as a finite automaton over tokens, so that they work inside a jit.

The automaton of Aho and Corasick (1975, doi:10.1145/360825.360855) reads bytes. Running
each token's bytes from each state gives a table `next[state, token]`; a stop string is
then found wherever it lies: inside a token, or split over several.

Memory: (bytes in all stop strings + 2) · V · 2 bytes at most (int16); one stop string
of ten bytes costs 1.2 MB at V = 49,152.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def automaton(stop: Sequence[str], token_bytes: Sequence[bytes]) -> np.ndarray:
  """The table [states, V] of the next state (int16). Start at state 0; the last state
  means that a stop string has been seen, and is never left.

  stop: the strings, none empty; matched as UTF-8 bytes
  token_bytes: what each id adds to the text; b'' for special tokens
  Raises ValueError on an empty string, or on more bytes than int16 can number.
  """
  if not stop or not all(stop):
    raise ValueError(f'stop strings must not be empty: {list(stop)!r}')
  step = _byte_steps([text.encode() for text in stop])
  states, seen = len(step), len(step) - 1
  if states > np.iinfo(np.int16).max:
    raise ValueError(f'stop strings of {states - 2} bytes in all are too long')
  table = np.empty((states, len(token_bytes)), np.int16)
  table[:] = np.arange(states, dtype=np.int16)[:, None]  # b'' stays where it is
  # All tokens at once, byte position by byte position: the longest token has few.
  lengths = np.array([len(text) for text in token_bytes])
  for index in range(lengths.max(initial=0)):
    ids = np.flatnonzero(lengths > index)
    byte = np.array([token_bytes[int(i)][index] for i in ids])
    table[:, ids] = step[table[:, ids], byte]
  assert (table[seen] == seen).all()
  return table


def _byte_steps(patterns: Sequence[bytes]) -> np.ndarray:
  """[states, 256] of the next state; the last state absorbs."""
  children: list[dict[int, int]] = [{}]
  final = [False]
  for pattern in patterns:
    node = 0
    for byte in pattern:
      if byte not in children[node]:
        children[node][byte] = len(children)
        children.append({})
        final.append(False)
      node = children[node][byte]
    final[node] = True
  seen = len(children)
  step = np.zeros((seen + 1, 256), np.int32)
  step[seen] = seen
  fallback = [0] * seen
  queue = [0]  # breadth first: a node's fallback is shallower, hence finished
  for node in queue:
    if node:
      step[node] = step[fallback[node]]
    for byte, child in children[node].items():
      fallback[child] = int(step[node, byte]) if node else 0
      final[child] = final[child] or final[fallback[child]]
      queue.append(child)
    for byte, child in children[node].items():
      step[node, byte] = child
  # Every way into a node that ends a stop string leads to the absorbing state.
  ends = np.flatnonzero(final)
  step[np.isin(step, ends)] = seen
  return step
