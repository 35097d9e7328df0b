# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the repository root goes on the path before the imports that need it)
"""The encoder of a run as one safetensors file with torchvision's (or timm's) key names; mio_ext.encoder reads it.

    .venv/bin/python train/export.py RUN [--output encoder.safetensors]

The file's metadata holds what it takes to use it: network, stem, mean, std, image size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from train.packages import require_packages

require_packages("export.py")

from safetensors.torch import save
from torch import nn

from mio_ext.encoder import rebuild_backbone
from train.command_line import OneLineParser
from train.errors import UserError
from train.run_folder import CHECKPOINT, ENCODER, load_checkpoint, write_atomically


def export_encoder(backbone: nn.Module, architecture: dict[str, object], path: Path) -> None:
    """``architecture``: backbone, width, channels, stem, stem_padding, image_size, mean and std.

    Raises:
        UserError: the file cannot be written.
    """
    tensors = {key: value.cpu().contiguous() for key, value in backbone.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in architecture.items()}
    try:
        # Not save_file: it keeps the file from everyone but its owner.
        write_atomically(path, lambda temporary: temporary.write_bytes(in_one_order(save(tensors, metadata))))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def in_one_order(file: bytes) -> bytes:
    """A safetensors file with its metadata sorted, which the library orders by chance: equal tensors, equal file."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def run(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="export.py", description="Write a run's encoder as safetensors.")
    parser.add_argument("run", type=Path, help="run folder with a checkpoint")
    parser.add_argument("--output", type=Path, help=f"file to write (RUN/{ENCODER})")
    try:
        args = parser.parse_args(argv)
        checkpoint = load_checkpoint(args.run / CHECKPOINT)
        about = checkpoint["architecture"]
        try:
            network = rebuild_backbone(about)
        except ValueError as error:  # timm is gone, or another one
            raise UserError(str(error)) from error
        network.load_state_dict(checkpoint["backbone"], strict=True)
        output = args.output or args.run / ENCODER
        export_encoder(network, about, output)
    except UserError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    print(f"encoder of step {checkpoint['step']} written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(run())
