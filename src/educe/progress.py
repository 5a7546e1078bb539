"""What people read while they wait: messages and bars, on stderr."""

from __future__ import annotations

import functools
import sys

import tqdm

from educe import hosts


def say(text: str) -> None:
  """A message, above any progress bar; of several processes the first one's alone."""
  if hosts.is_first():
    complain(text)


def complain(text: str) -> None:
  """A message of any process."""
  tqdm.tqdm.write(text, file=sys.stderr)


@functools.cache
def say_once(text: str) -> None:
  """`say`, the first time that it comes in this process."""
  say(text)


def steps(total: int, start: int) -> tqdm.tqdm:
  """A bar with ETA on a terminal; a line every half minute in a log file."""
  terminal = sys.stderr.isatty()
  return tqdm.tqdm(
    total=total,
    initial=start,
    unit='step',
    dynamic_ncols=True,
    mininterval=0.5 if terminal else 30,
    disable=not hosts.is_first(),
  )
