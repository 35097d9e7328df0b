# SPDX-License-Identifier: Apache-2.0
"""Frozen features of images, and what is read from them and from embeddings without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.data import Split, fits
from train.progress import counting

PAIR_IMAGES = 1000
COPIES = 2  #: of the features on a device: themselves, and scaled


class Features(NamedTuple):
    """Frozen features of both splits with their labels, all on one device."""

    train: Tensor  #: [n, F] float32
    train_labels: Tensor  #: [n]
    test: Tensor  #: [m, F] float32
    test_labels: Tensor  #: [m]

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1

    def to(self, device: torch.device | str) -> Features:
        return Features(*(tensor.to(device) for tensor in self))


class PairCosines(NamedTuple):
    """Cosines of all positive pairs and all negative pairs of a set of views, 1-dim."""

    positive: Tensor
    negative: Tensor


def pair_cosines(z1: Tensor, z2: Tensor) -> PairCosines:
    """Positive pairs are (z1_i, z2_i), negative pairs all others; each unordered pair once.

    Of the views [n, D] the first 1,000 images count: the number of pairs grows with n². On the CPU, where
    the cosines are drawn.
    """
    n = min(len(z1), PAIR_IMAGES)
    z = F.normalize(torch.cat([z1[:n], z2[:n]]).float().cpu(), dim=1)
    cosine = z @ z.T
    row, column = torch.triu_indices(2 * n, 2 * n, offset=1)
    positive = column - row == n
    values = cosine[row, column]
    return PairCosines(values[positive], values[~positive])


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Batch norm uses its running statistics inside; every module's own mode comes back afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def roomy_device(numbers: int, device: torch.device) -> torch.device:
    """``device`` if so many float32 numbers can be scored there, else the CPU."""
    return device if fits(COPIES * 4 * numbers, device) else torch.device("cpu")


@torch.inference_mode()
def extract_features(
    network: nn.Module,
    images: Tensor,
    preprocess: Callable[[Tensor], Tensor],
    device: torch.device | None = None,
    batch_size: int = 512,
    bfloat16: bool = False,
) -> Tensor:
    """Output [n, F] of ``network`` for uint8 ``images`` [n, C, H, W], float32 on ``device`` if it has the room.

    Chunk by chunk moved to ``device`` (that of the network unless given) and preprocessed there, so the
    images may be larger than its memory. Batch norm in eval mode; the network is left as it was found.
    """
    device = device or next((p.device for p in network.parameters()), images.device)
    features: Tensor | None = None
    done = 0
    with (
        eval_mode(network),
        torch.autocast(device.type, torch.bfloat16, enabled=bfloat16),
        counting("features", len(images), "images") as advance,
    ):
        for chunk in images.split(batch_size):
            rows = network(preprocess(chunk.to(device))).float()
            if features is None:
                place = roomy_device(len(images) * rows.shape[1], device)
                features = rows.new_empty(len(images), rows.shape[1], device=place)
            features[done : done + len(rows)] = rows
            done += len(rows)
            advance(len(rows))
    assert features is not None  # split gives one chunk of no images at all
    return features


def labelled_features(
    network: nn.Module,
    train: Split,
    test: Split,
    preprocess: Callable[[Tensor], Tensor],
    device: torch.device,
    bfloat16: bool = False,
) -> Features:
    """:func:`extract_features` of both splits, with their labels."""
    x, x_test = (extract_features(network, s.images, preprocess, device, bfloat16=bfloat16) for s in (train, test))
    return Features(x, train.labels, x_test, test.labels).to(x.device)


def pixel_features(train: Split, test: Split, size: int, device: torch.device) -> Features:
    """The pixels themselves, in [0, 1], as the network sees them: ``size`` per side."""
    channels = train.images.shape[1]
    place = roomy_device((len(train) + len(test)) * channels * size * size, device)

    def pixels(images: Tensor) -> Tensor:
        scaled = images.to(place).float() / 255
        if scaled.shape[-1] > size:
            scaled = F.interpolate(scaled, size=(size, size), mode="bilinear", antialias=True)
        return scaled.flatten(1)

    x, x_test = (torch.cat([pixels(chunk) for chunk in s.images.split(512)]) for s in (train, test))
    return Features(x, train.labels, x_test, test.labels).to(place)


def rankme(z: Tensor) -> Tensor:
    """Effective rank of embeddings ``z`` [n, D]: exp of the entropy of their normalised singular values.

    RankMe, Garrido et al. 2023 (arXiv 2210.02885), eq. (1), without its ε, from the eigenvalues of the
    smaller Gram matrix in float64. 0-dim on the device of ``z``; NaN where ``z`` is not finite. Nothing is
    read back to the host here, though torch's eigensolver itself waits for a CUDA device.
    """
    z = z.detach().double()
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
    finite = gram.isfinite().all()
    gram = torch.where(finite, gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return torch.where(finite, (-torch.xlogy(share, share).sum()).exp(), torch.nan)
