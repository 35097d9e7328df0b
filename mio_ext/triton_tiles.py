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


#: (compute capability, product, D up to) -> tile; the products are triton_kernels.py's.
TILES: dict[tuple[int, str, int], Tile] = {
    (80, "16-bit", 64): Tile(64, 32, 4, 3),
    (80, "16-bit", 128): Tile(64, 32, 4, 3),
    (80, "16-bit", 256): Tile(64, 32, 8, 2),
    (80, "tf32", 64): Tile(64, 32, 4, 2),
    (80, "tf32", 128): Tile(32, 32, 4, 2),
    (80, "tf32", 256): Tile(32, 32, 8, 2),
    (80, "fp16x3", 64): Tile(64, 32, 4, 2),
    (80, "fp16x3", 128): Tile(32, 32, 4, 2),
    (90, "16-bit", 64): Tile(128, 64, 8, 3),
    (90, "16-bit", 128): Tile(128, 64, 8, 3),
    (90, "16-bit", 256): Tile(64, 32, 8, 2),
    (90, "tf32", 64): Tile(64, 32, 4, 2),
    (90, "tf32", 128): Tile(64, 32, 4, 2),
    (90, "tf32", 256): Tile(64, 32, 8, 2),
    (90, "fp16x3", 64): Tile(64, 32, 4, 2),
    (90, "fp16x3", 128): Tile(64, 32, 8, 2),
    (100, "16-bit", 64): Tile(128, 32, 8, 3),
    (100, "16-bit", 128): Tile(128, 32, 8, 3),
    (100, "16-bit", 256): Tile(64, 32, 8, 2),
    (100, "tf32", 64): Tile(64, 32, 4, 2),
    (100, "tf32", 128): Tile(64, 32, 4, 2),
    (100, "tf32", 256): Tile(32, 32, 8, 2),
    (100, "fp16x3", 64): Tile(128, 32, 8, 2),
    (100, "fp16x3", 128): Tile(128, 32, 8, 2),
}

#: Where a launch finishes everything: few rows, and the end of the kernel wants registers too. Same key.
SMALL_TILES: dict[tuple[int, str, int], Tile] = {
    (80, "16-bit", 64): Tile(32, 32, 4, 2),
    (80, "16-bit", 128): Tile(32, 32, 4, 2),
    (80, "16-bit", 256): Tile(32, 32, 8, 2),
    (80, "tf32", 64): Tile(32, 32, 4, 2),
    (80, "tf32", 128): Tile(32, 32, 4, 2),
    (80, "tf32", 256): Tile(32, 32, 8, 2),
    (80, "fp16x3", 64): Tile(32, 32, 4, 2),
    (80, "fp16x3", 128): Tile(32, 32, 8, 2),
    (90, "16-bit", 64): Tile(64, 32, 8, 2),
    (90, "16-bit", 128): Tile(64, 32, 8, 2),
    (90, "16-bit", 256): Tile(64, 16, 8, 2),
    (90, "tf32", 64): Tile(32, 32, 8, 2),
    (90, "tf32", 128): Tile(32, 32, 8, 2),
    (90, "tf32", 256): Tile(32, 32, 8, 2),
    (90, "fp16x3", 64): Tile(64, 32, 8, 2),
    (90, "fp16x3", 128): Tile(64, 32, 8, 2),
    (100, "16-bit", 64): Tile(64, 32, 8, 2),
    (100, "16-bit", 128): Tile(64, 32, 8, 2),
    (100, "16-bit", 256): Tile(64, 32, 8, 2),
    (100, "tf32", 64): Tile(64, 32, 8, 2),
    (100, "tf32", 128): Tile(64, 32, 8, 2),
    (100, "tf32", 256): Tile(32, 32, 8, 2),
    (100, "fp16x3", 64): Tile(64, 32, 8, 2),
    (100, "fp16x3", 128): Tile(64, 32, 8, 2),
}


def tile_for(capability: int, product: str, width: int, small: bool, has_ids: bool) -> Tile:
    """The tile for D padded to ``width`` on a GPU of compute capability ``capability`` (90 is 9.0).

    A capability without tiles takes the nearest below it, but 12.x has the tensor cores and the 99 KiB of
    shared memory of 8.6 and 8.9.
    """
    known = sorted({key[0] for key in TILES})
    nearest = 80 if capability >= 120 else max((c for c in known if c <= capability), default=known[0])
    bucket = min(key[2] for key in TILES if key[:2] == (nearest, product) and key[2] >= width)
    if has_ids:  # both classes of pairs in every tile: twice the sums in registers
        tile = SMALL_TILES[nearest, product, bucket]
        return tile._replace(block_n=max(16, tile.block_n // 2))
    return (SMALL_TILES if small else TILES)[nearest, product, bucket]
