# SPDX-License-Identifier: Apache-2.0
"""What a finished run tells others: its model card and its events for TensorBoard."""

import json
import re
import sys

import pytest
import torch

pytest.importorskip("torchvision")
import torchvision

pytest.importorskip("safetensors.torch")
pytest.importorskip("sklearn")
from train import card, evaluate, pretrain

OPTIONS = ["--batch-size", "16", "--device", "cpu", "--log-every", "1", "--knn-every", "0", "--no-evaluate"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps, and one more after a resumption."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert pretrain.run([*OPTIONS, "--limit-steps", "2", "--output", str(folder)]) == 0
    assert pretrain.run(["--resume", str(folder), "--limit-steps", "3"]) == 0
    yield folder
    torch.set_num_threads(threads)


def test_the_code_in_the_card_runs_and_gives_the_same_features(run, monkeypatch):
    monkeypatch.chdir(run)
    with_us, plain = re.findall(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    images = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    names = {"images": images, "torch": torch, "torchvision": torchvision, "safetensors": sys.modules["safetensors"]}
    exec(with_us + plain, names)
    encoder = names["encoder"]
    with torch.inference_mode():
        features = names["network"]((images.float() / 255 - encoder.mean) / encoder.std)
    assert features.shape == (5, 512)
    assert torch.equal(features, names["features"])
    mean, std = re.search(r"Mean ([\d.]+) and standard deviation ([\d.]+)", (run / "README.md").read_text()).groups()
    assert float(mean) == pytest.approx(float(encoder.mean), abs=5e-5)
    assert float(std) == pytest.approx(float(encoder.std), abs=5e-5)


def test_the_card_shows_the_scores_that_are_there(run, tmp_path):
    for name in ("log.jsonl", "encoder.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert "## Results" not in card.model_card(tmp_path)
    rows = {"raw pixels": {"linear_all": 96.04, "knn": 97.5}, "mine": {"linear_2": 95.25, "linear_2_std": 1.68}}
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "evaluation-finetune.json").write_text('{"protocol": "finetune", "labels": 0.1, "accuracy": 91.234}')
    (tmp_path / "loss.png").touch()
    card.write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| encoder | linear, all labels | 20-NN | linear, 2/class |" in text
    assert "| raw pixels | 96.0 | 97.5 | – |" in text
    assert "| mine | – | – | 95.2 ± 1.7 |" in text
    assert "| finetune, 10 % of the labels | 91.23 |" in text
    assert "](loss.png)" in text
    assert "](embedding.png)" not in text


def test_evaluate_writes_its_score_into_the_card(run):
    assert evaluate.run([str(run), "--protocol", "knn", "--device", "cpu"]) == 0
    score = json.loads((run / "evaluation-knn.json").read_text())["knn"]
    assert f"| knn | {score:.2f} |" in (run / "README.md").read_text()


def test_tensorboard_reads_the_log(run):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(run)).Reload()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    entries = [entry for entry in log if entry["event"] == "train"]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for key in set(entries[0]) - {"event", "epoch", "step"}:
        scalars = events.Scalars(f"train/{key}")
        assert [(s.step, s.value) for s in scalars] == [(e["step"], pytest.approx(e[key], rel=1e-6)) for e in entries]


def test_a_new_run_in_the_folder_drops_the_old_events_and_evaluations(tmp_path):
    folder = tmp_path / "run"
    arguments = [*OPTIONS, "--limit-steps", "1", "--output", str(folder)]
    assert pretrain.run(arguments) == 0
    (folder / "evaluation-knn.json").write_text('{"protocol": "knn", "labels": 1.0, "knn": 50.0}')
    old = set(folder.glob("events.out.tfevents.*"))
    assert old
    assert pretrain.run([*arguments, "--overwrite"]) == 0
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert not (folder / "evaluation-knn.json").exists()


def test_without_tensorboard_the_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert pretrain.run([*OPTIONS, "--limit-steps", "1", "--output", str(tmp_path / "run")]) == 0
    assert "pip install tensorboard" in capsys.readouterr().err
