# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels cost a GPU, found without one: compiles ahead of time and reads the machine code.

    python benchmarks/triton_resources.py            every entry of the tile table, all variants
    python benchmarks/triton_resources.py --quick    the variants of mio_loss in bfloat16 only

Prints registers, shared memory, spills, matrix instructions and special functions per logit of the main
loop. Exit status 1 if an entry spills, lacks its matrix instructions (HGMMA on 9.0) or takes more than two
special functions per logit.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

#: Compute capability -> what its tensor cores' instruction is called; float32 on 9.0 may use the older one.
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTC[A-Z]*MMA"}
ROW = "{:<4} {:<8} {:<5} {:<16} {:<16} {:>4} {:>6} {:>6} {:>6} {:>10}"
SHARED_MEMORY = {80: 163, 90: 227, 100: 227}  # KiB a program may have


class Entry(NamedTuple):
    """One compilation: a kernel's constants and how it is launched."""

    kernel: str
    capability: int
    dtype: str  # as Triton spells it
    constants: dict[str, Any]
    warps: int
    stages: int
    name: str


class Resources(NamedTuple):
    registers: int
    shared: int
    spills: int
    matrix: int
    special: float | None  # MUFU per logit in the main loop


def sweep_entries(quick: bool) -> list[Entry]:
    from mio_ext.triton_tiles import TILES, tile_for

    entries = []
    for capability, itemsize, width in TILES:
        if quick and itemsize != 2:
            continue
        dtypes = {2: ["bf16"], 4: ["fp32"]}[itemsize]
        mio = {"NORMALIZE": True, "EXCLUDE_SELF": True}
        variants = {"mio": mio, "mio, small": mio | {"FINISH": True}}
        if not quick:
            variants |= {
                "mio, labels": mio | {"HAS_IDS": True},
                "siglip": {"DPARAMS": True},
                "siglip, columns": {"TRANSPOSED": True, "LOSS": False},
            }
        for dtype in dtypes:
            for name, flags in variants.items():
                tile = tile_for(capability, itemsize, width, "FINISH" in flags, "HAS_IDS" in flags)
                constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": width}
                constants |= dict.fromkeys(("NORMALIZE", "HAS_IDS", "EXCLUDE_SELF", "TRANSPOSED"), False)
                constants |= {"GRAD": True, "LOSS": True, "DPARAMS": False, "FINISH": False, "PRECISION": "tf32"}
                constants |= flags
                entries.append(Entry("sweep_kernel", capability, dtype, constants, tile.warps, tile.stages, name))
    return entries


def other_entries() -> list[Entry]:
    """The kernels that have no table; they only must compile and not spill."""
    entries = []
    for capability in MATRIX:
        for dtype in ("bf16", "fp16", "fp32", "fp64"):
            widths = (128, 768) if dtype != "fp64" else (128,)
            for width in widths:
                block_d = 1 << (width - 1).bit_length()
                prepare = {"WIDTH": width, "BLOCK_D": block_d, "ROWS": max(1, min(16, 4096 // block_d))}
                prepare |= {"NORMALIZE": True, "FIRST": True, "HAS_PARAMS": dtype == "fp64"}
                prepare |= {"COEF_SCALE": 1.0, "GRADIENT_TIMES": 2.0}
                entries.append(Entry("prepare_kernel", capability, dtype, prepare, 4, 3, f"D = {width}"))
                project = {"WIDTH": width, "BLOCK_D": block_d, "ROWS": prepare["ROWS"]}
                project |= {"NORMALIZE": True, "BOTH_NORMS": True}
                entries.append(Entry("project_kernel", capability, dtype, project, 4, 3, f"D = {width}"))
            for ids in (False, True):
                terms = {"BLOCK_M": 4, "BLOCK_N": 128, "HAS_IDS": ids, "EXCLUDE_SELF": True}
                terms |= {"GRAD": True, "DPARAMS": True}
                entries.append(Entry("terms_kernel", capability, dtype, terms, 4, 3, "labels" if ids else ""))
        entries.append(Entry("results_kernel", capability, "fp32", {"DPARAMS": True}, 4, 3, ""))
    return entries


def compile_entry(entry: Entry) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mio_ext import triton_kernels

    kernel = getattr(triton_kernels, entry.kernel)
    loss_type = "fp64" if entry.dtype == "fp64" else "fp32"
    features = {"x_ptr", "y_ptr", "z_ptr", "g_ptr"} - ({"g_ptr"} if entry.kernel == "project_kernel" else set())
    features |= {"out_ptr"}
    special = {"x_ids_ptr": "i64", "y_ids_ptr": "i64", "sums_ptr": "fp64", "stats_ptr": "fp64", "counter_ptr": "i32"}
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in entry.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + special.get(name, entry.dtype if name in features else loss_type)
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("a_p", "a_n", "b", "w_p", "w_n", "w_l") else "i32"
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=entry.constants, attrs=attrs),
        target=GPUTarget("cuda", entry.capability, 32),
        options={"num_warps": entry.warps, "num_stages": entry.stages},
    )
    code, usage = disassemble(compiled.asm["cubin"])
    special_per_logit = None
    if entry.kernel == "sweep_kernel":
        # A logit has exactly one exponential; the assembler may hold a loop's code twice, for a branch.
        loop = main_loop(code, "|".join(MATRIX.values()))
        special_per_logit = len(re.findall(r"\bMUFU", loop)) / len(re.findall(r"\bMUFU\.EX2", loop))
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        matrix=len(re.findall(rf"\b(?:{MATRIX[entry.capability]}|HMMA)\b", code)),
        special=special_per_logit,
    )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(machine code, resource usage)."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [subprocess.run([tools / t, option, file.name], capture_output=True, text=True, check=True).stdout
               for t, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))]  # fmt: skip
    return run[0], run[1]


def main_loop(code: str, matrix: str) -> str:
    """The shortest loop with matrix and special-function instructions in it."""
    lines = code.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
        if jump and labels.get(jump[1], i) < i:
            body = "\n".join(lines[labels[jump[1]] : i + 1])
            if re.search(rf"\b(?:{matrix})\b", body) and "MUFU.EX2" in body:
                loops.append(body)
    return min(loops, key=len)


def faults(entry: Entry, found: Resources) -> list[str]:
    """What is wrong with an entry; nothing, it is hoped."""
    wrong = []
    if found.spills:
        wrong.append(f"{found.spills} spills")
    if found.shared > SHARED_MEMORY[entry.capability] * 1024:
        wrong.append("too much shared memory")
    if entry.kernel == "sweep_kernel":
        if not found.matrix:
            wrong.append("no matrix instruction")
        if found.special is None or found.special > 2:
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
    print(ROW.format("cc", "kernel", "type", "tile", "what", "regs", "KiB", "spills", "matrix", "MUFU/logit"))
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        for entry, found in zip(entries, pool.map(compile_entry, entries), strict=True):
            c = entry.constants
            sweep = "PRECISION" in c
            tile = f"{c['BLOCK_M']}x{c['BLOCK_N']}x{c['BLOCK_D']} {entry.warps}w{entry.stages}s" if sweep else ""
            special = "" if found.special is None else f"{found.special:.2f}"
            wrong = faults(entry, found)
            bad += bool(wrong)
            kernel = entry.kernel.removesuffix("_kernel")
            shared = f"{found.shared / 1024:.1f}"
            row = (entry.capability, kernel, entry.dtype, tile, entry.name)
            row += (found.registers, shared, found.spills, found.matrix, special)
            print(ROW.format(*row) + ("  <- " + ", ".join(wrong) if wrong else ""), flush=True)
    print(f"{len(entries)} entries, {bad} with faults")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
