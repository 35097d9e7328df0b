# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels cost a GPU, found without one: compiles ahead of time and reads the machine code.

    python benchmarks/triton_resources.py            every entry of the tile table, all variants
    python benchmarks/triton_resources.py --quick    the variants of mio_loss in bfloat16 only

Prints registers, shared memory, spills, matrix instructions and special functions per logit of the main
loop. Exit status 1 if an entry spills, has other matrix instructions than its capability's own (MATRIX; LEGACY
names the exceptions) or takes more than two special functions per logit.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import importlib.metadata
import multiprocessing
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from benchmarks.harness.machine_code import ANY_MATRIX, main_loop, tool
from mio_ext.triton.tiles import SLICE_WIDTH, TILES, Tile, terms_tile, tile_for

#: Generation (compute capability / 10) -> what its tensor cores' instruction is called.
MATRIX = {8: "HMMA", 9: "HGMMA", 10: "UTCHMMA", 12: "HMMA"}
#: Entries that may have 8.0's instead: HGMMA and UTCHMMA start at 64 rows, which spill here in every tile tried.
#: (compute capability, product, D, launch)
LEGACY = {
    (90, "tf32", 128, "labels"),
    (90, "tf32", 256, "labels"),
    (90, "tf32", 256, "small"),
    (90, "fp16x3", 128, "labels"),
    (90, "fp16x3", 256, "labels"),
    (100, "tf32", 256, "labels"),
    (100, "tf32", 256, "small"),
    (100, "fp16x3", 64, "labels"),
    (100, "fp16x3", 128, "labels"),
    (100, "fp16x3", 256, "labels"),
}
ROW = "{:<4} {:<8} {:<6} {:<16} {:<22} {:>4} {:>6} {:>6} {:<12} {:>10}"
SHARED_MEMORY = {8: 99, 9: 227, 10: 227, 12: 99}  # KiB a program may have; 8.0 has 163, 8.6 and 8.9 have 99


class Entry(NamedTuple):
    """One compilation: a kernel's constants and how it is launched."""

    kernel: str
    capability: int
    dtype: str  # of the features, as Triton spells it
    constants: dict[str, Any]
    warps: int
    stages: int
    name: str


class Resources(NamedTuple):
    registers: int
    shared: int
    spills: int
    matrix: dict[str, int]  # instruction -> how often it is in the code
    special: float | None  # MUFU per logit in the main loop


def sweep_constants(tile: Tile, product: str, width: int, **flags: Any) -> dict[str, Any]:
    """The constants of sweep_kernel; by default the row gradient and the loss, and nothing else."""
    block_d = min(width, SLICE_WIDTH[product])
    constants: dict[str, Any] = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": block_d}
    constants |= {"WIDTH": width, "SLICE": 0, "PRODUCT": product}
    constants |= dict.fromkeys(("NORMALIZE", "HAS_IDS", "EXCLUDE_SELF", "TRANSPOSED", "DPARAMS", "FINISH"), False)
    return constants | {"GRAD": True, "LOSS": True} | flags


def sweep_entries(quick: bool) -> list[Entry]:
    entries = []
    mio = {"NORMALIZE": True, "EXCLUDE_SELF": True}
    variants = {"mio": mio}
    if not quick:
        variants |= {
            "mio, labels": mio | {"HAS_IDS": True},
            "siglip": {"DPARAMS": True},
            "siglip, columns": {"TRANSPOSED": True, "LOSS": False},
        }
    small = {f"{name}, small": flags | {"FINISH": True} for name, flags in variants.items()}
    for capability, product, width in TILES:
        if quick and product != "16-bit":
            continue
        sliced = width > SLICE_WIDTH[product]
        for name, flags in (variants | small).items():
            if sliced and "FINISH" in flags:
                continue
            tile = tile_for(capability, product, width, "FINISH" in flags, "HAS_IDS" in flags)
            constants = sweep_constants(tile, product, width, **flags)
            dtype = "bf16" if product == "16-bit" else "fp32"
            entries.append(Entry("sweep_kernel", capability, dtype, constants, tile.warps, tile.stages, name))
            if sliced and name == "mio":  # the second slice's sweep has no sums
                second = constants | {"SLICE": constants["BLOCK_D"], "LOSS": False}
                entries.append(
                    Entry("sweep_kernel", capability, dtype, second, tile.warps, tile.stages, "mio, 2nd slice")
                )
    return entries


def other_entries() -> list[Entry]:
    """The kernels that have no table; they only must compile and not spill."""
    entries = []
    kinds: list[tuple[str, str | None, int]]
    kinds = [("bf16", "16-bit", 128), ("fp16", "16-bit", 128), ("fp32", "tf32", 128), ("fp32", "fp16x3", 128)]
    kinds += [("fp64", None, 128), ("bf16", None, 768), ("fp16", None, 768), ("fp32", None, 768)]
    for capability in sorted({key[0] for key in TILES}):
        for dtype, product, width in kinds:
            block_d = 1 << (width - 1).bit_length()
            shape: dict[str, Any] = {"WIDTH": width, "BLOCK_D": block_d, "ROWS": max(1, min(16, 4096 // block_d))}
            shape |= {"NORMALIZE": True, "PRODUCT": product}
            prepare = shape | {
                "FIRST": True,
                "HAS_PARAMS": dtype == "fp64",
                "COEFFICIENT_LIFT": 1.0,
                "GRADIENT_TIMES": 2.0,
            }
            what = f"{product}, D = {width}" if product == "fp16x3" else f"D = {width}"
            entries.append(Entry("prepare_kernel", capability, dtype, prepare, 4, 3, what))
            if product is not None:
                entries.append(Entry("project_kernel", capability, dtype, shape, 4, 3, what))
                continue
            del shape["PRODUCT"]
            shape["ROWS"] //= 2 if dtype == "fp64" else 1
            finish = {"HAS_IDS": False, "EXCLUDE_SELF": True, "TRANSPOSED": False, "GRAD": True, "LOSS": True}
            entries.append(Entry("finish_kernel", capability, dtype, shape | finish, 4, 3, what))
            for ids in (False, True):
                tile = terms_tile(8 if dtype == "fp64" else 4)
                terms = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "HAS_IDS": ids, "EXCLUDE_SELF": True}
                terms |= {"GRAD": True, "DPARAMS": True}
                entries.append(
                    Entry("terms_kernel", capability, dtype, terms, tile.warps, tile.stages, "labels" if ids else "")
                )
        entries.append(Entry("results_kernel", capability, "fp32", {"DPARAMS": True}, 4, 3, ""))
    return entries


def pointer_types(entry: Entry) -> dict[str, str]:
    """What each pointer of the entry's kernel points to, where that is not the loss's type."""
    prepared = "fp16" if entry.constants.get("PRODUCT") == "fp16x3" else entry.dtype
    types = {"x_ptr": prepared, "y_ptr": prepared, "out_ptr": prepared, "g_ptr": prepared, "z_ptr": prepared}
    types |= {"x_ids_ptr": "i64", "y_ids_ptr": "i64", "sums_ptr": "fp64", "stats_ptr": "fp64", "counter_ptr": "i32"}
    if entry.kernel == "prepare_kernel":
        types["z_ptr"] = entry.dtype
    if entry.kernel in ("project_kernel", "finish_kernel"):
        del types["g_ptr"]
    return types


def compile_entry(entry: Entry) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mio_ext.triton import pairwise_bce

    kernel = getattr(pairwise_bce, entry.kernel)
    loss_type = "fp64" if entry.dtype == "fp64" else "fp32"
    types = pointer_types(entry)
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in entry.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + types.get(name, loss_type)
        else:
            signature[name] = "fp32" if name in ("a_p", "a_n", "b", "w_p", "w_n", "w_l") else "i32"
        if name.endswith("_ptr") or name in ("m_pad", "k_pad", "n_pad", "stride_g"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=entry.constants, attrs=attrs),
        target=GPUTarget("cuda", entry.capability, 32),
        options=pairwise_bce.OPTIONS | {"num_warps": entry.warps, "num_stages": entry.stages},
    )
    code, usage = disassemble(compiled.asm["cubin"])
    special_per_logit = None
    if entry.kernel == "sweep_kernel":
        # A logit has exactly one exponential; the assembler may hold a loop's code twice, for a branch.
        loop = main_loop(code)
        special_per_logit = len(re.findall(r"\bMUFU", loop)) / max(1, len(re.findall(r"\bMUFU\.EX2", loop)))
    return Resources(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        shared=compiled.metadata.shared,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        matrix=dict(collections.Counter(re.findall(ANY_MATRIX, code))),
        special=special_per_logit,
    )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(machine code, resource usage)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [subprocess.run([tool(t), option, file.name], capture_output=True, text=True, check=True).stdout
               for t, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))]  # fmt: skip
    return run[0], run[1]


def faults(entry: Entry, found: Resources) -> list[str]:
    """What is wrong with an entry; nothing, it is hoped."""
    wrong = []
    if found.spills:
        wrong.append(f"{found.spills} spills")
    if found.shared > SHARED_MEMORY[entry.capability // 10] * 1024:
        wrong.append("too much shared memory")
    if entry.kernel == "sweep_kernel":
        c = entry.constants
        launch = "labels" if c["HAS_IDS"] else "small" if c["FINISH"] else "large"
        legacy = (entry.capability, c["PRODUCT"], c["WIDTH"], launch) in LEGACY
        due = "HMMA" if legacy else MATRIX[entry.capability // 10]
        if set(found.matrix) != {due}:
            wrong.append(f"{' and '.join(sorted(found.matrix)) or 'no matrix instruction'} where {due} is due")
        if not found.special:
            wrong.append("no main loop")
        elif found.special > 2:
            wrong.append("more than two special functions per logit")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="mio_loss in bfloat16 only")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    entries = sweep_entries(args.quick) + ([] if args.quick else other_entries())
    context = multiprocessing.get_context("spawn")
    bad = 0
    print(f"Triton {importlib.metadata.version('triton')}")
    print(ROW.format("cc", "kernel", "type", "tile", "what", "regs", "KiB", "spills", "matrix", "MUFU/logit"))
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        for entry, found in zip(entries, pool.map(compile_entry, entries), strict=True):
            c = entry.constants
            sweep = "BLOCK_D" in c and "BLOCK_N" in c
            tile = f"{c['BLOCK_M']}x{c['BLOCK_N']}x{c['WIDTH']} {entry.warps}w{entry.stages}s" if sweep else ""
            special = "" if found.special is None else f"{found.special:.2f}"
            wrong = faults(entry, found)
            bad += bool(wrong)
            kernel = entry.kernel.removesuffix("_kernel")
            shared = f"{found.shared / 1024:.1f}"
            matrix = ", ".join(f"{n} {name}" for name, n in found.matrix.items())
            row: list[object] = [entry.capability, kernel, c["PRODUCT"] if sweep else entry.dtype, tile, entry.name]
            row += (found.registers, shared, found.spills, matrix, special)
            print(ROW.format(*row) + ("  <- " + ", ".join(wrong) if wrong else ""), flush=True)
    print(f"{len(entries)} entries, {bad} with faults")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
