# SPDX-License-Identifier: Apache-2.0
"""Are we still as far ahead as the committed data say? Informs; never fails.

    python benchmarks/check_ratios.py            # under a minute or two; `make bench-check`

Times a few cases again and compares how many times as long a peer takes as we do, with this device's committed
loss.json, or that of another device of the same kind. Only a ratio that fell by more than TOLERANCE is a regression;
one that rose as much wants new data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import folder_name
from benchmarks.harness.paths import ROOT
from benchmarks.harness.tables import CaseKey, by_case, case_name, data_files, our_best

CASES = ["mio:1024:128", "mio:8192:128", "siglip:1024:768", "siglip:4096:768"]
PEERS = ("eager", "open_clip")  #: their code is fixed by torch's version, and nothing has to be compiled
TOLERANCE = 1.5


def ratios(data: dict[str, Any]) -> dict[tuple[CaseKey, str], float]:
    """(case, peer) -> how many times as long as we take."""
    found = {}
    for case, contenders in by_case(data["results"]).items():
        ours = our_best(contenders)
        for peer in PEERS:
            row = contenders.get(peer)
            if ours and row and row["status"] == "ok":
                found[(case, peer)] = row["median_ms"] / ours["median_ms"]
    return found


def verdict(committed: float, here: float) -> str:
    if here < committed / TOLERANCE:
        return "FELL"
    return "rose" if here > committed * TOLERANCE else "as committed"


def committed_file(folder: str, device_type: str) -> Path | None:
    """This device's, else the first of its kind."""
    files = [p for p in data_files("loss") if json.loads(p.read_text())["device_type"] == device_type]
    return next((p for p in files if p.parent.name == folder), files[0] if files else None)


def compare(committed: dict[str, Any], here: dict[str, Any]) -> list[str]:
    old, new = ratios(committed), ratios(here)
    lines = [f"{'case':<44} {'peer':<12} {'committed':>9} {'here':>8}"]
    for key, ratio in new.items():
        case, peer = key
        before = f"{old[key]:8.1f}x" if key in old else f"{'–':>9}"
        said = verdict(old[key], ratio) if key in old else "not in the data"
        lines.append(f"{case_name(case):<44} {peer:<12} {before} {ratio:7.1f}x  {said}")
    fell = sum(key in old and verdict(old[key], ratio) == "FELL" for key, ratio in new.items())
    last = f"{fell} ratios fell by more than {TOLERANCE}x: run it again on an idle machine, then look for the cause"
    return [*lines, last if fell else f"no ratio fell by more than {TOLERANCE}x"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "loss.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "loss.py"), "--cases", *CASES, "--output", str(output)]
        run = subprocess.run([*command, "--contenders", "mio_ext", *PEERS], stdout=subprocess.DEVNULL)
        if not output.exists():
            print(f"bench-check: benchmarks/loss.py gave no data (exit status {run.returncode})")
            return
        here = json.loads(output.read_text())
    path = committed_file(folder_name(here), here["device_type"])
    if path is None:
        print(f"bench-check: no committed data for a device of type {here['device_type']!r}; run: make bench")
        return
    print(f"{here['device']} against {path.relative_to(ROOT)}")
    print("\n".join(compare(json.loads(path.read_text()), here)))


if __name__ == "__main__":
    main()
