"""Memory of the host that is kept between steps.

XLA's CPU backend asks the C library for its temporaries at every call and hands them back
behind it. glibc returns large blocks to the system, which clears every page before it gives
it out again: a fifth of a small model's step. Kept, they are there for the next one.
"""

from __future__ import annotations

import ctypes

# <malloc.h>, and what is set: no block is mapped by itself, none is returned from the end
# of the heap, which grows by 256 MB at a time and is one for all threads.
M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX = -4, -1, -2, -8
SETTINGS = {
  M_MMAP_MAX: 0,
  M_TRIM_THRESHOLD: 2**31 - 1,
  M_TOP_PAD: 2**28,
  M_ARENA_MAX: 1,
}


def keep() -> bool:
  """From now on, what this process frees stays its own; before JAX starts its threads.

  Returns whether the C library took it: glibc does.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return False
  return all(mallopt(name, value) for name, value in SETTINGS.items())
