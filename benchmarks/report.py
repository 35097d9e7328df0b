# SPDX-License-Identifier: Apache-2.0
"""Turns the data files under benchmarks/results/ into the figures of README.md and docs/, and plots.

    python benchmarks/report.py            # rewrite what stands between the markers, draw docs/plots/
    python benchmarks/report.py --check    # exit 1 if a page or plot is not the data's; needs no matplotlib

A marked place is <!-- NAME: benchmarks/report.py --> ... <!-- end -->; NAME is a key of SECTIONS. A plot carries the
hash of its data file inside.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import report_loss, report_processes, report_search, report_steps, report_training, report_wheel
from benchmarks.harness.paths import ROOT
from benchmarks.harness.tables import PLOT_NAMES, data_files

PAGES = ("README.md", "docs/performance.md", "docs/distributed.md", "docs/theory.md", "docs/training.md")
PLOTS = "docs/plots"

SECTIONS: dict[str, Callable[[], str]] = {
    "claim": report_loss.claim,
    "loss": report_loss.readme_loss,
    "digits": report_training.readme_digits,
    "cifar": report_training.readme_cifar,
    "search": report_search.search,
    "search-claim": report_search.readme_search,
    "forces": report_search.forces,
    "loss-report": report_loss.performance_loss,
    "step-report": report_steps.performance_step,
    "accuracy-report": report_steps.performance_accuracy,
    "processes": report_processes.measured,
    "ring-on-paper": report_processes.on_paper,
    "every-torch": report_wheel.every_torch,
}


def rendered(text: str) -> str:
    """The page with every marked place filled from the data."""

    def fill(match: re.Match[str]) -> str:
        if match[2] not in SECTIONS:
            raise SystemExit(f"report.py: no section {match[2]!r}; there are {', '.join(SECTIONS)}")
        return match[1] + SECTIONS[match[2]]() + "\n" + match[3]

    pattern = r"(<!-- ([\w-]+): benchmarks/report.py -->\n)(?:.*?\n)??(<!-- end -->)"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def data_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def png_text(path: Path) -> dict[str, str]:
    """The tEXt chunks of a PNG file."""
    data, found, at = path.read_bytes(), {}, 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind == b"tEXt":
            key, _, value = data[at + 8 : at + 8 + length].partition(b"\0")
            found[key.decode("latin-1")] = value.decode("latin-1")
        at += 12 + length
    return found


def stale() -> list[str]:
    """What differs from the data."""
    wrong = [page for page in PAGES if rendered(text := (ROOT / page).read_text()) != text]
    for path in data_files("loss"):
        for plot in PLOT_NAMES:
            target = ROOT / PLOTS / f"{path.parent.name}-{plot}.png"
            if not target.exists() or png_text(target).get("Data") != data_hash(path):
                wrong.append(str(target.relative_to(ROOT)))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page or plot is stale")
    if parser.parse_args().check:
        wrong = stale()
        sys.exit(f"{', '.join(wrong)}: not what the data say; run: python benchmarks/report.py" if wrong else 0)
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text()))
    from benchmarks.harness import plots

    for path in data_files("loss"):
        plots.draw(json.loads(path.read_text()), ROOT / PLOTS, path.parent.name, data_hash(path))


if __name__ == "__main__":
    main()
