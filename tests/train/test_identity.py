# SPDX-License-Identifier: Apache-2.0
"""The images and labels of a run are known by their content, wherever they are."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
from image_folders import COLOURS, load, make_classes, save

from train import evaluate, pretrain
from train.config import load_config

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--batch-size", "4", "--device", "cpu", "--no-evaluate", "--knn-every", "0", "--projector", "8"]


def start(folder: Path, run: Path) -> None:
    arguments = [*SMALL, "--data", f"folder:{folder}", "--data-root", str(run.parent / "root"), "--output", str(run)]
    assert pretrain.run([*arguments, "--limit-steps", "1"]) == 0


def test_the_key_is_that_of_files_labels_and_splits(tmp_path):
    keys = {"as it was": load(make_classes(tmp_path / "pets", 4)).content}
    shutil.copytree(tmp_path / "pets", tmp_path / "moved")
    assert load(tmp_path / "moved").content == keys["as it was"]
    (tmp_path / "pets").rename(tmp_path / "away")
    assert load(tmp_path / "away").content == keys["as it was"]

    image, other = tmp_path / "moved" / "cat" / "03.png", tmp_path / "moved" / "dog" / "03.png"
    before = image.read_bytes()
    save(image, (80, 80, 80))
    keys["another image"] = load(tmp_path / "moved").content
    image.write_bytes(before)
    assert load(tmp_path / "moved").content == keys["as it was"]
    shutil.move(tmp_path / "moved" / "cat" / "03.png", tmp_path / "moved" / "cat" / "x.png")
    shutil.move(other, image)  # the same images, one of them now a cat, by another path
    keys["another label"] = load(tmp_path / "moved").content
    assert len(set(keys.values())) == 3


def test_a_moved_folder_is_told_with_data(tmp_path, monkeypatch, capsys):
    """From another working directory nothing has to be told at all."""
    run = tmp_path / "run"
    make_classes(tmp_path / "pets", 4)
    monkeypatch.chdir(tmp_path)
    start(Path("pets"), run)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pretrain.run(["--resume", str(run), "--limit-steps", "2"]) == 0
    (tmp_path / "pets").rename(tmp_path / "moved")
    capsys.readouterr()
    evaluation = [str(run), "--protocol", "knn", "--device", "cpu"]
    for failed in (evaluate.run(evaluation), pretrain.run(["--resume", str(run), "--limit-steps", "3"])):
        assert failed == 2
    assert capsys.readouterr().err.count(f"--data folder:{tmp_path / 'pets'}: no such folder\n") == 2
    moved = ["--data", "folder:../moved"]
    assert evaluate.run([*evaluation, *moved]) == 0
    assert pretrain.run(["--resume", str(run), "--limit-steps", "3", *moved]) == 0
    assert load_config(run).data == f"folder:{tmp_path / 'moved'}"
    assert evaluate.run(evaluation) == 0, "the run knows now where its images are"


@pytest.mark.parametrize("change", ["image", "label"])
def test_other_content_under_the_same_path_is_refused(tmp_path, change, capsys):
    run = tmp_path / "run"
    pets = make_classes(tmp_path / "pets", 4)
    start(pets, run)
    if change == "image":
        save(pets / "cat" / "00.png", (80, 80, 80))
    else:
        cat, dog = ((pets / name / "00.png") for name in ("cat", "dog"))
        save(cat, COLOURS["dog"])
        save(dog, COLOURS["cat"])
    files = {path: path.read_bytes() for path in run.iterdir()}
    capsys.readouterr()
    assert pretrain.run(["--resume", str(run), "--limit-steps", "2"]) == 2
    assert evaluate.run([str(run), "--protocol", "knn", "--device", "cpu"]) == 2
    reason = f"folder:{pets} holds other images or labels than the run was started with; if those are elsewhere"
    assert capsys.readouterr().err.count(reason) == 2
    assert {path: path.read_bytes() for path in run.iterdir()} == files


def test_a_dry_run_leaves_nothing(tmp_path, capsys):
    pets = make_classes(tmp_path / "pets", 4)
    save(pets / "cat" / "wide.png", size=(30, 12))
    (pets / "cat" / "broken.png").write_bytes(b"no")
    before = sorted(tmp_path.rglob("*"))
    arguments = [*SMALL, "--data", f"folder:{pets}", "--data-root", str(tmp_path / "root"), "--dry-run"]
    assert pretrain.run(arguments) == 0
    said = capsys.readouterr()
    assert "dry run: 11 images, " in said.out and "1 damaged images" in said.err
    assert sorted(tmp_path.rglob("*")) == before
    assert pretrain.run([*arguments, "--download"]) == 2
    assert "--dry-run writes nothing, so it cannot --download" in capsys.readouterr().err


def test_help_shows_the_defaults_that_apply(tmp_path, capsys):
    def default(flag: str, *arguments: str) -> str:
        with pytest.raises(SystemExit):
            pretrain.run([*arguments, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        return text.split(f" {flag} ", 1)[1].split("(", 1)[1].split(")")[0]

    assert default("--epochs EPOCHS") == "30"  # of digits
    assert default("--epochs EPOCHS", "--data", "cifar10") == "200"
    assert default("--epochs EPOCHS", "--data", "cifar10", "--preset", "mio-v1") == "250"
    assert default("--crop-area CROP_AREA CROP_AREA") == "0.5 1.1"
    (tmp_path / "my.toml").write_text("epochs = 7\n")
    assert default("--epochs EPOCHS", "--config", str(tmp_path / "my.toml")) == "7"
