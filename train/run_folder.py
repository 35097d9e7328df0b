# SPDX-License-Identifier: Apache-2.0
"""A run on disk: one folder with its options, a log, a checkpoint, results, plots and the encoder."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from train.errors import UserError

LOG, METRICS_TABLE, CONFIG, CHECKPOINT, RESULTS = (
    "log.jsonl",
    "metrics.csv",
    "config.toml",
    "checkpoint.pt",
    "results.json",
)
LOSS_PLOT, COSINE_PLOT, EMBEDDING_PLOT = "loss.png", "cosines.png", "embedding.png"
ENCODER, CARD, LOCK = "encoder.safetensors", "README.md", ".lock"
TENSORBOARD = "events.out.tfevents.*"
ANALYSIS_PAGE, ANALYSIS_DATA = "analysis.md", "analysis.json"
ANALYSIS_PLOTS = tuple(f"analysis-{name}.png" for name in ("training", "cosines", "displacement", "toy"))
RUN_FILES = (
    *(LOG, METRICS_TABLE, CONFIG, CHECKPOINT, RESULTS, LOSS_PLOT, COSINE_PLOT, EMBEDDING_PLOT, ENCODER, CARD),
    *(ANALYSIS_PAGE, ANALYSIS_DATA, *ANALYSIS_PLOTS),
)


class RunLock:
    """Keeps a run folder for one process; the system lets go of it when the process ends, however that is."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.descriptor = -1

    def __enter__(self) -> RunLock:
        return self

    def take(self, folder: Path) -> None:
        """Raises UserError, with the holder, where another process has it."""
        path = folder / LOCK
        try:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot use the run folder {folder}: {error.strerror or error}") from error
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self.descriptor, 1000).decode(errors="replace").strip()
            os.close(self.descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return  # a file system without locks
            raise UserError(f"{folder} is in use by {holder or 'another process'}: wait for it, or stop it") from error
        if not path.exists() or path.stat().st_ino != os.fstat(self.descriptor).st_ino:
            os.close(self.descriptor)  # its last owner has just taken the file away
            return self.take(folder)
        self.path = path
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        for left in folder.glob(f"{CHECKPOINT}.*.tmp"):  # by a kill while it was written
            left.unlink(missing_ok=True)

    def __exit__(self, *exception: object) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            os.close(self.descriptor)


def create_run_folder(output: str | None, name: str, overwrite: bool, lock: RunLock | None = None) -> Path:
    """Make the folder of a run; a folder that holds anything is refused unless ``overwrite``.

    Without ``output`` it is runs/<name>-<date>-<time>, with a counter where two runs share a second.
    """
    try:
        folder = new_folder(name) if output is None else Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.take(folder)
        if not overwrite and any(path.name != LOCK for path in folder.iterdir()):
            raise UserError(
                f"--output {folder} is not empty: choose another folder, --resume {folder} to go on, or --overwrite"
            )
        stale = [folder / name for name in RUN_FILES]  # old results beside a new log would mislead
        for path in [*stale, *folder.glob(TENSORBOARD), *folder.glob("evaluation-*.json")]:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot use the run folder {folder}: {error.strerror or error}") from error
    return folder


def new_folder(name: str) -> Path:
    """Made here and by nobody else: runs that start in the same second get different ones."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for counter in range(1, 10_000):
        folder = Path("runs") / (stem if counter == 1 else f"{stem}-{counter}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise UserError(f"runs/ is full of runs named {stem}: pass --output")


def has_ended(folder: Path, scored: bool) -> bool:
    """Whether the run has written all it writes; the card is the last of it."""
    return (folder / CARD).is_file() and (not scored or (folder / RESULTS).is_file())


def take_back_end(folder: Path) -> None:
    """A run that goes on has not ended, and its old results would mislead."""
    for name in (CARD, RESULTS):
        (folder / name).unlink(missing_ok=True)


class RunLog:
    """JSON lines, flushed at once so that a crash loses nothing; the same metrics as a CSV table and for TensorBoard.

    A resumed run keeps what was logged up to its checkpoint's step and drops what a kill left after it.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        path = folder / LOG
        self.history: list[dict[str, Any]] = []
        kept = []
        if resumed_step is not None and path.is_file():
            kept = [entry for entry in read_log(path) if entry.get("step", 0) <= resumed_step]
            self.history = [entry for entry in kept if entry["event"] == "train"]
        lines = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_atomically(path, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
        self.file = path.open("a", encoding="utf-8")
        self.csv_file = (folder / METRICS_TABLE).open("w", encoding="utf-8", newline="")
        self.table: csv.DictWriter[str] | None = None
        for entry in self.history:
            self._write_row(entry)
        self.tensorboard = tensorboard_writer(folder, None if resumed_step is None else resumed_step + 1)

    def write(self, event: str, **fields: Any) -> None:
        entry = {"event": event, **fields}
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        if event == "train":
            self.history.append(entry)
            self._write_row(entry)
        if self.tensorboard is not None and event in ("train", "knn"):
            scalars = {key: value for key, value in fields.items() if key not in ("epoch", "step")}
            for key, value in scalars.items():
                self.tensorboard.add_scalar(f"{event}/{key}", value, fields["step"])

    def _write_row(self, entry: dict[str, Any]) -> None:
        if self.table is None:
            self.table = csv.DictWriter(self.csv_file, [key for key in entry if key != "event"], extrasaction="ignore")
            self.table.writeheader()
        self.table.writerow(entry)
        self.csv_file.flush()

    def close(self) -> None:
        self.file.close()
        self.csv_file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def tensorboard_writer(folder: Path, purge_step: int | None) -> Any:
    """Writes the event file of one process; TensorBoard hides what earlier ones logged from ``purge_step`` on."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=purge_step)  # type: ignore[no-untyped-call]
    except ImportError:
        print("nothing for TensorBoard: pip install tensorboard", file=sys.stderr)
    except Exception as error:  # protobuf and TensorFlow raise many kinds
        print(f"nothing for TensorBoard: {first_line(error)}", file=sys.stderr)
    return None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; a last line that a kill cut off is dropped."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def first_line(error: Exception) -> str:
    """An exception as part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)``, then put the file in place: readers see the old or the new one.

    Two processes that do so at once do not meet: the last one to end wins.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Tensors and plain types only, so that ``torch.load(path, weights_only=True)`` reads it.

    Raises:
        UserError: it cannot be written (a full disk, say); the previous checkpoint is intact.
    """
    try:
        write_atomically(path, lambda temporary: torch.save(content, temporary))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or f"is the disk full? {str(error).splitlines()[0]}"
        left = f"the previous one is intact in {path}" if path.exists() else "there is no earlier one"
        raise UserError(f"cannot save the checkpoint of step {content['step']} ({reason}); {left}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        return content
    except FileNotFoundError as error:
        reason = "has no checkpoint yet (--overwrite starts the run anew)" if path.parent.is_dir() else "does not exist"
        raise UserError(f"{path.parent} {reason}") from error
    except Exception as error:
        raise UserError(f"{path} is damaged, or no checkpoint of this script: {str(error).splitlines()[0]}") from error
