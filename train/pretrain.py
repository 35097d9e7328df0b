# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the repository root goes on the path before the imports that need it)
"""Self-supervised pre-training of a ResNet with the fused MIO loss (arXiv 2111.12664).

    python train/pretrain.py
    python train/pretrain.py --data folder:photos --epochs 100 --output runs/photos

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
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # so that the script runs without an installed mio_ext

REQUIRED = {"torch": "torch", "torchvision": "torchvision", "sklearn": "scikit-learn", "safetensors": "safetensors"}
if missing := [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]:
    print(f"pretrain.py: {', '.join(missing)} missing: pip install {' '.join(missing)}", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
from torch import Tensor, nn

from train.augment import Preprocess, ViewRanges
from train.config import Config, check_same, load_config, parse_arguments
from train.data import ImageData, load_data, prefetch
from train.device import check_loss_backend, choose_device, is_out_of_memory, use_bfloat16, versions
from train.export import export_encoder
from train.model import PretrainModel, build_model, resolve_stem
from train.monitor import METRICS, Progress, StepMetrics, StopRequest, collapse_warning
from train.objective import Objective
from train.optimizer import build_optimizer, learning_rate
from train.probes import (
    Features,
    PairCosines,
    evaluate_features,
    extract_features,
    format_table,
    knn_accuracy,
    label_budgets,
    pair_cosines,
    rankme,
)
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
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)

DESCRIPTION = (
    "Self-supervised pre-training of a ResNet with the fused MIO loss, then a linear probe and k-NN on held-out data. "
    "Later ones win: the defaults in brackets, what presets/datasets.toml says of the data set, --preset, "
    "--config, the command line."
)
KNN_BANK = 10_000  #: training images that an online k-NN looks its neighbours up in


class Setup(NamedTuple):
    """What is built once from the options."""

    device: torch.device
    data: ImageData
    model: PretrainModel
    objective: Objective
    preprocess: Preprocess
    bfloat16: bool
    architecture: dict[str, Any]  #: what it takes to use the encoder elsewhere


def set_up(config: Config) -> Setup:
    device = choose_device(config.device)
    check_loss_backend(config.loss_backend, device)
    data = load_data(config.data, root=Path(config.data_root), download=config.download, image_size=config.image_size)
    if config.knn_every and data.train is None:
        raise UserError(f"--knn-every {config.knn_every}: {config.data} has no labels; pass --knn-every 0")
    data = data.subset(config.subset).to(device)
    if config.batch_size > len(data.pretrain):
        raise UserError(f"--batch-size {config.batch_size} is more than the {len(data.pretrain)} training images")
    mean, std = data.mean_std()
    size = config.image_size or data.size
    stem = resolve_stem(config.stem, size)
    torch.manual_seed(config.seed)
    model = build_model(config.backbone, data.channels, stem, config.projector, config.stem_padding).to(device)
    ranges = ViewRanges(**{f.name: getattr(config, f.name) for f in fields(ViewRanges)})
    architecture = {
        "backbone": config.backbone,
        "channels": data.channels,
        "stem": stem,
        "stem_padding": config.stem_padding,
        "image_size": size,
        "mean": mean.flatten().tolist(),
        "std": std.flatten().tolist(),
    }
    return Setup(
        device,
        data,
        model,
        Objective(config).to(device),
        Preprocess(mean, std, size, ranges),
        use_bfloat16(config.precision, device),
        architecture,
    )


def generator_for(device: torch.device, *key: int) -> torch.Generator:
    """Random numbers of one epoch or step. They depend on the key alone, so a resumed run draws the same."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def random_batches(n: int, batch_size: int, seed: int, start: int, stop: int, device: torch.device) -> Iterator[Tensor]:
    """Indices of steps ``start`` to ``stop`` - 1, shuffled on the device; the incomplete last batch of an epoch
    is dropped, because the number of negatives is part of the loss."""
    per_epoch = n // batch_size
    permutation = None
    for step in range(start, stop):
        epoch, i = divmod(step, per_epoch)
        if permutation is None or i == 0:
            permutation = torch.randperm(n, generator=generator_for(device, seed, 0, epoch), device=device)
        yield permutation[i * batch_size : (i + 1) * batch_size]


class Trainer:
    """The state of a run between two steps, and how it is saved."""

    def __init__(self, config: Config, setup: Setup, folder: Path, log: RunLog) -> None:
        self.config, self.setup, self.folder, self.log = config, setup, folder, log
        self.parameters = nn.ModuleList([setup.model, setup.objective])
        self.optimizer = build_optimizer(self.parameters, config)
        self.steps_per_epoch = len(setup.data.pretrain) // config.batch_size
        self.total = config.epochs * self.steps_per_epoch
        self.step = 0
        self.metrics = StepMetrics()
        self.forward = setup.model.forward

    def compile(self) -> None:
        """Compile network and views; a compiler that does not work costs a warning, not the run."""
        on = self.config.compile == "on" or (self.config.compile == "auto" and self.setup.device.type == "cuda")
        if not on:
            return
        self.forward = torch.compile(self.setup.model)
        self.setup.preprocess.compile()
        try:
            with torch.random.fork_rng():
                self.loss_of(self.batch_of(0), 0)  # runs the compiler; batch norm's statistics are put back
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if self.config.compile == "on":
                raise UserError(f"--compile on: {str(error).splitlines()[0]}") from error
            print(f"warning: not compiled: {str(error).splitlines()[0]}", file=sys.stderr)
            self.forward = self.setup.model.forward
            self.setup.preprocess.function = self.setup.preprocess.augment

    def batch_of(self, step: int) -> Tensor:
        """The images of one step, [B, C, H, W] uint8 on the device."""
        return next(self.batches(step, step + 1))

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        images, config = self.setup.data.pretrain, self.config
        indices = random_batches(len(images), config.batch_size, config.seed, start, stop, images.device)
        return prefetch(images, indices, self.setup.device)

    def loss_of(self, images: Tensor, step: int) -> tuple[Tensor, Any, Tensor]:
        """(loss, pair statistics, embeddings [2B, D]) of images [B, C, H, W] uint8."""
        device, preprocess = self.setup.device, self.setup.preprocess
        parameters = preprocess.draw(2 * len(images), generator_for(device, self.config.seed, 1, step))
        views = preprocess.function(images.repeat(2, 1, 1, 1), parameters)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.setup.bfloat16):
            if self.config.forward == "fused":
                z = self.forward(views)  # batch norm sees 2B images
            else:
                z = torch.cat([self.forward(view) for view in views.chunk(2)])
        z = z.float()
        return *self.setup.objective(*z.chunk(2)), z

    def state(self) -> dict[str, Any]:
        return {
            "backbone": self.setup.model.backbone.state_dict(),
            "projector": self.setup.model.projector.state_dict(),
            "objective": self.setup.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
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
        self.step = checkpoint["step"]

    def train(self) -> None:
        """From the current step to the last; saves on the way, on Ctrl-C and on SIGTERM."""
        config = self.config
        last = min(self.total, config.limit_steps or self.total)
        schedule = (config.schedule_epochs or config.epochs) * self.steps_per_epoch
        warmup = config.warmup_epochs * self.steps_per_epoch
        self.setup.model.train()
        with StopRequest() as stop, Progress(last * config.batch_size, self.step * config.batch_size) as progress:
            for images in self.batches(self.step, last):
                rate = learning_rate(self.step, schedule, warmup, config.learning_rate)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                loss, stats, z = self.loss_of(images, self.step)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                self.step += 1

                self.metrics.add(loss, stats, z)
                progress.advance(len(images))
                save = self.step % (config.save_every * self.steps_per_epoch) == 0 or self.step == last
                if self.step % config.log_every == 0 or save or stop.requested:
                    epoch = math.ceil(self.step / self.steps_per_epoch)
                    norms = self.setup.objective.gradient_norms(z)
                    report(self.metrics, epoch, self.step, rate, z, progress, self.log, norms)
                if save or stop.requested:  # after the report, which stops at a loss that is not finite
                    save_checkpoint(self.folder / CHECKPOINT, self.state())
                self.online_knn(progress)
                if stop.requested:
                    raise Interrupted(stop.requested, f"checkpoint of step {self.step} saved in {self.folder}")

    def online_knn(self, progress: Progress) -> None:
        """k-NN every few epochs: a tenth of the train split's images, looked up in the others."""
        split, every = self.setup.data.train, self.config.knn_every
        every = 10 if every is None else every
        if split is None or every == 0 or self.step % (every * self.steps_per_epoch):
            return
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: KNN_BANK * 10 // 9]
        rows = extract_features(
            self.setup.model.backbone,
            split.images[order.to(split.images.device)],
            self.setup.preprocess.plain,
            self.setup.device,
            bfloat16=self.setup.bfloat16,
        )
        labels, held_out = split.labels.cpu()[order], max(len(order) // 10, 1)
        accuracy = 100 * knn_accuracy(Features(rows[held_out:], labels[held_out:], rows[:held_out], labels[:held_out]))
        self.log.write("knn", epoch=self.step // self.steps_per_epoch, step=self.step, accuracy=accuracy)
        progress.say(f"k-NN on held-out training images: {accuracy:.1f} %")


class Interrupted(Exception):
    """A signal ended the run; (its number, what was saved)."""


def report(
    metrics: StepMetrics,
    epoch: int,
    step: int,
    lr: float,
    z: Tensor,
    progress: Progress,
    log: RunLog,
    norms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Read the metrics of one interval and log their means; stop the run where the loss is not finite.

    ``z`` and the ``norms`` of its gradient are those of the interval's last step.
    """
    rows = metrics.read()
    finite = rows[:, METRICS.index("loss")].isfinite()
    if not finite.all():
        first = step - len(rows) + 1 + int(finite.logical_not().nonzero()[0])
        raise UserError(f"the loss is not finite at step {first}: try a lower --learning-rate; log in {log.file.name}")
    means = dict(zip(METRICS, rows.mean(0).tolist(), strict=True))
    # Eq. (6) at one temperature: a lower bound of the Jensen-Shannon divergence of the two kinds of pairs.
    information = math.log(2) - (means["positive_loss"] + means["negative_loss"]) / 2
    entry = {"epoch": epoch, "step": step, "lr": lr, **means, "js_estimate": information}
    entry |= {"rankme": float(rankme(z.detach())), "images_per_second": progress.rate}
    entry |= norms or {}
    log.write("train", **entry)
    progress.report(epoch, step, means)
    if warning := collapse_warning(means):
        log.write("warning", step=step, message=warning)
        progress.say(f"warning: {warning}")
    return entry


class Snapshot(NamedTuple):
    """What is compared before and after training, all with batch norm in eval mode."""

    features: Features  #: of the backbone, before the projector
    cosines: PairCosines  #: of the embeddings of two views of test images


def take_snapshot(setup: Setup) -> Snapshot:
    """Needs labels. The views are the same before and after."""
    data, model, preprocess = setup.data, setup.model, setup.preprocess
    assert data.train is not None and data.test is not None
    generator = torch.Generator(setup.device).manual_seed(0)
    train, test = (
        extract_features(model.backbone, s.images, preprocess.plain, setup.device, bfloat16=setup.bfloat16)
        for s in (data.train, data.test)
    )
    images = data.test.images[:1000]
    z1, z2 = (extract_features(model, images, lambda x: preprocess.views(x, generator), setup.device) for _ in range(2))
    return Snapshot(
        Features(train, data.train.labels.cpu(), test, data.test.labels.cpu()),
        pair_cosines(z1, z2),
    )


def raw_pixels(data: ImageData) -> Features:
    assert data.train is not None and data.test is not None
    train, test = ((s.images.flatten(1).float().cpu() / 255, s.labels.cpu()) for s in (data.train, data.test))
    return Features(*train, *test)


def save_plots(history: list[dict[str, Any]], before: Snapshot, after: Snapshot, folder: Path) -> None:
    try:
        from train import plots
    except ImportError as error:
        print(f"no plots: {error} (pip install matplotlib)", file=sys.stderr)
        return
    plots.plot_loss(history, folder / LOSS_PLOT)
    plots.plot_cosines(before.cosines, after.cosines, folder / COSINE_PLOT)
    plots.plot_embedding(after.features.test[:2000], after.features.test_labels[:2000], folder / EMBEDDING_PLOT)


def open_run(config: Config, setup: Setup) -> tuple[Path, dict[str, Any] | None]:
    """(the run folder, the checkpoint to go on from)."""
    if config.resume is not None:
        folder = Path(config.output or config.resume)
        if config.resume != "auto" or (folder / CHECKPOINT).exists():
            check_same(load_config(folder), config, folder)
            return folder, load_checkpoint(folder / CHECKPOINT)
    overwrite = config.overwrite or config.resume == "auto"
    folder = create_run_folder(config.output, setup.data.name, overwrite)
    write_atomically(folder / CONFIG, lambda path: path.write_text(config.to_toml(), encoding="utf-8"))
    return folder, None


def main(argv: Sequence[str] | None = None) -> None:
    config, args = parse_arguments(argv, "pretrain.py", DESCRIPTION)
    if args.print_config:
        print(config.to_toml(), end="")
        return
    setup = set_up(config)
    if args.dry_run:
        dry_run(config, setup)
        return
    folder, checkpoint = open_run(config, setup)
    log = RunLog(folder, None if checkpoint is None else checkpoint["step"])
    event = "start" if checkpoint is None else "resume"
    log.write(event, command=shlex.join(["python", *sys.argv]), config=asdict(config), versions=versions(setup.device))
    n = len(setup.data.pretrain)
    print(f"{setup.data.name}: {n} training images on {setup.device}, run folder {folder}", flush=True)

    scored = config.evaluate and setup.data.train is not None
    before = take_snapshot(setup) if scored else None
    trainer = Trainer(config, setup, folder, log)
    if checkpoint is not None:
        trainer.load(checkpoint)
        print(f"going on after step {trainer.step} of {trainer.total}", flush=True)
    trainer.compile()
    start, cpu_start = time.perf_counter(), time.process_time()
    trainer.train()
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    export_encoder(setup.model.backbone, setup.architecture, folder / ENCODER)
    if before is not None:
        finish(config, setup, folder, log, before, times)
    log.close()
    print(f"trained in {times['seconds']:.0f} s; encoder, log, checkpoint and results are in {folder}")


def dry_run(config: Config, setup: Setup) -> None:
    """One step, to see that everything fits and works; nothing is written."""
    trainer = Trainer(config, setup, Path(os.devnull), None)  # type: ignore[arg-type]
    loss, _, _ = trainer.loss_of(trainer.batch_of(0), 0)
    loss.backward()
    print(f"dry run: {len(setup.data.pretrain)} images, {trainer.total} steps, first loss {loss.item():.4f}")


def finish(config: Config, setup: Setup, folder: Path, log: RunLog, before: Snapshot, times: dict[str, float]) -> None:
    """Score the encoder beside raw pixels and itself untrained, and draw the plots."""
    after = take_snapshot(setup)
    labels = after.features.train_labels
    budgets = label_budgets(len(labels), len(labels.unique()))
    rows = {
        name: evaluate_features(features, budgets=budgets)
        for name, features in [
            ("raw pixels", raw_pixels(setup.data)),
            ("untrained encoder", before.features),
            ("pre-trained encoder", after.features),
        ]
    }
    log.write("results", rows=rows, **times)
    results = json.dumps({"rows": rows, **times, "config": asdict(config)}, indent=2)
    write_atomically(folder / RESULTS, lambda path: path.write_text(results + "\n"))
    epoch = log.history[-1]["epoch"]
    n = len(after.features.test)
    print(format_table(rows, f"accuracy in % on {n} held-out test images, after epoch {epoch}"))
    save_plots(log.history, before, after, folder)


def run(argv: Sequence[str] | None = None) -> int:
    """``main`` with a user's mistakes as one line and an exit code."""
    try:
        main(argv)
    except UserError as error:
        print(f"pretrain.py: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupt:
        number, saved = interrupt.args
        print(f"pretrain.py: interrupted: {saved}", file=sys.stderr)
        return 128 + number
    except KeyboardInterrupt:
        print("pretrain.py: interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print("pretrain.py: out of memory: try a smaller --batch-size", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
