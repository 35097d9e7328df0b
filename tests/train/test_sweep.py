# SPDX-License-Identifier: Apache-2.0
"""Sweeps: the table, a tiny one from start to ranking in two calls, what is refused."""

import json

import pytest
from conftest import ROOT

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors.torch")

from train import sweep

TINY = """
[hold-out]
images = 100
bank = 100

[common]
batch_size = 64
width = 8
epochs = 1
warmup_epochs = 0.0
evaluate = false

[[runs]]
objective = "mio"
negative_weight = 126.0
projector = [[32, 16]]

[[runs]]
objective = "simclr"
"""


def write(folder, text):
    path = folder / "table.toml"
    path.write_text(text)
    return path


def test_lists_are_tried_in_every_combination(tmp_path):
    table = '[common]\nepochs = 3\n[[runs]]\npreset = "simclr"\ntemperature = [0.1, 0.5]\nseed = [1, 2]\n'
    runs, hold_out = sweep.read_table(write(tmp_path, table + "projector = [64, 32]\n"))
    assert hold_out == {}
    assert [(r.options["temperature"], r.options["seed"]) for r in runs] == [(0.1, 1), (0.5, 1), (0.1, 2), (0.5, 2)]
    assert len({r.name for r in runs}) == 4 and len({r.setting for r in runs}) == 2  # seeds are one setting
    assert all(r.options["projector"] == [64, 32] and r.options["epochs"] == 3 for r in runs)
    config = sweep.write_config(runs[0], tmp_path).read_text()
    assert 'objective = "simclr"' in config and "temperature = 0.1" in config and "warmup_epochs = 2" in config


@pytest.mark.parametrize("table", sorted((ROOT / "train" / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_the_tables_that_come_with_it(table, tmp_path):
    runs, _ = sweep.read_table(table)
    for run in runs:
        sweep.write_config(run, tmp_path)
    tries = [run.options["objective"] for run in runs]
    assert table.stem != "cpu-grid" or tries.count("mio") == tries.count("simclr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[common]\nseed = 1\n", "has no [[runs]]"),
        ("[commun]\n[[runs]]\n", "unknown table commun"),
        ("[[runs]]\ntemperatur = 1.0\n", "unknown option temperatur"),
        ("[[runs]]\ntemperature = [0.1, 'x']\n", "temperature must be float, got 'x'"),
        ("[[runs]]\nseed = 1\n[[runs]]\nseed = 1\n", "these runs twice"),
        ("[hold-out]\nimage = 1\n[[runs]]\n", "unknown key image in [hold-out]"),
    ],
)
def test_a_wrong_table_is_one_line(text, message, tmp_path, capsys):
    assert sweep.run([str(write(tmp_path, text)), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_ranking_is_by_k_nn_with_standard_errors():
    lines = [
        {"setting": name, "knn": knn, "linear": 50.0}
        for name, values in (("low", (10.0, 12.0, 14.0)), ("high", (20.0,)))
        for knn in values
    ]
    _, first, second = sweep.ranking(lines).splitlines()
    assert first.split() == ["high", "1", "20.0", "50.0"]
    assert second.split() == ["low", "3", "12.0", "±", "1.2", "50.0", "±", "0.0"]


def test_a_sweep_stops_goes_on_and_ranks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)  # pytest keeps its own
    table, out = write(tmp_path, TINY), tmp_path / "out"
    command = [str(table), "--output", str(out), "--jobs", "2", "--minutes"]

    assert sweep.run([*command, "0", "--", "--device", "cpu"]) == 0
    stopped = capsys.readouterr().out
    assert "0 of 2 runs" in stopped and "goes on" in stopped
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert sweep.run([*command, "5", "--", "--device", "cpu"]) == 0
    done = capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(10 < line["knn"] <= 100 and line["seconds"] > 0 for line in lines)
    best = max(lines, key=lambda line: line["knn"])["setting"]
    assert done.splitlines()[3].startswith(best)
    before = (out / "sweep.jsonl").read_text()
    assert sweep.run([*command, "5"]) == 0
    assert "2 of 2 runs" in capsys.readouterr().out
    assert sorted((out / "sweep.jsonl").read_text()) == sorted(before)
