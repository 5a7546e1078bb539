"""What each TPU's vector memory has room for, as data."""

from __future__ import annotations

from typing import NamedTuple

MIB = 1 << 20
LANES = 128


class Tiles(NamedTuple):
  """What a step of the grid holds of each dimension; vmem: bytes that it may take."""

  rows: int
  vocab: int
  width: int
  vmem: int


# By `device_kind`. A core's vector memory is 16 MiB on v4, 128 on v5e and v6e, 64 on v5p
# and 7x, and part of it is the compiler's. More rows read W less often; backward, a tile
# of dH or dW and its float32 sum lie there as well.
CHIPS = {
  'TPU v4': Tiles(256, 256, 512, 15 * MIB),
  'TPU v5 lite': Tiles(512, 1024, 4096, 100 * MIB),
  'TPU v5': Tiles(512, 512, 4096, 60 * MIB),
  'TPU v6 lite': Tiles(512, 1024, 4096, 100 * MIB),
  'TPU7x': Tiles(512, 512, 4096, 56 * MIB),
}
SMALLEST = CHIPS['TPU v4']


def divisor(width: int, most: int) -> int | None:
  """The largest piece of `width`, in whole lanes, of at most `most`."""
  if width <= most:
    return width
  pieces = range(most // LANES * LANES, 0, -LANES)
  return next((piece for piece in pieces if width % piece == 0), None)
