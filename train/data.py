# SPDX-License-Identifier: Apache-2.0
"""Data sets, held as one uint8 tensor per split so that they can live on the training device.

Labels never reach the pre-training loop: they are here for the evaluation on frozen features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits as sklearn_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images and labels of one split."""

    images: Tensor  #: [n, C, H, W] uint8
    labels: Tensor  #: [n] int64

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A data set: its train split (pre-training, probe training) and its held-out test split."""

    name: str
    train: Split
    test: Split

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Per-channel mean and standard deviation of the train split on the scale [0, 1], each [C]."""
        pixels = self.train.images.double() / 255
        mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
        return mean.float(), std.float()

    def to(self, device: torch.device) -> ImageData:
        return ImageData(self.name, self.train.to(device), self.test.to(device))


def load_digits() -> ImageData:
    """scikit-learn's handwritten digits: 1797 gray images of 8x8 pixels, shipped inside the package.

    The split is fixed (stratified, 1437 train and 360 test images, independent of the run's seed), so
    numbers of different runs compare.
    """
    bunch = sklearn_digits()
    # Ink levels 0..16 become 0..255, the range of every other image data set.
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None].contiguous()
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    return ImageData("digits", Split(images[train], labels[train]), Split(images[test], labels[test]))
