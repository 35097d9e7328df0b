# SPDX-License-Identifier: Apache-2.0
"""A run that is interrupted, goes on, and what it must never lose."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytest.importorskip("torchvision")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from train import pretrain
from train.run_folder import RunLog, create_run_folder, save_checkpoint, write_atomically

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = ROOT / "train" / "pretrain.py"
SMALL = ["--batch-size", "16", "--device", "cpu", "--log-every", "2"]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_the_checkpoint_and_ends_the_run(number, code, tmp_path):
    command = [sys.executable, "-u", str(SCRIPT), *SMALL, "--log-every", "1", "--output", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code
    step = int(re.fullmatch(r"pretrain.py: interrupted: checkpoint of step (\d+) saved in .*\n", error)[1])
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == step >= 1


def test_resume_is_bit_exact(tmp_path, fast_probes, capsys):
    """Train 4 steps = train 2, stop, resume for 2; momentum, batch norm, shuffling and views included."""
    common = [*SMALL, "--epochs", "2", "--seed", "1", "--log-every", "1"]
    assert pretrain.run([*common, "--limit-steps", "4", "--output", str(tmp_path / "whole")]) == 0
    assert pretrain.run([*common, "--limit-steps", "2", "--output", str(tmp_path / "parts")]) == 0
    assert pretrain.run(["--resume", str(tmp_path / "parts"), "--limit-steps", "4"]) == 0
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    for part in ("backbone", "projector"):
        assert all(torch.equal(parts[part][key], value) for key, value in whole[part].items()), part
    buffers = [[state["momentum_buffer"] for state in c["optimizer"]["state"].values()] for c in (whole, parts)]
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))
    losses = [[e["loss"] for e in read_log(tmp_path / n) if e["event"] == "train"] for n in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_a_complete_run_is_left_alone(tmp_path, fast_probes, capsys):
    """Resumed, it says so; what its end lacks is made up for, and its time is that of all parts."""
    run = tmp_path / "run"
    common = [*SMALL, "--resume", "auto", "--output", str(run)]
    assert pretrain.run([*common, "--limit-steps", "2"]) == 0
    first = json.loads((run / "results.json").read_text())
    assert pretrain.run([*common, "--limit-steps", "3"]) == 0
    second = json.loads((run / "results.json").read_text())
    for time in ("seconds", "cpu_seconds"):
        assert second[time] > first[time] > 0

    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()}
    for arguments in ([*common, "--limit-steps", "3"], ["--resume", str(run), "--limit-steps", "1"]):
        capsys.readouterr()
        assert pretrain.run(arguments) == 0
        said = capsys.readouterr()
        assert said.out + said.err == f"the run in {run} is complete after step 3: nothing is left to do\n"
        assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()} == files

    (run / "README.md").unlink()  # as if killed after the last checkpoint
    assert pretrain.run(["--resume", str(run), "--limit-steps", "3"]) == 0
    assert (run / "README.md").exists()
    again = json.loads((run / "results.json").read_text())
    assert again["seconds"] == second["seconds"]


def test_resume_auto_starts_goes_on_and_refuses_other_options(tmp_path, fast_probes, capsys):
    output = tmp_path / "run"
    common = [*SMALL, "--resume", "auto", "--output", str(output)]
    assert pretrain.run([*common, "--limit-steps", "1"]) == 0
    assert pretrain.run([*common, "--limit-steps", "2"]) == 0
    assert "going on after step 1" in capsys.readouterr().out
    before = (output / "checkpoint.pt").read_bytes()
    assert pretrain.run([*common, "--temperature", "0.3", "--epochs", "40"]) == 2
    error = capsys.readouterr().err
    assert "was started with other options" in error
    assert "  --temperature: 0.5 in the run, 0.3 now" in error
    assert "  --epochs: 30 in the run, 40 now" in error
    assert pretrain.run(["--resume", str(output), "--batch-size", "32"]) == 2
    assert "  --batch-size: 16 in the run, 32 now" in capsys.readouterr().err
    assert pretrain.run(["--resume", str(tmp_path)]) == 2
    assert "is no run folder: it has no config.toml" in capsys.readouterr().err
    assert (output / "checkpoint.pt").read_bytes() == before


def test_a_log_forgets_what_came_after_the_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step=step, loss=float(step))
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "train", "st')  # what a kill leaves
    log = RunLog(tmp_path, resumed_step=2)
    log.write("train", step=3, loss=9.0)
    log.close()
    assert [(e["step"], e["loss"]) for e in read_log(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,loss", "1,1.0", "2,2.0", "3,9.0"]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """A file size limit stands in for the full disk: the write fails half way in the same manner."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1, "weights": torch.zeros(10)})
    code = (
        "import resource, sys, torch; from pathlib import Path; from train.run_folder import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: save_checkpoint(Path(sys.argv[1]), {'step': 2, 'weights': torch.zeros(1_000_000)})\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert re.match(r"cannot save the checkpoint of step 2 \(.*\); the previous one is intact in ", done.stdout), done
    assert torch.load(path, weights_only=True)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_elsewhere_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*arguments, **fields):
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in ((Path, "write_bytes"), (RunLog, "write")):  # the encoder at the end; the log at any time
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            arguments = [*SMALL, "--limit-steps", "1", "--no-evaluate", "--output", str(tmp_path / name)]
            assert pretrain.run(arguments) == 2
        error = capsys.readouterr().err
        assert re.match(r"pretrain.py: (cannot write .*encoder.safetensors: No space|the disk is full; )", error)
        assert error.count("\n") == 1


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"


HOLD = """
import sys, time
from pathlib import Path
from train.run_folder import RunLock
lock = RunLock()
lock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_run_folder_has_one_owner(tmp_path, fast_probes, capsys):
    """A second process is told who has it; a killed owner leaves nothing to clear away."""
    run = tmp_path / "run"
    assert pretrain.run([*SMALL, "--limit-steps", "1", "--output", str(run)]) == 0
    log = (run / "log.jsonl").read_bytes()
    owner = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert owner.stdout.readline() == "held\n"
        capsys.readouterr()
        for arguments in (["--resume", str(run)], [*SMALL, "--overwrite", "--output", str(run)]):
            assert pretrain.run([*arguments, "--limit-steps", "2"]) == 2
            assert f"{run} is in use by process {owner.pid} on " in capsys.readouterr().err
        assert (run / "log.jsonl").read_bytes() == log
    finally:
        owner.kill()
        owner.wait()
    (run / "checkpoint.pt.1.tmp").touch()  # a kill while it was written
    assert pretrain.run(["--resume", str(run), "--limit-steps", "2"]) == 0
    assert not list(run.glob("*.tmp"))


def test_runs_that_start_in_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.run_folder.time.strftime", lambda form: "now")
    folders = {create_run_folder(None, "digits", False) for _ in range(3)}
    assert {folder.name for folder in folders} == {"digits-now", "digits-now-2", "digits-now-3"}


def test_two_processes_may_write_one_file(tmp_path, monkeypatch):
    """The other one's temporary file is not ours: evaluations at once used to end in FileNotFoundError."""
    path = tmp_path / "evaluation-knn.json"

    def meanwhile(temporary: Path) -> None:
        temporary.write_text("ours")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            write_atomically(path, lambda other: other.write_text("theirs"))

    write_atomically(path, meanwhile)
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_goes_on_without_its_log(tmp_path, fast_probes, capsys):
    run = tmp_path / "run"
    assert pretrain.run([*SMALL, "--limit-steps", "2", "--output", str(run)]) == 0
    for name in ("log.jsonl", "README.md", "encoder.safetensors"):
        (run / name).unlink()
    assert pretrain.run(["--resume", str(run), "--limit-steps", "2"]) == 0, capsys.readouterr().err
    assert "pre-trained on digits with MIO" in (run / "README.md").read_text()
    assert (run / "encoder.safetensors").exists()


def test_a_run_may_become_longer_where_its_schedule_says_when_it_ends(tmp_path, capsys):
    run, common = tmp_path / "run", [*SMALL, "--no-evaluate", "--knn-every", "0"]
    big = ["--batch-size", "512", "--device", "cpu", "--no-evaluate", "--knn-every", "0", "--warmup-epochs", "0"]
    assert pretrain.run([*big, "--epochs", "1", "--schedule-epochs", "3", "--output", str(run)]) == 0
    assert pretrain.run(["--resume", str(run), "--epochs", "2"]) == 0, capsys.readouterr().err
    assert pretrain.run(["--resume", str(run)]) == 0
    assert "complete after step 4" in capsys.readouterr().out
    assert pretrain.run(["--resume", str(run), "--epochs", "4"]) == 2  # beyond the schedule
    fixed = tmp_path / "fixed"
    assert pretrain.run([*common, "--limit-steps", "1", "--output", str(fixed)]) == 0
    capsys.readouterr()
    assert pretrain.run(["--resume", str(fixed), "--epochs", "40"]) == 2
    error = capsys.readouterr().err
    assert "--epochs: 30 in the run, 40 now" in error and "free to change: --compile, --data-root, --device" in error
