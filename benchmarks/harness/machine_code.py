# SPDX-License-Identifier: Apache-2.0
"""Reading NVIDIA's machine code: the tools, and where in a kernel its time goes."""

from __future__ import annotations

import re
from pathlib import Path

#: A matrix instruction of any generation, dense or sparse, of any type, in machine code.
ANY_MATRIX = r"\b(?:[HIDQB]MMA|[HIQ]GMMA|UTC[A-Z]*MMA)\b"


def tool(name: str) -> Path:
    """cuobjdump and nvdisasm come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def main_loop(code: str) -> str:
    """The shortest loop with matrix and special-function instructions in it; empty if there is none."""
    lines = code.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
        if jump and labels.get(jump[1], i) < i:
            body = "\n".join(lines[labels[jump[1]] : i + 1])
            if re.search(ANY_MATRIX, body) and "MUFU.EX2" in body:
                loops.append(body)
    return min(loops, key=len, default="")
