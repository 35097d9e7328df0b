# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels cost a GPU, found without one: reads the machine code of the objects setup.py built.

    FORCE_CUDA=1 python setup.py build_ext && python benchmarks/cuda_resources.py

Prints registers, stack, matrix and special-function instructions of every kernel; cubins may be named instead. Exit
status 1 if one uses local memory (a spill), if a sweep has no HMMA or more than two special functions per logit in
its main loop, or if a kernel lacks exponentials: a compiler has left a whole branch out before.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from triton_resources import main_loop

ROOT = Path(__file__).resolve().parents[1]
ROW = "{:<6} {:<28} {:>5} {:>6} {:>6} {:>6} {:>6} {:>11}"


def tool(name: str) -> Path:
    """cuobjdump and nvdisasm come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def run(*command: object, cwd: str | None = None) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, cwd=cwd).stdout


def kernel_name(mangled: str) -> str:
    sweep = re.search(r"sweep_kernelINS_\d+(Bf16|Fp16x3|Fp16|Tf32)ELi(\d+)ELb([01])", mangled)
    if sweep:
        return f"sweep {sweep[1]} D<={sweep[2]}" + (" ids" if sweep[3] == "1" else "")
    row = re.search(r"(prepare|terms|finish)_kernelINS_\d+(Bf16|Fp16x3|Fp16|Tf32|Fp32)E(?:Lb([01]))?", mangled)
    return f"{row[1]} {row[2]}" + (" ids" if row[3] == "1" else "") if row else mangled


def least_exponentials(kernel: str) -> int:
    """One for every logit that a thread has of a tile, in every form of the loop's body; see csrc/cuda/*tile.h."""
    sweep = re.match(r"sweep (\w+) D<=(\d+)( ids)?", kernel)
    if not sweep:
        return 16 if kernel.startswith("terms") else 0
    width, half = int(sweep[2]), sweep[1] in ("Bf16", "Fp16")
    fragments, columns = 2 if half and width <= 128 else 1, 16 if not half and width == 256 else 32
    return fragments * columns // 2 * (1 if sweep[3] else 3)


def read(cubin: Path) -> list[tuple[str, int, int, int, int, float | None, int]]:
    """(kernel, registers, stack, local accesses, matrix instructions, special functions per exponential, these)."""
    usage = run(tool("cuobjdump"), "-res-usage", cubin)
    found = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+)", usage)
    registers = {name: (int(reg), int(stack)) for name, reg, stack in found}
    code = run(tool("nvdisasm"), "-c", cubin)
    rows = []
    for part in re.split(r"^\s*\.section\s+\.text\.", code, flags=re.MULTILINE)[1:]:
        name = re.match(r"[^\s,]+", part)[0]
        special = None
        if "sweep" in name:
            loop = main_loop(part)
            special = len(re.findall(r"\bMUFU", loop)) / len(re.findall(r"\bMUFU\.EX2", loop))
        local, matrix = (len(re.findall(rf"\b(?:{op})\b", part)) for op in ("LDL|STL", "HMMA"))
        exponentials = len(re.findall(r"\bMUFU\.EX2", part))
        rows.append((kernel_name(name), *registers[name], local, matrix, special, exponentials))
    return sorted(rows)


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
    paths = [Path(p) for p in sys.argv[1:]] or sorted(ROOT.glob("build/temp*/csrc/cuda/pairwise_bce_*.o"))
    if not paths:
        print(
            "cuda_resources: no CUDA objects under build/; run: FORCE_CUDA=1 python setup.py build_ext", file=sys.stderr
        )
        sys.exit(2)
    bad = count = 0
    print(ROW.format("arch", "kernel", "regs", "stack", "local", "HMMA", "EX2", "MUFU/logit"))
    for cubin in cubins(paths):
        arch = re.search(r"sm_\d+a?", cubin.name)[0]
        for kernel, regs, stack, local, matrix, special, exponentials in read(cubin):
            sweep = kernel.startswith("sweep")
            wrong = bool(stack or local) or (sweep and (not matrix or special is None or special > 2))
            wrong = wrong or exponentials < least_exponentials(kernel)
            bad += wrong
            count += 1
            shown = "" if special is None else f"{special:.2f}"
            row = ROW.format(arch, kernel, regs, stack, local, matrix if sweep else "", exponentials, shown)
            print(row + ("  <- fault" if wrong else ""), flush=True)
    print(f"{count} kernels, {bad} with faults")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
