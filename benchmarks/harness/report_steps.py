# SPDX-License-Identifier: Apache-2.0
"""The tables of step.json and accuracy.json in Markdown, for docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness.tables import (
    LOSSES,
    SHORT,
    Row,
    data_files,
    lines_of_table,
    machine_line,
    milliseconds,
    source_line,
)


def performance_step() -> str:
    return "\n\n".join(step_report(path) for path in data_files("step")) or "No data yet."


def step_report(path: Path) -> str:
    data = json.loads(path.read_text())
    text = f"{machine_line(data)}. {source_line(path, data)}. Time of the loss, forward and backward, and its share."
    late = f"Over budget: {'; '.join(data['over_budget'])}." if data["over_budget"] else ""
    return "\n".join([text, "", *lines_of_table(*step_table(data["results"])), *(["", late] if late else [])])


def step_table(results: list[Row]) -> tuple[list[str], list[list[str]]]:
    """(head, rows)"""
    cases: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in results:
        cases.setdefault((row["model"], row["image_size"], row["batch"]), {})[row["contender"]] = row
    names = list(dict.fromkeys(n for contenders in cases.values() for n in contenders))
    rows = []
    for (model, pixels, batch), contenders in sorted(cases.items()):
        rest = next((r["rest_ms"] for r in contenders.values() if r["status"] == "ok"), None)
        cells = [step_cell(contenders.get(n)) for n in names]
        rows.append([model, str(pixels), f"{batch:,}", "–" if rest is None else milliseconds(rest), *cells])
    return ["network", "pixels", "batch", "all but the loss", *names], rows


def step_cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{milliseconds(row['loss_ms'])}, {100 * row['share']:.2g} %" if row["status"] == "ok" else row["status"]


def performance_accuracy() -> str:
    return "\n\n".join(accuracy_report(path) for path in data_files("accuracy")) or "No data yet."


def accuracy_report(path: Path) -> str:
    data = json.loads(path.read_text())
    parts = [f"{machine_line(data)}. {source_line(path, data)}. Relative error of the loss / of the gradient."]
    parts += ["\n".join(lines_of_table(*table)) for table in accuracy_tables(data["results"])]
    if data["over_budget"]:
        parts.append(f"Over budget: {'; '.join(data['over_budget'])}.")
    return "\n\n".join(parts)


def accuracy_tables(results: list[Row]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """(head, rows) of each loss."""
    for loss, (name, letter) in LOSSES.items():
        mine = [r for r in results if r["loss"] == loss]
        if not mine:
            continue
        scales = list(dict.fromkeys(r["scale"] for r in mine))
        found: dict[tuple[str, str], dict[float, Row]] = {}
        for row in mine:
            found.setdefault((row["dtype"], row["contender"]), {})[row["scale"]] = row
        rows = [
            [SHORT[dtype], contender, *(error_cell(cells.get(s)) for s in scales)]
            for (dtype, contender), cells in found.items()
        ]
        shape = f"{name}, {letter} = {mine[0]['rows']}, D = {mine[0]['dim']}"
        yield [shape, "", *(f"τ = {1 / s:.2g}" if loss == "mio" else f"scale {s:g}" for s in scales)], rows


def error_cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{row['loss_error']:.0e} / {row['gradient_error']:.0e}" if row["status"] == "ok" else row["status"]
