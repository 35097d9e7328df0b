# SPDX-License-Identifier: Apache-2.0
"""Tiles of the fused Triton kernel, as data. ``benchmarks/triton_tiles.py`` measures and rewrites TILES.

Every entry must compile without a spill, with matrix instructions: ``benchmarks/triton_resources.py``.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    block_m: int  #: rows of a program
    block_n: int  #: columns of a step
    warps: int
    stages: int


#: (compute capability, bytes of an element, D up to) -> tile. A capability that is not here takes the
#: nearest below it.
TILES: dict[tuple[int, int, int], Tile] = {
    (80, 2, 64): Tile(64, 32, 4, 3),
    (80, 2, 128): Tile(64, 32, 4, 3),
    (80, 2, 256): Tile(64, 32, 8, 2),
    (80, 4, 64): Tile(64, 32, 4, 2),
    (80, 4, 128): Tile(32, 32, 4, 2),
    (80, 4, 256): Tile(32, 32, 8, 2),
    (90, 2, 64): Tile(128, 64, 8, 3),
    (90, 2, 128): Tile(128, 64, 8, 3),
    (90, 2, 256): Tile(64, 32, 8, 2),
    (90, 4, 64): Tile(64, 32, 4, 2),
    (90, 4, 128): Tile(64, 32, 4, 2),
    (90, 4, 256): Tile(64, 32, 8, 2),
    (100, 2, 64): Tile(128, 32, 8, 3),
    (100, 2, 128): Tile(128, 32, 8, 3),
    (100, 2, 256): Tile(64, 32, 8, 2),
    (100, 4, 64): Tile(64, 32, 4, 2),
    (100, 4, 128): Tile(64, 32, 4, 2),
    (100, 4, 256): Tile(32, 32, 8, 2),
}

#: Where a launch finishes everything: few rows, and the end of the kernel wants registers too. Same key.
SMALL_TILES: dict[tuple[int, int, int], Tile] = {
    (80, 2, 64): Tile(32, 32, 4, 2),
    (80, 2, 128): Tile(32, 32, 4, 2),
    (80, 2, 256): Tile(32, 32, 8, 2),
    (80, 4, 64): Tile(32, 32, 4, 2),
    (80, 4, 128): Tile(32, 32, 4, 2),
    (80, 4, 256): Tile(32, 32, 8, 2),
    (90, 2, 64): Tile(64, 32, 8, 2),
    (90, 2, 128): Tile(64, 32, 8, 2),
    (90, 2, 256): Tile(64, 16, 8, 2),
    (90, 4, 64): Tile(32, 32, 8, 2),
    (90, 4, 128): Tile(32, 32, 8, 2),
    (90, 4, 256): Tile(32, 32, 8, 2),
    (100, 2, 64): Tile(64, 32, 8, 2),
    (100, 2, 128): Tile(64, 32, 8, 2),
    (100, 2, 256): Tile(64, 32, 8, 2),
    (100, 4, 64): Tile(64, 32, 8, 2),
    (100, 4, 128): Tile(64, 32, 8, 2),
    (100, 4, 256): Tile(32, 32, 8, 2),
}


def tile_for(capability: int, itemsize: int, width: int, small: bool, has_ids: bool) -> Tile:
    """The tile for D padded to ``width`` on a GPU of compute capability ``capability`` (90 is 9.0)."""
    known = sorted({key[0] for key in TILES})
    nearest = max((c for c in known if c <= capability), default=known[0])
    bucket = min(key[2] for key in TILES if key[:2] == (nearest, itemsize) and key[2] >= width)
    if has_ids:  # both classes of pairs in every tile: twice the sums in registers
        tile = SMALL_TILES[nearest, itemsize, bucket]
        return tile._replace(block_n=max(16, tile.block_n // 2))
    return (SMALL_TILES if small else TILES)[nearest, itemsize, bucket]
