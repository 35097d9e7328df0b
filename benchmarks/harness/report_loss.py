# SPDX-License-Identifier: Apache-2.0
"""The tables of a loss.json in Markdown: a short one for README.md, all of it for docs/performance.md."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks.harness import report_kernels
from benchmarks.harness.tables import (
    LOSSES,
    PLOT_NAMES,
    SHORT,
    Cases,
    Row,
    by_case,
    case_name,
    case_order,
    data_files,
    is_ours,
    lines_of_table,
    machine_line,
    main_type,
    milliseconds,
    other_backends,
    our_best,
    our_row,
    percent,
    size,
    source_line,
    time_cell,
    times,
    usual_cases,
)

README_SIZES = {"cpu": (256, 1024, 8192, 65_536, 262_144), "cuda": (256, 1024, 4096, 8192, 16_384, 32_768, 65_536)}
README_PEERS = ("eager", "torch.compile", "paper", "open_clip", "siglip-kernel")


def readme_loss() -> str:
    return "\n\n".join(readme_loss_table(path) for path in data_files("loss"))


def claim() -> str:
    """A line a machine: the largest batch of MIO that eager PyTorch was timed at, and what both take."""
    lines = []
    for path in data_files("loss"):
        data = json.loads(path.read_text())
        shown = usual_cases(data, data["results"])
        cases = [(c, v) for c, v in shown.items() if c[0] == "mio" and v.get("eager", {}).get("status") == "ok"]
        (_, n, dim, dtype, _), contenders = max(cases, key=lambda case: case[0][1:3])
        ours, eager = our_row(contenders), contenders["eager"]
        lines.append(
            f"- **{data['device']}**, N = {n:,}, D = {dim}, {dtype}: loss and gradient in "
            f"**{time_cell(ours, None, memory=True)}**; the best dense PyTorch takes "
            f"{time_cell(eager, ours, memory=True)}."
        )
    return "\n".join(lines)


def readme_loss_table(path: Path) -> str:
    data = json.loads(path.read_text())
    shown = usual_cases(data, data["results"], README_SIZES[data["device_type"]])
    names = [*other_backends(shown), *README_PEERS]
    names = [n for n in names if any(n in contenders for contenders in shown.values())]
    rows = []
    for (loss, n, dim, *_), contenders in shown.items():
        ours = our_row(contenders)
        name, letter = LOSSES[loss]
        cells = [time_cell(contenders.get(other), ours, memory=True) for other in names]
        rows.append([name, f"{letter} = {n:,}, D = {dim}", time_cell(ours, None, memory=True), *cells])
    text = f"{machine_line(data)}. {main_type(data)}, forward + backward, medians; {source_line(path, data)}."
    table = lines_of_table(["loss", "size", "mio_ext", *names], rows)
    notes = [f"- {note}" for note in data.get("notes", [])]
    return "\n".join([text, "", *table, "", losses(data), *(["", *notes] if notes else [])])


def losses(data: Row) -> str:
    """In how many of the cases where another was timed somebody is faster, and which those are."""
    compared, lost = 0, []
    for case, contenders in by_case(data["results"]).items():
        ours = our_best(contenders)
        peers = [r for n, r in contenders.items() if r["status"] == "ok" and not is_ours(n)]
        if ours is None or not peers:
            continue
        compared += 1
        best = min(peers, key=lambda r: r["median_ms"])
        if best["median_ms"] < ours["median_ms"]:
            lost.append(f"{case_name(case)} ({best['contender']} {best['median_ms'] / ours['median_ms']:.2f}×)")
    where = f"of the {compared} cases where anything else was timed"
    if not lost:
        return f"Nothing was faster than mio_ext in any {where}."
    return f"Something was faster than mio_ext in {len(lost)} {where}: {'; '.join(lost)}."


def performance_loss() -> str:
    return "\n\n".join(loss_report(path) for path in data_files("loss")) or "No data yet."


def loss_report(path: Path) -> str:
    data = json.loads(path.read_text())
    cases = by_case(data["results"])
    name = path.parent.name
    parts = [f"### {data['device']}", f"{machine_line(data)}.\n{source_line(path, data)}."]
    parts.append("\n".join(f"![{plot}](plots/{name}-{plot}.png)" for plot in PLOT_NAMES))
    parts += [rates_text(data), "\n".join(summary_table(cases)), losses(data)]
    for loss in LOSSES:
        mine = {c: v for c, v in sorted(cases.items(), key=case_order) if c[0] == loss}
        if mine:
            parts.append("\n".join(lines_of_table(*time_table(loss, mine))))
    parts.append("Peak memory of a step beyond its inputs:")
    for loss in LOSSES:
        mine = {c: v for c, v in usual_cases(data, data["results"]).items() if c[0] == loss}
        if mine:
            parts.append("\n".join(memory_table(loss, mine)))
    notes = "\n".join(f"- {note}" for note in data.get("notes", []))
    parts += [not_measured(data), *([notes] if notes else [])]
    return "\n\n".join([*parts, *report_kernels.sections(path.parent)])


def rates_text(data: Row) -> str:
    """The machine's rates, as the range over the cases: they are measured anew beside each."""
    rows = [r for r in data["results"] if r["status"] == "ok"]
    parts = []
    for dtype in SHORT:
        mine = [r for r in rows if r["dtype"] == dtype]
        if mine:
            loops = [r["multiply_add"] for r in mine if r["multiply_add"]]
            loop = f", multiply-adds on registers {span(loops)}" if loops else ""
            parts.append(f"{dtype}: library product {span([r['library'] for r in mine])}{loop} GFLOP/s")
    common = (
        f"{span([r['special'] for r in rows])} · 10⁹ exponentials/s, copy {span([r['bandwidth'] for r in rows])} GB/s"
    )
    return f"Measured beside the cases (range): {'; '.join([*parts, common])}."


def span(values: list[float]) -> str:
    low, high = (f"{v:.3g}" if v < 1000 else f"{v:,.0f}" for v in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def summary_table(cases: Cases) -> list[str]:
    """Per contender and loss: over all cases, how many times as long as ours."""
    ratios: dict[tuple[str, str], list[float]] = {}
    missing: dict[tuple[str, str], dict[str, int]] = {}
    for case, contenders in cases.items():
        ours = our_best(contenders)
        for name, row in contenders.items():
            key = (case[0], name)
            if is_ours(name):
                continue
            if row["status"] != "ok":
                missing.setdefault(key, {}).setdefault(row["status"], 0)
                missing[key][row["status"]] += 1
            elif ours is not None:
                ratios.setdefault(key, []).append(row["median_ms"] / ours["median_ms"])
    rows = []
    for key in dict.fromkeys([*ratios, *missing]):
        found = ratios.get(key, [])
        mean = math.exp(sum(map(math.log, found)) / len(found)) if found else None
        cells = [times(min(found)), times(mean), times(max(found))] if mean else ["–"] * 3
        lost = f"{sum(r < 1 for r in found)} of {len(found)}"
        why = ", ".join(f"{n} {status}" for status, n in missing.get(key, {}).items()) or "–"
        rows.append([LOSSES[key[0]][0], key[1], *cells, lost, why])
    rows.sort(key=lambda row: row[0])
    head = ["loss", "time of … ÷ mio_ext", "least", "geometric mean", "most", "faster than us", "not timed"]
    return lines_of_table(head, rows)


def time_table(loss: str, cases: Cases) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a case's time, its share of the floor, and how many times as long others take."""
    others = other_backends(cases)
    others += dict.fromkeys(n for contenders in cases.values() for n in contenders if not is_ours(n))
    name, letter = LOSSES[loss]
    rows = []
    for (_, n, dim, dtype, direction), contenders in cases.items():
        ours = our_row(contenders)
        share = f"{percent(ours['share'])} of {milliseconds(ours['floor_ms'])}" if ours and "share" in ours else "–"
        what = SHORT[dtype] + (", forward" if direction == "forward" else "")
        rows.append([f"{n:,}", str(dim), what, time_cell(ours, None), share])
        rows[-1] += [time_cell(contenders.get(other), ours) for other in others]
    return [f"{name}: {letter}", "D", "type", "mio_ext", "floor reached", *others], rows


def memory_table(loss: str, cases: Cases) -> list[str]:
    others = other_backends(cases)
    others += dict.fromkeys(n for contenders in cases.values() for n in contenders if not is_ours(n))
    rows = []
    for (_, n, dim, *_), contenders in cases.items():
        found = [our_row(contenders), *(contenders.get(other) for other in others)]
        cells = ["–" if r is None else size(r["peak_bytes"]) if r["status"] == "ok" else r["status"] for r in found]
        rows.append([f"{n:,}", str(dim), *cells])
    name, letter = LOSSES[loss]
    return lines_of_table([f"{name}: {letter}", "D", "mio_ext", *others], rows)


def not_measured(data: Row) -> str:
    limits, done, late = data["limits"], len(by_case(data["results"])), len(data["over_budget"])
    memory = f", {limits['memory'] / 1e9:.0f} GB" if limits["memory"] else ""
    text = f"Limits: {limits['step']:g} s for a peer's step{memory}"
    if data["budget_seconds"]:
        text += (
            f"; {data['budget_seconds']:g} s for the whole run, in which {done} of {done + late} cases found a place; "
            "the others are listed as `over_budget` in the data file."
        )
    else:
        text += f"; {done} cases."
    skipped = "; ".join(f"{name}: {reason}" for name, reason in data["skipped"].items())
    return f"{text} Not taking part: {skipped}." if skipped else text
