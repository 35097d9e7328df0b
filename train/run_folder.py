# SPDX-License-Identifier: Apache-2.0
"""What a run leaves on disk: one folder with a JSON-lines log, a checkpoint, results and plots."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from train.model import PretrainModel

LOG, CHECKPOINT, RESULTS = "log.jsonl", "checkpoint.pt", "results.json"
LOSS_PLOT, COSINE_PLOT, EMBEDDING_PLOT = "loss.png", "cosines.png", "embedding.png"
RUN_FILES = (LOG, CHECKPOINT, RESULTS, LOSS_PLOT, COSINE_PLOT, EMBEDDING_PLOT)


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 2, no traceback."""


def create_run_folder(output: str | None, name: str, overwrite: bool) -> Path:
    """Make the folder of a run; a folder that holds anything is refused unless ``overwrite``.

    Without ``output`` it is runs/<name>-<date>-<time>, with a counter where two runs share a second.
    """
    if output is None:
        stem, counter = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}", 1
        folder = Path("runs") / stem
        while folder.exists():
            counter += 1
            folder = Path("runs") / f"{stem}-{counter}"
    else:
        folder = Path(output)
    try:
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise UserError(f"--output {folder} is not empty: choose another folder or pass --overwrite")
        folder.mkdir(parents=True, exist_ok=True)
        for stale in RUN_FILES:  # old results beside a new log would mislead
            (folder / stale).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot use the run folder {folder}: {error.strerror or error}") from error
    return folder


class JsonLinesLog:
    """One JSON object per line, flushed at once, so that a crash loses nothing."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        self.file.write(json.dumps({"event": event, **fields}) + "\n")
        self.file.flush()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)``, then put the file in place: readers see the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(
    path: Path,
    model: PretrainModel,
    optimizer: torch.optim.Optimizer,
    step: int,
    config: dict[str, Any],
) -> None:
    """Tensors and plain types only, so that ``torch.load(path, weights_only=True)`` reads it."""
    content = {
        "backbone": model.backbone.state_dict(),
        "projector": model.projector.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "config": config,
    }
    write_atomically(path, lambda temporary: torch.save(content, temporary))
