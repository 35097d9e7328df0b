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


def without_detours(code: str) -> str:
    """A kernel to its last EXIT. What comes after that, for warps that have diverged, jumps back from there."""
    end = code.rfind("EXIT ;")
    return code if end < 0 else code[: code.index("\n", end)]


def main_loop(code: str) -> str:
    """The shortest loop with matrix and special-function instructions in it; empty if there is none."""
    return _shortest_loop(without_detours(code)) or _shortest_loop(code)


def _shortest_loop(code: str) -> str:
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


def voted_ways(loop: str, groups: int, times: int) -> list[list[list[int]]]:
    """Of the terms with ids (csrc/cuda/labelled.cuh), whose warps vote for each of some groups of logits: the
    instructions along the shortest way through a main loop in which no group has a positive pair, and all have, by
    number; in each form of the terms, of which a way has one, or one for each part of a tile."""
    steps: list[str] = []
    labels: dict[str, int] = {}
    for line in loop.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(steps)
        elif step := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*;.*)", line):
            steps.append(step[1])
    jumps = [at for at, text in enumerate(steps) if re.search(r"\bBRA\b", text)]
    votes: list[int] = []  # the jumps that they decide, with terms behind them
    for at, text in enumerate(steps):
        jump, after = [*(to for to in jumps if to > at), 0, 0][:2]
        if (vote := re.match(r"VOTE\.ANY (P\d)", text)) and re.match(rf"@!?{vote[1]} ", steps[jump]):
            votes += [jump] if any("MUFU.EX2" in behind for behind in steps[jump:after]) else []
    forms = len(votes) // (groups * times)
    ways = []
    for form in range(forms):
        own = {vote for i, vote in enumerate(votes) if i // groups % forms == form}
        others = set(votes) - own
        ways.append([_way(steps, labels, others, dict.fromkeys(own, some)) for some in (False, True)])
    return ways


def _way(steps: list[str], labels: dict[str, int], closed: set[int], votes: dict[int, bool]) -> list[int]:
    """The shortest from the first to the last; what multiplies or copies is not jumped over, but with other forms."""
    before = {0: 0}
    open_ends = [0]
    for at in open_ends:
        step = steps[at]
        jump = re.search(r"\bBRA(?:\.U)? .*?(\.L_x_\d+)", step)
        to = labels.get(jump[1]) if jump else None
        nexts = [] if (jump and not step.startswith("@")) or step.startswith("EXIT") else [at + 1]
        if step.startswith("BRX"):
            nexts = [labels[target] for target in re.findall(r"\.L_x_\d+", step) if target in labels]
        elif at in votes and to is not None:
            nexts = [to if votes[at] != step.startswith("@!") else at + 1]
        elif to is not None and (
            not closed.isdisjoint(range(at, to))
            or not any(re.search(rf"{ANY_MATRIX}|\bLDGSTS", over) for over in steps[at + 1 : to])
        ):
            nexts.append(to)
        for following in nexts:
            if following < len(steps) and following not in before and following not in closed:
                before[following] = at
                open_ends.append(following)
    way = [len(steps) - 1]
    while way[-1] in before and way[-1] != 0:
        way.append(before[way[-1]])
    return way[::-1] if way[-1] == 0 else []
