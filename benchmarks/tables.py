# SPDX-License-Identifier: Apache-2.0
"""Data files under benchmarks/results/ as text and tables in Markdown; report.py puts them where they belong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT_NAMES = ("time", "memory", "share", "speedup")  #: plots.py draws one of each per device
LOSSES = {"mio": ("MIO", "N"), "siglip": ("SigLIP", "B")}
SHORT = {"float32": "float32", "bfloat16": "bf16", "float16": "fp16", "float64": "float64"}

Row = dict[str, Any]
CASE = ("loss", "rows", "dim", "dtype", "direction")


def is_ours(name: str) -> bool:
    return name.startswith("mio_ext")


def data_files(kind: str) -> list[Path]:
    return sorted(RESULTS.glob(f"*/{kind}.json"))


def by_case(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """case -> contender -> row, in the order of the file."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[k] for k in CASE), {})[row["contender"]] = row
    return cases


def our_best(contenders: dict[str, Row]) -> Row | None:
    """The fastest of our backends."""
    ours = [r for name, r in contenders.items() if is_ours(name) and r["status"] == "ok"]
    return min(ours, key=lambda r: r["median_ms"], default=None)


def milliseconds(value: float) -> str:
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


def times(ratio: float) -> str:
    """How many times as long as ours; bold where that is less than once."""
    text = f"{ratio:.2f}×" if ratio < 1.95 else f"{ratio:.1f}×" if ratio < 19.5 else f"{ratio:.0f}×"
    return f"**{text}**" if ratio < 1 else text


def machine_line(data: Row) -> str:
    versions = data["versions"]
    name = data["device"] + (f", {data['threads']} threads, {data['instruction_set']}" if "threads" in data else "")
    rest = ", ".join(f"{k} {v}" for k, v in versions.items() if k in ("torch", "triton"))
    return f"{name}, {rest}, driver {data['driver']}; commit {data['commit']}, {data['date']}"


def source_line(path: Path, data: Row) -> str:
    return f"`{data['command']}`, data in `{path.relative_to(ROOT)}`"


def lines_of_table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def case_name(case: tuple) -> str:
    loss, rows, dim, dtype, direction = case
    name, letter = LOSSES[loss]
    return f"{name} {letter} = {rows:,}, D = {dim}, {SHORT[dtype]}" + (", forward" if direction == "forward" else "")


def time_cell(row: Row | None, ours: Row | None, memory: bool = False) -> str:
    """Time, its ratio to ours, and memory if asked for; or the reason why there is none."""
    if row is None:
        return "–"
    if row["status"] != "ok":
        return row["status"]
    text = milliseconds(row["median_ms"])
    if ours is not None and not is_ours(row["contender"]):
        text += f" ({times(row['median_ms'] / ours['median_ms'])})"
    return text + (f", {size(row['peak_bytes'])}" if memory else "")


# --- README ----------------------------------------------------------------------------------------------------------

README_SIZES = (256, 1024, 8192, 65_536, 262_144)
README_PEERS = ("eager", "torch.compile", "paper", "open_clip", "siglip-kernel")


def readme_loss() -> str:
    parts = []
    for path in data_files("loss"):
        data = json.loads(path.read_text())
        shown = usual_cases(data, data["results"], README_SIZES)
        peers = [p for p in README_PEERS if any(p in contenders for contenders in shown.values())]
        rows = []
        for (loss, n, dim, *_), contenders in shown.items():
            ours = our_best(contenders)
            name, letter = LOSSES[loss]
            cells = [time_cell(contenders.get(p), ours, memory=True) for p in peers]
            rows.append([name, f"{letter} = {n:,}, D = {dim}", time_cell(ours, None, memory=True), *cells])
        dtype = next(iter(shown))[3]
        text = f"{machine_line(data)}. {dtype}, forward + backward, medians; {source_line(path, data)}."
        parts.append(
            "\n".join([text, "", *lines_of_table(["loss", "size", "mio_ext", *peers], rows), "", losses(data)])
        )
    return "\n\n".join(parts)


def usual_cases(data: Row, rows: list[Row], sizes: tuple[int, ...] | None = None) -> dict[tuple, dict[str, Row]]:
    """Forward + backward over N in the main type, each loss at its most measured D."""
    cases = {c: v for c, v in by_case(rows).items() if c[4] == "both" and c[3] == main_type(data)}
    dims = {loss: [c[2] for c in cases if c[0] == loss] for loss in LOSSES}
    usual = {loss: max(found, key=found.count) for loss, found in dims.items() if found}
    kept = {c: v for c, v in cases.items() if c[2] == usual[c[0]] and (sizes is None or c[1] in sizes)}
    return dict(sorted(kept.items(), key=lambda item: item[0][:2]))


def main_type(data: Row) -> str:
    return "float32" if data["device_type"] == "cpu" else "bfloat16"


def losses(data: Row) -> str:
    """In how many of all cases somebody is faster, and which those are."""
    cases = by_case(data["results"])
    lost = []
    for case, contenders in cases.items():
        ours = our_best(contenders)
        if ours is None:
            continue
        faster = [r for n, r in contenders.items() if r["status"] == "ok" and not is_ours(n)]
        faster = [r for r in faster if r["median_ms"] < ours["median_ms"]]
        if faster:
            best = min(faster, key=lambda r: r["median_ms"])
            lost.append(f"{case_name(case)} ({best['contender']} {best['median_ms'] / ours['median_ms']:.2f}×)")
    measured = sum(our_best(c) is not None for c in cases.values())
    if not lost:
        return f"Nothing was faster than mio_ext in any of the {measured} cases measured."
    return f"Something was faster than mio_ext in {len(lost)} of the {measured} cases measured: {'; '.join(lost)}."


def readme_digits() -> str:
    """What the default pre-training run learnt."""
    return "\n\n".join(digits_table(path) for path in data_files("digits"))


def digits_table(path: Path) -> str:
    data = json.loads(path.read_text())
    lines = [
        f"`python train/pretrain.py`: ResNet-18 on scikit-learn's digits, {data['config']['epochs']} epochs, "
        f"seed {data['config']['seed']}; accuracy in % on the held-out test split, "
        f"few-label columns mean ± std over the same random draws; data in `{path.relative_to(ROOT)}`.",
        "",
        "| encoder | linear, 2 labels a class | 10 labels a class | all labels | 20-NN |",
        "|---|---|---|---|---|",
    ]
    for name, row in data["rows"].items():
        few = [f"{row[f'linear_{n}']:.1f} ± {row[f'linear_{n}_std']:.1f}" for n in (2, 10)]
        lines.append(f"| {name} | {few[0]} | {few[1]} | {row['linear_all']:.1f} | {row['knn']:.1f} |")
    return "\n".join(lines)


def readme_cifar() -> str:
    """MIO beside SimCLR on real photos."""
    return "\n\n".join(cifar_table(path) for path in data_files("cifar10-jpeg"))


def cifar_table(path: Path) -> str:
    data = json.loads(path.read_text())
    mio, simclr = data["mio"], data["simclr"]
    lines = [
        f"CIFAR-10 (JPEG): the {mio['images']:,} training images re-encoded as JPEG, {mio['config']['epochs']} epochs "
        f"at a setting small enough for a CPU ({mio['cpu_seconds'] / 60:.0f} minutes of one core), one run each, "
        f"seed {mio['config']['seed']} (n = 1), SimCLR with the same views, network and schedule; accuracy in % on "
        f"10,000 test images. `{mio['command']}`, data in `{path.relative_to(ROOT)}`.",
        "",
        "| encoder | linear, 1 % of the labels | 10 % | all labels | 20-NN |",
        "|---|---|---|---|---|",
    ]
    rows = {name: mio["rows"][name] for name in ("raw pixels", "untrained encoder")}
    rows |= {name: run["rows"]["pre-trained encoder"] for name, run in (("MIO", mio), ("SimCLR", simclr))}
    for name, row in rows.items():
        few = [f"{row[f'linear_{n}']:.1f} ± {row[f'linear_{n}_std']:.1f}" for n in (50, 500)]
        lines.append(f"| {name} | {few[0]} | {few[1]} | {row['linear_all']:.1f} | {row['knn']:.1f} |")
    return "\n".join(lines)


# --- docs/performance.md ---------------------------------------------------------------------------------------------


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
            parts.append("\n".join(time_table(loss, mine)))
    parts.append("Peak memory of a step beyond its inputs:")
    for loss in LOSSES:
        mine = {c: v for c, v in usual_cases(data, data["results"]).items() if c[0] == loss}
        if mine:
            parts.append("\n".join(memory_table(loss, mine)))
    return "\n\n".join([*parts, not_measured(data)])


def case_order(item: tuple[tuple, Any]) -> tuple:
    loss, rows, dim, dtype, direction = item[0]
    return loss, direction != "both", list(SHORT).index(dtype), dim, rows


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


def summary_table(cases: dict[tuple, dict[str, Row]]) -> list[str]:
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


def time_table(loss: str, cases: dict[tuple, dict[str, Row]]) -> list[str]:
    names = list(dict.fromkeys(name for contenders in cases.values() for name in contenders))
    peers = [n for n in names if not is_ours(n)]
    name, letter = LOSSES[loss]
    rows = []
    for (_, n, dim, dtype, direction), contenders in cases.items():
        ours = our_best(contenders)
        share = f"{100 * ours['share']:.0f} % of {milliseconds(ours['floor_ms'])}" if ours else "–"
        what = SHORT[dtype] + (", forward" if direction == "forward" else "")
        rows.append([f"{n:,}", str(dim), what, time_cell(ours, None), share])
        rows[-1] += [time_cell(contenders.get(p), ours) for p in peers]
    return lines_of_table([f"{name}: {letter}", "D", "type", "mio_ext", "floor reached", *peers], rows)


def memory_table(loss: str, cases: dict[tuple, dict[str, Row]]) -> list[str]:
    peers = list(dict.fromkeys(n for contenders in cases.values() for n in contenders if not is_ours(n)))
    rows = []
    for (_, n, dim, *_), contenders in cases.items():
        found = [our_best(contenders), *(contenders.get(p) for p in peers)]
        cells = ["–" if r is None else size(r["peak_bytes"]) if r["status"] == "ok" else r["status"] for r in found]
        rows.append([f"{n:,}", str(dim), *cells])
    name, letter = LOSSES[loss]
    return lines_of_table([f"{name}: {letter}", "D", "mio_ext", *peers], rows)


def not_measured(data: Row) -> str:
    limits = data["limits"]
    text = (
        f"Limits: {limits['step']:g} s for a peer's step, {limits['memory'] / 1e9:.0f} GB; "
        f"{data['budget_seconds']:g} s for the whole run, in which {len(by_case(data['results']))} of "
        f"{len(by_case(data['results'])) + len(data['over_budget'])} cases found a place; the others are listed as "
        "`over_budget` in the data file."
    )
    skipped = "; ".join(f"{name}: {reason}" for name, reason in data["skipped"].items())
    return f"{text} Not taking part: {skipped}." if skipped else text


def performance_step() -> str:
    return "\n\n".join(step_report(path) for path in data_files("step")) or "No data yet."


def step_report(path: Path) -> str:
    data = json.loads(path.read_text())
    cases: dict[tuple, dict[str, Row]] = {}
    for row in data["results"]:
        cases.setdefault((row["model"], row["image_size"], row["batch"]), {})[row["contender"]] = row
    names = list(dict.fromkeys(n for contenders in cases.values() for n in contenders))
    rows = []
    for (model, pixels, batch), contenders in sorted(cases.items()):
        rest = next((r["rest_ms"] for r in contenders.values() if r["status"] == "ok"), None)
        cells = [step_cell(contenders.get(n)) for n in names]
        rows.append([model, str(pixels), f"{batch:,}", "–" if rest is None else milliseconds(rest), *cells])
    head = ["network", "pixels", "batch", "all but the loss", *names]
    text = f"{machine_line(data)}. {source_line(path, data)}. Time of the loss, forward and backward, and its share."
    late = f"Over budget: {'; '.join(data['over_budget'])}." if data["over_budget"] else ""
    return "\n".join([text, "", *lines_of_table(head, rows), *(["", late] if late else [])])


def step_cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{milliseconds(row['loss_ms'])}, {100 * row['share']:.2g} %" if row["status"] == "ok" else row["status"]


def performance_accuracy() -> str:
    return "\n\n".join(accuracy_report(path) for path in data_files("accuracy")) or "No data yet."


def accuracy_report(path: Path) -> str:
    data = json.loads(path.read_text())
    parts = [f"{machine_line(data)}. {source_line(path, data)}. Relative error of the loss / of the gradient."]
    for loss, (name, letter) in LOSSES.items():
        mine = [r for r in data["results"] if r["loss"] == loss]
        scales = list(dict.fromkeys(r["scale"] for r in mine))
        found: dict[tuple[str, str], dict[float, Row]] = {}
        for row in mine:
            found.setdefault((row["dtype"], row["contender"]), {})[row["scale"]] = row
        rows = [
            [SHORT[dtype], contender, *(error_cell(cells.get(s)) for s in scales)]
            for (dtype, contender), cells in found.items()
        ]
        shape = f"{name}, {letter} = {mine[0]['rows']}, D = {mine[0]['dim']}"
        columns = [f"τ = {1 / s:.2g}" if loss == "mio" else f"scale {s:g}" for s in scales]
        parts.append("\n".join(lines_of_table([shape, "", *columns], rows)))
    if data["over_budget"]:
        parts.append(f"Over budget: {'; '.join(data['over_budget'])}.")
    return "\n\n".join(parts)


def error_cell(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{row['loss_error']:.0e} / {row['gradient_error']:.0e}" if row["status"] == "ok" else row["status"]
