# SPDX-License-Identifier: Apache-2.0
"""What all reports share: the data files under benchmarks/results/, their cases, and how a figure is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.paths import RESULTS, ROOT

PLOT_NAMES = ("time", "memory", "share", "speedup")  #: plots.py draws one of each per device
LOSSES = {"mio": ("MIO", "N"), "siglip": ("SigLIP", "B")}
SHORT = {"float32": "float32", "bfloat16": "bf16", "float16": "fp16", "float64": "float64"}

Row = dict[str, Any]
CaseKey = tuple[Any, ...]  #: the values of CASE
Cases = dict[CaseKey, dict[str, Row]]  #: contender -> row
CASE = ("loss", "rows", "dim", "dtype", "direction")


def is_ours(name: str) -> bool:
    return name.startswith("mio_ext")


def data_files(kind: str) -> list[Path]:
    """Those of every device, GPUs first."""
    files = sorted(RESULTS.glob(f"*/{kind}.json"))
    return sorted(files, key=lambda path: json.loads(path.read_text()).get("device_type") != "cuda")


def by_case(rows: Iterable[Row]) -> Cases:
    """case -> contender -> row, in the order of the file; of a contender timed twice, the faster run."""
    cases: Cases = {}
    for row in rows:
        contenders = cases.setdefault(tuple(row[k] for k in CASE), {})
        known = contenders.get(row["contender"], row)
        contenders[row["contender"]] = min(known, row, key=lambda r: r.get("median_ms", math.inf))
    return cases


def our_best(contenders: dict[str, Row]) -> Row | None:
    """The fastest of our backends."""
    ours = [r for name, r in contenders.items() if is_ours(name) and r["status"] == "ok"]
    return min(ours, key=lambda r: r["median_ms"], default=None)


def our_row(contenders: dict[str, Row]) -> Row | None:
    """The fastest of our backends, or what became of one of them."""
    return our_best(contenders) or next((r for name, r in contenders.items() if is_ours(name)), None)


def other_backends(cases: Cases) -> list[str]:
    """Our backends, but for the one that is the fastest most often."""
    names = [n for contenders in cases.values() for n in contenders if is_ours(n)]
    best = [ours["contender"] for contenders in cases.values() if (ours := our_best(contenders))]
    usual = max(best, key=best.count, default=None)
    return [n for n in dict.fromkeys(names) if n != usual]


def milliseconds(value: float) -> str:
    if value < 0.095:
        return f"{1e3 * value:.2g} µs"
    if value < 1:
        return f"{value:.2f} ms"
    if value < 1000:
        return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"
    return f"{value / 1e3:.3g} s" if value < 1e5 else f"{value / 1e3:.0f} s"


def size(value: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g} {unit}" if value < 100 * scale else f"{value / scale:.0f} {unit}"
    return f"{value / 1e6:.1f} MB"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def times(ratio: float) -> str:
    """How many times as long as ours; bold where that is less than once."""
    text = f"{ratio:.2f}×" if ratio < 1.95 else f"{ratio:.1f}×" if ratio < 19.5 else f"{ratio:.0f}×"
    return f"**{text}**" if ratio < 1 else text


def machine_line(data: Row) -> str:
    versions = data["versions"]
    name = data["device"] + (f", {data['threads']} threads, {data['instruction_set']}" if "threads" in data else "")
    rest = ", ".join(f"{k} {v}" for k, v in versions.items() if k in ("torch", "triton"))
    host = f", host {data['host']}" if "host" in data else ""
    return f"{name}, {rest}, driver {data['driver']}{host}; commit {data['commit']}, {data['date']}"


def source_line(path: Path, data: Row) -> str:
    return f"`{data['command']}`, data in `{path.relative_to(ROOT)}`"


def lines_of_table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def text_table(head: list[str], rows: Iterable[list[str]]) -> str:
    """The same for a terminal."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def case_name(case: CaseKey) -> str:
    loss, rows, dim, dtype, direction = case
    name, letter = LOSSES[loss]
    return f"{name} {letter} = {rows:,}, D = {dim}, {SHORT[dtype]}" + (", forward" if direction == "forward" else "")


def case_order(item: tuple[CaseKey, Any]) -> CaseKey:
    loss, rows, dim, dtype, direction = item[0]
    return loss, direction != "both", list(SHORT).index(dtype), dim, rows


def time_cell(row: Row | None, ours: Row | None, memory: bool = False) -> str:
    """Time, its ratio to ours, and memory if asked for; or the reason why there is none."""
    if row is None:
        return "–"
    if row["status"] != "ok":
        return str(row["status"])
    text = milliseconds(row["median_ms"])
    if ours is not None and ours["status"] == "ok" and row is not ours:
        text += f" ({times(row['median_ms'] / ours['median_ms'])})"
    return text + (f", {size(row['peak_bytes'])}" if memory else "")


def usual_cases(data: Row, rows: list[Row], sizes: tuple[int, ...] | None = None) -> Cases:
    """Forward + backward over N in the main type, each loss at its most measured D."""
    cases = {c: v for c, v in by_case(rows).items() if c[4] == "both" and c[3] == main_type(data)}
    dims = {loss: [c[2] for c in cases if c[0] == loss] for loss in LOSSES}
    usual = {loss: max(found, key=found.count) for loss, found in dims.items() if found}
    kept = {c: v for c, v in cases.items() if c[2] == usual[c[0]] and (sizes is None or c[1] in sizes)}
    return dict(sorted(kept.items(), key=lambda item: item[0][:2]))


def main_type(data: Row) -> str:
    return "float32" if data["device_type"] == "cpu" else "bfloat16"
