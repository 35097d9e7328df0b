# SPDX-License-Identifier: Apache-2.0
"""Which images of a folder there are, their splits and their labels; nothing is opened."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from train.errors import UserError

Image.init()
READABLE = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
#: .avif only where Pillow was built with it; of a .gif the first frame counts.
EXTENSIONS = tuple(
    f".{name}"
    for name in ("jpg", "jpeg", "jpe", "jfif", "png", "ppm", "pgm", "bmp", "tif", "tiff", "webp", "gif", "avif")
    if f".{name}" in READABLE
)
TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("test", "testing", "val", "valid", "validation")  #: the first with labelled images is used
HELD_OUT = 10  #: one image in so many of each class is held out where the folder has no such split


class ImageFile(NamedTuple):
    path: str  #: relative to the folder, with slashes
    bytes: int
    modified: int  #: nanoseconds


class Listing(NamedTuple):
    """What to decode, in order."""

    files: list[ImageFile]  #: train split first
    train_files: int
    labels: list[int] | None
    classes: tuple[str, ...]


class Found(NamedTuple):
    """What lies below a folder."""

    images: list[ImageFile]  #: by path
    others: Counter[str]  #: files of other kinds by extension


def list_images(path: Path) -> Listing:
    """Files, splits and labels, the same on every call as long as the folder is."""
    if not path.is_dir():
        raise UserError(f"--data folder:{path}: {'not a folder' if path.exists() else 'no such folder'}")
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if is_folder(entry) and not skipped(entry.name))
    folders = {name.lower(): name for name in names}
    train_name = next((folders[name] for name in TRAIN_NAMES if name in folders), None)
    held_out = [folders[name] for name in HELD_OUT_NAMES if name in folders]
    if train_name is None:
        if held_out:
            raise UserError(
                f"--data folder:{path}: {held_out[0]} is the name of a split, and there is no train beside it: add "
                "that, or rename the folder if it is a class"
            )
        return label_and_split(path, find(path), 0)
    if aside := sorted(set(folders.values()) - {train_name, *held_out}):
        print(f"{path / train_name} holds the training images: {', '.join(aside)} beside it is not used", flush=True)
    train = find(path, f"{train_name}/")
    directories = first_directories(train.images, 1)
    if directories is None:
        return label_and_split(path, train, 1)
    for name in held_out:
        test = labelled(path, find(path, f"{name}/"), directories)
        if test is not None:
            print(f"{path / name} is the test split", flush=True)
            report_others(path, train.others)
            number = {directory: label for label, directory in enumerate(directories)}
            labels = [number[file.path.split("/")[1]] for file in train.images + test]
            return Listing(train.images + test, len(train.images), labels, tuple(directories))
    if held_out:
        where = f"{path / train_name} is held out instead"
        print(f"{path / ' and '.join(held_out)} has no labelled images: a tenth of {where}", flush=True)
    return label_and_split(path, train, 1)


def labelled(path: Path, test: Found, directories: list[str]) -> list[ImageFile] | None:
    """The held-out images if each lies in the folder of a class of the train split; None if none does."""
    names = {file.path.split("/")[1] if file.path.count("/") > 1 else "" for file in test.images}
    known = names & set(directories)
    if not known or "" in names:
        return None
    if unknown := sorted(names - known):
        part = test.images[0].path.split("/")[0]
        raise UserError(f"class {unknown[0]!r} of {path / part} is not among those of the train split")
    return test.images


def label_and_split(path: Path, found: Found, level: int) -> Listing:
    """Labels from the directories at ``level``, and a fixed tenth of every class at the end as test split."""
    files = found.images
    report_others(path, found.others)
    if not files:
        raise UserError(f"--data folder:{path}: no images there ({' '.join(EXTENSIONS)})")
    directories = first_directories(files, level)
    if directories is None or len(directories) == len(files):  # one image each: folders, but no classes
        print(f"{path} is taken as unlabelled: its images do not all lie in two or more class folders", flush=True)
        return Listing(files, len(files), None, ())
    train: list[tuple[ImageFile, int]] = []
    test: list[tuple[ImageFile, int]] = []
    members_of: dict[str, list[ImageFile]] = {name: [] for name in directories}
    for file in files:
        members_of[file.path.split("/")[level]].append(file)
    for label, members in enumerate(members_of.values()):
        # The order of a hash is as good as random, needs no generator and hardly changes with new files.
        by_hash = sorted(members, key=lambda file: hashlib.sha256(os.fsencode(file.path)).digest())
        count = max(1, round(len(members) / HELD_OUT)) if len(members) > 1 else 0
        chosen = set(by_hash[:count])
        test += [(file, label) for file in members if file in chosen]
        train += [(file, label) for file in members if file not in chosen]
    ordered = train + test
    return Listing([f for f, _ in ordered], len(train), [label for _, label in ordered], tuple(directories))


def first_directories(files: list[ImageFile], level: int) -> list[str] | None:
    """Sorted names of the directories at ``level``; None if they are fewer than two or not every image's."""
    if any(file.path.count("/") <= level for file in files):
        return None
    names = sorted({file.path.split("/")[level] for file in files})
    return names if len(names) > 1 else None


def find(root: Path, below: str = "") -> Found:
    """All files below root/below; a link to a folder that we are in is not entered again.

    An image is what is called so: a link to nothing is among them, and turns out to be unreadable.
    """
    others: Counter[str] = Counter()

    def visit(relative: str, ancestors: frozenset[tuple[int, int]]) -> Iterator[ImageFile]:
        status = os.stat(root / relative)
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            return
        with os.scandir(root / relative) as entries:
            for entry in entries:
                if skipped(entry.name):
                    continue
                if is_folder(entry):
                    yield from visit(f"{relative}{entry.name}/", ancestors | {identity})
                elif entry.name.lower().endswith(EXTENSIONS):
                    yield describe(relative + entry.name, entry)
                else:
                    others[os.path.splitext(entry.name)[1].lower() or "no extension"] += 1

    return Found(sorted(visit(below, frozenset())), others)


def skipped(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def describe(path: str, entry: os.DirEntry[str]) -> ImageFile:
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # a link to nothing
            return ImageFile(path, 0, 0)
        raise
    return ImageFile(path, status.st_size, status.st_mtime_ns)


def report_others(path: Path, others: Counter[str]) -> None:
    if others:
        by_count = sorted(others.items(), key=lambda item: (-item[1], item[0]))
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in by_count[:8])
        print(f"files of {path} that are not read: {kinds}", flush=True)
