# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the repository root goes on the path before the imports that need it)
"""Many pre-trainings from one table, side by side on one device, and their ranking.

    .venv/bin/python train/sweep.py train/sweeps/cifar10-200.toml --output runs/cifar10-200 --jobs 2
    .venv/bin/python train/sweep.py TABLE.toml --output DIR -- --data folder:photos --device cpu

The table has [common] options, and [[runs]] whose lists are tried in every combination. Each run is a run folder of
train/pretrain.py. Runs are ranked by held-out *training* images, never by the test images. The same command goes
on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from train.packages import require_packages

require_packages("sweep.py")

import torch

from train import pretrain
from train.assemble import load_run
from train.command_line import OneLineParser, combine, shown
from train.config import Config, element_type, read_options, read_toml
from train.errors import Interrupted, UserError
from train.features import Features, extract_features
from train.probes import knn_accuracy, linear_probe
from train.run_folder import RESULTS, write_atomically

SCORES = "hold-out.json"  #: in a run folder
TABLE = "sweep.jsonl"  #: a line per finished run
HOLD_OUT = 0.2  #: of the training split, where the table does not say


@dataclass(frozen=True, eq=False)
class Run:
    """One pre-training of the table."""

    name: str  #: its folder: what tells it from the others, and its seed
    setting: str  #: the name without the seed
    options: dict[str, Any]


def read_table(path: Path) -> tuple[list[Run], dict[str, int]]:
    """The runs, and the numbers of images that score them."""
    table = read_toml(path)
    if unknown := sorted(set(table) - {"common", "runs", "hold-out"}):
        raise UserError(f"{path}: unknown table {', '.join(unknown)}; there are [common], [hold-out] and [[runs]]")
    hold_out = table.get("hold-out", {})
    if unknown := sorted(set(hold_out) - {"images", "bank"}):
        raise UserError(f"{path}: unknown key {', '.join(unknown)} in [hold-out]; there are images and bank")
    if not table.get("runs"):
        raise UserError(f"{path} has no [[runs]]")
    runs = [run for entry in table["runs"] for run in expand(path, table.get("common", {}), entry)]
    if twice := {run.name for run in runs if [r.name for r in runs].count(run.name) > 1}:
        raise UserError(f"{path} has these runs twice: {', '.join(sorted(twice))}")
    runs.sort(key=lambda run: run.options.get("seed", 0))  # what is over early compares settings
    return runs, hold_out


def expand(path: Path, common: dict[str, Any], entry: dict[str, Any]) -> Iterator[Run]:
    """Every combination of the lists of one [[runs]]; an option that is a list itself has a list of lists."""
    values = common | entry
    choices: dict[str, list[Any]] = {}
    for name, value in values.items():
        plain = name == "preset" or name not in Config.__dataclass_fields__ or element_type(name)[1] == 1
        several = isinstance(value, list) and (plain or (bool(value) and isinstance(value[0], list)))
        choices[name] = value if several else [value]
    told = sorted((set(entry) | {n for n in choices if len(choices[n]) > 1}) - {"seed"})
    for combination in itertools.product(*choices.values()):
        options = dict(zip(choices, combination, strict=True))
        read_options(path, {n: v for n, v in options.items() if n != "preset"})
        parts = [f"{n.replace('_', '-')}-{shown_value(options[n])}" for n in told]
        setting = "_".join(parts) or "run"
        yield Run(f"{setting}_seed-{options.get('seed', 0)}", setting, options)


def shown_value(value: Any) -> str:
    return shown(tuple(value) if isinstance(value, list) else value).replace(" ", "-").replace("/", "-")


def write_config(run: Run, folder: Path) -> Path:
    """The run's options as a file for ``--config``."""
    options = dict(run.options)
    preset = options.pop("preset", None)
    converted = read_options(Path(run.name), options)
    config = combine(converted | {"output": str(folder / run.name)}, preset, None)
    path = folder / f"{run.name}.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    return path


def score(folder: Path, images: int | None, bank: int | None) -> dict[str, float]:
    """k-NN and linear probe, in percent, of training images that are held out; the labels of others are known.

    Pre-training may have seen the held-out images, without their labels, as it has for all that are scored so.
    """
    setup = load_run(folder, "auto", None, None)
    split = setup.data.train
    if split is None:
        raise UserError(f"{setup.data.name} has no labels to rank runs by")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    held_out = images or max(1, round(HOLD_OUT * len(split)))
    order = order[: held_out + bank] if bank else order
    rows = extract_features(
        setup.model.backbone,
        split.images[order.to(split.images.device)],
        setup.preprocess.plain,
        setup.device,
        bfloat16=setup.bfloat16,
    )
    labels = split.labels.cpu()[order].to(rows.device)
    features = Features(rows[held_out:], labels[held_out:], rows[:held_out], labels[:held_out])
    return {"knn": 100 * knn_accuracy(features), "linear": 100 * linear_probe(features).accuracy}


def train_one(config: Path, folder: Path, hold_out: dict[str, int], rest: list[str]) -> None:
    """In a process of its own: one run from where it was, then its scores."""
    pretrain.main(["--config", str(config), "--output", str(folder), "--resume", "auto", *rest])
    scores = score(folder, hold_out.get("images"), hold_out.get("bank"))
    content = json.dumps(scores) + "\n"
    write_atomically(folder / SCORES, lambda path: path.write_text(content))


def finished(folder: Path, run: Run) -> dict[str, Any] | None:
    """The line of the results that a run has earned, None if it is not over."""
    if not (folder / run.name / SCORES).is_file():
        return None
    line: dict[str, Any] = {"setting": run.setting, "seed": run.options.get("seed", 0), "options": run.options}
    line |= json.loads((folder / run.name / SCORES).read_text())
    checkpoint = torch.load(folder / run.name / "checkpoint.pt", weights_only=True, map_location="cpu", mmap=True)
    line |= {key: round(value, 1) for key, value in checkpoint["times"].items()}
    if (results := folder / run.name / RESULTS).is_file():
        line["test"] = json.loads(results.read_text())["rows"]["pre-trained encoder"]
    return line


class Jobs:
    """Runs as processes, some at a time; all are told to save and stop when time is up or at Ctrl-C."""

    def __init__(self, folder: Path, table: Path, count: int, rest: list[str], deadline: float) -> None:
        self.folder, self.table, self.count, self.rest, self.deadline = folder, table, count, rest, deadline
        self.environment = os.environ | {}
        self.environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        self.running: dict[Run, subprocess.Popen[bytes]] = {}
        self.failed: list[str] = []

    def start(self, run: Run) -> None:
        log = open(self.folder / f"{run.name}.log", "ab")  # noqa: SIM115  (the process keeps it)
        command = [sys.executable, str(Path(__file__).resolve()), str(self.table), "--output", str(self.folder)]
        command += ["--one", run.name, "--", *self.rest]
        self.running[run] = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
        log.close()

    def work(self, waiting: list[Run], total: int) -> None:
        try:
            while (waiting and time.monotonic() < self.deadline) or self.running:
                while waiting and len(self.running) < self.count and time.monotonic() < self.deadline:
                    self.start(waiting.pop(0))
                if time.monotonic() > self.deadline:
                    self.stop()
                self.collect(total)
                time.sleep(0.2)
        except KeyboardInterrupt:  # Ctrl-C has reached the runs too
            self.wait()
            raise
        except BaseException:
            self.stop()
            raise

    def collect(self, total: int) -> None:
        for run, process in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[run]
            line = finished(self.folder, run)
            if line is None:
                self.failed.append(run.name)
                print(f"{run.name}: not finished (exit {process.returncode}; see {run.name}.log)", flush=True)
                continue
            with (self.folder / TABLE).open("a") as file:
                file.write(json.dumps(line) + "\n")
            done = sum(1 for _ in (self.folder / TABLE).open())
            print(f"[{done}/{total}] {run.name}: k-NN {line['knn']:.1f}, linear {line['linear']:.1f}", flush=True)

    def stop(self) -> None:
        for process in self.running.values():
            process.terminate()  # pretrain.py saves first
        self.wait()

    def wait(self) -> None:
        for process in self.running.values():
            process.wait()


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def ranking(lines: list[dict[str, Any]]) -> str:
    """Settings by their mean k-NN over seeds, with standard errors."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        settings.setdefault(line["setting"], []).append(line)
    mean = {name: statistics.fmean(line["knn"] for line in group) for name, group in settings.items()}
    width = max(map(len, settings), default=0)
    table = [f"{'held-out training images, %':{width}}  seeds         k-NN       linear"]
    for name in sorted(settings, key=lambda n: -mean[n]):
        cells = []
        for key in ("knn", "linear"):
            values = [line[key] for line in settings[name]]
            error = f" ± {standard_error(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{error}".rjust(11))
        table.append(f"{name:{width}}  {len(settings[name]):5d}  {cells[0]}  {cells[1]}")
    return "\n".join(table)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="sweep.py",
        description="Pre-train every run of a table and rank them.",
        epilog="What follows -- are options of train/pretrain.py, for every run.",
    )
    parser.add_argument("table", type=Path, help="TOML: [common] options, [[runs]] with lists, [hold-out]")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the run folders are")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side on the device (1)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after so long; none: at the end")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, take one step of each, keep nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a process of the sweep: this run
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:cut])
    args.rest = given[cut + 1 :]
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {args.jobs}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    runs, hold_out = read_table(args.table)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.one is not None:
        run = next(run for run in runs if run.name == args.one)
        train_one(write_config(run, args.output), args.output / run.name, hold_out, args.rest)
        return
    if args.dry_run:
        for run in runs:
            print(run.name, flush=True)
            config = write_config(run, args.output)
            pretrain.main(["--config", str(config), "--dry-run", *args.rest])
            config.unlink()
        return
    lines = {run: finished(args.output, run) for run in runs}
    (args.output / TABLE).write_text("".join(json.dumps(line) + "\n" for line in lines.values() if line is not None))
    jobs = Jobs(args.output, args.table, args.jobs, args.rest, time.monotonic() + 60 * args.minutes)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    jobs.work([run for run, line in lines.items() if line is None], len(runs))
    done = [json.loads(line) for line in (args.output / TABLE).read_text().splitlines()]
    print(ranking(done))
    left = len(runs) - len(done)
    print(f"{len(done)} of {len(runs)} runs in {args.output / TABLE}" + ("; the same command goes on" if left else ""))
    if jobs.failed and time.monotonic() < jobs.deadline:
        raise UserError(f"{len(jobs.failed)} runs failed: {', '.join(jobs.failed)}")


def run(argv: Sequence[str] | None = None) -> int:
    try:
        main(argv)
    except UserError as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupt:
        print(f"sweep.py: {interrupt.args[1]}", file=sys.stderr)
        return 128 + int(interrupt.args[0])
    except KeyboardInterrupt:
        print("sweep.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
