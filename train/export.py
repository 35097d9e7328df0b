# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the repository root goes on the path before the imports that need it)
"""The encoder of a run as one safetensors file with torchvision's key names, and back.

    python train/export.py RUN [--output encoder.safetensors]

The file's metadata holds what it takes to use it: network, stem, mean, std, image size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from train.config import OneLineParser
from train.errors import UserError
from train.model import build_backbone
from train.run_folder import CHECKPOINT, ENCODER, load_checkpoint, write_atomically


class Encoder(NamedTuple):
    """A torchvision ResNet without classifier, in eval mode, and what its input must look like."""

    network: nn.Module  #: [B, C, H, W] to features [B, F]
    mean: Tensor  #: [C, 1, 1] on the scale [0, 1]
    std: Tensor  #: [C, 1, 1]
    image_size: int  #: pixels per side it was trained at

    def features(self, images: Tensor) -> Tensor:
        """[B, F] for images [B, C, H, W], uint8 or float in [0, 1]."""
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images
        with torch.inference_mode():
            features: Tensor = self.network((scaled - self.mean) / self.std)
        return features


def export_encoder(backbone: nn.Module, architecture: dict[str, object], path: Path) -> None:
    """``architecture``: backbone, channels, stem, stem_padding, image_size, mean and std.

    Raises:
        UserError: the file cannot be written.
    """
    tensors = {key: value.cpu().contiguous() for key, value in backbone.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in architecture.items()}
    try:
        # Not save_file: it keeps the file from everyone but its owner.
        write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata)))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """The ``architecture`` that an encoder was exported with."""
    with safe_open(path, framework="pt") as file:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


def load_encoder(path: str | Path) -> Encoder:
    """The encoder in ``path``, a file of :func:`export_encoder` or a run folder.

    Raises:
        UserError: no such file, or one that this script did not write; or keys that do not match.
    """
    path = Path(path) / ENCODER if Path(path).is_dir() else Path(path)
    try:
        about, tensors = read_metadata(path), load_file(path)
        network, _ = build_backbone(about["backbone"], about["channels"], about["stem"], about["stem_padding"])
        network.load_state_dict(tensors, strict=True)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} holds no encoder of train/export.py: {str(error).splitlines()[0]}") from error
    mean, std = (torch.tensor(about[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return Encoder(network.eval(), mean, std, about["image_size"])


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="export.py", description="Write a run's encoder as safetensors.")
    parser.add_argument("run", type=Path, help="run folder with a checkpoint")
    parser.add_argument("--output", type=Path, help=f"file to write (RUN/{ENCODER})")
    try:
        args = parser.parse_args(argv)
        checkpoint = load_checkpoint(args.run / CHECKPOINT)
        about = checkpoint["architecture"]
        network, _ = build_backbone(about["backbone"], about["channels"], about["stem"], about["stem_padding"])
        network.load_state_dict(checkpoint["backbone"], strict=True)
        output = args.output or args.run / ENCODER
        export_encoder(network, about, output)
    except UserError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    print(f"encoder of step {checkpoint['step']} written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
