# SPDX-License-Identifier: Apache-2.0
"""The training loop: batches, views, loss, update, and what is saved and said on the way."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mio_ext import backward_in_micro_batches
from train.assemble import Setup
from train.config import Config
from train.data import generator_for, prefetch, random_batches
from train.device import is_out_of_memory
from train.errors import Interrupted, UserError
from train.features import Features, extract_features
from train.monitor import Progress, StepMetrics, StopRequest, Stopwatch, report
from train.optimizer import build_optimizer, learning_rate
from train.probes import knn_accuracy
from train.run_folder import CHECKPOINT, RunLog, save_checkpoint

KNN_BANK = 10_000  #: training images that an online k-NN looks its neighbours up in


def last_step(config: Config, images: int) -> int:
    total = config.epochs * (images // config.batch_size)
    return min(total, config.limit_steps or total)


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
                self.backward(self.batch_of(0), 0)  # each way runs the compiler
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

    def backward(self, images: Tensor, step: int) -> tuple[Tensor, Any, Tensor]:
        """(loss, pair statistics, own embeddings [VB, D]) of images [B, C, H, W] uint8; gradients in the parameters."""
        own, views = len(images), self.views_of(images, step)
        micro = min(self.config.micro_batch_size or own, own)
        # Rows of the first views, the second ..., in the order in which the encoder sees them.
        count = self.config.views
        order = torch.arange(count * own, device=images.device).view(count, own)
        if self.config.forward == "fused":  # batch norm sees all views of an image at once
            pieces = [torch.cat([part.flatten() for part in order.split(micro, dim=1)])]
        else:
            pieces = list(order)
        place = torch.cat(pieces).argsort() if micro < own else None
        seen: tuple[Any, Tensor]

        def loss_of(*embedded: Tensor) -> Tensor:
            nonlocal seen
            z = torch.cat(embedded) if place is None else torch.cat(embedded)[place]
            loss, stats = self.objective(*z.chunk(2))
            seen = stats, z
            return loss  # type: ignore[no-any-return]

        def encoder(rows: Tensor) -> Tensor:
            return self.encode(views(rows))

        if micro < own:
            size = micro * (count if self.config.forward == "fused" else 1)
            loss = backward_in_micro_batches(encoder, pieces, loss_of, size, modules=[self.network])
        else:
            loss = loss_of(*map(encoder, pieces))
            loss.backward()
        return loss, *seen

    def views_of(self, images: Tensor, step: int) -> Callable[[Tensor], Tensor]:
        """From rows of [first views; second views; ...] of own images to those views, [n, C, size, size]."""
        device, preprocess, batch = self.setup.device, self.setup.preprocess, self.config.batch_size
        count = self.config.views * batch
        parameters = preprocess.draw(count, generator_for(device, self.config.seed, 1, step))
        if self.processes.count > 1:  # of the whole batch's views, the own ones
            share = self.processes.share(batch)
            parameters = parameters.rows(torch.arange(count, device=device).view(-1, batch)[:, share].flatten())
        return lambda rows: preprocess.function(images[rows % len(images)], parameters.rows(rows))

    def encode(self, views: Tensor) -> Tensor:
        """Embeddings, in float32 or better."""
        with torch.autocast(views.device.type, torch.bfloat16, enabled=self.setup.bfloat16):
            z = self.forward(views)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def state(self) -> dict[str, Any]:
        return {
            "backbone": self.setup.model.backbone.state_dict(),
            "projector": self.setup.model.projector.state_dict(),
            "objective": self.setup.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "times": self.times,
            "images": len(self.setup.data.pretrain),
            "content": self.setup.data.content,
            "config": asdict(self.config),
            "architecture": self.setup.architecture,
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
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
        with (
            StopRequest() as stop,
            Progress(last * config.batch_size, self.step * config.batch_size, config.epochs) as progress,
        ):
            for images in self.batches(self.step, last):
                rate = learning_rate(self.step // unit, schedule, warmup, config.learning_rate)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group.get("share", 1.0)
                self.optimizer.zero_grad(set_to_none=True)
                loss, stats, z = self.backward(images, self.step)
                self.optimizer.step()
                self.step += 1

                progress.advance(config.batch_size)
                progress.glance(math.ceil(self.step / self.steps_per_epoch), loss, stats)
                stopped = self.processes.maximum(stop.requested)  # all stop after the same step
                save = self.step % (config.save_every * self.steps_per_epoch) == 0 or self.step == last or stopped
                if log := self.step % config.log_every == 0 or save:  # in all processes at once
                    z = torch.cat([self.processes.gather(half) for half in z.detach().chunk(2)])
                if self.log is not None:
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
                    raise Interrupted(
                        stopped,
                        f"checkpoint of step {self.step} saved in {self.folder}; --resume {self.folder} goes on",
                    )

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
