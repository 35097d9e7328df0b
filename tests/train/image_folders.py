# SPDX-License-Identifier: Apache-2.0
"""Folders of small images in one colour, which is their label."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
from PIL import Image

from train.data import ImageData, load_data

COLOURS = {"cat": (250, 0, 0), "dog": (0, 250, 0), "owl": (0, 0, 250)}


def save(
    path: Path, colour: Any = (9, 9, 9), size: tuple[int, int] = (12, 12), mode: str = "RGB", **options: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def make_classes(root: Path, count: int, classes: Iterable[str] = COLOURS, suffix: str = ".png") -> Path:
    for name in classes:
        for number in range(count):
            save(root / name / f"{number:02d}{suffix}", COLOURS[name])
    return root


def load(path: Path, **options: Any) -> ImageData:
    """With a cache of its own beside the folder."""
    return load_data(f"folder:{path}", root=path.parent / "root", **options)


def assert_colours_are_labels(data: ImageData, classes: tuple[str, ...] = ("cat", "dog", "owl")) -> None:
    assert data.classes == classes
    for split in (data.train, data.test):
        assert split is not None
        assert len(split.images) == len(split.labels) > 0
        for image, label in zip(split.images, split.labels, strict=True):
            expected = torch.tensor(COLOURS[classes[label]])
            assert (image.flatten(1).float().mean(1) - expected).abs().max() < 8


def damage(path: Path) -> None:
    """The first half of the file, as an interrupted copy leaves it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
