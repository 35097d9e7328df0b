# SPDX-License-Identifier: Apache-2.0
"""Data sets, held as uint8 tensors so that they can live on the training device.

Labels never reach the pre-training loop: they are here for the evaluation on frozen features. Images
that fit nowhere stay a memory map of a file, from which ``prefetch`` streams batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from sklearn.datasets import load_digits as sklearn_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from train.errors import UserError
from train.folder import free_memory, load_folder

CHOICES = "digits, cifar10, cifar100, stl10 or folder:PATH"
STATISTICS_IMAGES = 50_000  #: more images do not change a mean or a standard deviation in its first digits


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
    """A data set: what pre-training sees, and the labelled splits of the evaluation."""

    name: str  #: digits, cifar10, cifar100, stl10 or folder-<name of the folder>
    pretrain: Tensor  #: [n, C, H, W] uint8, without labels; disjoint from ``test``
    train: Split | None  #: for the probes; its images are a view of the first ones of ``pretrain`` or apart
    test: Split | None  #: held out, scored once; both splits are None where the data has no labels
    classes: tuple[str, ...] = ()  #: names by label
    image_size: int | None = None  #: pixels per side for the network, where that is not the stored size
    content: str = ""  #: a key: equal for equal images, labels and splits, wherever they are

    @property
    def channels(self) -> int:
        return self.pretrain.shape[1]

    @property
    def size(self) -> int:
        """Height and width of the stored images, which are square."""
        return self.pretrain.shape[-1]

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Per-channel mean and standard deviation of ``pretrain`` on the scale [0, 1], each [C] float32.

        Of all images up to 50,000; beyond that, of a fixed evenly spaced subset of at most so many. Exact
        for those: levels are counted, image chunk by image chunk, so a memory map is never loaded whole.
        """
        images = self.pretrain[:: math.ceil(len(self.pretrain) / STATISTICS_IMAGES)]
        counts = torch.zeros(self.channels, 256, dtype=torch.long, device=images.device)
        for chunk in images.split(1000):
            for channel, count in enumerate(counts):
                count += torch.bincount(chunk[:, channel].flatten(), minlength=256)
        level = torch.arange(256, dtype=torch.double, device=images.device) / 255
        n = counts.sum(1)
        mean = (counts * level).sum(1) / n
        variance = (counts * (level - mean[:, None]) ** 2).sum(1) / (n - 1)
        std = torch.where(variance > 0, variance.sqrt(), 1.0)  # a constant channel would be divided by zero
        return mean.float(), std.float()

    def to(self, device: torch.device) -> ImageData:
        """Moves each tensor that needs at most half of the device's free memory; the others stay.

        The labels of a split go where its images go. Images of ``train`` that are a view of ``pretrain``
        remain one.
        """
        if same_device(self.pretrain, device):
            return self
        pretrain = self.pretrain.to(device) if fits(self.pretrain.nbytes, device) else self.pretrain
        train = self.train
        if train is not None and train.images.data_ptr() == self.pretrain.data_ptr():
            train = Split(pretrain[: len(train)], train.labels.to(pretrain.device))
        elif train is not None and fits(train.images.nbytes, device):
            train = train.to(device)
        test = self.test
        if test is not None and fits(test.images.nbytes, device):
            test = test.to(device)
        return replace(self, pretrain=pretrain, train=train, test=test)

    def subset(self, share: float) -> ImageData:
        """Pre-train on a fixed random share of the images; the labelled splits stay whole."""
        if share == 1:
            return self
        n = max(2, round(share * len(self.pretrain)))
        chosen = torch.randperm(len(self.pretrain), generator=torch.Generator().manual_seed(0))[:n]
        return replace(self, pretrain=self.pretrain[chosen.sort().values])


def same_device(tensor: Tensor, device: torch.device) -> bool:
    """``cuda`` without a number is taken for the one that the tensor is on."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def fits(size: int, device: torch.device) -> bool:
    """Whether ``size`` bytes are no more than half of the memory that is free on the device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return size <= free / 2


def load_data(
    name: str,
    *,
    root: Path = Path("data"),
    download: bool = False,
    image_size: int | None = None,
    keep: bool = True,
) -> ImageData:
    """The data set ``name``: digits, cifar10, cifar100, stl10 or folder:PATH.

    ``root`` holds the official files of torchvision's data sets and the cache of decoded folders;
    ``download`` fetches missing official files. ``image_size`` is the size at which images of a folder are
    stored (None: see ``load_folder``); the other data sets keep theirs (8, 32 or 96 pixels). ``keep``:
    whether a folder that is decoded is cached.

    Raises UserError for an unknown name and for data that is missing, damaged or cannot be stored.
    """
    root = Path(root)
    kind, colon, path = name.partition(":")
    if kind == "folder" and path:
        return load_image_folder(Path(path).expanduser(), root if keep else None, image_size)
    if not colon and kind == "digits":
        return with_content(load_digits())
    if not colon and kind in ("cifar10", "cifar100"):
        return with_content(load_cifar(kind, root, download))
    if not colon and kind == "stl10":
        return with_content(load_stl10(root, download))
    raise UserError(f"--data must be {CHOICES}, got {name!r}")


def with_content(data: ImageData) -> ImageData:
    """The data with the key of their content; a folder's is made while it is decoded."""
    key = hashlib.sha256()
    parts = [data.pretrain]
    for split in (data.train, data.test):
        parts += [] if split is None else [split.images, split.labels]
    for part in parts:
        key.update(repr(tuple(part.shape)).encode())
        key.update(part.contiguous().numpy().data)
    return replace(data, content=key.hexdigest())


def load_digits() -> ImageData:
    """scikit-learn's handwritten digits: 1797 gray images of 8x8 pixels, shipped inside the package.

    The split is fixed (stratified, 1437 train and 360 test images, independent of the run's seed), so
    numbers of different runs compare.
    """
    bunch = sklearn_digits()
    # Ink levels 0..16 become 0..255, the range of every other image data set.
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None].contiguous()
    labels = torch.from_numpy(bunch.target).long()
    rows, test_rows = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, test = (Split(images[part], labels[part]) for part in (rows, test_rows))
    return ImageData("digits", train.images, train, test, tuple(str(digit) for digit in range(10)))


def load_cifar(name: str, root: Path, download: bool) -> ImageData:
    """CIFAR-10 or CIFAR-100: 50,000 train images, all of them pre-trained on, and 10,000 test images."""
    dataset_class = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    parts = [open_official(dataset_class, root, download, train=train) for train in (True, False)]
    train, test = (
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return ImageData(name, train.images, train, test, tuple(parts[0].classes))


def load_stl10(root: Path, download: bool) -> ImageData:
    """STL-10 at 96 pixels: pre-training sees 5,000 labelled and 100,000 unlabelled images; 8,000 test images."""
    both = open_official(torchvision.datasets.STL10, root, download, split="train+unlabeled")
    held_out = open_official(torchvision.datasets.STL10, root, download, split="test")
    # torchvision transposes the file's columns by strides: make rows contiguous, once.
    images, test_images = (torch.from_numpy(np.ascontiguousarray(part.data)) for part in (both, held_out))
    labels = torch.from_numpy(both.labels.astype(np.int64))
    labelled = int((labels >= 0).sum())  # those come first, -1 marks the others
    train = Split(images[:labelled], labels[:labelled])
    test = Split(test_images, torch.from_numpy(held_out.labels.astype(np.int64)))
    return ImageData("stl10", images, train, test, tuple(both.classes))


def open_official(dataset_class: Any, root: Path, download: bool, **split: Any) -> Any:
    """One of torchvision's data sets, with what is wrong with its files as a UserError."""
    title = {"CIFAR10": "CIFAR-10", "CIFAR100": "CIFAR-100", "STL10": "STL-10"}[dataset_class.__name__]
    try:
        return dataset_class(root, download=download, **split)
    except (RuntimeError, OSError, HTTPException) as error:  # an unreachable server is an OSError
        if download:
            reason = " ".join(str(error).split())
            message = f"cannot download {title} from {dataset_class.url} to {root}: {reason} (or pass --data-root DIR)"
            raise UserError(message) from error
        folder, archive = root / dataset_class.base_folder, root / dataset_class.filename
        names = [file for file, _ in dataset_class.train_list + dataset_class.test_list]
        missing = [file for file in names if not (folder / file).is_file()]
        if len(missing) == len(names) and not archive.exists():
            raise UserError(f"no {title} under {root}: pass --data-root DIR, or --download") from error
        if len(missing) == len(names):
            problem = f"{archive} is not unpacked, or only half downloaded"
        elif missing:
            problem = f"{folder / missing[0]} is missing"
        else:
            problem = f"{damaged_file(dataset_class, folder)} is damaged or half downloaded"
        raise UserError(f"{title} under {root} is incomplete: {problem}; --download fetches it anew") from error


def damaged_file(dataset_class: Any, folder: Path) -> Path:
    """The first file whose checksum is wrong; where all are right, the class names are what is broken."""
    for file, checksum in dataset_class.train_list + dataset_class.test_list:
        if not torchvision.datasets.utils.check_integrity(folder / file, checksum):
            return folder / str(file)
    return folder


def load_image_folder(path: Path, root: Path | None, image_size: int | None) -> ImageData:
    """Images of a folder (see ``load_folder``); pre-training sees everything but the test images."""
    folder = load_folder(path, None if root is None else root / "cache", image_size)
    pretrain, test_images = folder.images[: folder.train_images], folder.images[folder.train_images :]
    train = test = None
    if folder.labels is not None:
        train = Split(pretrain, folder.labels[: folder.train_images])
        test = Split(test_images, folder.labels[folder.train_images :])
    return ImageData(folder.name, pretrain, train, test, folder.classes, folder.image_size, folder.content)


def prefetch(images: Tensor, indices: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """``images[index]`` on ``device`` for every ``index`` of ``indices``, in order.

    Images [n, C, H, W] that already are on the device are just indexed. Others are gathered by one
    background thread, one batch ahead: so ``indices`` runs a batch ahead too, and a random generator that
    shuffles it must serve nothing else if a run is to be repeatable. Index tensors are best on the device
    of the images. An error in the thread is raised here; closing the generator ends the thread.
    """
    if same_device(images, device):
        for index in indices:
            yield images[index]
        return

    def gather(index: Tensor) -> Tensor:
        index = index.to(images.device)
        batch = torch.empty(len(index), *images.shape[1:], dtype=images.dtype, pin_memory=device.type == "cuda")
        return torch.index_select(images, 0, index, out=batch)

    def ready(batch: Future[Tensor]) -> Tensor:
        return batch.result().to(device, non_blocking=True)  # from pinned memory, in the consumer's stream

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        pending: Future[Tensor] | None = None
        for index in indices:
            following = thread.submit(gather, index)
            if pending is not None:
                yield ready(pending)
            pending = following
        if pending is not None:
            yield ready(pending)


def generator_for(device: torch.device, *key: int) -> torch.Generator:
    """Random numbers of one epoch or step. They depend on the key alone, so a resumed run draws the same."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def random_batches(n: int, batch_size: int, seed: int, start: int, stop: int, device: torch.device) -> Iterator[Tensor]:
    """Indices of steps ``start`` to ``stop`` - 1, shuffled on the device; the incomplete last batch of an epoch
    is dropped, because the number of negatives is part of the loss."""
    per_epoch = n // batch_size
    permutation = None
    for step in range(start, stop):
        epoch, i = divmod(step, per_epoch)
        if permutation is None or i == 0:
            permutation = torch.randperm(n, generator=generator_for(device, seed, 0, epoch), device=device)
        yield permutation[i * batch_size : (i + 1) * batch_size]
