# SPDX-License-Identifier: Apache-2.0
"""The plots of a loss.json: time, memory, share of the floor and speed-up over N; called by report.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.harness.tables import LOSSES, Cases, is_ours, main_type, other_backends, our_best, usual_cases

#: Colour (Okabe and Ito's, safe for the colour-blind), marker and dashes: told apart in black and white as well.
STYLE = {
    "eager": ("#D55E00", "s", "-"),
    "torch.compile": ("#009E73", "^", "-"),
    "checkpointed chunks": ("#CC79A7", "v", "-"),
    "paper": ("#E69F00", "D", "-"),
    "open_clip": ("#56B4E9", "P", "-"),
    "open_clip chunk_size": ("#56B4E9", "P", ":"),
    "siglip-kernel": ("#D4A017", "X", "-"),
    "lightly NT-Xent": ("#777777", "x", ":"),
}
OURS = ("#0050A0", "o", "-")
SECOND = ("#6FA8DC", "o", "--")  #: of ours, where another is faster most often

Value = Callable[[dict[str, Any], dict[str, Any]], float]  # (row, our best row of the case) -> y


def draw(data: dict[str, Any], folder: Path, name: str, data_hash: str) -> None:
    """The files <name>-<plot>.png; each carries ``data_hash`` under the key Data."""
    folder.mkdir(parents=True, exist_ok=True)
    what = f"{data['device']}, {main_type(data)}, forward + backward"
    kinds: dict[str, tuple[str, str, Value]] = {
        "time": ("Time of a step", "ms", lambda row, _: row["median_ms"]),
        "memory": ("Peak memory of a step beyond its inputs", "MB", lambda row, _: max(row["peak_bytes"] / 1e6, 0.01)),
        "share": ("Share of the floor reached", "%", lambda row, _: 100 * row["share"]),
        "speedup": (
            "Time relative to mio_ext",
            "times as long",
            lambda row, ours: row["median_ms"] / ours["median_ms"],
        ),
    }
    cases = usual_cases(data, data["results"])
    for kind, (title, unit, value) in kinds.items():
        with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
            figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
            for axis, loss in zip(axes, LOSSES, strict=True):
                panel(axis, loss, {c: v for c, v in cases.items() if c[0] == loss}, kind, value)
                axis.set_ylabel(unit)
            figure.suptitle(f"{title} — {what}", fontsize=11)
            legend(figure, axes)
            target = folder / f"{name}-{kind}.png"
            figure.savefig(target, dpi=150, metadata={"Data": data_hash, "Software": None})
            plt.close(figure)


def panel(axis: Axes, loss: str, cases: Cases, kind: str, value: Value) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    floor = []
    second = other_backends(cases)
    for case, contenders in cases.items():
        ours = our_best(contenders)
        for name, row in contenders.items():
            if row["status"] == "ok" and ours is not None:
                lines.setdefault(name, []).append((case[1], value(row, ours)))
        if ours is not None:
            floor.append((case[1], ours["floor_ms"]))
    for name, points in lines.items():
        colour, marker, dash = SECOND if name in second else OURS if is_ours(name) else STYLE[name]
        wide = 2.4 if is_ours(name) else 1.3
        axis.plot(*zip(*points, strict=True), dash, color=colour, marker=marker, ms=5, lw=wide, label=name,
                  zorder=3 if is_ours(name) else 2)  # fmt: skip
    if kind == "time" and floor:
        axis.plot(*zip(*floor, strict=True), "--", color="black", lw=1, label="floor")
    letter, dim = LOSSES[loss][1], next(iter(cases))[2] if cases else "?"
    axis.set_title(f"{LOSSES[loss][0]}, D = {dim}", fontsize=10)
    axis.set_xlabel(f"rows {letter}")
    scales(axis, [case[1] for case in cases], kind)


def scales(axis: Axes, rows: list[int], kind: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(rows, [f"{n // 1024}k" if n >= 1024 else str(n) for n in rows])
    axis.tick_params(which="minor", length=0)
    axis.tick_params(labelsize=9)
    axis.grid(True, which="major", color="#DDDDDD", lw=0.6)
    if kind == "share":
        axis.set_ylim(0, 100)
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    if kind == "speedup":
        low, high = axis.get_ylim()
        high = max(high, 10)
        low = min(low, high**-0.15)  # room for the words
        axis.axhspan(low, 1, color="#F3DCDC", zorder=0)
        axis.text(0.98, 0.02, "below 1: mio_ext loses", transform=axis.transAxes, ha="right", va="bottom", fontsize=8.5)
        axis.set_ylim(low, high)
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if low <= t <= high]
        axis.set_yticks(ticks, [f"{t:g}×" for t in ticks])


def legend(figure: Any, axes: Any) -> None:
    """One for both panels, below."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(len(entries), 5), frameon=False)
