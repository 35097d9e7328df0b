# SPDX-License-Identifier: Apache-2.0
"""The network that is trained: backbone (mio_ext/encoder.py) and projector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mio_ext.encoder import TIMM, WIDTH, build_backbone
from train.errors import UserError

SMALL_IMAGE = 64  #: pixels up to which stem "auto" keeps the resolution


class Projector(nn.Sequential):
    """Linear layers with batch norm after each, ReLU between; no biases: batch norm would cancel them."""

    def __init__(self, features: int, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        for width in widths:
            if layers:
                layers.append(nn.ReLU(inplace=True))
            layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width)]
            features = width
        super().__init__(*layers)


class PretrainModel(nn.Module):
    """Images [B, C, H, W] to embeddings [B, D] for the loss; ``backbone`` alone gives the features."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.projector(self.backbone(images))
        return embeddings


def resolve_stem(stem: str, image_size: int, backbone: str = "") -> str:
    if backbone.startswith(TIMM):
        return "own"
    if stem != "auto":
        return stem
    return "3x3" if image_size <= SMALL_IMAGE else "7x7"


def build_model(
    name: str,
    channels: int,
    stem: str,
    projector: Sequence[int],
    stem_padding: bool = True,
    image_size: int = 224,
    width: int = WIDTH,
) -> PretrainModel:
    """Backbone and projector in channels_last, which is faster or as fast on every device we measured.

    Raises:
        UserError: timm is missing, has no such model, or the model takes no images of this size.
    """
    try:
        backbone, features = build_backbone(name, channels, stem, stem_padding, image_size, width)
    except ValueError as error:
        raise UserError(f"--backbone {name}: {error}") from error
    model = PretrainModel(backbone, Projector(features, projector))
    return model.to(memory_format=torch.channels_last)
