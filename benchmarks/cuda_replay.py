# SPDX-License-Identifier: Apache-2.0
"""How many clocks a tile of the fused Hopper kernel should take: replays the machine code of its main loop.

    FORCE_CUDA=1 python setup.py build_ext && python benchmarks/cuda_replay.py
    python benchmarks/cuda_replay.py --form any --law fifo kernel.sm_90a.cubin

One scheduler of a multiprocessor stands for all four: each has one warp of every consumer. A warp issues in order, one
instruction a clock for all warps, after the clocks and the scoreboards that the assembler wrote into the instruction
before (they are in the encoding that nvdisasm -hex prints). Pipes take a warp's instruction for some clocks, and the
tensor cores run beside them. Tiles are always there, and a multiprocessor's four schedulers never get in each other's
way.

What NVIDIA does not say, how the tensor cores take products of two warps, is a law to choose, --law, which the
measurements in benchmarks/results/nvidia-h100-80gb-hbm3/kernels.json judge; docs/cuda.md has the outcome.
"""

from __future__ import annotations

import argparse
import heapq
import re
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import NamedTuple

from benchmarks.cuda_resources import cubins, kernel_name, shapes
from benchmarks.harness.machine_code import main_loop, tool
from benchmarks.harness.paths import ROOT

#: Clocks that a warp's instruction keeps its pipe busy, and until its result is there where a scoreboard tells. From
#: the throughputs of the CUDA programming guide: 128 float32, 64 integer and 16 special results a clock for 4 pipes.
MUFU, ALU, FMA, LSU, UNIFORM = "MUFU", "ALU", "FMA", "LSU", "UNIFORM"
BUSY = {MUFU: 8, ALU: 2, FMA: 1, LSU: 4, UNIFORM: 2}
LATENCY = {MUFU: 22, ALU: 6, FMA: 6, LSU: 33, UNIFORM: 12}
ON_FMA = ("FADD", "FMUL", "FFMA", "IMAD", "HFMA2", "UIMAD")
TENSOR_RATE = 512  #: multiply-adds a clock of a scheduler's tensor core
SHARED_RATE = 128  #: bytes a clock, of all four
POLICY_RR = True
SHARE = 1.0
DRAIN = 32  #: clocks from a product's last multiply-add to the warp that waits for it
BARRIER = 24  #: clocks from a barrier's last arrival to those who wait


class Instruction(NamedTuple):
    op: str
    text: str
    stall: int
    sets: tuple[int, ...]  #: scoreboards
    waits: int  #: mask of scoreboards


class Product(NamedTuple):
    clocks: float
    registers: bool  #: the left operand is in registers


def pipe(op: str) -> str:
    name = op.split(".")[0]
    if name == "MUFU":
        return MUFU
    if name in ("LDS", "STS", "LDG", "STG", "SYNCS", "LDC", "S2R"):
        return LSU
    if name == "R2UR" or name.startswith("U"):
        return UNIFORM
    return FMA if name.startswith(ON_FMA) else ALU


def decode(line: str, more: str) -> Instruction | None:
    """Of the two lines that nvdisasm -hex prints of an instruction; the second has its control bits."""
    found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;\s*/\*", line)
    word = re.search(r"/\* 0x([0-9a-f]{16}) \*/", more)
    if not found or not word:
        return None
    text = found[1]
    control = int(word[1], 16) >> 41
    stall, write, read, waits = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
    op = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
    return Instruction(op, text, stall, tuple(b for b in (write, read) if b < 6), waits)


def trace(loop: str, logits: int, form: str) -> list[Instruction]:
    """The shortest way around a main loop through the block of code that has this form of the terms."""
    steps: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = loop.splitlines()
    for line, more in zip(lines, [*lines[1:], ""], strict=True):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(steps)
        elif step := decode(line, more):
            steps.append(step)
    leaders = sorted({*labels.values(), 0, len(steps)})
    forms = []
    for start, end in zip(leaders, leaders[1:], strict=False):
        special = [s.op for s in steps[start:end] if s.op.startswith("MUFU")]
        if sum(op == "MUFU.EX2" for op in special) >= logits:
            forms.append((len(special), end - start, start, end))
    bounded, rest = min(forms), sorted(forms[:], key=lambda f: f[1])
    start, end = {"bounded": bounded, "any": [f for f in rest if f != bounded][1 if len(rest) > 2 else 0]}[form][2:]

    def way(first: int, last: int) -> list[int]:
        heap, seen = [(0, first, [first])], set()
        while heap:
            cost, at, path = heapq.heappop(heap)
            if at == last:
                return path
            if at in seen:
                continue
            seen.add(at)
            target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", steps[at].text)
            following = [labels[target[1]]] if target and target[1] in labels else []
            if not target or steps[at].text.startswith("@"):
                following.append(at + 1)
            for n in following:
                if n < len(steps) and n > at:
                    heapq.heappush(heap, (cost + 1, n, [*path, n]))
        raise ValueError("no way through the loop")

    path = way(0, start)[:-1] + list(range(start, end - 1)) + way(end - 1, len(steps) - 1)
    return [steps[i] for i in path]


class Warp:
    def __init__(self, steps: list[Instruction]) -> None:
        self.steps = steps
        self.at = self.rounds = 0
        self.ready = 0.0
        self.boards = [0.0] * 6  #: when each is clear
        self.queue: deque[tuple[float, bool]] = deque()  #: clocks of products, and which end a group
        self.open_groups = 0
        self.drained = 0.0
        self.turns: deque[float] = deque()  #: times of turns given and not taken


class Machine:
    """A scheduler, its pipes and its tensor core."""

    def __init__(self, steps: list[Instruction], consumers: int, law: str, depth: int) -> None:
        self.warps = [Warp(steps) for _ in range(consumers)]
        self.warps[0].turns.append(0.0)
        self.law, self.depth = law, depth
        self.free = dict.fromkeys(BUSY, 0.0)
        self.order: deque[Warp] = deque()  #: of products, as issued
        self.serving: Warp | None = None
        self.left = 0.0
        self.tensor = self.issued = self.idle = self.eligible = 0
        self.last: Warp | None = None
        self.ends: list[list[float]] = [[] for _ in self.warps]

    def step_tensor(self, now: float) -> None:
        if self.serving is None:
            if not self.order:
                return
            if self.law == "fifo":
                self.serving = self.order.popleft()
            else:
                others = [w for w in self.order if w is not self.last]
                self.serving = others[0] if others else self.order[0]
                self.order.remove(self.serving)
            self.last = self.serving
            self.left += self.serving.queue[0][0]
        self.tensor += 1
        self.left -= 1
        if self.left <= 0:
            warp, self.serving = self.serving, None
            if warp.queue.popleft()[1]:
                warp.open_groups -= 1
                warp.drained = now + DRAIN

    def may_issue(self, warp: Warp, now: float) -> bool:
        step = warp.steps[warp.at]
        if now < warp.ready or any(step.waits >> b & 1 and now < warp.boards[b] for b in range(6)):
            return False
        if step.op.startswith("HGMMA"):
            return self.depth == 0 or len(warp.queue) < self.depth
        if step.op.startswith("WARPGROUP.DEPBAR"):
            most = int(step.text.split(",")[1], 16)
            return warp.open_groups < most or (warp.open_groups == most and now >= warp.drained)
        if step.op.startswith("BAR.SYNC"):
            return bool(warp.turns) and now >= warp.turns[0] + BARRIER
        return now >= self.free[pipe(step.op)]

    def issue(self, number: int, now: float) -> None:
        warp = self.warps[number]
        step = warp.steps[warp.at]
        if step.op.startswith("HGMMA"):
            last = "gsb0" in step.text
            warp.queue.append((product_clocks(step), last))
            warp.open_groups += last
            self.order.append(warp)
        elif step.op.startswith("BAR.SYNC"):
            warp.turns.popleft()
        elif step.op.startswith("BAR.ARV"):
            self.warps[(number + 1) % len(self.warps)].turns.append(now)
        kind = pipe(step.op)
        self.free[kind] = max(now, self.free[kind]) + BUSY[kind]
        for board in step.sets:
            warp.boards[board] = max(warp.boards[board], now + LATENCY[kind])
        warp.ready = now + max(step.stall, 1)
        warp.at += 1
        if warp.at == len(warp.steps):
            warp.at = 0
            warp.rounds += 1
            self.ends[number].append(now)

    def run(self, rounds: int) -> dict[str, float]:
        now, first, credit = 0.0, 0, 0.0
        start: tuple[float, int, int, int, int] | None = None
        while min(w.rounds for w in self.warps) < rounds:
            busy = self.tensor
            self.step_tensor(now)
            credit = min(credit, 1) + (SHARE if self.tensor > busy else 1)
            ready = [i for i in range(len(self.warps)) if self.may_issue(self.warps[i], now)]
            if ready and credit < 1:
                self.idle += 1
            elif ready:
                credit -= 1
                choice = first if first in ready and not POLICY_RR else min(ready, key=lambda i: (i - first - 1) % len(self.warps))
                first = choice
                self.issue(choice, now)
                self.issued += 1
                self.eligible += len(ready)
            else:
                self.idle += 1
            now += 1
            if start is None and min(w.rounds for w in self.warps) == 4:
                start = (now, self.issued, self.idle, self.tensor, self.eligible)
            if now > 1e6:
                raise ValueError("the replay hangs")
        assert start is not None
        clocks = now - start[0]
        return {"clocks": clocks / (rounds - 4), "issued": (self.issued - start[1]) / clocks,
                "idle": (self.idle - start[2]) / clocks, "tensor": (self.tensor - start[3]) / clocks,
                "eligible": (self.eligible - start[4]) / clocks}


def product_clocks(step: Instruction) -> float:
    shape = re.search(r"64x(\d+)x16", step.op)
    assert shape
    n = int(shape[1])
    shared = n * 32 + (0 if ".tnspB" in step.text else 2048)
    return max(16 * n * 16 / TENSOR_RATE, shared / SHARED_RATE)


def main_code(cubin: Path) -> tuple[str, str]:
    code = subprocess.run([tool("nvdisasm"), "-c", "-hex", cubin], capture_output=True, text=True, check=True).stdout
    part = re.split(r"^\s*\.section\s+\.text\.", code, flags=re.MULTILINE)[1]
    return kernel_name(re.split(r"[\s,]", part, maxsplit=1)[0]), main_loop(part)
