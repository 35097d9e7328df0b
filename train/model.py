# SPDX-License-Identifier: Apache-2.0
"""Backbone (torchvision ResNet with a stem for small images) and projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18


class Projector(nn.Sequential):
    """Two layers, batch norm after each, no biases: batch norm would cancel them."""

    def __init__(self, features: int, hidden: int, embedding: int) -> None:
        super().__init__(
            nn.Linear(features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, embedding, bias=False),
            nn.BatchNorm1d(embedding),
        )


class PretrainModel(nn.Module):
    """Images [B, C, H, W] to embeddings [B, D] for the loss; ``backbone`` alone gives the features."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


def build_backbone(channels: int) -> tuple[nn.Module, int]:
    """ResNet-18 for small images and its feature width.

    The 3x3 stem of stride 1 (padding 1) without max-pool keeps the resolution that the 7x7 stem would
    divide by four. Keys of the state dict stay torchvision's; the classifier ``fc`` is gone.
    """
    backbone = resnet18(weights=None)
    features = backbone.fc.in_features
    backbone.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision
    backbone.maxpool = nn.Identity()
    backbone.fc = nn.Identity()
    return backbone, features


def build_model(channels: int, hidden: int, embedding: int) -> PretrainModel:
    """Backbone and projector in channels_last, which is faster or as fast on every device we measured."""
    backbone, features = build_backbone(channels)
    model = PretrainModel(backbone, Projector(features, hidden, embedding))
    return model.to(memory_format=torch.channels_last)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and filters only; none on biases and batch norm (ndim <= 1)."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
