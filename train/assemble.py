# SPDX-License-Identifier: Apache-2.0
"""What a run is made of, built once from its options: data, network, loss, views."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from train.augment import Preprocess, ViewRanges
from train.config import Config, load_config
from train.data import ImageData, load_data
from train.device import check_loss_backend, choose_device, use_bfloat16, verify_loss_backend
from train.errors import UserError
from train.model import PretrainModel, build_model, resolve_stem
from train.objective import Objective
from train.processes import ALONE, Processes
from train.run_folder import CHECKPOINT, load_checkpoint
from train.sync_batch_norm import synchronize_batch_norm


class Setup(NamedTuple):
    """What is built once from the options."""

    device: torch.device
    data: ImageData
    model: PretrainModel
    objective: Objective
    preprocess: Preprocess
    bfloat16: bool
    architecture: dict[str, Any]  #: what it takes to use the encoder elsewhere
    processes: Processes  #: that share every batch


def assemble(config: Config, processes: Processes = ALONE, keep: bool = True) -> Setup:
    """``keep``: whether images that were decoded stay in a cache."""
    if config.batch_size % processes.count:
        raise UserError(
            f"--batch-size {config.batch_size} is that of all processes together: it must be a multiple of their "
            f"number, {processes.count}"
        )
    device = choose_device(config.device, processes)
    if config.loss_backend == "auto":
        verify_loss_backend(device, config.embedding, processes)
    check_loss_backend(config.loss_backend, device)
    with processes.one_before_the_others():
        data = load_data(
            config.data,
            root=Path(config.data_root),
            download=config.download,
            image_size=config.image_size,
            keep=keep,
        )
    if config.knn_every and data.train is None:
        raise UserError(f"--knn-every {config.knn_every}: {config.data} has no labels; pass --knn-every 0")
    data = data.subset(config.subset).to(device)
    if config.batch_size > len(data.pretrain):
        raise UserError(f"--batch-size {config.batch_size} is more than the {len(data.pretrain)} training images")
    mean, std = data.mean_std()
    size = config.image_size or data.image_size or data.size
    stem = resolve_stem(config.stem, size, config.backbone)
    torch.manual_seed(config.seed)
    model = build_model(
        config.backbone, data.channels, stem, config.projector, config.stem_padding, size, config.width
    ).to(device)
    if processes.count > 1:
        synchronize_batch_norm(model, device)
    ranges = ViewRanges(**{f.name: getattr(config, f.name) for f in fields(ViewRanges)})
    architecture = {
        "backbone": config.backbone,
        "width": config.width,
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
        processes,
    )


def check_content(checkpoint: dict[str, Any], data: ImageData, where: str) -> None:
    """A run goes on with, and is scored on, the images and labels it began with, wherever they are now."""
    now, then = data.content, checkpoint.get("content")
    if then is None:  # an older run knows but the number of its images
        now, then = str(len(data.pretrain)), str(checkpoint["images"])
    if now != then:
        raise UserError(
            f"{where} holds other images or labels than the run was started with; if those are elsewhere, pass --data"
        )


def load_run(run: Path, device: str, data: str | None, data_root: str | None) -> Setup:
    """The run's data and its model with the weights of the last checkpoint."""
    config = replace(load_config(run), device=device, loss_backend="reference", subset=1.0, batch_size=2)
    if data is not None:
        config = replace(config, data=data)
    if data_root is not None:
        config = replace(config, data_root=data_root)
    checkpoint = load_checkpoint(run / CHECKPOINT)
    setup = assemble(config)
    if "content" in checkpoint:  # the number that older runs have is that of a subset
        check_content(checkpoint, setup.data, config.data)
    for name, module in (*setup.model.named_children(), ("objective", setup.objective)):
        module.load_state_dict(checkpoint[name], strict=True)
    # The statistics of the images that pre-training saw, which a subset or a changed folder would shift.
    mean, std = (setup.preprocess.mean.new_tensor(checkpoint["architecture"][key]) for key in ("mean", "std"))
    return setup._replace(preprocess=Preprocess(mean, std, setup.preprocess.size, setup.preprocess.ranges))
