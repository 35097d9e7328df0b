# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the repository root goes on the path before the imports that need it)
"""Self-supervised pre-training of a ResNet with the fused MIO loss (arXiv 2111.12664).

    python train/pretrain.py
    python train/pretrain.py --data folder:photos --epochs 100 --output runs/photos
    torchrun --nproc-per-node 4 train/pretrain.py --data folder:photos    # the same run, on four GPUs

Without arguments: scikit-learn's handwritten digits, CPU or GPU, a minute or two on two cores, then a
linear probe and k-NN on the held-out test split. Labels are used by the evaluation only, and the test
split is scored once, after the last epoch.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # so that the script runs without an installed mio_ext

REQUIRED = {"torch": "torch", "torchvision": "torchvision", "sklearn": "scikit-learn", "safetensors": "safetensors"}
if missing := [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]:
    if os.environ.get("RANK", "0") == "0":  # else torchrun's other processes say it again
        print(f"pretrain.py: {', '.join(missing)} missing: pip install {' '.join(missing)}", file=sys.stderr)
    sys.exit(2)

import torch
from torch import Tensor, nn

from train.card import write_card
from train.config import Config, parse_arguments
from train.data import generator_for, prefetch, random_batches
from train.device import is_out_of_disk, is_out_of_memory, versions
from train.export import export_encoder
from train.monitor import Progress, StepMetrics, StopRequest, Stopwatch, report
from train.optimizer import build_optimizer, learning_rate
from train.probes import (
    Features,
    PairCosines,
    evaluate_features,
    extract_features,
    format_table,
    knn_accuracy,
    label_budgets,
    labelled_features,
    pair_cosines,
    pixel_features,
)
from train.processes import ALONE, Processes
from train.run_folder import (
    CHECKPOINT,
    CONFIG,
    COSINE_PLOT,
    EMBEDDING_PLOT,
    ENCODER,
    LOSS_PLOT,
    RESULTS,
    RunLog,
    UserError,
    create_run_folder,
    has_ended,
    load_checkpoint,
    save_checkpoint,
    take_back_end,
    write_atomically,
)
from train.setup import Setup, set_up

DESCRIPTION = (
    "Self-supervised pre-training of a ResNet with the fused MIO loss, then a linear probe and k-NN on held-out data. "
    "Later ones win: the defaults in brackets, what presets/datasets.toml says of the data set, --preset, "
    "--config, the command line."
)
KNN_BANK = 10_000  #: training images that an online k-NN looks its neighbours up in


class Trainer:
    """The state of a run between two steps, and how it is saved.

    Each of several processes takes its share of the images, and all their batch is in the loss; so the
    weights stay the same everywhere. ``log`` is that of the first process, None in the others.
    """

    def __init__(self, config: Config, setup: Setup, folder: Path, log: RunLog | None) -> None:
        self.config, self.setup, self.folder, self.log = config, setup, folder, log
        self.processes = setup.processes
        self.parameters = nn.ModuleList([setup.model, setup.objective])
        self.optimizer = build_optimizer(self.parameters, config)
        self.steps_per_epoch = len(setup.data.pretrain) // config.batch_size
        self.last = last_step(config, len(setup.data.pretrain))
        self.step = 0
        self.times = {"seconds": 0.0, "cpu_seconds": 0.0}  #: of the steps so far, whatever processes took them
        self.metrics = StepMetrics()
        self.network, self.objective = self.processes.wrap(setup.model), self.processes.wrap(setup.objective)
        self.forward: Callable[[Tensor], Tensor] = self.network

    def compile(self) -> None:
        """Compile network and views; a compiler that does not work costs a warning, not the run."""
        on = self.config.compile == "on" or (self.config.compile == "auto" and self.setup.device.type == "cuda")
        if not on:
            return
        self.forward = torch.compile(self.network)
        self.setup.preprocess.compile()
        buffers = [buffer.clone() for buffer in self.setup.model.buffers()]
        try:
            with torch.random.fork_rng():
                self.loss_of(self.batch_of(0), 0)[0].backward()  # each runs the compiler
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if self.config.compile == "on":
                raise UserError(f"--compile on: {str(error).splitlines()[0]}") from error
            print(f"warning: not compiled: {str(error).splitlines()[0]}", file=sys.stderr)
            self.forward = self.network
            self.setup.preprocess.function = self.setup.preprocess.augment
        finally:  # batch norm and gradients have seen a batch that does not count
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, value in zip(self.setup.model.buffers(), buffers, strict=True):
                buffer.copy_(value)

    def batch_of(self, step: int) -> Tensor:
        """The images of one step that are this process's, [B, C, H, W] uint8 on the device."""
        return next(self.batches(step, step + 1))

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        images, config = self.setup.data.pretrain, self.config
        whole = random_batches(len(images), config.batch_size, config.seed, start, stop, images.device)
        share = self.processes.share(config.batch_size)
        return prefetch(images, (indices[share] for indices in whole), self.setup.device)

    def loss_of(self, images: Tensor, step: int) -> tuple[Tensor, Any, Tensor]:
        """(loss, pair statistics, own embeddings [2B, D]) of images [B, C, H, W] uint8."""
        device, preprocess, batch = self.setup.device, self.setup.preprocess, self.config.batch_size
        parameters = preprocess.draw(2 * batch, generator_for(device, self.config.seed, 1, step))
        if self.processes.count > 1:  # of the whole batch's first and second views, the own ones
            share = self.processes.share(batch)
            parameters = parameters.rows(torch.arange(2 * batch, device=device).view(2, batch)[:, share].flatten())
        views = preprocess.function(images.repeat(2, 1, 1, 1), parameters)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.setup.bfloat16):
            if self.config.forward == "fused":
                z = self.forward(views)  # batch norm sees 2B images
            else:
                z = torch.cat([self.forward(view) for view in views.chunk(2)])
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return *self.objective(*z.chunk(2)), z

    def state(self) -> dict[str, Any]:
        return {
            "backbone": self.setup.model.backbone.state_dict(),
            "projector": self.setup.model.projector.state_dict(),
            "objective": self.setup.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "times": self.times,
            "images": len(self.setup.data.pretrain),
            "config": asdict(self.config),
            "architecture": self.setup.architecture,
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["images"] != (n := len(self.setup.data.pretrain)):
            raise UserError(f"the run was started on {checkpoint['images']} images, and {self.config.data} has {n} now")
        self.setup.model.backbone.load_state_dict(checkpoint["backbone"], strict=True)
        self.setup.model.projector.load_state_dict(checkpoint["projector"], strict=True)
        self.setup.objective.load_state_dict(checkpoint["objective"], strict=True)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.times = checkpoint["step"], checkpoint.get("times", self.times)

    def train(self) -> None:
        """From the current step to the last; saves on the way, on Ctrl-C and on SIGTERM."""
        config, last = self.config, self.last
        unit = self.steps_per_epoch if config.schedule_by == "epoch" else 1
        schedule = (config.schedule_epochs or config.epochs) * self.steps_per_epoch // unit
        warmup = config.warmup_epochs * self.steps_per_epoch / unit
        self.setup.model.train()
        watch = Stopwatch(**self.times)
        with StopRequest() as stop, Progress(last * config.batch_size, self.step * config.batch_size) as progress:
            for images in self.batches(self.step, last):
                rate = learning_rate(self.step // unit, schedule, warmup, config.learning_rate)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                loss, stats, z = self.loss_of(images, self.step)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                self.step += 1

                progress.advance(config.batch_size)
                stopped = self.processes.maximum(stop.requested)  # all stop after the same step
                save = self.step % (config.save_every * self.steps_per_epoch) == 0 or self.step == last or stopped
                if log := self.step % config.log_every == 0 or save:  # in all processes at once
                    z = torch.cat([self.processes.gather(half) for half in z.detach().chunk(2)])
                if self.processes.first:
                    self.metrics.add(loss, stats)
                    if log:
                        epoch = math.ceil(self.step / self.steps_per_epoch)
                        norms = self.setup.objective.gradient_norms(z)
                        report(self.metrics, epoch, self.step, rate, z, progress, self.log, norms)
                    if save:  # after the report, which stops at a loss that is not finite
                        self.times = watch.read()
                        save_checkpoint(self.folder / CHECKPOINT, self.state())
                self.online_knn(progress)
                if stopped:
                    raise Interrupted(stopped, f"checkpoint of step {self.step} saved in {self.folder}")

    def online_knn(self, progress: Progress) -> None:
        """k-NN every few epochs: a tenth of the train split's images, looked up in the others."""
        split, every = self.setup.data.train, self.config.knn_every
        every = 10 if every is None else every
        if split is None or every == 0 or self.step % (every * self.steps_per_epoch):
            return
        if not self.processes.first:
            self.processes.wait()
            return
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: KNN_BANK * 10 // 9]
        rows = extract_features(
            self.setup.model.backbone,
            split.images[order.to(split.images.device)],
            self.setup.preprocess.plain,
            self.setup.device,
            bfloat16=self.setup.bfloat16,
        )
        labels, held_out = split.labels.cpu()[order].to(rows.device), max(len(order) // 10, 1)
        accuracy = 100 * knn_accuracy(Features(rows[held_out:], labels[held_out:], rows[:held_out], labels[:held_out]))
        assert self.log is not None
        self.log.write("knn", epoch=self.step // self.steps_per_epoch, step=self.step, accuracy=accuracy)
        progress.say(f"k-NN on held-out training images: {accuracy:.1f} %")
        self.processes.wait()


class Interrupted(Exception):
    """A signal ended the run; (its number, what was saved)."""


class Snapshot(NamedTuple):
    """What is compared before and after training, all with batch norm in eval mode."""

    features: Features  #: of the backbone, before the projector
    cosines: PairCosines  #: of the embeddings of two views of test images


def take_snapshot(setup: Setup) -> Snapshot:
    """Needs labels. The views are the same before and after."""
    data, model, preprocess = setup.data, setup.model, setup.preprocess
    assert data.train is not None and data.test is not None
    generator = torch.Generator(setup.device).manual_seed(0)
    features = labelled_features(model.backbone, data.train, data.test, preprocess.plain, setup.device, setup.bfloat16)
    images = data.test.images[:1000]
    z1, z2 = (extract_features(model, images, lambda x: preprocess.views(x, generator), setup.device) for _ in range(2))
    return Snapshot(features, pair_cosines(z1, z2))


def save_plots(history: list[dict[str, Any]], before: Snapshot, after: Snapshot, folder: Path) -> None:
    try:
        from train import plots
    except ImportError as error:
        print(f"no plots: {error} (pip install matplotlib)", file=sys.stderr)
        return
    plots.plot_loss(history, folder / LOSS_PLOT)
    if len(after.features.test) < 3:
        return  # no pairs of images, or nothing to arrange
    plots.plot_cosines(before.cosines, after.cosines, folder / COSINE_PLOT)
    shown = (tensor[:2000].cpu() for tensor in (after.features.test, after.features.test_labels))
    plots.plot_embedding(*shown, folder / EMBEDDING_PLOT)


def last_step(config: Config, images: int) -> int:
    total = config.epochs * (images // config.batch_size)
    return min(total, config.limit_steps or total)


def open_run(config: Config, setup: Setup) -> tuple[Path, dict[str, Any] | None]:
    """(the run folder, the checkpoint to go on from)."""
    if (folder := config.run_to_resume()) is not None:
        return folder, load_checkpoint(folder / CHECKPOINT)
    overwrite = config.overwrite or config.resume == "auto"
    folder = create_run_folder(config.output, setup.data.name, overwrite)
    write_atomically(folder / CONFIG, lambda path: path.write_text(config.to_toml(), encoding="utf-8"))
    return folder, None


def main(argv: Sequence[str] | None = None, processes: Processes = ALONE) -> None:
    config, args = parse_arguments(argv, "pretrain.py", DESCRIPTION)
    if args.print_config:
        print(config.to_toml(), end="")
        return
    try:
        pretrain(config, processes, args.dry_run)
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            raise UserError(f"out of memory: try --batch-size {max(config.batch_size // 2, 2)}") from error
        if is_out_of_disk(error):
            raise UserError("the disk is full; once it is not, --resume goes on from the last checkpoint") from error
        raise


def pretrain(config: Config, processes: Processes, try_only: bool) -> None:
    setup = set_up(config, processes)
    if try_only:
        dry_run(config, setup)
        return
    folder, checkpoint = processes.from_first(lambda: open_run(config, setup))
    scored = config.evaluate and setup.data.train is not None
    trained = checkpoint is not None and checkpoint["step"] >= last_step(config, checkpoint["images"])
    if trained and processes.from_first(lambda: has_ended(folder, scored)):
        print(f"the run in {folder} is complete after step {checkpoint['step']}: nothing is left to do")
        return
    log = open_log(folder, checkpoint, config, setup) if processes.first else None
    n = len(setup.data.pretrain)
    together = f" in each of {processes.count} processes" if processes.count > 1 else ""
    print(f"{setup.data.name}: {n} training images on {setup.device}{together}, run folder {folder}", flush=True)

    before = None
    if scored and processes.first:
        before = take_snapshot(setup)
        before = before._replace(features=before.features.to(torch.device("cpu")))  # training needs the memory
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
        finish(config, setup, folder, log, before, trainer.times)
    write_card(folder)
    log.close()
    print(f"trained in {trainer.times['seconds']:.0f} s; encoder, log, checkpoint and results are in {folder}")


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
    loss, _, _ = trainer.loss_of(trainer.batch_of(0), 0)
    loss.backward()
    print(f"dry run: {len(setup.data.pretrain)} images, {trainer.last} steps, first loss {loss.item():.4f}")


def finish(config: Config, setup: Setup, folder: Path, log: RunLog, before: Snapshot, times: dict[str, float]) -> None:
    """Score the encoder beside raw pixels and itself untrained, and draw the plots."""
    data = setup.data
    assert data.train is not None and data.test is not None
    print("scoring raw pixels, the untrained and the pre-trained encoder", flush=True)
    after = take_snapshot(setup)
    labels = after.features.train_labels
    budgets = label_budgets(len(labels), len(labels.unique()))
    rows = {
        name: evaluate_features(make(), budgets=budgets)
        for name, make in [
            ("raw pixels", lambda: pixel_features(data.train, data.test, setup.device)),
            ("untrained encoder", lambda: before.features.to(labels.device)),
            ("pre-trained encoder", lambda: after.features),
        ]
    }
    log.write("results", rows=rows, **times)
    results = json.dumps({"rows": rows, **times, "config": asdict(config)}, indent=2)
    write_atomically(folder / RESULTS, lambda path: path.write_text(results + "\n"))
    epoch = log.history[-1]["epoch"]
    n = len(after.features.test)
    print(format_table(rows, f"accuracy in % on {n} held-out test images, after epoch {epoch}"), flush=True)
    save_plots(log.history, before, after, folder)


def run(argv: Sequence[str] | None = None) -> int:
    """``main`` with a user's mistakes as one line and an exit code."""
    processes = Processes.start()
    try:
        main(argv, processes)
    except UserError as error:
        processes.fail(f"pretrain.py: {error}")
        return 2
    except Interrupted as interrupt:
        number, saved = interrupt.args
        processes.fail(f"pretrain.py: interrupted: {saved}")
        return 128 + number
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
