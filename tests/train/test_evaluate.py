# SPDX-License-Identifier: Apache-2.0
"""evaluate.py and export.py on a short run."""

import json
import re

import pytest
import torch
from conftest import run_python

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
from mio_ext.encoder import load_encoder
from train import evaluate, export, pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "digits"
    argv = ["--batch-size", "16", "--device", "cpu", "--limit-steps", "2", "--no-evaluate", "--output", str(folder)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert pretrain.run(argv) == 0
    yield folder
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "options",
    [
        ["--protocol", "knn"],
        ["--protocol", "finetune", "--epochs", "1", "--labels", "0.2"],
        ["--protocol", "v1", "--epochs", "1", "--eval-batch-norm"],
    ],
    ids=lambda o: o[1],
)
def test_a_protocol_prints_and_writes_its_accuracy(options, run, capsys):
    assert evaluate.run([str(run), "--device", "cpu", *options]) == 0, capsys.readouterr().err
    result = json.loads((run / f"evaluation-{options[1]}.json").read_text())
    accuracy = result.get("knn", result.get("accuracy"))
    assert 5 < accuracy <= 100
    assert re.search(rf"^{run} +{accuracy:.1f}$", capsys.readouterr().out, re.M)
    # The encoder barely moved: its k-NN is far above chance, as that of an untrained one on digits.
    if options[1] == "knn":
        assert accuracy > 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "0"], r"--labels must be in (0, 1], got 0.0"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--protocol", "svm"], "invalid choice: 'svm'"),
    ],
)
def test_a_mistake_is_one_line(options, message, run, capsys):
    assert evaluate.run([str(run), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("evaluate.py: ")
    assert error.count("\n") == 1


def test_no_run_is_one_line(tmp_path, capsys):
    assert evaluate.run([str(tmp_path)]) == 2
    assert "is no run folder: it has no config.toml" in capsys.readouterr().err
    assert export.run([str(tmp_path)]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_export_writes_what_the_run_wrote(run, tmp_path, capsys):
    output = tmp_path / "encoder.safetensors"
    assert export.run([str(run), "--output", str(output)]) == 0
    assert "encoder of step 2 written" in capsys.readouterr().out
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(load_encoder(output).features(images), load_encoder(run).features(images))


def test_equal_tensors_give_an_equal_file(run, tmp_path):
    """Another process used to order the metadata in another way."""
    output = tmp_path / "encoder.safetensors"
    done = run_python("train/export.py", str(run), "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == (run / "encoder.safetensors").read_bytes()


def test_images_of_another_kind_are_refused(run):
    with pytest.raises(ValueError, match=r"images must be \[B, 1, H, W\], got \[2, 3, 8, 8\]"):
        load_encoder(run).features(torch.rand(2, 3, 8, 8))


def test_runs_side_by_side_are_one_table(run, capsys):
    assert evaluate.run([str(run), f"{run}/", "--protocol", "knn", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert table.count("20-NN") == 1 and len(re.findall(rf"^{run} +\d\d\.\d$", table, re.M)) == 1


def test_the_protocols_are_explained(capsys):
    with pytest.raises(SystemExit):
        evaluate.run(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {name}  +\w+", text, re.M) for name in ("knn", "linear", "finetune", "v1"))
