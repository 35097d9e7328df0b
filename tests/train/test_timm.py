# SPDX-License-Identifier: Apache-2.0
"""`--backbone timm:NAME`: trains, resumes, is scored, exported and loaded; what cannot be is one sentence."""

import re
import sys

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("safetensors.torch")
pytest.importorskip("sklearn")
import timm

from mio_ext.encoder import build_backbone, load_encoder
from train import analyze, evaluate, export, pretrain
from train.errors import UserError
from train.sync_batch_norm import synchronize_batch_norm

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ["--image-size", "32", "--batch-size", "64", "--projector", "64", "32", "--device", "cpu", "--subset", "0.1"]
ADAMW = ["--optimizer", "adamw", "--learning-rate", "1e-3"]
QUICK = [*ADAMW, "--log-every", "1", "--knn-every", "0", "--no-evaluate"]
VIT = ["--backbone", "timm:test_vit", *OPTIONS, *QUICK]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of a ViT, and two more after a resumption."""
    folder = tmp_path_factory.mktemp("run") / "vit"
    assert pretrain.run([*VIT, "--limit-steps", "2", "--output", str(folder)]) == 0
    assert pretrain.run(["--resume", str(folder), "--limit-steps", "4"]) == 0
    return folder


def test_resumed_is_as_if_nothing_had_happened(run, tmp_path):
    assert pretrain.run([*VIT, "--limit-steps", "4", "--output", str(tmp_path / "whole")]) == 0
    parts = [torch.load(f / "checkpoint.pt", weights_only=True)["backbone"] for f in (run, tmp_path / "whole")]
    untrained, _ = build_backbone("timm:test_vit", 1, "own", image_size=32)
    assert parts[0].keys() == untrained.state_dict().keys()
    assert all(torch.equal(a, parts[1][key]) for key, a in parts[0].items())


def test_exported_and_loaded(run, tmp_path, monkeypatch):
    """By load_encoder, and without mio_ext by the code in the model card."""
    file = tmp_path / "encoder.safetensors"
    assert export.run([str(run), "--output", str(file)]) == 0
    assert file.read_bytes() == (run / file.name).read_bytes()
    encoder = load_encoder(file)
    images = torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    card = (run / "README.md").read_text()
    assert "library_name: timm" in card
    plain = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(run)
    names = {"timm": timm, "safetensors": sys.modules["safetensors"]}
    exec(plain, names)
    with torch.inference_mode():
        expected = names["network"]((images - encoder.mean) / encoder.std)
    assert expected.shape == (5, 64)
    assert torch.equal(encoder.features(images), expected)
    with pytest.raises(ValueError, match=r"images must be \[B, 1, 32, 32\], got \[5, 1, 48, 48\]"):
        encoder.features(torch.rand(5, 1, 48, 48))


def test_scored_and_analysed(run, capsys):
    assert evaluate.run([str(run), "--protocol", "knn"]) == 0
    assert "20-NN" in capsys.readouterr().out
    assert analyze.run([str(run)]) == 0


@pytest.mark.parametrize(
    "name, size", [("test_convnext", 32), ("test_efficientnet", 32), ("test_resnet", 16), ("test_vit3", 48)]
)
def test_other_models_train_a_step(name, size, capsys):
    argv = ["--backbone", f"timm:{name}", *OPTIONS, *QUICK, "--image-size", str(size), "--dry-run"]
    assert pretrain.run(argv) == 0
    assert "dry run: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--backbone", "timm:test_vitt"],
            r"--backbone timm:test_vitt: timm \S+ has no model 'test_vitt'; near it: test_",
        ),
        (["--backbone", "timm:hf-hub:me/mine"], "has no model 'hf-hub:me/mine'"),
        (["--image-size", "40"], r"takes no images of 40 pixels: its patches of 16 pixels fill images of 16, 32, 48, "),
        (["--backbone", "timm:test_convnext", "--image-size", "8"], "test_convnext takes no images of 8 pixels: "),
        (["--stem", "3x3"], "--stem, --no-stem-padding and --width belong to ResNets: timm:test_vit has its own"),
    ],
)
def test_what_cannot_be_is_one_sentence(options, message, capsys):
    assert pretrain.run([*VIT, *options, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error


def test_without_timm(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert pretrain.run([*VIT, "--dry-run"]) == 2
    assert "--backbone timm:test_vit: timm:test_vit needs timm: pip install timm" in capsys.readouterr().err
    assert export.run([str(run)]) == 2
    with pytest.raises(ValueError, match="timm:test_vit needs timm: pip install timm"):
        load_encoder(run)


def test_processes_refuse_a_batch_norm_that_does_more():
    """Its activation would be lost where batch norm is made one over all processes."""
    model, _ = build_backbone("timm:test_efficientnet", 1, "own", image_size=32)
    with pytest.raises(UserError, match="cannot share the batch norm of this backbone, BatchNormAct2d"):
        synchronize_batch_norm(model, torch.device("cpu"))
