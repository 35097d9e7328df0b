# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels cost a GPU, found without one: reads the machine code of the objects setup.py built.

    FORCE_CUDA=1 python setup.py build_ext && python benchmarks/cuda_resources.py

Prints of every kernel: registers, stack, shared memory, blocks that fit on a multiprocessor of its capability, matrix
instructions, exponentials and special functions per logit; of a main loop the bytes that it stores per logit, and the
instructions, in each form of its terms (without the loss, of a known bound, of any, crossed by a diagonal; special
functions in brackets) and around them, branches that are rarely taken included. Cubins may be named instead. The kernel
called logits has each form twice, and around them the products of 64 features; that called wide, which does the same on
8.0, has no loop around its terms, and all of it counts. Of kernels with ids: all along one way through the loop, with
no positive pair and with some in each group of logits, in each form of the terms.

Exit status 1 if a kernel uses local memory (a spill), if one with a main loop has matrix instructions of another kind
than is due (HGMMA for 9.0a's own, else HMMA), waits for each of them, has more than two special functions per logit
there or stores anything but two bytes of G, where G is what it makes, or if a kernel lacks exponentials: a compiler has
left a whole branch out before.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.machine_code import main_loop, tool, voted_ways, without_detours
from benchmarks.harness.paths import ROOT

ROW = "{:<7} {:<23} {:>4} {:>5} {:>5} {:>9} {:>6} {:>6} {:>5} {:>10} {:>7}  {}"
HEAD = (
    "arch",
    "kernel",
    "regs",
    "stack",
    "local",
    "shared KB",
    "blocks",
    "matrix",
    "EX2",
    "MUFU/logit",
    "B/logit",
    "instructions/logit",
)
#: Of a multiprocessor, by architecture: KB of shared memory, of which a block takes one more than it asks for.
SHARED_KB = {"sm_80": 164, "sm_90": 228, "sm_90a": 228}
#: First words of the names of 9.0a's own kernels.
HOPPER = ("hopper", "logits")


class Shape(NamedTuple):
    """Of a sweep, as csrc/cuda/tile.h has it."""

    threads: int
    shared: int  #: bytes
    logits: int  #: that a thread has at a time
    times: int  #: that it has as many, of a tile


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    local: int  #: accesses to local memory
    matrix: set[str]
    waits: float  #: share of HGMMA after which all or some are waited for
    exponentials: int
    special: float | None  #: special functions per exponential in a sweep's main loop
    loop: str


def run(*command: object, cwd: str | None = None) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, cwd=cwd).stdout


def shapes() -> dict[str, Shape]:
    """By kernel, as the headers say."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "tiles"
        source = ROOT / "benchmarks" / "cuda_tiles.cpp"
        run("c++", "-std=c++20", "-I", ROOT / "csrc", "-I", ROOT / "tests" / "native", "-o", program, source)
        lines = run(program).splitlines()
    return {name: Shape(*map(int, numbers)) for name, *numbers in (line.split("|") for line in lines)}


def kernel_name(mangled: str) -> str:
    sweep = re.search(r"sweep_(hopper_)?kernelINS_\d+(Bf16|Fp16x3|Fp16|Tf32)ELi(\d+)ELb([01])", mangled)
    if sweep:
        return f"{'hopper' if sweep[1] else 'sweep'} {sweep[2]} D<={sweep[3]}" + (" ids" if sweep[4] == "1" else "")
    logits = re.search(r"chunk_(hopper|logits)_kernelINS_\d+(Bf16|Fp16)ELb([01])", mangled)
    if logits:
        return f"{'logits' if logits[1] == 'hopper' else 'wide'} {logits[2]}" + (" ids" if logits[3] == "1" else "")
    row = re.search(r"(prepare|terms|project)_kernelINS_\d+(Bf16|Fp16x3|Fp16|Tf32|Fp32)E(Lb1|Li32)?", mangled)
    return f"{row[1]} {row[2]}" + {"Lb1": " ids", "Li32": " wide", None: ""}[row[3]] if row else mangled


def read(cubin: Path, arch: str) -> list[Kernel]:
    """What is in a cubin, but for the empty places of kernels that other architectures have."""
    usage = run(tool("cuobjdump"), "-res-usage", cubin)
    found = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+)", usage)
    registers = {name: (int(reg), int(stack)) for name, reg, stack in found}
    code = run(tool("nvdisasm"), "-c", cubin)
    kernels = []
    for part in re.split(r"^\s*\.section\s+\.text\.", code, flags=re.MULTILINE)[1:]:
        mangled = re.split(r"[\s,]", part, maxsplit=1)[0]
        name = kernel_name(mangled)
        if name.startswith(HOPPER) and arch != "sm_90a":
            continue
        special, loop = None, ""
        if name.startswith(("sweep", "wide", *HOPPER)):
            loop = without_detours(part) if name.startswith("wide") else main_loop(part)
            exponentials = len(re.findall(r"\bMUFU\.EX2", loop))
            special = len(re.findall(r"\bMUFU", loop)) / exponentials if exponentials else float("inf")
        local, exponentials = (len(re.findall(rf"\b(?:{op})\b", part)) for op in ("LDL|STL", r"MUFU\.EX2"))
        matrix = re.findall(r"\b(HG?MMA)\b", part)
        order = re.findall(r"\b(HGMMA|WARPGROUP\.DEPBAR)", part)
        waits = sum(pair == ("HGMMA", "WARPGROUP.DEPBAR") for pair in pairwise(order)) / max(len(matrix), 1)
        kernels.append(Kernel(name, *registers[mangled], local, set(matrix), waits, exponentials, special, loop))
    return sorted(kernels)


def stored(loop: str, shape: Shape) -> float:
    """Bytes in global memory for each of a thread's logits."""
    widths = re.findall(r"\bSTG\.E(?:\.[US]?(8|16|64|128))?\b", loop)
    return sum(int(width or 32) // 8 for width in widths) / (shape.logits * shape.times)


def instructions(loop: str, logits: int) -> str:
    """Of a main loop, for each of a thread's logits: where all of them are in one block of code, and the others."""
    forms, others = [], 0
    for block in re.split(r"^\s*\.L_x_\d+:", loop, flags=re.MULTILINE):
        count = len(re.findall(r"^\s*/\*[0-9a-f]+\*/.*;", block, flags=re.MULTILINE))
        if len(re.findall(r"\bMUFU\.EX2", block)) >= logits:
            forms.append((count / logits, len(re.findall(r"\bMUFU", block)) / logits))
        else:
            others += count
    terms = ", ".join(f"{count:.1f} ({special:.1f})" for count, special in sorted(forms))
    return f"{terms} + {others / logits:.1f}" if terms else ""


def labelled_instructions(loop: str, shape: Shape) -> str:
    """With ids, of which csrc/cuda/labelled.cuh takes eight logits at a time."""
    ways = voted_ways(loop, shape.logits // 8, shape.times)
    counts = sorted([len(way) / (shape.logits * shape.times) for way in form] for form in ways)
    return ", ".join(f"{least:.1f} to {most:.1f}" for least, most in counts)


def faults(kernel: Kernel, shape: Shape | None) -> list[str]:
    wrong = []
    if kernel.stack or kernel.local:
        wrong.append("local memory")
    if shape is None:
        if kernel.name.startswith("terms") and kernel.exponentials < 16:
            wrong.append("too few exponentials")
        return wrong
    makes_g = kernel.name.startswith(("logits", "wide"))
    due = {"HGMMA" if kernel.name.startswith(HOPPER) else "HMMA"}
    if kernel.matrix != due:
        wrong.append(f"{kernel.matrix or 'no matrix instructions'} where {due} is due")
    # The assembler waits for each where it cannot follow the registers; G's kernel itself for every four of them.
    if kernel.waits > (0.5 if makes_g else 0.25):
        wrong.append("matrix products one at a time")
    # Two for a logit, and where a tile's place is found and its sums are added up, a few for all of them.
    whole = kernel.name.startswith("wide")
    if kernel.special is None or kernel.special > (2.3 if whole else 2.05 if makes_g else 2):
        wrong.append("too many special functions")
    record = 8 / (shape.logits * shape.times) if whole else 0  # eight bytes of it, by a thread
    if stored(kernel.loop, shape) != (2 + record if makes_g else 0):
        wrong.append("stores more or less than G")
    # Of the loop's body, each with all logits. G's kernel always takes the loss.
    # With ids each but the bounded one, and each has two ways.
    forms = (6 if makes_g else 8) if kernel.name.endswith("ids") else 4 if makes_g else 5
    if kernel.exponentials < forms * shape.logits * shape.times:
        wrong.append("too few exponentials")
    return wrong


def cubins(paths: list[Path]) -> Iterator[Path]:
    """The cubins that are in objects, or are named."""
    for path in paths:
        if path.suffix == ".cubin":
            yield path
            continue
        with tempfile.TemporaryDirectory() as folder:
            run(tool("cuobjdump"), "-xelf", "all", path, cwd=folder)
            yield from sorted(Path(folder).glob("*.cubin"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="objects, or .cubin files (default what setup.py built)")
    paths = parser.parse_args().paths or sorted(ROOT.glob("build/temp*/csrc/cuda/instantiate/*.o"))
    if not paths:
        print(
            "cuda_resources: no CUDA objects under build/; run: FORCE_CUDA=1 python setup.py build_ext", file=sys.stderr
        )
        sys.exit(2)
    bad = count = 0
    tiles = shapes()
    print(ROW.format(*HEAD))
    for cubin in cubins(paths):
        named = re.search(r"sm_\d+a?", cubin.name)
        if named is None:
            sys.exit(f"cuda_resources: the name of {cubin} does not say its architecture, as in kernel.sm_90a.cubin")
        arch = named[0]
        for kernel in read(cubin, arch):
            shape = tiles.get(kernel.name.removesuffix(" ids"))
            wrong = faults(kernel, shape)
            bad += bool(wrong)
            count += 1
            of_sweep: list[object] = [""] * 6
            if shape:
                by_registers = 65536 // (shape.threads * ((kernel.registers + 7) // 8 * 8))
                blocks = min(by_registers, SHARED_KB.get(arch, 100) * 1024 // (shape.shared + 1024))
                of_sweep = [
                    f"{shape.shared / 1024:.1f}",
                    blocks,
                    " ".join(sorted(kernel.matrix)),
                    f"{kernel.special:.2f}",
                    f"{stored(kernel.loop, shape):.1f}",
                    labelled_instructions(kernel.loop, shape)
                    if kernel.name.endswith("ids")
                    else instructions(kernel.loop, shape.logits),
                ]
            shared, resident, matrix, special, stores, counts = of_sweep
            row = ROW.format(arch, *kernel[:4], shared, resident, matrix, kernel.exponentials, special, stores, counts)
            print(row.rstrip() + (f"  <- {', '.join(wrong)}" if wrong else ""), flush=True)
    print(f"{count} kernels, {bad} with faults")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
