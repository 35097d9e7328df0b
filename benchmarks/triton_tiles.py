# SPDX-License-Identifier: Apache-2.0
"""Which tile is fastest on this GPU? Times candidates for every bucket and prints the table's lines.

    python benchmarks/triton_tiles.py [--write]

With --write the lines of this GPU's compute capability in mio_ext/triton/tiles.py are replaced. Candidates
that spill, or want more shared memory than there is, do not take part. Check the result with
benchmarks/triton_resources.py.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys

import torch

from benchmarks.harness.paths import ROOT
from benchmarks.triton_resources import Entry, compile_entry, faults, sweep_constants
from mio_ext import mio_loss
from mio_ext.triton import pairwise_bce, tiles

SIZES = {"TILES": 32_768, "SMALL_TILES": 256}  # rows


def candidates() -> list[tiles.Tile]:
    warps_of = {32: (4, 8), 64: (4, 8), 128: (8,)}
    grid = itertools.product((32, 64, 128), (16, 32, 64, 128), (2, 3, 4))
    return [tiles.Tile(m, n, w, stages) for m, n, stages in grid for w in warps_of[m]]


def sound(capability: int, product: str, width: int, tile: tiles.Tile, finish: bool) -> bool:
    constants = sweep_constants(tile, product, width, NORMALIZE=True, EXCLUDE_SELF=True, FINISH=finish)
    dtype = "bf16" if product == "16-bit" else "fp32"
    entry = Entry("sweep_kernel", capability, dtype, constants, tile.warps, tile.stages, "")
    try:
        return not faults(entry, compile_entry(entry))
    except Exception as error:  # the compiler gives up in many ways: that tile is out
        print(f"  {tile}: {type(error).__name__}")
        return False


def time_ms(rows: int, width: int, dtype: torch.dtype) -> float:
    z = torch.randn(rows, width, device="cuda", dtype=dtype, requires_grad=True)
    times = []
    for repetition in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        mio_loss(z[: rows // 2], z[rows // 2 :], backend="triton").backward()
        end.record()
        torch.cuda.synchronize()
        if repetition >= 5:
            times.append(start.elapsed_time(end))
    return float(statistics.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("triton_tiles: no CUDA GPU here", file=sys.stderr)
        sys.exit(2)
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    path = ROOT / "mio_ext" / "triton" / "tiles.py"
    text = path.read_text()
    products = tiles.SLICE_WIDTH.items()
    for (name, rows), (product, slice_width), width in itertools.product(SIZES.items(), products, (64, 128, 256)):
        if width > slice_width and name == "SMALL_TILES":
            continue
        torch.set_float32_matmul_precision("highest" if product == "fp16x3" else "high")
        best = None
        for tile in candidates():
            if not sound(capability, product, width, tile, finish=name == "SMALL_TILES"):
                continue
            vars(pairwise_bce)["tile_for"] = lambda *_, tile=tile, **__: tile  # for this measurement
            ms = time_ms(rows, width, torch.bfloat16 if product == "16-bit" else torch.float32)
            best = min(best or (ms, tile), (ms, tile))
        if best is None:
            continue
        numbers = ", ".join(map(str, best[1]))
        line = f'({capability}, "{product}", {width}): Tile({numbers}),'
        print(f"{name}: {line}  # {best[0]:.3f} ms at N = {rows}", flush=True)
        table = text.index(f"\n{name}: ")
        pattern = re.compile(rf'\({capability}, "{product}", {width}\): Tile\([^)]*\),')
        found = pattern.search(text, table)
        if found:
            text = text[: found.start()] + line + text[found.end() :]
        else:
            brace = text.index("{\n", table) + 2
            text = f"{text[:brace]}    {line}\n{text[brace:]}"
    if args.write:
        path.write_text(text)


if __name__ == "__main__":
    main()
