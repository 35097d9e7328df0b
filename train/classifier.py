# SPDX-License-Identifier: Apache-2.0
"""Protocols that run images through the encoder: fine-tuning, and the linear evaluation of the paper's code.

Both are one loop over augmented batches with a linear head on the encoder; they differ in what is trained,
in the schedule, and in whether a validation split stops the run. The test split is scored once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.augment import ViewRanges
from train.data import Split
from train.features import eval_mode
from train.probes import stratified_split
from train.progress import counting


@dataclass(frozen=True)
class ClassifierSettings:
    """One protocol; ``dataclasses.replace`` a preset for another."""

    learning_rate: float  #: of SGD, per step of ``batch_size`` images
    epochs: int
    batch_size: int
    momentum: float = 0.9
    weight_decay: float = 0.0  #: not on biases and batch norm
    step_decay: float | None = None  #: factor on the learning rate after each epoch; None: cosine per step to 0
    train_backbone: bool = True  #: False: only the linear head learns
    batch_norm_train: bool = True  #: batch norm of the encoder in train mode while training; scored in eval mode
    label_fraction: float = 1.0  #: share of every class of the train split that is used at all
    validation: float = 0.0  #: share of that which is held out; the epoch of the lowest loss on it is scored
    patience: int = 50  #: epochs without a new lowest validation loss before the run stops
    drop_last_test: bool = False  #: leave out the images of the test split beyond a multiple of ``batch_size``
    bfloat16: bool = False  #: autocast
    seed: int = 0


#: Encoder and head together; the last epoch is scored.
FINETUNE = ClassifierSettings(learning_rate=0.05, epochs=50, batch_size=256, weight_decay=5e-4)

#: The linear evaluation of the paper's public code. Its encoder gets no gradient, but its batch norm stays in
#: train mode while the head learns: the head sees batch statistics, and the running ones, with which it is
#: scored, drift to the cropped images. ``batch_norm_train=False`` is the corrected protocol. Its
#: ``drop_last`` leaves 9,984 of CIFAR-10's 10,000 test images.
V1 = ClassifierSettings(
    learning_rate=0.01,
    epochs=100,
    batch_size=32,
    step_decay=0.98,
    train_backbone=False,
    validation=0.2,
    drop_last_test=True,
)

#: The augmented images of each protocol.
FINETUNE_VIEWS = ViewRanges(crop_area=(0.2, 1.0), flip=0.5, jitter=0.0, grayscale=0.0)
V1_VIEWS = replace(FINETUNE_VIEWS, crop_area=(0.8, 1.0), flip=0.0)


class ClassifierResult(NamedTuple):
    """Accuracies are shares in [0, 1]."""

    accuracy: float  #: on the test split
    epochs_run: int
    holdout_accuracy: float | None  #: at the scored epoch; None without a validation split


class Plain(Protocol):
    """Images [n, C, H, W] uint8 to network input, float32 (``train.augment.Preprocess``)."""

    def plain(self, images: Tensor) -> Tensor: ...


class Augmented(Protocol):
    """One random view of each image (``train.augment.Preprocess`` with this protocol's ranges)."""

    def views(self, images: Tensor, generator: torch.Generator) -> Tensor: ...


class Classifier(nn.Module):
    """Encoder and linear head."""

    def __init__(self, backbone: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.utils.skip_init(nn.Linear, features, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images).float())
        return logits


def score(
    model: nn.Module, split: Split, preprocess: Plain, device: torch.device, bfloat16: bool
) -> tuple[float, float]:
    """Accuracy and mean cross-entropy, batch norm in eval mode; images [n, C, H, W] may lie elsewhere."""
    correct = torch.zeros((), dtype=torch.long, device=device)  # read once, at the end
    loss = torch.zeros((), dtype=torch.double, device=device)
    with torch.inference_mode(), eval_mode(model), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        for images, labels in zip(split.images.split(512), split.labels.split(512), strict=True):
            labels = labels.to(device)
            logits = model(preprocess.plain(images.to(device))).float()
            correct += (logits.argmax(1) == labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum")
    return int(correct) / len(split), float(loss) / len(split)


def subset(split: Split, index: Tensor) -> Split:
    return Split(split.images[index.to(split.images.device)], split.labels[index.to(split.labels.device)])


def build_classifier(
    backbone: nn.Module,
    images: Tensor,
    preprocess: Plain,
    classes: int,
    settings: ClassifierSettings,
    device: torch.device,
) -> Classifier:
    """A copy of the backbone with a new linear head, whose width is measured on one of the ``images``."""
    backbone = copy.deepcopy(backbone).to(device)
    with torch.inference_mode(), eval_mode(backbone):
        features = backbone(preprocess.plain(images[:1].to(device))).shape[1]
    backbone.requires_grad_(settings.train_backbone)
    model = Classifier(backbone, features, classes)
    generator = torch.Generator().manual_seed(settings.seed)  # of its own: nothing else is disturbed
    for parameter in model.head.parameters():  # torch's own initialisation of a linear layer
        nn.init.uniform_(parameter, -(features**-0.5), features**-0.5, generator=generator)
    return model.to(device)


def build_optimizer(model: Classifier, settings: ClassifierSettings) -> torch.optim.SGD:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)


def train_epoch(
    model: Classifier,
    optimizer: torch.optim.SGD,
    split: Split,
    order: Tensor,
    view: Callable[[Tensor], Tensor],
    epoch: int,
    settings: ClassifierSettings,
    device: torch.device,
) -> float:
    """One pass (the ``epoch``-th, from 1) over the images at ``order``; the mean training loss."""
    model.train()
    model.backbone.train(settings.batch_norm_train)
    batch = min(settings.batch_size, len(order))
    batches = order[: len(order) // batch * batch].to(split.images.device).split(batch)
    losses = []
    with counting(f"epoch {epoch}/{settings.epochs}", len(batches) * batch, "images") as advance:
        for step, index in enumerate(batches, start=(epoch - 1) * len(batches)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch, step / (settings.epochs * len(batches)), settings)
            now = subset(split, index)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
                logits = model(view(now.images.to(device)))
            loss = F.cross_entropy(logits.float(), now.labels.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            advance(batch)
    return float(torch.stack(losses).mean())


def learning_rate(epoch: int, done: float, settings: ClassifierSettings) -> float:
    """In the ``epoch``-th epoch, with the share ``done`` of all steps behind."""
    if settings.step_decay is not None:
        return settings.learning_rate * settings.step_decay ** (epoch - 1)
    return settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * done))


class Best(NamedTuple):
    """The epoch of the lowest validation loss so far."""

    loss: float
    epoch: int
    accuracy: float
    state: dict[str, Tensor]


def train_classifier(
    backbone: nn.Module,
    data_train: Split,
    data_test: Split,
    preprocess: Plain,
    *,
    settings: ClassifierSettings,
    device: torch.device,
    augmented: Augmented | None = None,
    progress: Callable[[str], None] | None = None,
) -> ClassifierResult:
    """Train a linear head on ``backbone`` (with it, or on it frozen) and score the test split once.

    ``backbone`` maps images to features [n, F]; a copy is trained, the given one stays as it is. The splits
    hold uint8 images, on any device. ``augmented`` gives the training views (None: the plain images),
    ``preprocess`` what is scored. ``progress`` gets a line per epoch. With a validation split the epoch of
    its lowest loss is scored, otherwise the last one. An incomplete last batch of an epoch is left out.
    Raises ValueError if fewer than two images are left to train on, or none to validate or test on.
    """
    device = torch.device(device)
    chosen = torch.arange(len(data_train))
    if settings.label_fraction < 1:
        chosen = stratified_split(data_train.labels, settings.label_fraction, settings.seed)[0].cpu()
    held_out = None
    if settings.validation > 0:
        fit, rest = stratified_split(data_train.labels[chosen], 1 - settings.validation, settings.seed)
        held_out, chosen = subset(data_train, chosen[rest.cpu()]), chosen[fit.cpu()]
    if settings.drop_last_test:
        kept = len(data_test) // settings.batch_size * settings.batch_size
        data_test = Split(data_test.images[:kept], data_test.labels[:kept])
    if len(chosen) < 2 or not len(data_test) or (held_out is not None and not len(held_out)):
        raise ValueError("train_classifier: needs at least two images to train on, and some to validate and test on")

    model = build_classifier(backbone, data_test.images, preprocess, int(data_train.labels.max()) + 1, settings, device)
    optimizer = build_optimizer(model, settings)
    shuffle = torch.Generator().manual_seed(settings.seed)
    generator = torch.Generator(device).manual_seed(settings.seed)  # of the views
    view = preprocess.plain if augmented is None else partial(augmented.views, generator=generator)
    best: Best | None = None
    for epoch in range(1, settings.epochs + 1):
        order = chosen[torch.randperm(len(chosen), generator=shuffle)]
        training_loss = train_epoch(model, optimizer, data_train, order, view, epoch, settings, device)
        line = f"epoch {epoch}/{settings.epochs}  loss {training_loss:.4f}"
        if held_out is not None:
            accuracy, loss = score(model, held_out, preprocess, device, settings.bfloat16)
            line += f"  validation loss {loss:.4f}  accuracy {100 * accuracy:.2f} %"
            if best is None or loss <= best.loss:
                best = Best(loss, epoch, accuracy, copy.deepcopy(model.state_dict()))
        if progress is not None:
            progress(line)
        if best is not None and epoch - best.epoch > settings.patience:
            break
    if best is not None:
        model.load_state_dict(best.state)
    accuracy, _ = score(model, data_test, preprocess, device, settings.bfloat16)
    return ClassifierResult(accuracy, epoch, None if best is None else best.accuracy)
