# SPDX-License-Identifier: Apache-2.0
"""From a file to an image of the wanted size: what is turned, cropped, left out or refused."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
from image_folders import assert_colours_are_labels, damage, load, make_classes, save
from PIL import Image

from train import folder
from train.data import Split
from train.errors import UserError
from train.features import pixel_features


def test_orientation_modes_and_crop(tmp_path):
    root = tmp_path / "mix"
    turned = Image.new("RGB", (16, 16), "black")
    turned.paste((255, 255, 255), (0, 0, 16, 8))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise: then the right half is white
    root.mkdir()
    turned.save(root / "a.png", exif=exif)
    save(root / "b.png", 100, mode="L", size=(16, 16))
    save(root / "c.png", (0, 0, 0, 0), mode="RGBA", size=(16, 16))
    Image.fromarray(np.full((16, 16), 200 * 256, np.uint16)).save(root / "d.png")
    wide = Image.new("RGB", (48, 16), (255, 0, 0))
    wide.paste((0, 0, 255), (16, 0, 32, 16))  # only the central square is blue
    wide.save(root / "e.png")
    upright, gray, transparent, deep, cropped = load(root, image_size=16).pretrain
    assert upright[:, :, :8].max() == 0 and upright[:, :, 8:].min() == 255
    assert gray.unique().tolist() == [100]
    assert transparent.unique().tolist() == [255]
    assert deep.unique().tolist() == [200]
    assert cropped.flatten(1).unique(dim=1).flatten().tolist() == [0, 0, 255]


def test_a_malformed_tag_does_not_cost_a_turned_photo(tmp_path):
    """Its orientation is right; another tag holds text where a number belongs."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    turned = Image.new("RGB", (16, 16), "black")
    turned.paste((255, 255, 255), (0, 0, 16, 8))
    (tmp_path / "photos").mkdir()
    turned.save(tmp_path / "photos" / "a.jpg", exif=exif, quality=95)
    (image,) = load(tmp_path / "photos").pretrain
    assert image[:, :, :6].max() < 30 and image[:, :, 10:].min() > 225


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((16, 16), 4000, np.uint16), "16 bits a pixel, of which at most 12 are used"),
        (np.full((16, 16), 70000, np.int32), "32-bit integers, whose range the file does not say"),
        (np.full((16, 16), 0.5, np.float32), "floats, whose range the file does not say"),
    ],
)
def test_pixels_of_unknown_range_are_refused_by_name(tmp_path, pixels, reason):
    """They came out nearly black."""
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.tif")
    with pytest.raises(UserError, match=f"none of its images can be decoded; a.tif: ValueError: {reason}"):
        load(tmp_path / "photos")


def test_the_stored_size(tmp_path, capsys):
    root = make_classes(tmp_path / "pets", 2)
    assert load(root).size == 12
    assert "--image-size" not in capsys.readouterr().out
    assert load(root, image_size=20).size == 20
    save(root / "cat" / "wide.png", size=(12, 30))
    assert load(root).size == 64
    assert "at 64 pixels (--image-size chooses)" in capsys.readouterr().out


def test_damaged_images_take_their_labels_with_them(tmp_path, capsys):
    root = make_classes(tmp_path / "pets", 10, suffix=".jpg")
    for name in ("cat/03.jpg", "dog/00.jpg", "dog/01.jpg"):
        damage(root / name)
    (root / "dog" / "empty.png").touch()
    for message in ("decoding 31 images", "reused from"):
        data = load(root)
        assert len(data.train) + len(data.test) == 27
        assert_colours_are_labels(data)
        captured = capsys.readouterr()
        assert message in captured.out
        warning = re.match(r"warning: 4 damaged images of .* are left out: .*, \.\.\. \(all .* in (.*)\)", captured.err)
        listed = Path(warning[1]).read_text().splitlines()
        names = sorted(line.split("\t")[0] for line in listed)
        assert names == ["cat/03.jpg", "dog/00.jpg", "dog/01.jpg", "dog/empty.png"]
        assert all("Error: " in line for line in listed)


def test_a_decompression_bomb_is_left_out(tmp_path, monkeypatch, capsys):
    root = make_classes(tmp_path / "pets", 4)
    save(root / "cat" / "bomb.png", size=(90, 90))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    data = load(root, image_size=8)
    assert len(data.train) + len(data.test) == 12
    assert "1 damaged images of" in capsys.readouterr().err


def test_folders_without_images_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--data folder:.*/none: no such folder"):
        load(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--data folder:.*/file: not a folder"):
        load(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--data folder:.*/empty: no images there \(.jpg"):
        load(tmp_path / "empty")
    damage(save(tmp_path / "broken" / "a.png"))
    with pytest.raises(UserError, match=r"none of its images can be decoded; a.png: .*Error"):
        load(tmp_path / "broken")
    monkeypatch.setattr(folder.os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied", path)))
    with pytest.raises(UserError, match=r"cannot read .*/empty.*: denied"):
        load(tmp_path / "empty")


def test_an_unreadable_file_stops_instead_of_being_cached(tmp_path, monkeypatch):
    root = make_classes(tmp_path / "pets", 2)
    opened = Path.open

    def fail(path, *mode, **options):
        if path.name == "01.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *mode, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UserError, match=r"cannot read .*01.png: Permission denied"):
        load(root)
    assert not list((tmp_path / "root" / "cache").iterdir())


def test_images_keep_more_detail_than_the_network_sees(tmp_path, capsys):
    """A crop of a quarter of a photo still has a pixel for each that the network sees."""
    checks = Image.fromarray(np.kron(np.indices((10, 10)).sum(0) % 2 * 255, np.ones((16, 16))).astype(np.uint8))
    (tmp_path / "photos").mkdir()
    for number in range(2):
        checks.save(tmp_path / "photos" / f"{number}.png")
    for asked, seen, stored in ((None, 64, 128), (16, 16, 32), (100, 100, 160), (200, 200, 200)):
        data = load(tmp_path / "photos", image_size=asked)
        assert (data.image_size, data.size) == (seen, stored)
    quarter = load(tmp_path / "photos", image_size=80).pretrain[0, 0, :80, :80]
    assert torch.equal(quarter, torch.from_numpy(np.asarray(checks)[:80, :80].copy()))


def test_raw_pixels_are_those_that_the_network_sees(tmp_path):
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    split = Split(images, torch.arange(6))
    stored, seen = (pixel_features(split, split, size, torch.device("cpu")).train for size in (32, 16))
    assert torch.equal(stored, images.flatten(1) / 255)
    half = torch.nn.functional.interpolate(images / 255, size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen, half.flatten(1))
