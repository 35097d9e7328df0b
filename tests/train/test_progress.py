# SPDX-License-Identifier: Apache-2.0

"""The count of what takes longer than two seconds."""

import sys

from train import progress


def test_a_short_task_is_silent_and_a_long_one_is_not(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    with progress.counting("k-NN", 300, "images") as advance:
        advance(100)
        now = 1.9
        advance(50)
        assert capsys.readouterr().out == ""
        now = 2.1
        advance(50)
        assert capsys.readouterr().out == "k-NN: 200 of 300 images\n"
        now = 5.0
        advance(50)
        assert capsys.readouterr().out == ""
        now = 12.5
        advance(50)
    assert capsys.readouterr() == ("k-NN: 300 of 300 images\n", "")


def test_of_an_unknown_total_the_count_is_said(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    with progress.counting("fit", None, "evaluations") as advance:
        advance(1)
    assert capsys.readouterr().out == "fit: 1 evaluations\n"


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.counting("k-NN", 300, "images") as advance:
        advance(300)
    captured = capsys.readouterr()
    assert captured.out == "" and "k-NN" in captured.err
