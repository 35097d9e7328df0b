# SPDX-License-Identifier: Apache-2.0
"""The official data sets, their statistics, and how batches reach the device."""

import re
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from train import data as data_module
from train.data import ImageData, Split, load_data, prefetch
from train.errors import UserError

CPU = torch.device("cpu")


# The official data sets


class FakeDataset:
    """What torchvision's classes share: files with checksums, and an error for anything amiss."""

    url, filename, base_folder = "https://example.org/x.tar.gz", "x.tar.gz", "files"
    train_list, test_list = [["one", "md5 of 1"], ["two", "md5 of 2"]], [["three", "md5 of 3"]]
    classes = ["a", "b"]  # noqa: RUF012  (as in torchvision)

    def __init__(self, root, download, **split):
        if download:
            raise OSError("Name or service not known")
        raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")


class FakeCifar(FakeDataset):
    def __init__(self, root, train=True, download=False):
        self.data = np.random.default_rng(train).integers(0, 256, (6 if train else 4, 32, 32, 3), np.uint8)
        self.targets = [0, 1, 0, 1, 1, 1][: len(self.data)]


FakeCifar.__name__ = "CIFAR10"


@pytest.mark.parametrize(("name", "attribute"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar(name, attribute, monkeypatch, tmp_path):
    monkeypatch.setattr(data_module.torchvision.datasets, attribute, FakeCifar)
    data = load_data(name, root=tmp_path)
    raw = FakeCifar(tmp_path)
    assert (data.name, data.size, data.classes) == (name, 32, ("a", "b"))
    assert data.pretrain.is_contiguous() and data.pretrain.data_ptr() == data.train.images.data_ptr()
    assert torch.equal(data.pretrain[2, 1], torch.from_numpy(raw.data[2, :, :, 1]))
    assert data.train.labels.tolist() == raw.targets and data.train.labels.dtype == torch.int64
    assert len(data.test) == 4 and data.test.labels.tolist() == [0, 1, 0, 1]


class FakeStl(FakeDataset):
    def __init__(self, root, split="train", download=False):
        n = {"train+unlabeled": 7, "test": 3}[split]
        columns_first = np.random.default_rng(n).integers(0, 256, (n, 3, 96, 96), np.uint8)
        self.data = columns_first.transpose(0, 1, 3, 2)  # as torchvision turns the file's columns
        self.labels = np.array([0, 1, -1, -1, -1, -1, -1]) if n == 7 else np.array([1, 0, 1], np.uint8)


FakeStl.__name__ = "STL10"


def test_stl10_pre_trains_on_the_unlabelled_images_too(monkeypatch, tmp_path):
    monkeypatch.setattr(data_module.torchvision.datasets, "STL10", FakeStl)
    data = load_data("stl10", root=tmp_path)
    raw = FakeStl(tmp_path, "train+unlabeled")
    assert (len(data.pretrain), len(data.train), len(data.test), data.size) == (7, 2, 3, 96)
    assert data.pretrain.is_contiguous() and data.train.images.data_ptr() == data.pretrain.data_ptr()
    assert np.array_equal(data.pretrain.numpy(), raw.data)
    assert data.train.labels.tolist() == [0, 1] and data.test.labels.tolist() == [1, 0, 1]
    assert data.train.labels.dtype == data.test.labels.dtype == torch.int64


def test_official_files_that_are_missing_or_damaged(monkeypatch, tmp_path):
    missing = type("CIFAR10", (FakeDataset,), {})
    monkeypatch.setattr(data_module.torchvision.datasets, "CIFAR10", missing)
    monkeypatch.setattr(
        data_module.torchvision.datasets.utils, "check_integrity", lambda path, md5: path.read_text() == md5
    )

    def message(**options) -> str:
        with pytest.raises(UserError) as caught:
            load_data("cifar10", root=tmp_path, **options)
        return str(caught.value)

    assert message() == f"no CIFAR-10 under {tmp_path}: pass --data-root DIR, or --download"
    assert re.match(r"cannot download CIFAR-10 from https://.*: Name or service not known", message(download=True))
    (tmp_path / "x.tar.gz").touch()
    assert "x.tar.gz is not unpacked, or only half downloaded; --download fetches it anew" in message()
    (tmp_path / "files").mkdir()
    for number, file in ((1, "one"), (3, "three")):
        (tmp_path / "files" / file).write_text(f"md5 of {number}")
    assert f"{tmp_path}/files/two is missing" in message()
    (tmp_path / "files" / "two").write_text("half")
    assert f"{tmp_path}/files/two is damaged or half downloaded" in message()


def test_real_torchvision_classes_report_missing_files(tmp_path):
    for name, title in (("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100"), ("stl10", "STL-10")):
        with pytest.raises(UserError, match=f"no {title} under .*: pass --data-root DIR, or --download"):
            load_data(name, root=tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "folder:", "folder", "digits:x", ""])
def test_unknown_names_list_the_choices(name):
    with pytest.raises(UserError, match="--data must be digits, cifar10, cifar100, stl10 or folder:PATH, got"):
        load_data(name)


# What all data share


def test_digits():
    data = load_data("digits")
    assert (len(data.pretrain), len(data.test), data.size, data.channels) == (1437, 360, 8, 1)
    mean, std = data.mean_std()
    pixels = data.pretrain.double() / 255
    torch.testing.assert_close(mean, pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(std, pixels.std((0, 2, 3)).float())


def test_statistics_of_many_images_use_an_even_subset(monkeypatch):
    monkeypatch.setattr(data_module, "STATISTICS_IMAGES", 30)
    images = torch.randint(0, 256, (100, 3, 4, 4), dtype=torch.uint8)
    mean, _ = ImageData("x", images, None, None).mean_std()
    torch.testing.assert_close(mean, images[::4].float().mean((0, 2, 3)) / 255)


def test_only_what_fits_moves_to_the_device(monkeypatch):
    """The meta device stands for one with memory of its own."""
    meta = torch.device("meta")
    images = torch.zeros(10, 3, 4, 4, dtype=torch.uint8)
    labels = torch.arange(10)
    data = ImageData("x", images, Split(images[:6], labels[:6]), Split(images[:2].clone(), labels[:2]))
    assert data.to(CPU).pretrain is images
    monkeypatch.setattr(data_module, "free_memory", lambda: 2 * images.nbytes)
    moved = data.to(meta)
    assert {moved.pretrain.device, moved.train.images.device, moved.test.labels.device} == {meta}
    assert moved.train.images._base is moved.pretrain, "shared images must stay shared"
    monkeypatch.setattr(data_module, "free_memory", lambda: images.nbytes)
    moved = data.to(meta)
    assert moved.pretrain is images
    assert moved.train.images.data_ptr() == images.data_ptr() and moved.train.labels.device == CPU
    assert moved.test.images.device == moved.test.labels.device == meta


@pytest.fixture
def other_device(monkeypatch):
    """Makes prefetch believe that the CPU is another device than that of the images."""
    monkeypatch.setattr(data_module, "same_device", lambda tensor, device: False)
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_of_resident_images_starts_no_thread():
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    batches = prefetch(images, iter(torch.arange(20).split(5)), CPU)
    assert torch.equal(next(batches), images[:5])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_gathers_every_batch_in_order(other_device):
    images = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    indices = torch.randperm(50).split(7)
    batches = list(prefetch(images, iter(indices), CPU))
    assert len(batches) == 8
    assert all(torch.equal(batch, images[index]) for batch, index in zip(batches, indices, strict=True))
    assert list(prefetch(images, iter([]), CPU)) == []


def test_prefetch_raises_what_the_thread_raised(other_device):
    batches = prefetch(torch.zeros(4, 1, 2, 2), iter([torch.tensor([1]), torch.tensor([9])]), CPU)
    assert next(batches).shape == (1, 1, 2, 2)
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        next(batches)


def test_prefetch_can_be_closed_early(other_device):
    batches = prefetch(torch.zeros(4, 1, 2, 2), (torch.tensor([1]) for _ in iter(int, 1)), CPU)  # endless
    next(batches)
    batches.close()


def test_a_subset_leaves_the_labelled_splits_whole():
    images = torch.arange(200, dtype=torch.uint8).view(100, 2, 1, 1)
    whole = ImageData("x", images, Split(images, torch.zeros(100)), Split(images[:5], torch.zeros(5)))
    part = whole.subset(0.3)
    assert (len(part.pretrain), len(part.train), len(part.test)) == (30, 100, 5)
    assert torch.equal(part.pretrain, whole.subset(0.3).pretrain)
    assert part.pretrain.unique().numel() == 60
