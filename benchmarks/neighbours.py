# SPDX-License-Identifier: Apache-2.0
"""What is a step of the loss worth while other processes want the cores? Training runs beside data loaders.

    python benchmarks/neighbours.py              # two minutes on an otherwise quiet machine

mio_ext, eager and torch.compile take turns, forward and backward, beside 0, 1, 2 and 4 processes that never pause.
Writes a JSON file and a CSV beside it. Only a machine that does nothing else gives figures to keep.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import facts, save
from benchmarks.harness.paths import ROOT
from benchmarks.harness.plan import Case
from benchmarks.harness.tables import is_ours
from benchmarks.loss import interleaved

NAMES = ["mio_ext cpu", "eager", "torch.compile"]


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """``count`` processes that compute until the end."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(case: Case, neighbours: int, seconds: float, warm: list[str]) -> list[dict[str, Any]]:
    """A row for every contender: times of its steps, and how many times as long as ours they took."""
    with busy_processes(neighbours):
        times = interleaved(case, NAMES, warm, "cpu", seconds)
    ours = next(times[name] for name in NAMES if is_ours(name))
    return [
        case._asdict()
        | {"neighbours": neighbours, "contender": name, "steps": len(t)}
        | {"median_ms": 1e3 * statistics.median(t), "mean_ms": 1e3 * statistics.fmean(t)}
        | {"median_ratio": statistics.median(t) / statistics.median(ours)}
        | {"mean_ratio": statistics.fmean(t) / statistics.fmean(ours)}
        for name, t in times.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """A line for every N and number of neighbours: median (mean) ms, and the others' over ours."""
    lines = ["    N  busy  " + "".join(f"{name:<32}" for name in NAMES)]
    for n, neighbours in dict.fromkeys((row["rows"], row["neighbours"]) for row in rows):
        line = f"{n:>5}  {neighbours:>4}  "
        for row in rows:
            if (row["rows"], row["neighbours"]) == (n, neighbours):
                cell = f"{row['median_ms']:.3g} ({row['mean_ms']:.3g}) ms"
                if not is_ours(row["contender"]):
                    cell += f"  {row['median_ratio']:.2g}x ({row['mean_ratio']:.2g}x)"
                line += f"{cell:<32}"
        lines.append(line.rstrip())
    return "\n".join([*lines, "Median (mean) of the steps; x: times as long as mio_ext."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 2048], help="N, rows of both views together")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2, 4], help="busy processes")
    parser.add_argument("--seconds", type=float, default=5, help="of steps, for each contender of a case (default 5)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "neighbours.json", help="default build/neighbours.json"
    )
    args = parser.parse_args()
    head, results = facts("cpu") | {"seconds": args.seconds}, []
    for n in args.rows:
        for i, neighbours in enumerate(args.neighbours):
            warm = NAMES if i == 0 else []  # the compiler's turn
            results += measure(Case("mio", n, 128), neighbours, args.seconds, warm)
    save(args.output, head, results)
    print(table(results))


if __name__ == "__main__":
    main()
