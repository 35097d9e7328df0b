# SPDX-License-Identifier: Apache-2.0
"""Tiles of the fused Triton kernel, as data. ``benchmarks/tiles.py`` measures and rewrites TILES.

Every entry must compile without a spill, with matrix instructions: ``benchmarks/triton_resources.py``.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    block_m: int  #: rows of a program
    block_n: int  #: columns of a step
    warps: int
    stages: int


#: How much of a row's gradient fits in registers, by product; a wider row takes a sweep for each of two slices.
SLICE_WIDTH = {"16-bit": 256, "tf32": 256, "fp16x3": 128}

#: (compute capability, product, D up to) -> tile; the products are sweep.py's.
TILES: dict[tuple[int, str, int], Tile] = {
    (80, "16-bit", 64): Tile(64, 32, 4, 3),
    (80, "16-bit", 128): Tile(64, 32, 4, 3),
    (80, "16-bit", 256): Tile(64, 32, 8, 2),
    (80, "tf32", 64): Tile(64, 32, 4, 2),
    (80, "tf32", 128): Tile(32, 32, 4, 2),
    (80, "tf32", 256): Tile(32, 32, 8, 2),
    (80, "fp16x3", 64): Tile(64, 32, 4, 2),
    (80, "fp16x3", 128): Tile(32, 32, 4, 2),
    (80, "fp16x3", 256): Tile(32, 32, 8, 2),
    (90, "16-bit", 64): Tile(128, 64, 8, 3),
    (90, "16-bit", 128): Tile(128, 64, 8, 3),
    (90, "16-bit", 256): Tile(64, 32, 8, 2),
    (90, "tf32", 64): Tile(64, 32, 4, 2),
    (90, "tf32", 128): Tile(64, 32, 8, 2),
    (90, "tf32", 256): Tile(64, 32, 8, 2),
    (90, "fp16x3", 64): Tile(64, 32, 4, 2),
    (90, "fp16x3", 128): Tile(64, 32, 8, 2),
    (90, "fp16x3", 256): Tile(64, 16, 8, 2),
    (100, "16-bit", 64): Tile(128, 32, 8, 3),
    (100, "16-bit", 128): Tile(128, 32, 8, 3),
    (100, "16-bit", 256): Tile(64, 32, 8, 2),
    (100, "tf32", 64): Tile(128, 32, 8, 3),
    (100, "tf32", 128): Tile(64, 32, 4, 2),
    (100, "tf32", 256): Tile(64, 16, 8, 2),
    (100, "fp16x3", 64): Tile(128, 32, 8, 2),
    (100, "fp16x3", 128): Tile(128, 16, 8, 2),
    (100, "fp16x3", 256): Tile(64, 16, 8, 2),
}

#: Where a launch finishes everything: few rows, and the end of the kernel wants registers too. Same key; rows in
#: slices are not among them, since eq. (10) needs all of a row.
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
    (90, "tf32", 64): Tile(64, 32, 8, 2),
    (90, "tf32", 128): Tile(64, 32, 8, 2),
    (90, "tf32", 256): Tile(32, 32, 8, 2),
    (90, "fp16x3", 64): Tile(64, 32, 8, 2),
    (90, "fp16x3", 128): Tile(64, 32, 8, 2),
    (100, "16-bit", 64): Tile(64, 32, 4, 3),
    (100, "16-bit", 128): Tile(64, 32, 8, 2),
    (100, "16-bit", 256): Tile(64, 32, 8, 2),
    (100, "tf32", 64): Tile(64, 16, 8, 2),
    (100, "tf32", 128): Tile(64, 16, 8, 2),
    (100, "tf32", 256): Tile(32, 32, 8, 2),
    (100, "fp16x3", 64): Tile(64, 32, 8, 2),
    (100, "fp16x3", 128): Tile(64, 32, 8, 3),
}


#: With ids every tile has both classes of pairs and twice the sums in registers: SMALL_TILES with half the
#: columns, unless the key is here.
LABEL_TILES: dict[tuple[int, str, int], Tile] = {
    (80, "tf32", 128): Tile(32, 16, 8, 2),
    (80, "fp16x3", 256): Tile(32, 16, 8, 2),
    (90, "16-bit", 256): Tile(64, 16, 8, 3),
    (90, "tf32", 128): Tile(32, 16, 8, 2),
    (90, "fp16x3", 128): Tile(32, 16, 8, 2),
    (90, "fp16x3", 256): Tile(16, 32, 8, 2),
    # 64 rows or more: Triton 3.6 cannot compile them
    (100, "fp16x3", 64): Tile(32, 16, 8, 2),
    (100, "fp16x3", 128): Tile(32, 16, 8, 2),
    (100, "fp16x3", 256): Tile(16, 32, 8, 2),
}


def terms_tile(itemsize: int) -> Tile:
    """The epilogue's of the chunked path: a thread loads 16 bytes of a row of logits."""
    return Tile(8, 64, itemsize, 3)


def table_capability(capability: int) -> int:
    """Whose tiles a GPU of compute capability ``capability`` (90 is 9.0) takes: its own, or the nearest below.

    But 12.x has the tensor cores, and the 99 KiB of shared memory, of 8.6 and 8.9.
    """
    known = sorted({key[0] for key in TILES})
    alike = [c for c in known if c <= capability and (c < 90 or c >= 120 or capability < 120)]
    return max(alike, default=known[0])


def tile_for(capability: int, product: str, width: int, small: bool, has_ids: bool) -> Tile:
    """The tile for D padded to ``width``."""
    nearest = table_capability(capability)
    key = nearest, product, min(k[2] for k in TILES if k[:2] == (nearest, product) and k[2] >= width)
    if has_ids and key in LABEL_TILES:
        return LABEL_TILES[key]
    if has_ids:
        tile = SMALL_TILES[key]
        return tile._replace(block_n=max(16, tile.block_n // 2))
    return (SMALL_TILES if small else TILES)[key]
