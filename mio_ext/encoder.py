# SPDX-License-Identifier: Apache-2.0
"""Encoders that the pre-training script has exported; needs torchvision and safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

__all__ = ["Encoder", "load_encoder"]

FILE = "encoder.safetensors"  #: in a run folder
WIDTH = 64  #: of the first stage of torchvision's ResNets


class Encoder(NamedTuple):
    """A torchvision ResNet without classifier, in eval mode, and what its input must look like."""

    network: nn.Module  #: [B, C, H, W] to features [B, F]
    mean: Tensor  #: [C, 1, 1] on the scale [0, 1]
    std: Tensor  #: [C, 1, 1]
    image_size: int  #: pixels per side it was trained at

    def features(self, images: Tensor) -> Tensor:
        """[B, F] for images [B, C, H, W], uint8 or float in [0, 1].

        Raises:
            ValueError: another number of channels than the encoder was trained with.
        """
        channels = len(self.mean)
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"Encoder.features: images must be [B, {channels}, H, W], got {list(images.shape)}")
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images
        with torch.inference_mode():
            features: Tensor = self.network((scaled - self.mean) / self.std)
        return features


def load_encoder(path: str | Path) -> Encoder:
    """The encoder in ``path``, a file that the pre-training script has exported, or a run folder with one.

    Raises:
        ValueError: no such file, or one that the script did not write; or keys that do not match.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        about, tensors = read_metadata(path), load_file(path)
        network, _ = build_backbone(
            about["backbone"], about["channels"], about["stem"], about["stem_padding"], about.get("width", WIDTH)
        )
        network.load_state_dict(tensors, strict=True)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} holds no encoder of the pre-training script: {str(error).splitlines()[0]}") from error
    mean, std = (torch.tensor(about[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return Encoder(network.eval(), mean, std, about["image_size"])


def read_metadata(path: Path) -> dict[str, Any]:
    """Backbone, width, channels, stem, stem_padding, image_size, mean and std of the encoder in ``path``."""
    with safe_open(path, framework="pt") as file:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


def narrow_resnet(name: str, width: int) -> Any:
    """torchvision's ResNet ``name`` with stages of another width; its constructor has no such argument."""
    block, layers = {
        "resnet18": (BasicBlock, [2, 2, 2, 2]),
        "resnet34": (BasicBlock, [3, 4, 6, 3]),
        "resnet50": (Bottleneck, [3, 4, 6, 3]),
    }[name]

    class Narrow(ResNet):  # type: ignore[misc]
        def _make_layer(self, block: Any, planes: int, *rest: Any, **options: Any) -> Any:
            return super()._make_layer(block, planes * width // WIDTH, *rest, **options)

    network = Narrow(block, layers)
    network.fc = nn.Linear(network.inplanes, 1)  # the width that came out
    return network


def build_backbone(
    name: str, channels: int, stem: str, stem_padding: bool = True, width: int = WIDTH
) -> tuple[nn.Module, int]:
    """A torchvision ResNet without its classifier ``fc``, and its feature width.

    Keys of the state dict stay torchvision's. ``stem`` "3x3" (stride 1, no max-pool) keeps the resolution
    that the "7x7" one divides by four. ``width`` is that of the first stage, after which it doubles three times;
    another than torchvision's 64 narrows (or widens) every stage, and the first block projects the stem to it.
    """
    backbone: Any = torchvision.models.get_model(name, weights=None) if width == WIDTH else narrow_resnet(name, width)
    features = backbone.fc.in_features
    if stem == "3x3":
        backbone.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=int(stem_padding), bias=False)
        backbone.maxpool = nn.Identity()
    elif channels != 3:
        backbone.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision
    backbone.fc = nn.Identity()
    return backbone, features
