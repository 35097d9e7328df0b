# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the repository root goes on the path before the imports that need it)
"""Self-supervised pre-training of a ResNet with the fused MIO loss (arXiv 2111.12664).

    .venv/bin/python train/pretrain.py
    .venv/bin/python train/pretrain.py --data folder:photos --epochs 100 --output runs/photos
    torchrun --nproc-per-node 4 train/pretrain.py --data folder:photos    # the same run, on four GPUs

Without arguments: scikit-learn's handwritten digits, CPU or GPU, a minute or two on two cores, then a
linear probe and k-NN on the held-out test split. Labels are used by the evaluation only, and the test
split is scored once, after the last epoch.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # so that the script runs without an installed mio_ext

from train.packages import require_packages

require_packages("pretrain.py")

from train.assemble import Setup, assemble, check_content
from train.card import write_card
from train.command_line import parse_arguments
from train.config import Config, load_config
from train.console import forgiving_streams
from train.device import is_out_of_disk, is_out_of_memory, versions
from train.errors import Interrupted, UserError
from train.export import export_encoder
from train.probes import can_choose
from train.processes import ALONE, Processes
from train.run_folder import (
    CHECKPOINT,
    CONFIG,
    ENCODER,
    RunLock,
    RunLog,
    create_run_folder,
    has_ended,
    load_checkpoint,
    take_back_end,
    write_atomically,
)
from train.scoring import finish, take_snapshot
from train.trainer import Trainer, last_step

DESCRIPTION = (
    "Self-supervised pre-training of a ResNet with the fused MIO loss, then a linear probe and k-NN on held-out data. "
    "Later ones win: the defaults, what presets/datasets.toml says of the data set, --preset, --config, the command "
    "line. In brackets: what applies to the rest of this command line."
)


def open_run(config: Config, setup: Setup, lock: RunLock) -> tuple[Path, dict[str, Any] | None]:
    """(the run folder, which is ours now, the checkpoint to go on from)."""
    if (folder := config.run_to_resume()) is not None:
        lock.take(folder)
        checkpoint = load_checkpoint(folder / CHECKPOINT)
        check_content(checkpoint, setup.data, config.data)
        saved = load_config(folder)
        now = replace(saved, epochs=config.epochs, data=config.data)  # lengthened, moved
        if now != saved:
            write_atomically(folder / CONFIG, lambda path: path.write_text(now.to_toml(), encoding="utf-8"))
        return folder, checkpoint
    overwrite = config.overwrite or config.resume == "auto"
    folder = create_run_folder(config.output, setup.data.name, overwrite, lock)
    write_atomically(folder / CONFIG, lambda path: path.write_text(config.to_toml(), encoding="utf-8"))
    return folder, None


def main(argv: Sequence[str] | None = None, processes: Processes = ALONE) -> None:
    config, args = parse_arguments(argv, "pretrain.py", DESCRIPTION)
    if args.print_config:
        print(config.to_toml(), end="")
        return
    if args.dry_run and config.download:
        raise UserError("--dry-run writes nothing, so it cannot --download")
    try:
        with RunLock() as lock:
            pretrain(config, processes, args.dry_run, lock)
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            raise UserError(f"out of memory: try --batch-size {max(config.batch_size // 2, 2)}") from error
        if is_out_of_disk(error):
            raise UserError("the disk is full; once it is not, --resume goes on from the last checkpoint") from error
        raise


def pretrain(config: Config, processes: Processes, try_only: bool, lock: RunLock) -> None:
    setup = assemble(config, processes, keep=not try_only)
    if config.warmup_epochs >= config.epochs:
        reached = config.learning_rate * config.epochs / config.warmup_epochs
        print(
            f"warning: the warm-up of {config.warmup_epochs:g} epochs outlasts the run of {config.epochs}: the "
            f"learning rate ends near {reached:.2g} instead of {config.learning_rate:g} (--warmup-epochs)",
            flush=True,
        )
    if try_only:
        dry_run(config, setup)
        return
    folder, checkpoint = processes.from_first(lambda: open_run(config, setup, lock))
    scored = config.evaluate and setup.data.train is not None
    step = 0 if checkpoint is None else checkpoint["step"]
    trained = checkpoint is not None and step >= last_step(config, checkpoint["images"])
    if trained and processes.from_first(lambda: has_ended(folder, scored)):
        print(f"the run in {folder} is complete after step {step}: nothing is left to do")
        return
    log = open_log(folder, checkpoint, config, setup) if processes.first else None
    n = len(setup.data.pretrain)
    together = f" in each of {processes.count} processes" if processes.count > 1 else ""
    print(f"{setup.data.name}: {n} training images on {setup.device}{together}, run folder {folder}", flush=True)

    before = None
    if scored and processes.first:
        assert setup.data.train is not None
        if not can_choose(setup.data.train.labels):
            print("no class has two training images: the linear probe will be left out", flush=True)
        before = take_snapshot(setup)
        before = before._replace(features=before.features.to("cpu"))  # training needs the memory
    processes.wait()
    trainer = Trainer(config, setup, folder, log)
    if checkpoint is not None:
        trainer.load(checkpoint)
        print(f"going on after step {trainer.step} of {trainer.last}", flush=True)
    trainer.compile()
    trainer.train()
    if log is None:
        return
    export_encoder(setup.model.backbone, setup.architecture, folder / ENCODER)
    if before is not None:
        epoch = math.ceil(trainer.step / trainer.steps_per_epoch)
        finish(config, setup, folder, log, before, trainer.times, epoch)
    write_card(folder)
    log.close()
    left = "encoder, log and checkpoint are" if before is None else "results, encoder, log and checkpoint are"
    print(f"trained in {trainer.times['seconds']:.0f} s; {left} in {folder}")


def open_log(folder: Path, checkpoint: dict[str, Any] | None, config: Config, setup: Setup) -> RunLog:
    take_back_end(folder)
    log = RunLog(folder, None if checkpoint is None else checkpoint["step"])
    log.write(
        "start" if checkpoint is None else "resume",
        command=shlex.join(["python", *sys.argv]),
        config=asdict(config),
        data=setup.data.name,
        images=len(setup.data.pretrain),
        versions=versions(setup.device, setup.processes),
    )
    return log


def dry_run(config: Config, setup: Setup) -> None:
    """One step, to see that everything fits and works; nothing is written."""
    trainer = Trainer(config, setup, Path(os.devnull), None)  # type: ignore[arg-type]
    loss, _, _ = trainer.backward(trainer.batch_of(0), 0)
    print(f"dry run: {len(setup.data.pretrain)} images, {trainer.last} steps, first loss {loss.item():.4f}")


def run(argv: Sequence[str] | None = None) -> int:
    """``main`` with a user's mistakes as one line and an exit code."""
    with forgiving_streams():
        return run_to_the_end(argv, Processes.start())


def run_to_the_end(argv: Sequence[str] | None, processes: Processes) -> int:
    try:
        main(argv, processes)
    except UserError as error:
        processes.fail(f"pretrain.py: {error}")
        return 2
    except Interrupted as interrupt:
        number, saved = interrupt.args
        processes.fail(f"pretrain.py: interrupted: {saved}")
        return 128 + int(number)
    except KeyboardInterrupt:
        processes.fail("pretrain.py: interrupted")
        return 130
    except Exception:
        if processes.count == 1:
            raise
        processes.fail(traceback.format_exc())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
