# SPDX-License-Identifier: Apache-2.0
"""Makes committed figures of what gpu-check left: loss.json, kernels.json, profile.json and tests.json of that GPU.

    python benchmarks/collect.py build/gpu-check && python benchmarks/report.py

Writes into benchmarks/results/<device>/, unless told by --output; of parts that did not get far there is what there is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import folder_name, save
from benchmarks.harness.paths import RESULTS

#: What pairwise_bce_cuda_bench prints.
SIZE = re.compile(r".+, N = (\d+), D = (\d+), MIO")
TIME = re.compile(
    r"(\S+)( hopper)?\s+(loss and gradient|loss only)\s+([\d.]+) ms \(([\d.]+) to ([\d.]+)\)\s+([\d.]+) TFLOP/s"
    r"(?:\s+floor ([\d.]+) ms)?"
)
#: What ncu calls it -> what profile.json does.
METRICS = {
    "Duration": "duration_ms",
    "SM Frequency": "sm_frequency_ghz",
    "Issue Slots Busy": "issue_slots_busy_percent",
    "No Eligible": "no_eligible_percent",
    "Active Warps Per Scheduler": "active_warps_per_scheduler",
    "Achieved Occupancy": "achieved_occupancy_percent",
    "L2 Hit Rate": "l2_hit_rate_percent",
    "Registers Per Thread": "registers_per_thread",
    "Dynamic Shared Memory Per Block": "dynamic_shared_memory_per_block_kb",
    "Local Memory Spilling Requests": "local_memory_spilling_requests",
    "Block Size": "block_size",
    "Grid Size": "grid_size",
}
TO_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def head_of(folder: Path) -> dict[str, Any]:
    """The head of all data files, from the part `card`."""
    text = (folder / "card.txt").read_text()
    head: dict[str, Any] = json.JSONDecoder().raw_decode(text, text.index("{\n"))[0]
    return head | {"command": "python benchmarks/gpu_check.py", "n": 1}


def loss_rows(folder: Path) -> list[dict[str, Any]]:
    """Of all parts, those that were killed too."""
    rows = []
    for part in ("loss-cuda", "loss-triton", "loss-peers", "loss-wide", "loss-compile"):
        whole, lines = folder / f"{part}.json", folder / f"{part}.jsonl"
        if whole.exists():
            found = json.loads(whole.read_text())["results"]
        elif lines.exists():
            found = [json.loads(line) for line in lines.read_text().splitlines() if line.endswith("}")]
        else:
            continue
        rows += [row | {"run": part} for row in found]
    return rows


def kernel_rows(folder: Path) -> list[dict[str, Any]]:
    rows, size = [], (0, 0)
    for path in sorted(folder.glob("bench-*.txt")):
        for line in path.read_text(errors="replace").splitlines():
            if found := SIZE.fullmatch(line):
                size = int(found[1]), int(found[2])
            elif found := TIME.match(line):
                row = {"loss": "mio", "rows": size[0], "dim": size[1], "arithmetic": found[1]}
                row |= {"kernel": "hopper" if found[2] else "portable"}
                row |= {"direction": "both" if "gradient" in found[3] else "forward"}
                row |= dict(
                    zip(("median_ms", "p20_ms", "p80_ms", "tflops"), map(float, found.groups()[3:7]), strict=True)
                )
                rows.append(row | {"floor_ms": found[8] and float(found[8])})
    return rows


def profile_rows(folder: Path) -> list[dict[str, Any]]:
    """A row a profiled kernel; ncu names a metric, its unit if it has one, and a number."""
    rows = []
    for part, kernel in (("profile", "hopper"), ("profile-portable", "portable")):
        path = folder / f"{part}.txt"
        text = path.read_text(errors="replace") if path.exists() else ""
        size, name = re.search(r"N = (\d+), D = (\d+), MIO", text), re.search(r"sweep_\w*kernel<(\w+)[^>]*>", text)
        if size is None or name is None:
            continue
        row = {"kernel": kernel, "rows": int(size[1]), "dim": int(size[2]), "arithmetic": name[1].lower()}
        row |= {"name": name[0]}
        for metric, key in METRICS.items():
            found = re.search(rf"^ +{re.escape(metric)} +(?:([A-Za-z%][\w/%]*) +)?([\d.,]+) *$", text, re.MULTILINE)
            if found:
                number = found[2].replace(",", "")
                value = float(number) if "." in number else int(number)
                row[key] = value * TO_MS[found[1]] if metric == "Duration" else value
        pipe = re.search(r"is the highest-utilized pipeline \(([\d.]+)%\)", text)
        rows.append(row | ({"busiest_pipe_percent": float(pipe[1])} if pipe else {}))
    return rows


def test_rows(folder: Path) -> list[dict[str, Any]]:
    """Without the paths of the machine: of a reason the last line."""
    rows = []
    for backend in ("cuda", "triton"):
        path = folder / f"tests-{backend}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            if "why" in row:
                last = row["why"].strip().splitlines()[-1].removeprefix("E").strip()
                row["why"] = re.sub(r"\('[^']*', \d+, '(.*)'\)", r"\1", last)[-200:]
            rows.append(row | {"backend": backend})
    return rows


def cpp_test(folder: Path) -> str:
    """Of every family of kernels the last line of its C++ test, and what failed in it."""
    found = []
    for path in sorted(folder.glob("kernels-*.txt")):
        lines = path.read_text(errors="replace").splitlines()
        if path.stem == "kernels-build" or not lines:
            continue
        failed = [line for line in lines[:-1] if "FAILED" in line]
        found.append(f"{path.stem.removeprefix('kernels-')}: {'; '.join([lines[-1], *failed])}")
    return "pairwise_bce_cuda_test: " + (". ".join(found) or "not run")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="gpu-check's output")
    parser.add_argument("--output", type=Path, help="folder (default benchmarks/results/<device>)")
    args = parser.parse_args()
    if not (args.folder / "card.txt").exists():
        print(f"collect.py: {args.folder} has no card.txt; run gpu-check with its part card", file=sys.stderr)
        return 2
    head = head_of(args.folder)
    output = args.output or RESULTS / folder_name(head)
    limits = {"seconds": 0.3, "step": 6, "memory": None}
    of_loss: dict[str, Any] = {"limits": limits, "budget_seconds": None, "skipped": {}, "over_budget": []}
    of_loss["notes"] = [
        "One run of one card (n = 1), in several processes one after the other (`run` of a row); of what was timed in "
        "several of them the fastest counts."
    ]
    of_profile = {"notes": ["Clocks are the profiler's, lower than those of a run without it."]}
    for kind, more, rows in (
        ("loss", of_loss, loss_rows(args.folder)),
        ("kernels", {}, kernel_rows(args.folder)),
        ("profile", of_profile, profile_rows(args.folder)),
        ("tests", {"cpp_test": cpp_test(args.folder)}, test_rows(args.folder)),
    ):
        if rows:
            save(output / f"{kind}.json", head | more, rows, as_csv=kind == "loss")
        else:
            print(f"no {kind}: left as it was")
    return 0


if __name__ == "__main__":
    sys.exit(main())
