# SPDX-License-Identifier: Apache-2.0
"""Encoders that the pre-training script has exported; needs torchvision and safetensors, and timm for timm's."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

__all__ = ["Encoder", "load_encoder"]

FILE = "encoder.safetensors"  #: in a run folder
TIMM = "timm:"  #: before the name of a model of timm
WIDTH = 64  #: of the first stage of torchvision's ResNets


class Encoder(NamedTuple):
    """A torchvision ResNet or a model of timm, without classifier, in eval mode, and what its input must look like."""

    network: nn.Module  #: [B, C, H, W] to features [B, F]
    mean: Tensor  #: [C, 1, 1] on the scale [0, 1]
    std: Tensor  #: [C, 1, 1]
    image_size: int  #: pixels per side it was trained at
    fixed_size: bool = False  #: it takes no other: most models of timm with a position for every patch

    def features(self, images: Tensor) -> Tensor:
        """[B, F] for images [B, C, H, W], uint8 or float in [0, 1].

        Raises:
            ValueError: another number of channels than the encoder was trained with, or another size than the
                one it takes.
        """
        shape = [len(self.mean), *([self.image_size] * 2 if self.fixed_size else images.shape[2:])]
        if images.ndim != 4 or list(images.shape[1:]) != shape:
            expected = ", ".join(map(str, shape)) if self.fixed_size else f"{len(self.mean)}, H, W"
            raise ValueError(f"Encoder.features: images must be [B, {expected}], got {list(images.shape)}")
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images
        with torch.inference_mode():
            features: Tensor = self.network((scaled - self.mean) / self.std)
        return features


def load_encoder(path: str | Path) -> Encoder:
    """The encoder in ``path``, a file that the pre-training script has exported, or a run folder with one.

    Raises:
        ValueError: no such file, or one that the script did not write; keys that do not match; or a model of
            timm, and no timm.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        about, tensors = read_metadata(path), load_file(path)
        network = rebuild_backbone(about)
        network.load_state_dict(tensors, strict=True)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} holds no encoder of the pre-training script: {str(error).splitlines()[0]}") from error
    mean, std = (torch.tensor(about[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return Encoder(network.eval(), mean, std, about["image_size"], has_fixed_size(about["backbone"]))


def read_metadata(path: Path) -> dict[str, Any]:
    """Backbone, width, channels, stem, stem_padding, image_size, mean and std of the encoder in ``path``."""
    with safe_open(path, framework="pt") as file:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


def rebuild_backbone(about: dict[str, Any]) -> nn.Module:
    """The network that such metadata describe, with weights of its own."""
    network, _ = build_backbone(
        about["backbone"],
        about["channels"],
        about["stem"],
        about["stem_padding"],
        about["image_size"],
        about.get("width", WIDTH),
    )
    return network


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
    name: str, channels: int, stem: str, stem_padding: bool = True, image_size: int = 224, width: int = WIDTH
) -> tuple[nn.Module, int]:
    """A torchvision ResNet without its classifier ``fc``, and its feature width; or timm's NAME for "timm:NAME".

    Keys of the state dict stay torchvision's, or timm's. ``stem`` "3x3" (stride 1, no max-pool) keeps the resolution
    that the "7x7" one divides by four; a model of timm has its own, and may depend on the image size. ``width`` is that
    of a ResNet's first stage, after which it doubles three times; another than torchvision's 64 narrows (or widens)
    every stage, and the first block projects the stem to it.
    """
    if name.startswith(TIMM):
        return build_timm(name, channels, image_size)
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


def import_timm(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{name} needs timm: pip install timm") from error
    module: ModuleType = timm
    return module


def has_fixed_size(name: str) -> bool:
    """Whether the model must be built for the size of its images, as timm says of its own."""
    if not name.startswith(TIMM):
        return False
    about = import_timm(name).get_pretrained_cfg(name.removeprefix(TIMM))
    return about is not None and bool(about.fixed_input_size)


def build_timm(name: str, channels: int, image_size: int) -> tuple[nn.Module, int]:
    """timm's model without weights or classifier, tried on one image, and its feature width.

    Raises:
        ValueError: no timm, no such model, or one that makes no [B, F] of images of this size.
    """
    timm, model = import_timm(name), name.removeprefix(TIMM)
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f"; near it: {', '.join(near)}" if near else "; timm.list_models() has their names"
        raise ValueError(f"timm {timm.__version__} has no model {model!r}{hint}")
    size = {"img_size": image_size} if has_fixed_size(name) else {}
    try:
        backbone: nn.Module = timm.create_model(model, pretrained=False, num_classes=0, in_chans=channels, **size)
        check_patches(backbone, image_size)
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(1, channels, image_size, image_size))
    except Exception as error:  # every architecture has its own words for it
        raise ValueError(f"{model} takes no images of {image_size} pixels: {str(error).splitlines()[0]}") from error
    if features.ndim != 2:
        raise ValueError(f"{model} makes {list(features.shape)} of an image, not one row of features")
    return backbone.train(), features.shape[1]


def check_patches(backbone: nn.Module, image_size: int) -> None:
    """Patches that do not fill the image would leave out its right and lower edge without a word."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    side = max(patch) if isinstance(patch, tuple) else patch
    if image_size % side:
        raise ValueError(f"its patches of {side} pixels fill images of {side}, {2 * side}, {3 * side}, ... pixels")
