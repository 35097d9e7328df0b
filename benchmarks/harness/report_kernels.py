# SPDX-License-Identifier: Apache-2.0
"""What a GPU says of the kernels themselves, in Markdown: their tests, their times without PyTorch, a profile."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from benchmarks.harness.tables import Row, lines_of_table, machine_line, milliseconds, source_line

#: Field of profile.json -> how a row is called and its figure written.
PROFILE = {
    "duration_ms": ("time", "{} ms"),
    "sm_frequency_ghz": ("clock", "{} GHz"),
    "issue_slots_busy_percent": ("issue slots busy", "{} %"),
    "no_eligible_percent": ("cycles in which no warp of a scheduler could issue", "{} %"),
    "active_warps_per_scheduler": ("active warps a scheduler", "{}"),
    "busiest_pipe_percent": ("shared memory and tensor pipe", "{} %"),
    "l2_hit_rate_percent": ("hits in the L2 cache", "{} %"),
    "registers_per_thread": ("registers a thread", "{}"),
    "local_memory_spilling_requests": ("spills", "{}"),
}


def sections(folder: Path) -> list[str]:
    """Of one device, what there is."""
    parts = []
    for kind, section in (("tests", tests_section), ("kernels", kernels_section), ("profile", profile_section)):
        path = folder / f"{kind}.json"
        if path.exists():
            parts.append(section(path, json.loads(path.read_text())))
    return parts


def tests_section(path: Path, data: Row) -> str:
    """How many tests passed, by backend, and all that failed."""
    lines = [f"Tests. {machine_line(data)}; {source_line(path, data)}. {data['cpp_test']}.", ""]
    outcomes = ("passed", "failed", "skipped")
    counts = {b: Counter(r["outcome"] for r in data["results"] if r["backend"] == b) for b in ("cuda", "triton")}
    rows = [[backend, *(str(count[o]) for o in outcomes)] for backend, count in counts.items()]
    lines += [*lines_of_table(["backend", *outcomes], rows), ""]
    lines += [f"- failed: `{r['test']}`: {r['why']}" for r in data["results"] if r["outcome"] == "failed"]
    return "\n".join(lines)


def kernels_section(path: Path, data: Row) -> str:
    """Each arithmetic and kernel at each size, without PyTorch."""
    rows = []
    for r in data["results"]:
        direction = "" if r["direction"] == "both" else ", loss only"
        what = f"{r['arithmetic']}{direction}"
        floor = r["floor_ms"]
        share = f"{100 * floor / r['median_ms']:.0f} % of {milliseconds(floor)}" if floor else "–"
        cells = [f"{r['rows']:,}", str(r["dim"]), what, r["kernel"], milliseconds(r["median_ms"])]
        rows.append([*cells, f"{r['tflops']:.0f}", share])
    head = ["MIO: N", "D", "arithmetic", "kernel", "time", "TFLOP/s", "floor reached (2 units)"]
    text = f"The kernels alone, loss and gradient. {machine_line(data)}; {source_line(path, data)}."
    return "\n".join([text, "", *lines_of_table(head, rows)])


def profile_section(path: Path, data: Row) -> str:
    """A kernel a column."""
    kernels = data["results"]
    head = ["", *(f"{k['kernel']}, N = {k['rows']:,}, D = {k['dim']}, {k['arithmetic']}" for k in kernels)]
    rows = [
        [name, *(form.format(k[key]) if key in k else "–" for k in kernels)] for key, (name, form) in PROFILE.items()
    ]
    text = f"A profile. {machine_line(data)}; {source_line(path, data)}. {' '.join(data['notes'])}"
    return "\n".join([text, "", *lines_of_table(head, rows)])
