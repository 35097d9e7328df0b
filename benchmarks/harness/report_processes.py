# SPDX-License-Identifier: Apache-2.0
"""Docs/distributed.md's tables: what was measured over processes, and what a ring costs on paper."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness.tables import LOSSES, data_files, lines_of_table, machine_line, milliseconds, source_line

#: Bytes a second of a GPU in one direction.
LINKS = {"400 Gbit/s": 50e9, "NVLink": 450e9}
#: Of a message, in seconds: assumed, for none of ours has crossed such a link.
LATENCY = 15e-6
#: (loss, D) -> operations a second of the sweep on an H100 in bfloat16, N = B = 65,536 (its loss.json).
RATES = {("mio", 128): 483e12, ("siglip", 768): 402e12}
PROCESSES = (8, 64, 1024)
BATCHES = (512, 2048, 8192)


def measured() -> str:
    return "\n\n".join(measured_on(path) for path in data_files("processes")) or "No data yet."


def measured_on(path: Path) -> str:
    data = json.loads(path.read_text())
    rows = []
    for r in data["results"]:
        name = LOSSES[r["loss"]][0]
        cells = [name, str(r["processes"]), f"{r['rows']:,}", str(r["dim"]), r["contender"]]
        rows.append([*cells, milliseconds(r["median_ms"]), f"{r['held_bytes'] / 1e6:.2f} MB"])
    head = ["loss", "processes", "rows of each", "D", "contender", "forward + backward", "tensors held"]
    text = f"{machine_line(data)}, Gloo, a thread a process. {source_line(path, data)}."
    return "\n".join([text, "", *lines_of_table(head, rows)])


def step_of_the_ring(loss: str, b: int, dim: int, link: float) -> tuple[float, float]:
    """Seconds of a block's sweep, and of its way to the next process; b samples a process, 16-bit features."""
    if loss == "mio":  # 2b rows against 2b columns, logits and row gradient
        return 2 * 2 * (2 * b) ** 2 * dim / RATES[loss, dim], LATENCY + 2 * b * dim * 2 / link
    return 3 * 2 * b**2 * dim / RATES[loss, dim], LATENCY + b * dim * (2 + 4) / link  # with a float32 gradient


def memory(loss: str, b: int, dim: int, processes: int) -> tuple[float, float]:
    """Bytes a process holds beside its own rows and gradients, gathered and in a ring."""
    if loss == "mio":
        return processes * 2 * b * dim * 2, 2 * 2 * b * dim * 2  # all columns; a block and the next
    return processes * b * dim * (2 + 4), 2 * b * dim * (2 + 4)


def on_paper() -> str:
    """A line for every loss and batch: the two times of a block, and memory by the number of processes."""
    rows = []
    for loss, dim in RATES:
        for b in BATCHES:
            sweep, *ways = (
                step_of_the_ring(loss, b, dim, 1)[0],
                *(step_of_the_ring(loss, b, dim, link)[1] for link in LINKS.values()),
            )
            cells = [LOSSES[loss][0], str(dim), f"{b:,}", microseconds(sweep)]
            cells += [f"{microseconds(way)}{'' if way <= sweep else ' (waits)'}" for way in ways]
            cells += [megabytes(memory(loss, b, dim, PROCESSES[0])[1])]
            cells += [megabytes(memory(loss, b, dim, w)[0]) for w in PROCESSES]
            rows.append(cells)
    head = ["loss", "D", "samples of each", "sweep of a block", *(f"its way, {name}" for name in LINKS)]
    head += ["held: ring", *(f"gathered, {w:,}" for w in PROCESSES)]
    return "\n".join(lines_of_table(head, rows))


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.1f} ms"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
