# SPDX-License-Identifier: Apache-2.0
"""The machine a figure belongs to: what it is, the memory a step takes on it, and where its data files go."""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.paths import RESULTS, ROOT, SCRATCH
from mio_ext import __version__, library

PACKAGES = ("torch", "triton", "open_clip_torch", "siglip-kernel", "lightly")


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts(device: str) -> dict[str, Any]:
    """The head of a data file. A machine that does other things at the start is told off."""
    load = os.getloadavg()[0]
    if load > 0.5 * (os.cpu_count() or 1):
        print(f"warning: load average {load:.1f}: other programs are running, these times will not do", file=sys.stderr)
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    head: dict[str, Any] = {
        "command": shlex.join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": commit + ("+changes" if output_of("git", "status", "--porcelain") else ""),
        "device_type": device,
        "load_average": round(load, 2),
    }
    if device == "cuda":
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        head |= {"device": torch.cuda.get_device_name(), "driver": driver[0] if driver else None}
        head |= {"cuda": torch.version.cuda, "host": f"{os.cpu_count()} × {processor()}"}
    else:
        head |= {"device": processor(), "driver": f"{platform.system()} {platform.release()}"}
        head |= {"threads": torch.get_num_threads(), "instruction_set": library.diagnostics.cpu_instruction_set()}
    versions = {"python": platform.python_version(), "mio_ext": __version__}
    return head | {"versions": versions | {p: v for p in PACKAGES if (v := version(p))}}


def folder_name(head: dict[str, Any]) -> str:
    """Of the device; threads are part of a CPU's name."""
    name = head["device"] + (f" {head['threads']} threads" if "threads" in head else "")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def output_path(parser: argparse.ArgumentParser, args: argparse.Namespace, head: dict[str, Any], name: str) -> Path:
    """Where the data go: to ``--output``, else among the committed figures of this device.

    With any option the run is a part of the benchmark or another one: those go to a folder that git ignores.
    """
    if args.output is not None:
        return Path(args.output)
    whole = all(value == parser.get_default(key) for key, value in vars(args).items())
    return (RESULTS if whole else SCRATCH) / folder_name(head) / f"{name}.json"


def save(path: Path, head: dict[str, Any], rows: list[dict[str, Any]], as_csv: bool = True) -> None:
    """``path`` as JSON, a row to a line, and its rows again as CSV beside it, for whoever likes a spreadsheet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    lines += [' "results": [', ",\n".join("  " + json.dumps(row) for row in rows), " ]"]
    path.write_text("\n".join(["{", *lines, "}"]) + "\n")
    if not as_csv:
        print(f"wrote {path}")
        return
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path} and {path.with_suffix('.csv').name}")


def free_memory(device: str) -> int:
    """Bytes that could be had now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return 1024 * proc_field("/proc/meminfo", "MemAvailable")


def proc_field(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(f"{path} has no {name}")


class PeakMemory:
    """Bytes beyond those held before, at the peak: of PyTorch's allocator on a GPU, resident on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # or memory kept from earlier steps would be used again unseen
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self.before = self.now()
        return self

    def now(self) -> int:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return 1024 * proc_field("/proc/self/status", "VmHWM")

    def __exit__(self, *_: object) -> None:
        self.bytes = self.now() - self.before
