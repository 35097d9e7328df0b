# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels cost a GPU, found without one: reads the machine code of the objects setup.py built.

    python setup.py build_ext && python benchmarks/cuda_resources.py

Prints registers, stack, matrix and special-function instructions of every kernel. Exit status 1 if one uses local
memory (a spill), or a sweep has no HMMA or more than two special functions per logit in its main loop.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from triton_resources import main_loop

ROOT = Path(__file__).resolve().parents[1]
ROW = "{:<6} {:<28} {:>5} {:>6} {:>6} {:>6} {:>11}"


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


def read(cubin: Path) -> list[tuple[str, int, int, int, int, float | None]]:
    """(kernel, registers, stack bytes, local accesses, matrix instructions, special functions per exponential)."""
    usage = run(tool("cuobjdump"), "-res-usage", cubin)
    found = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+)", usage)
    registers = {name: (int(reg), int(stack)) for name, reg, stack in found}
    code = run(tool("nvdisasm"), "-c", cubin)
    rows = []
    for part in re.split(r"^\s*\.section\s+\.text\.", code, flags=re.MULTILINE)[1:]:
        name = re.match(r"[^\s,]+", part)[0]
        special = None
        if "sweep" in name:
            loop = main_loop(part, "HMMA")
            special = len(re.findall(r"\bMUFU", loop)) / len(re.findall(r"\bMUFU\.EX2", loop))
        local, matrix = (len(re.findall(rf"\b(?:{op})\b", part)) for op in ("LDL|STL", "HMMA"))
        rows.append((kernel_name(name), *registers[name], local, matrix, special))
    return sorted(rows)


def main() -> None:
    objects = sorted(ROOT.glob("build/temp*/csrc/cuda/pairwise_bce_*.o"))
    if not objects:
        print("cuda_resources: no CUDA objects under build/; run: python setup.py build_ext", file=sys.stderr)
        sys.exit(2)
    bad = count = 0
    print(ROW.format("arch", "kernel", "regs", "stack", "local", "HMMA", "MUFU/logit"))
    for path in objects:
        with tempfile.TemporaryDirectory() as folder:
            run(tool("cuobjdump"), "-xelf", "all", path, cwd=folder)
            for cubin in sorted(Path(folder).glob("*.cubin")):
                arch = re.search(r"sm_\d+a?", cubin.name)[0]
                for kernel, regs, stack, local, matrix, special in read(cubin):
                    sweep = kernel.startswith("sweep")
                    wrong = bool(stack or local) or (sweep and (not matrix or special is None or special > 2))
                    bad += wrong
                    count += 1
                    shown = "" if special is None else f"{special:.2f}"
                    row = ROW.format(arch, kernel, regs, stack, local, matrix if sweep else "", shown)
                    print(row + ("  <- fault" if wrong else ""), flush=True)
    print(f"{count} kernels, {bad} with faults")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
