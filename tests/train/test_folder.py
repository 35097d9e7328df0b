# SPDX-License-Identifier: Apache-2.0
"""Folders of images: labels stay with their images, splits stay apart, mistakes are told in plain words."""

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
from image_folders import COLOURS, assert_colours_are_labels, damage, load, make_classes, save
from PIL import Image

from train import folder, listing
from train.data import load_data
from train.errors import UserError


def test_labels_are_the_first_directories_at_any_depth(tmp_path):
    root = make_classes(tmp_path / "pets", 10)
    save(root / "owl" / "barn" / "young" / "A.JPEG", COLOURS["owl"])
    for skipped in (".hidden.png", "__MACOSX/a.png", "cat/._00.png", ".git/b.png"):
        save(root / skipped)
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "owl" / "barn" / "loop").symlink_to(root)
    data = load(root)
    assert data.name == "folder-pets"
    assert len(data.train) + len(data.test) == 31
    assert (data.channels, data.size, data.pretrain.dtype) == (3, 12, torch.uint8)
    assert data.train.images.data_ptr() == data.pretrain.data_ptr()
    assert len(data.pretrain) == len(data.train), "held-out images must not be pre-trained on"
    assert_colours_are_labels(data)


def test_a_linked_folder_counts(tmp_path):
    make_classes(tmp_path / "elsewhere", 4)
    (tmp_path / "pets").mkdir()
    for name in COLOURS:
        (tmp_path / "pets" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert_colours_are_labels(load(tmp_path / "pets"))


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_train_and_test_folders_are_the_splits(tmp_path, held_out):
    root = tmp_path / "pets"
    make_classes(root / "train", 3)
    make_classes(root / held_out, 2, ("owl", "cat"))  # not all classes, and labels still those of train
    data = load(root)
    assert (len(data.pretrain), len(data.train), len(data.test)) == (9, 9, 4)
    assert_colours_are_labels(data)


def test_a_test_class_unknown_to_train_is_refused(tmp_path):
    make_classes(tmp_path / "pets" / "train", 2, ("cat", "dog"))
    make_classes(tmp_path / "pets" / "test", 2)
    with pytest.raises(UserError, match=r"class 'owl' of .*test is not among those of .*train"):
        load(tmp_path / "pets")


def test_an_unlabelled_test_folder_is_not_used(tmp_path, capsys):
    make_classes(tmp_path / "pets" / "train", 10)
    save(tmp_path / "pets" / "test" / "0.png")
    data = load(tmp_path / "pets")
    assert (len(data.train), len(data.test)) == (27, 3)
    assert_colours_are_labels(data)
    assert "test has no labelled images: a tenth of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("train", "valid"), ("train", "validation"), ("Train", "Test"), ("training", "testing"), ("TRAIN", "VAL")],
)
def test_splits_go_by_their_usual_names(tmp_path, train, held_out):
    """They used to be taken for two classes, and the held-out images were trained on."""
    root = tmp_path / "pets"
    make_classes(root / train, 4)
    make_classes(root / held_out, 2)
    data = load(root)
    assert (len(data.pretrain), len(data.test)) == (12, 6)
    assert_colours_are_labels(data)


def test_the_name_of_a_split_is_no_class(tmp_path):
    make_classes(tmp_path / "pets", 3, ("cat", "dog"))
    make_classes(tmp_path / "pets" / "Valid", 1)
    with pytest.raises(UserError, match="Valid is the name of a split, and there is no train beside it"):
        load(tmp_path / "pets")


def test_what_lies_beside_the_splits_is_named_and_not_used(tmp_path, capsys):
    make_classes(tmp_path / "pets" / "train", 10)
    make_classes(tmp_path / "pets" / "extra", 1)
    data = load(tmp_path / "pets")
    assert (len(data.train), len(data.test)) == (27, 3)
    assert_colours_are_labels(data)
    assert "train holds the training images: extra beside it is not used" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["tiny-imagenet", "ImageNet"])
def test_an_unlabelled_split_gives_way_to_a_labelled_one(tmp_path, layout, capsys):
    root = tmp_path / "pets"
    if layout == "tiny-imagenet":  # as unzipped
        for name in COLOURS:
            make_classes(root / "train" / name, 0)
            for number in range(10):
                save(root / "train" / name / "images" / f"{number}.JPEG", COLOURS[name])
        save(root / "val" / "images" / "val_0.JPEG")
        save(root / "test" / "images" / "test_0.JPEG")
    else:
        make_classes(root / "train", 27)
        make_classes(root / "val", 1)
        save(root / "test" / "0.png")
    data = load(root)
    assert len(data.test) == 3
    assert_colours_are_labels(data)
    if layout == "tiny-imagenet":
        assert "has no labelled images: a tenth of" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".gif", ".avif"])
def test_what_pillow_reads_is_an_image(tmp_path, suffix):
    if suffix not in listing.EXTENSIONS:
        pytest.skip(f"this Pillow reads no {suffix}")
    make_classes(tmp_path / "pets", 2, ("cat", "dog"), suffix=".png")
    for number in range(2):
        save(tmp_path / "pets" / "owl" / f"{number}{suffix}", COLOURS["owl"])
    assert load(tmp_path / "pets").classes == ("cat", "dog", "owl")


def test_the_first_frame_of_a_gif_counts(tmp_path):
    frames = [Image.new("RGB", (12, 12), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    (tmp_path / "pets").mkdir()
    frames[0].save(tmp_path / "pets" / "a.gif", save_all=True, append_images=frames[1:])
    (image,) = load(tmp_path / "pets").pretrain
    assert image.flatten(1).unique(dim=1).flatten().tolist() == [250, 0, 0]


def test_files_that_are_not_read_are_counted_by_extension(tmp_path, capsys):
    root = make_classes(tmp_path / "pets", 2)
    for name in ("cat/a.HEIC", "cat/b.heic", "notes.txt", "Makefile"):
        (root / name).touch()
    load(root)
    assert "that are not read: 2 .heic, 1 .txt, 1 no extension" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["pipe", "link to nothing", "link to itself"])
def test_what_is_no_file_is_left_out(tmp_path, kind, capsys):
    root = make_classes(tmp_path / "pets", 2)
    if kind == "pipe":
        os.mkfifo(root / "cat" / "x.png")
    else:
        (root / "cat" / "x.png").symlink_to("nowhere.png" if kind == "link to nothing" else "x.png")
    data = load(root)
    assert len(data.train) + len(data.test) == 6
    assert "1 damaged images" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["flat", "mixed", "one folder", "one image each", "split"])
def test_unlabelled_images_have_no_splits(tmp_path, layout, capsys):
    root = tmp_path / "pets"
    paths = {
        "flat": ["a.png", "b.png"],
        "mixed": ["a.png", "cat/b.png", "dog/c.png"],
        "one folder": ["cat/a.png", "cat/x/b.png"],
        "one image each": ["cat/a.png", "dog/b.png"],
        "split": ["train/a.png", "train/b.png", "test/c.png"],
    }[layout]
    for path in paths:
        save(root / path)
    data = load(root)
    assert len(data.pretrain) == (2 if layout == "split" else len(paths))
    assert (data.train, data.test, data.classes) == (None, None, ())
    assert "taken as unlabelled" in capsys.readouterr().out


def test_the_hold_out_is_stratified_disjoint_and_stable(tmp_path):
    root = tmp_path / "pets"
    for name, count in (("cat", 40), ("dog", 20), ("owl", 2)):
        make_classes(root, count, (name,))
    listed = listing.list_images(root)
    train, test = listed.files[: listed.train_files], listed.files[listed.train_files :]
    assert not {file.path for file in train} & {file.path for file in test}
    assert np.bincount(listed.labels[listed.train_files :]).tolist() == [4, 2, 1]
    assert listing.list_images(root) == listed
    other = tmp_path / "moved"
    root.rename(other)
    assert [file.path for file in listing.list_images(other).files] == [file.path for file in listed.files]


# The cache


def test_the_cache_saves_decoding_until_something_changes(tmp_path, monkeypatch, capsys):
    root = make_classes(tmp_path / "pets", 4)
    first = load(root)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "decode", lambda *arguments: pytest.fail("decoded again"))
        again = load(root)
    assert "are reused from" in capsys.readouterr().out
    assert torch.equal(again.pretrain, first.pretrain)
    assert torch.equal(again.test.labels, first.test.labels)
    assert again.classes == first.classes
    save(root / "cat" / "00.png", (80, 80, 80))
    changed = load(root)
    assert not torch.equal(
        torch.cat([changed.pretrain, changed.test.images]), torch.cat([first.pretrain, first.test.images])
    )
    assert not [path for path in (tmp_path / "root" / "cache").iterdir() if path.name.startswith(".")]


def test_a_cache_that_is_not_whole_is_made_again(tmp_path):
    root = make_classes(tmp_path / "pets", 4)
    first = load(root)
    (array,) = (tmp_path / "root" / "cache").glob("*.npy")
    damage(array)
    assert torch.equal(load(root).pretrain, first.pretrain)


def test_two_runs_at_once_write_the_same_cache(tmp_path):
    root = make_classes(tmp_path / "pets", 8)
    loaded, threads = [], []
    for _ in range(3):
        threads.append(threading.Thread(target=lambda: loaded.append(load(root))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 3
    assert all(torch.equal(data.pretrain, load(root).pretrain) for data in loaded)


def test_a_memory_map_holds_the_same(tmp_path, monkeypatch, recwarn):
    root = make_classes(tmp_path / "pets", 8)
    resident = load(root)
    monkeypatch.setattr(folder, "free_memory", lambda: 1000)
    monkeypatch.setattr(torch, "from_numpy", checked_memory_map(torch.from_numpy))
    mapped = load(root)
    assert torch.equal(mapped.pretrain, resident.pretrain)
    assert torch.equal(mapped.test.images, resident.test.images)
    assert_colours_are_labels(mapped)
    torch.testing.assert_close(mapped.mean_std(), resident.mean_std())
    assert not recwarn.list


def checked_memory_map(from_numpy):
    def check(array):
        assert isinstance(array, np.memmap)
        return from_numpy(array)

    return check


def test_a_full_disk_is_told_before_decoding(tmp_path, monkeypatch):
    root = make_classes(tmp_path / "pets", 4)
    monkeypatch.setattr(folder, "decode", lambda *arguments: pytest.fail("decoded"))
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    with pytest.raises(UserError, match=r"decoded images need 0.04 GB under .*cache, where 0.01 GB are free"):
        load(root, image_size=1000)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*--data-root"):
        load_data(f"folder:{root}", root=tmp_path / "file")


def test_free_memory_is_plausible():
    assert 2**20 < folder.free_memory() < 2**50
