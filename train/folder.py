# SPDX-License-Identifier: Apache-2.0
"""Any folder of images as one uint8 array, decoded once and cached.

Decoding costs far more than reading the result back, so the array is written beside the other data and
later runs map it into memory. The cache is written image by image and in order: a damaged image takes
neither a row nor a label, and a full disk is an error message instead of a bus error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from train.errors import UserError
from train.listing import ImageFile, Listing, list_images
from train.progress import counting

FORMAT = 3  #: part of the cache key: raise it when decoding or the files of the cache change
LARGEST_OWN_SIZE, DEFAULT_SIZE = 96, 64  #: pixels
DETAIL = 2  #: images are stored so many times larger than the network sees them: a crop of a quarter loses nothing
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  #: by EXIF orientation
BLOCK = 256  #: images decoded between two writes


@dataclass(frozen=True)
class FolderImages:
    """Decoded images, those of the train split first."""

    name: str  #: folder-<name of the folder>
    images: Tensor  #: [n, 3, stored, stored] uint8, in memory or a read-only memory map
    image_size: int  #: pixels per side for the network
    train_images: int  #: how many of them are not held out
    labels: Tensor | None  #: [n] int64
    classes: tuple[str, ...]
    content: str  #: a key: equal for equal files with equal labels and splits, wherever they are


def load_folder(path: Path, cache: Path | None, image_size: int | None) -> FolderImages:
    """Decode the images below ``path``, or read them from ``cache``, as [n, 3, stored, stored].

    Without a cache they are decoded into a file without a name, and nothing is left.

    Splits: path/train and path/test (or val, valid, validation; in any case), the first whose images are
    labelled. Otherwise, of labelled images, a fixed tenth of every class is held out as the test split.
    Labels: the first-level directory, if every image lies in one and there are at least two of them; otherwise
    the images are unlabelled, and there is no test split. Files count by extension, other kinds are named;
    hidden ones and __MACOSX are skipped; links are followed.

    An image is turned by its EXIF orientation, made RGB (gray stays gray in three channels, 16 bits become
    8, transparent parts become white), cut to its central square and resized (bicubic, antialiased).
    ``image_size`` None: the images' own size if a sample of 100 are squares of one size up to 96 pixels, else 64.
    They are stored up to twice that large, as far as the largest of the sample has the pixels.

    Images that cannot be decoded are left out, each with its label, reported on stderr and listed in a
    file. Raises UserError for a folder without usable images, unreadable files and a disk that is full.
    """
    try:
        listing = list_images(path)
    except OSError as error:
        raise unreadable(error, path) from error
    image_size, size = choose_sizes(path, listing.files, image_size)
    key = hashlib.sha256(json.dumps([FORMAT, size, listing.files]).encode()).hexdigest()[:16]
    name = f"folder-{path.resolve().name}"
    if cache is None:
        with tempfile.TemporaryFile() as file:
            record = decode_all(path, listing, size, file, Path(tempfile.gettempdir()))
            file.flush()
            images = open_array(Path(f"/proc/self/fd/{file.fileno()}"))
        report_left_out(record["left_out"], path, None)
    else:
        array_path = cache / f"{name}-{key}.npy"
        record = read_or_decode(path, listing, size, array_path)
        report_left_out(record["left_out"], path, array_path)
        images = open_array(array_path)
    labels = None if record["labels"] is None else torch.tensor(record["labels"])
    return FolderImages(
        name, images, image_size, record["train_images"], labels, tuple(record["classes"]), record["content"]
    )


def read_or_decode(path: Path, listing: Listing, size: int, array_path: Path) -> dict[str, Any]:
    """The record of the cached array, which is made where there is none."""
    if (record := read_record(array_path)) is not None:
        print(f"decoded images of {path} are reused from {array_path}", flush=True)
        return record
    try:
        array_path.parent.mkdir(parents=True, exist_ok=True)
        with placed_atomically(array_path) as file:
            record = decode_all(path, listing, size, file, array_path.parent)
        with placed_atomically(array_path.with_suffix(".json")) as file:  # last: a record vouches for its array
            file.write(json.dumps(record).encode())
    except OSError as error:
        raise UserError(f"cannot write {array_path}: {error.strerror or error} (--data-root chooses)") from error
    return record


def unreadable(error: OSError, path: Path) -> UserError:
    return UserError(f"cannot read {error.filename or path}: {error.strerror}")


def choose_sizes(path: Path, files: list[ImageFile], image_size: int | None) -> tuple[int, int]:
    """(pixels per side for the network, as stored): without ``image_size`` the size of small square images that are
    all alike, and 64, with a sentence, for any others."""
    sizes = set()
    for file in files[:: max(1, len(files) // 100)][:100]:  # evenly spaced, so of all classes
        try:
            if (path / file.path).is_file():  # a pipe would be waited for
                with Image.open(path / file.path) as image:
                    sizes.add(image.size)
        except Exception:  # decoding will report it
            continue
    largest = max((min(size) for size in sizes), default=0)
    if image_size is None and sizes == {(largest, largest)} and largest <= LARGEST_OWN_SIZE:
        return largest, largest
    chosen = image_size or DEFAULT_SIZE
    stored = max(chosen, min(DETAIL * chosen, largest))
    if image_size is None:
        print(f"the network sees images of {path} at {chosen} pixels (--image-size chooses)", flush=True)
    return chosen, stored


# Decoding


def decode(path: Path, size: int) -> tuple[bytes, bytes] | str:
    """([3, size, size] uint8 of one image file, a key of the file), or the reason why it cannot be decoded.

    An error of the file system is raised instead: it says nothing about the image, and must not be cached.
    """
    try:
        if not path.is_file():
            return "not a file, or a link to nothing"
        with path.open("rb") as stream:
            key = hashlib.file_digest(stream, "sha256").digest()
            stream.seek(0)
            file = Image.open(stream)
            file.draft(None, (2 * size, 2 * size))  # JPEG: skip the detail that resizing would drop
            image = upright(file)
            side = min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = (left, top, left + side, top + side)
            square = as_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box)
            return np.asarray(square).transpose(2, 0, 1).tobytes(), key
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(error, path) from error
        return " ".join(f"{type(error).__name__}: {error}".split())


def upright(image: Image.Image) -> Image.Image:
    """Turned by its orientation alone: ImageOps.exif_transpose rewrites all tags, and stumbles over a malformed one."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # tags that cannot be read at all
        turn = None
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image)  # which Pillow would clip instead of scale
        if 0 < values.max() < 4096:
            raise ValueError("16 bits a pixel, of which at most 12 are used: scale them to 16 or to 8")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode[0] in "IF":
        kind = "floats" if image.mode[0] == "F" else "32-bit integers"
        raise ValueError(f"{kind}, whose range the file does not say: scale them to 16 or to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decode_all(path: Path, listing: Listing, size: int, file: BinaryIO, disk: Path) -> dict[str, Any]:
    """Write the array into ``file``, which is on ``disk``; returns the record of what it holds.

    Threads, not processes: Pillow decodes and resizes without the interpreter lock.
    """
    check_disk(len(listing.files) * 3 * size * size, disk)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n, kept, left_out, content = len(listing.files), [], {}, hashlib.sha256()
    print(f"decoding {n} images of {path} to {size}x{size} pixels with {workers} workers", flush=True)
    with ThreadPoolExecutor(workers) as pool, counting("decoding", n, "images") as advance:
        write_header(file, n, size)
        for start in range(0, n, BLOCK):
            block = range(start, min(start + BLOCK, n))
            results = pool.map(lambda row: decode(path / listing.files[row].path, size), block)
            for row, result in zip(block, results, strict=True):
                if isinstance(result, str):
                    left_out[listing.files[row].path] = result
                else:
                    file.write(result[0])
                    content.update(result[1])
                    kept.append(row)
            advance(len(block))
    train_images = sum(row < listing.train_files for row in kept)
    if not train_images or (listing.labels is not None and train_images == len(kept)):
        part = "test images" if train_images else "train images" if kept else "images"
        first, reason = next(iter(left_out.items()))
        raise UserError(f"--data folder:{path}: none of its {part} can be decoded; {first}: {reason}")
    file.seek(0)
    write_header(file, len(kept), size)
    labels = None if listing.labels is None else [listing.labels[row] for row in kept]
    content.update(json.dumps([train_images, labels]).encode())
    return {
        "content": content.hexdigest(),
        "train_images": train_images,
        "classes": listing.classes,
        "labels": labels,
        "paths": [listing.files[row].path for row in kept],
        "left_out": left_out,
    }


def write_header(file: BinaryIO, n: int, size: int) -> None:
    """NumPy pads the header for any length of the first axis, so that it can be rewritten in place."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, 3, size, size)}
    np.lib.format.write_array_header_1_0(file, header)


def check_disk(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the decoded images need {needed / 1e9:.2f} GB under {folder}, where {free / 1e9:.2f} GB are free: "
            "pass a smaller --image-size, or --data-root on another disk"
        )


@contextmanager
def placed_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file under a name of its own that becomes ``path`` once it is complete."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# The cache


def read_record(array_path: Path) -> dict[str, Any] | None:
    """What ``decode_all`` wrote, None if there is nothing or not all of it."""
    try:
        record = json.loads(array_path.with_suffix(".json").read_text(encoding="utf-8"))
        array = np.load(array_path, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return record if len(array) == len(record["paths"]) else None


def open_array(path: Path) -> Tensor:
    """In memory if it needs no more than half of what is free, else a map of the file."""
    if path.stat().st_size <= free_memory() / 2:
        return torch.from_numpy(np.load(path))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")  # nothing here writes to images
        return torch.from_numpy(np.load(path, mmap_mode="r"))


def free_memory() -> int:
    """Bytes that a new tensor may take: what the system can give, within the limit of a container."""
    try:
        free = number_after("MemAvailable:", Path("/proc/meminfo")) * 1024
    except (OSError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        group = Path("/sys/fs/cgroup")
        return min(free, int((group / "memory.max").read_text()) - number_after("anon", group / "memory.stat"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free


def number_after(word: str, path: Path) -> int:
    """Raises ValueError where no line starts so."""
    found = re.search(rf"^{word}\s+(\d+)", path.read_text(), re.M)
    if found is None:
        raise ValueError(f"no {word} in {path}")
    return int(found[1])


def report_left_out(left_out: dict[str, str], path: Path, array_path: Path | None) -> None:
    """One warning with the count and the first paths; all of them, with reasons, in a file beside the array."""
    if not left_out:
        return
    where = ""
    if array_path is not None:
        listed = array_path.with_name(array_path.stem + "-left-out.txt")
        try:
            with placed_atomically(listed) as file:
                file.writelines(os.fsencode(f"{name}\t{reason}\n") for name, reason in left_out.items())
            where = f" (all are listed in {listed})"
        except OSError as error:  # a cache that can be read only
            where = f" ({listed} cannot be written: {error.strerror})"
    first = ", ".join(list(left_out)[:3]) + (", ..." if len(left_out) > 3 else "")
    print(f"warning: {len(left_out)} damaged images of {path} are left out: {first}{where}", file=sys.stderr)
