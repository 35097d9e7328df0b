# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/loss.py measures, in which order, and what it need not even try."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from benchmarks.harness.contenders import LOSSES
from benchmarks.harness.tables import is_ours

ROWS = [256, 1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144]  # N = 2 B of MIO, B of SigLIP
DIMS = [64, 128, 256, 512, 768, 1152]
DTYPES = ["float32", "bfloat16", "float16"]
DIM = {"mio": 128, "siglip": 768}  #: the usual one


class Case(NamedTuple):
    loss: str
    rows: int
    dim: int
    dtype: str = "float32"
    direction: str = "both"  # forward and backward, or "forward"

    @property
    def gradient(self) -> bool:
        return self.direction == "both"

    def __str__(self) -> str:
        return ":".join(map(str, self))


class Limits(NamedTuple):
    """What one contender may take of one case."""

    seconds: float  #: of timed steps, beyond the first MIN_STEPS
    step: float  #: seconds of a peer's step; ours has the rest of the budget
    memory: float  #: bytes


def parse_case(text: str) -> Case:
    loss, rows, dim, *rest = text.split(":")
    case = Case(loss, int(rows), int(dim), *rest)
    if loss not in LOSSES or case.dtype not in DTYPES or case.direction not in ("both", "forward"):
        raise ValueError(text)
    if case.rows < 4 or case.rows % 2 or case.dim < 1:
        raise ValueError(text)
    return case


#: Of a GPU, whose time is short: the ends of the range and what is known to be weak, before the rest of the grid.
TELLING = [
    *(Case("mio", n, 128, "bfloat16") for n in (65_536, 8192, 256)),
    *(Case("siglip", n, 768, "bfloat16") for n in (65_536, 16_384, 4096)),
    *(Case("mio", 65_536, 128, "float32"), Case("mio", 32_768, 256, "bfloat16"), Case("mio", 16_384, 128, "float16")),
    *(Case("mio", 32_768, 128, "bfloat16"), Case("mio", 1024, 128, "bfloat16"), Case("mio", 8192, 128, "float32")),
]


def all_cases(device: str) -> list[Case]:
    """Every combination, the most interesting first: over N, D, types and directions around the usual ones."""
    main = ["float32"] if device == "cpu" else ["bfloat16", "float32"]
    reach = {"mio": 65_536, "siglip": 16_384} if device == "cpu" else dict.fromkeys(LOSSES, ROWS[-1])
    some = 1024 if device == "cpu" else 4096  # rows where 4096 take too long: float16, and SigLIP where D varies

    def usual(loss: str, rows: int, dtype: str = main[0], direction: str = "both") -> Case:
        return Case(loss, rows, DIM[loss], dtype, direction)

    cases = list(TELLING) if device == "cuda" else []
    cases += [usual(loss, n, t) for n in ROWS for t in main for loss in LOSSES if n <= reach[loss]]
    cases += [usual(loss, 4096, "bfloat16") for loss in LOSSES] + [usual("mio", 8192, "bfloat16")]
    cases += [usual(loss, some, "float16") for loss in LOSSES]
    cases += [Case(loss, 4096 if loss == "mio" else some, d, main[0]) for loss in LOSSES for d in DIMS]
    cases += [usual("mio", n, direction="forward") for n in (1024, 8192)]
    cases += [usual("siglip", n, direction="forward") for n in (1024, 4096)]
    cases += [usual("mio", n) for n in ROWS]
    rest = (Case(*c) for c in itertools.product(LOSSES, ROWS, DIMS, DTYPES, ("both", "forward")))
    return list(dict.fromkeys([*cases, *sorted(rest, key=lambda c: (c.rows**2 * c.dim, c))]))


class History:
    """What steps took so far, to foretell a larger one: time grows with N²·D, memory of dense forms with N²."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str, str], list[tuple[Case, float, float]]] = {}

    def add(self, name: str, case: Case, seconds: float, memory: float) -> None:
        self.seen.setdefault((name, case.loss, case.direction), []).append((case, seconds, memory))

    def expected(self, name: str, case: Case) -> tuple[float, float] | None:
        """(seconds, bytes) of a step, from the measured case most like it; None if there is none."""
        seen = self.seen.get((name, case.loss, case.direction))
        if name == "paper" and case.loss == "mio":  # known before anything has run: six N × N × D tensors
            memory = 6.0 * case.rows**2 * case.dim * getattr(torch, case.dtype).itemsize
        else:
            memory = 0.0
        if not seen:
            return (0.0, memory) if memory else None

        def distance(entry: tuple[Case, float, float]) -> float:
            near = entry[0]
            return (
                2 * abs(math.log(near.rows / case.rows))
                + abs(math.log(near.dim / case.dim))
                + (near.dtype != case.dtype)
            )

        near, seconds, used = min(seen, key=distance)
        grown = (case.rows / near.rows) ** 2
        return seconds * grown * case.dim / near.dim, memory or used * (grown if grown > 1 else 1)

    def refusal(self, name: str, case: Case, limits: Limits, left: float) -> dict[str, str] | None:
        """Status and reason if ``name`` need not be tried at all."""
        expected = self.expected(name, case)
        if expected is None:
            return None
        seconds, memory = expected
        limit = left if is_ours(name) else limits.step
        if seconds > limit:
            return {"status": "over budget", "reason": f"a step would take about {seconds:.0f} s of {limit:.0f} s"}
        if memory > limits.memory and not is_ours(name):
            return {
                "status": "out of memory",
                "reason": f"a step would take about {memory / 1e9:.0f} GB of {limits.memory / 1e9:.0f} GB",
            }
        return None
