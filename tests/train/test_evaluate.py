# SPDX-License-Identifier: Apache-2.0
"""evaluate.py and export.py on a short run."""

import json

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
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
    assert f"{options[1]}: {accuracy:.2f} % of the test images" in capsys.readouterr().out
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
    assert export.main([str(tmp_path)]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_export_writes_what_the_run_wrote(run, tmp_path, capsys):
    output = tmp_path / "encoder.safetensors"
    assert export.main([str(run), "--output", str(output)]) == 0
    assert "encoder of step 2 written" in capsys.readouterr().out
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(export.load_encoder(output).features(images), export.load_encoder(run).features(images))
