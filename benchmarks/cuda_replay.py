# SPDX-License-Identifier: Apache-2.0
"""How many clocks a tile of the fused Hopper kernel should take: replays the machine code of its main loop.

    FORCE_CUDA=1 python setup.py build_ext && python benchmarks/cuda_replay.py
    python benchmarks/cuda_replay.py kernel.sm_90a.cubin

One scheduler of a multiprocessor stands for all four: each has one warp of every consumer. A warp issues in order, one
instruction a clock for all warps, as the stall counts and scoreboards say that the assembler writes into every
instruction (nvdisasm -hex prints them). A pipe takes a warp's instruction for some clocks; the tensor core works on
products beside that, of the warps in turn, and holds back a warp that has two of them waiting. Tiles are always there.

How much the other pipes get done while a tensor core is busy is not documented. So each kernel is replayed thrice:
"beside" as if the two never met; "behind" with the share of issue slots, BEHIND, that gives D = 128 the 4,060 clocks of
the profile in docs/cuda.md; "after" as if all else began when the products have ended. D = 64 and 256, and the share of
clocks without a warp to issue, are then a test.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.cuda_resources import cubins, kernel_name, run, shapes
from benchmarks.harness.machine_code import main_loop, tool, voted_ways
from benchmarks.harness.paths import ROOT

#: Clocks that a warp's instruction keeps its pipe, a quarter of a multiprocessor's: by the throughputs in the CUDA
#: programming guide, 128 float32, 64 integer and 16 special results a clock. Then clocks to a result, where a
#: scoreboard tells of it.
PIPES = {"special": (8, 22), "integer": (2, 6), "float": (1, 6), "memory": (4, 33), "uniform": (2, 12)}
TENSOR_RATE = 512  #: multiply-adds a clock of a scheduler's tensor core
SHARED_RATE = 128  #: bytes a clock, for all four
QUEUE = 2  #: products of a warp that wait for the tensor core before it may issue no more
READ = 8  #: clocks until an instruction has read its operands, where a scoreboard tells of it
DRAIN, BARRIER = 32, 24  #: clocks from a product's or a barrier's end to the warp that waits for it
BESIDE, BEHIND = 1.0, 0.08
ROUNDS, WARM = 16, 4  #: tiles
FORMS = ("bounded", "capped", "any")  #: of the terms, by what is known of the logits: csrc/cuda/terms.cuh
HEAD = (
    "kernel                terms    consumers  instructions  pipes meet  clocks a tile  tensor  issued  no warp ready"
)
ROW = "{:<21} {:<8} {:>9} {:>13} {:>11} {:>14.0f} {:>6.0f}% {:>6.0f}% {:>10.0f}%"


class Instruction(NamedTuple):
    op: str
    text: str
    stall: int  #: clocks to the warp's next
    sets: tuple[tuple[int, bool], ...]  #: scoreboards, and whether until its operands are read, not the result there
    waits: tuple[int, ...]

    @property
    def pipe(self) -> str:
        name = self.op.split(".")[0]
        if name == "MUFU":
            return "special"
        if name in ("LDS", "LDC", "S2R", "SYNCS"):
            return "memory"
        if name.startswith(("U", "R2UR")):
            return "uniform"
        return "float" if name in ("FADD", "FMUL", "FFMA", "IMAD") else "integer"

    @property
    def product_clocks(self) -> float:
        """Of a product of four warps: 64 rows, of which a scheduler has 16, and its operands from shared memory."""
        n = int(re.findall(r"64x(\d+)x16", self.op)[0])
        shared = 2 * 16 * (n + (0 if ".tnspB" in self.text else 64))
        return max(16 * 16 * n / TENSOR_RATE, shared / SHARED_RATE)


def decode(line: str, more: str) -> Instruction | None:
    """Of the two lines of an instruction; the second has the control bits, 41 of its word on."""
    code = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;\s*/\*", line)
    word = re.search(r"/\* 0x([0-9a-f]{16}) \*/", more)
    if not code or not word:
        return None
    control = int(word[1], 16) >> 41
    boards = ((control >> 5 & 7, False), (control >> 8 & 7, True))
    sets = tuple((board, read) for board, read in boards if board < 6)
    waits = tuple(board for board in range(6) if control >> 11 >> board & 1)
    return Instruction(re.sub(r"^@!?U?P\w+\s+", "", code[1]).split()[0], code[1], control & 15, sets, waits)


def way(steps: list[Instruction], labels: dict[str, int], first: int, last: int) -> list[int]:
    """The shortest from one instruction to a later one, the first left out: jumps over what is rarely done."""
    ways: dict[int, list[int]] = {first: []}
    for at in range(first, last):
        if at not in ways:
            continue
        jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", steps[at].text)
        following = [] if jump and not steps[at].text.startswith("@") else [at + 1]
        if jump and jump[1] in labels:
            following.append(labels[jump[1]])
        for to in following:
            if at < to <= last and (to not in ways or len(ways[to]) > len(ways[at]) + 1):
                ways[to] = [*ways[at], to]
    return ways[last]


def parse(loop: str) -> tuple[list[Instruction], dict[str, int]]:
    """Its instructions, and which of them labels name."""
    steps: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = loop.splitlines()
    for line, more in zip(lines, [*lines[1:], ""], strict=True):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(steps)
        elif step := decode(line, more):
            steps.append(step)
    return steps, labels


def labelled_traces(loop: str, logits: int) -> Iterator[tuple[str, list[Instruction]]]:
    """Once around a main loop with ids, where no group of logits has a positive pair, and where all have."""
    steps, _ = parse(loop)
    _, capped, other, _ = sorted(
        voted_ways(loop, logits // 8, 1), key=lambda ways: len(ways[0])
    )  # without the loss; crossed
    for name, way in (("capped", capped[0]), ("any", other[0]), ("positive", other[1])):
        yield name, [steps[i] for i in way[:-1]]  # as all of them, without the jump back


def trace(loop: str, logits: int, form: str) -> list[Instruction]:
    """Once around a main loop, with one form of the terms: each is a block of code with all logits, or half."""
    steps, labels = parse(loop)
    starts = sorted({0, *labels.values()})
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
        special = [step.op for step in steps[start:end] if step.pipe == "special"]
        blocks.append((special.count("MUFU.EX2"), len(special), end - start, start, end))
    times = 1 if max(blocks)[0] >= logits else 2
    forms = [block[1:] for block in blocks if block[0] >= logits // times]
    each = len(forms) // times
    at, path = 0, [0]
    for i in range(0, each * times, each):
        # Bounded: fewest special functions. Without the loss, capped, any, crossed: ever more instructions.
        bounded, *others = sorted(forms[i : i + each])
        others.sort(key=lambda block: block[1])
        start, end = {"bounded": bounded, "capped": others[1], "any": others[2]}[form][2:]
        path += [*way(steps, labels, at, start), *range(start + 1, end)] if start > at else list(range(1, end))
        at = end - 1
    return [steps[i] for i in path + way(steps, labels, at, len(steps) - 1)]


class Warp:
    def __init__(self) -> None:
        self.at = self.rounds = 0
        self.ready = self.drained = 0.0
        self.boards = [0.0] * 6  #: when each is clear
        self.products: deque[tuple[float, bool]] = deque()  #: clocks, and whether it ends a group
        self.groups = 0  #: open
        self.turns: deque[float] = deque()  #: that it was given and has not taken


class Scheduler:
    def __init__(self, steps: list[Instruction], consumers: int, share: float, products: float = 1.0) -> None:
        self.steps, self.share, self.products = steps, share, products
        self.warps = [Warp() for _ in range(consumers)]
        self.warps[0].turns.append(0.0)
        self.warps_by_turn = list(self.warps)
        self.free = dict.fromkeys(PIPES, 0.0)
        self.order: deque[Warp] = deque()  #: of products
        self.serving: Warp | None = None
        self.served = self.warps[-1]
        self.left = 0.0
        self.tensor = self.issued = self.idle = 0

    def multiply(self, now: float) -> bool:
        """A clock of the tensor core."""
        if self.serving is None:
            if not self.order:
                return False
            self.serving = next((warp for warp in self.order if warp is not self.served), self.order[0])
            self.order.remove(self.serving)
            self.served = self.serving
            self.left += self.serving.products[0][0]
        self.left -= 1
        if self.left <= 0:
            warp, self.serving = self.serving, None
            if warp.products.popleft()[1]:
                warp.groups -= 1
                warp.drained = now + DRAIN
        return True

    def may_issue(self, warp: Warp, now: float) -> bool:
        step = self.steps[warp.at]
        if now < warp.ready or any(now < warp.boards[board] for board in step.waits):
            return False
        if step.op.startswith("HGMMA"):
            return len(warp.products) < QUEUE
        if step.op.startswith("WARPGROUP.DEPBAR"):
            most = int(step.text.split(",")[1], 16)
            return warp.groups < most or (warp.groups == most and now >= warp.drained)
        if step.op.startswith("BAR.SYNC"):
            return bool(warp.turns) and now >= warp.turns[0] + BARRIER
        return now >= self.free[step.pipe]

    def issue(self, warp: Warp, now: float) -> None:
        step = self.steps[warp.at]
        if step.op.startswith("HGMMA"):
            ends = "gsb0" in step.text
            warp.products.append((self.products * step.product_clocks, ends))
            warp.groups += ends
            self.order.append(warp)
        elif step.op.startswith("BAR.SYNC"):
            warp.turns.popleft()
        elif step.op.startswith("BAR.ARV"):
            self.warps[(self.warps.index(warp) + 1) % len(self.warps)].turns.append(now)
        busy, latency = PIPES[step.pipe]
        self.free[step.pipe] = max(now, self.free[step.pipe]) + busy
        for board, read in step.sets:
            warp.boards[board] = max(warp.boards[board], now + (READ if read else latency))
        warp.ready = now + max(step.stall, 1)
        warp.rounds, warp.at = divmod(warp.rounds * len(self.steps) + warp.at + 1, len(self.steps))

    def run(self) -> tuple[float, ...]:
        """Clocks a round; of these the tensor core busy, instructions issued, and no warp ready, in percent."""
        now, slots = 0, 0.0
        start = (0, 0, 0, 0)
        while (rounds := min(warp.rounds for warp in self.warps)) < ROUNDS:
            if rounds == WARM and not start[0]:
                start = (now, self.tensor, self.issued, self.idle)
            busy = self.multiply(now)
            self.tensor += busy
            slots = min(slots, 1) + (self.share if busy else 1)
            ready = [warp for warp in self.warps_by_turn if self.may_issue(warp, now)] if slots >= 1 else []
            if ready:
                self.issue(ready[0], now)
                self.warps_by_turn.remove(ready[0])
                self.warps_by_turn.append(ready[0])
                self.issued += 1
                slots -= 1
            else:
                self.idle += 1
            now += 1
            if now > 10000 * ROUNDS:
                raise ValueError("the replay hangs: a barrier or a product that never comes")
        clocks = now - start[0]
        of = (100 * (end - begin) / clocks for begin, end in zip(start[1:], self.counts(), strict=True))
        return (clocks / (ROUNDS - WARM), *of)

    def counts(self) -> tuple[int, int, int]:
        return self.tensor, self.issued, self.idle


def replayed(steps: list[Instruction], consumers: int, meet: str) -> tuple[float, ...]:
    """As Scheduler.run(), with what is assumed of tensor cores and other pipes."""
    if meet != "after":
        return Scheduler(steps, consumers, BESIDE if meet == "beside" else BEHIND).run()
    clocks, _, issued, _ = Scheduler(steps, consumers, BESIDE, products=0).run()
    tensor = consumers * sum(step.product_clocks for step in steps if step.op.startswith("HGMMA"))
    share = clocks / (clocks + tensor)
    return clocks + tensor, 100 * (1 - share), issued * share, 100 - issued * share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="objects, or .cubin files (default what setup.py built)")
    paths = parser.parse_args().paths or sorted(ROOT.glob("build/temp*/csrc/cuda/instantiate/hopper.o"))
    if not paths:
        sys.exit("cuda_replay: no CUDA objects under build/; run: FORCE_CUDA=1 python setup.py build_ext")
    tiles = shapes()
    print(HEAD)
    for cubin in cubins(paths):
        code = run(tool("nvdisasm"), "-c", "-hex", cubin)
        for part in re.split(r"^\s*\.section\s+\.text\.", code, flags=re.MULTILINE)[1:]:
            name = kernel_name(re.split(r"[\s,]", part, maxsplit=1)[0])
            if not name.startswith("hopper") or "HGMMA" not in part:
                continue
            shape = tiles[name.removesuffix(" ids")]
            consumers = (shape.threads - 128) // 128
            loop = main_loop(part)
            if name.endswith("ids"):
                forms = labelled_traces(loop, shape.logits)
            else:
                forms = ((form, trace(loop, shape.logits, form)) for form in FORMS)
            for form, steps in forms:
                for meet in ("beside", "behind", "after"):
                    found = replayed(steps, consumers, meet)
                    print(ROW.format(name, form, consumers, len(steps), meet, *found), flush=True)


if __name__ == "__main__":
    main()
