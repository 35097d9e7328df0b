# SPDX-License-Identifier: Apache-2.0
"""``python -m mio_ext check`` and what ``auto`` makes of it: children that fail in every way, the record, the table."""

import json
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import run_python

from mio_ext import backends, selfcheck, verified
from mio_ext.backends import Cell
from train.device import verify_loss_backend

CPU = torch.device("cpu")
CELL = Cell(torch.float32, False)
GOOD = {
    "loss_error": 1e-8,
    "gradient_error": 1e-7,
    "plain_loss_error": 1e-8,
    "plain_gradient_error": 1e-7,
    "ms": 2.0,
    "reference_ms": 8.0,
    "same_bits": True,
}


@pytest.fixture(autouse=True)
def no_record(monkeypatch, tmp_path):
    """A cache folder of the test's own, and nothing remembered."""
    monkeypatch.setenv("MIO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "_memory", {})
    backends.forget_choices()
    yield
    backends.forget_choices()


def result(change: dict | None = None, at: int = 0) -> str:
    """What a good child prints, with one row changed, or left out."""
    rows = [p._asdict() | GOOD for p in selfcheck.problems(CELL, CPU)]
    if change is None:
        del rows[at]
    else:
        rows[at] |= change
    return "\n".join(map(json.dumps, rows))


def child_that(monkeypatch, script: str) -> None:
    monkeypatch.setattr(selfcheck, "child_command", lambda *_: [sys.executable, "-c", script])


def verdict(monkeypatch, script: str, limit: float = 30.0) -> selfcheck.Verdict:
    child_that(monkeypatch, script)
    return selfcheck.try_backend("cpu", CELL, CPU, limit)


def test_a_good_child_is_verified(monkeypatch):
    got = verdict(monkeypatch, f"print('''{result({})}''')")
    assert got.reason is None
    assert got.ms == pytest.approx(2) and got.reference_ms == pytest.approx(8)


@pytest.mark.parametrize(
    "output, reason",
    [
        (result(), "no result for mio, 62 x 128"),
        (result({"same_bits": False}, at=3), "two runs differ"),
        (result({"same_bits": "yes"}), "two runs differ"),
        (result({"loss_error": 1e-3}), "loss is off by 1.0e-03"),
        (result({"gradient_error": 3e-5}, at=5), "gradient is off by 3.0e-05"),
        (result({"gradient_error": float("nan")}), "not finite"),
        (result({"loss_error": -1.0}), "not finite"),
        (result({"ms": None}), "no result"),
        ("hello", "printed what is no result: 'hello'"),
        ("[1, 2]", "printed what is no result"),
        ("", "no result for mio"),
    ],
)
def test_a_child_that_lies_or_is_wrong_is_not(monkeypatch, output, reason):
    got = verdict(monkeypatch, f"print('''{output}''')")
    assert got.reason is not None and reason in got.reason


def test_twice_plain_pytorch_is_allowed():
    ok = result({"loss_error": 3e-6, "plain_loss_error": 2e-6})
    assert selfcheck.judge(ok, CELL, selfcheck.problems(CELL, CPU))[1] is None
    bad = result({"loss_error": 5e-6, "plain_loss_error": 2e-6})
    assert "allowed 4.0e-06" in selfcheck.judge(bad, CELL, selfcheck.problems(CELL, CPU))[1]


def test_a_child_that_hangs_is_ended_with_all_it_started(monkeypatch, tmp_path):
    script = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\n"
        f"print('''{result({})}''', flush=True)\n"
        "time.sleep(600)\n"
    )
    got = verdict(monkeypatch, script, limit=5)
    assert got.reason == "took longer than 5 s"
    grandchild = int((tmp_path / "pid").read_text())
    state, deadline = Path(f"/proc/{grandchild}/stat"), time.monotonic() + 20
    while state.exists() and state.read_text().split()[2] not in "ZX":  # a signal takes a moment
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "script, reason",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with signal 11"),
        ("raise RuntimeError('CUDA error: an illegal memory access')", "RuntimeError: CUDA error: an illegal memory"),
        (f"print('''{result({})}'''); raise SystemExit(3)", "exit code 3: no message"),
    ],
)
def test_a_child_that_crashes(monkeypatch, script, reason):
    assert reason in verdict(monkeypatch, script).reason


def test_a_real_child_verifies_the_cpu_backend():
    got = selfcheck.try_backend("cpu", CELL, CPU, 240)
    assert got.reason is None
    assert got.ms > 0 and got.reference_ms > 0


# ---------------------------------------------------------------- the record


def test_one_backend_failing_costs_its_cell_only(monkeypatch):
    other = Cell(torch.float32, True)
    monkeypatch.setattr(selfcheck, "fused_backends", lambda *_: ["cuda", "triton"])
    ways = {
        ("cuda", CELL): "raise SystemExit('no kernel image')",
        ("triton", CELL): f"print('''{result({})}''')",
        ("cuda", other): "print('nonsense')",
        ("triton", other): "import os; os.abort()",
    }
    monkeypatch.setattr(selfcheck, "child_command", lambda b, c, _: [sys.executable, "-c", ways[b, c]])
    said = []
    chosen = selfcheck.check(CPU, [CELL, other], 30, said.append)
    assert chosen == {str(CELL): "triton", str(other): None}
    assert len(said) == 4 and "no kernel image" in said[0] and "verified, 2 ms" in said[1]
    verified._memory.clear()  # as another process would find it
    assert verified.record(CPU) == chosen
    verified.remember(CPU, {str(other): "cpu"})
    assert verified.record(CPU) == {str(CELL): "triton", str(other): "cpu"}
    folder = verified.record_path(CPU).parent
    assert [p.suffix for p in folder.iterdir()] == [".json"]


def test_the_fastest_verified_backend_is_taken(monkeypatch):
    monkeypatch.setattr(selfcheck, "fused_backends", lambda *_: ["cuda", "triton"])
    fast = result({}).replace('"ms": 2.0', '"ms": 1.0')
    outputs = {"cuda": result({}), "triton": fast}
    monkeypatch.setattr(selfcheck, "child_command", lambda b, *_: [sys.executable, "-c", f"print('''{outputs[b]}''')"])
    assert selfcheck.check(CPU, [CELL]) == {str(CELL): "triton"}


def test_where_the_record_is(monkeypatch, tmp_path):
    assert verified.record_path(CPU).parent == tmp_path / "cache"
    monkeypatch.delenv("MIO_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert verified.record_path(CPU).parent == tmp_path / "xdg" / "mio_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert verified.record_path(CPU).parent == tmp_path / "home" / ".cache" / "mio_ext"


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIO_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="kept for this process only"):
        verified.remember(CPU, {str(CELL): "cpu"})
    assert verified.record(CPU) == {str(CELL): "cpu"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": [1]}'])
def test_a_damaged_record_is_said_and_ignored(text):
    path = verified.record_path(CPU)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert verified.record(CPU) == {}


def test_a_record_is_for_what_it_was_made_with(monkeypatch):
    verified.remember(CPU, {str(CELL): "cpu"})
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert verified.record(CPU) == {}


# ---------------------------------------------------------------- what auto takes


@pytest.fixture
def gpu(monkeypatch):
    """As if this machine had a GPU of compute capability 8.6 and all backends."""
    capability = [(8, 6)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "a GPU")
    monkeypatch.setattr(backends, "unavailable_reason", lambda backend: None)
    return capability


def test_auto_on_a_gpu_we_have_measured(gpu):
    gpu[0] = (9, 0)
    for cell in backends.CELLS:
        expected = "reference" if cell.dtype == torch.float64 else "cuda"
        assert backends.auto_on_gpu(0, cell).backend == expected


def test_auto_on_another_gpu_takes_what_was_verified(gpu):
    choice = backends.auto_on_gpu(0, CELL)
    assert choice.backend == "reference" and choice.why.endswith("run: python -m mio_ext check")
    verified.remember(torch.device("cuda", 0), {str(CELL): "triton"})
    assert backends.auto_on_gpu(None, CELL).backend == "triton"
    assert backends.auto_on_gpu(0, Cell(torch.float32, True)).backend == "reference"


def test_auto_says_once_that_it_takes_the_reference(gpu):
    with pytest.warns(UserWarning, match="takes the dense reference for float32 D <= 256: .* python -m mio_ext check"):
        assert backends._auto(torch.device("cuda", 0), torch.float32, False) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends._auto(torch.device("cuda", 0), torch.float32, False) == "reference"


def test_auto_where_the_measured_backend_was_not_built(gpu, monkeypatch):
    gpu[0] = (9, 0)
    monkeypatch.setattr(backends, "unavailable_reason", lambda b: "it was not built" if b == "cuda" else None)
    choice = backends.auto_on_gpu(0, CELL)
    assert choice.backend == "reference" and "'cuda' would be faster, but it was not built" in choice.why
    verified.remember(torch.device("cuda", 0), {str(CELL): "triton"})
    assert backends.auto_on_gpu(0, CELL).backend == "triton"


def test_the_choice_is_a_constant_of_a_compiled_graph(monkeypatch):
    found = {CELL: "triton"}
    monkeypatch.setattr(backends, "auto_on_gpu", lambda _, cell: backends.Choice(found[cell], "verified on this GPU"))

    def chosen(x):
        backend = backends._auto(torch.device("cuda", 0), x.dtype, backends._is_wide(x))
        return x + {"triton": 1, "reference": 2}[backend]

    x = torch.zeros(2, 3)
    for dynamic in (False, True):
        torch.compiler.reset()
        assert torch.equal(torch.compile(chosen, fullgraph=True, backend="eager", dynamic=dynamic)(x), x + 1)


def test_scripts_check_what_they_need_once(gpu, monkeypatch):
    device = torch.device("cuda", 0)
    child_that(monkeypatch, f"print('''{result({})}''')")
    monkeypatch.setattr(selfcheck, "problems", lambda cell, _, of=selfcheck.problems: of(cell, CPU))
    assert selfcheck.ensure(device, torch.float32, 128).startswith("checked the kernels on this GPU for float32 D <=")
    assert selfcheck.ensure(device, torch.float32, 128) is None
    assert backends.auto_on_gpu(0, CELL).backend in ("cuda", "triton")
    child_that(monkeypatch, "print('nonsense')")
    line = selfcheck.ensure(device, torch.float32, 512)
    assert "none is verified, so the loss runs as dense PyTorch" in line and "nonsense" in line
    assert selfcheck.ensure(device, torch.float32, 512) is None  # it was looked for, in vain
    gpu[0] = (9, 0)
    assert selfcheck.ensure(device, torch.bfloat16, 128) is None  # the table knows


# ---------------------------------------------------------------- the command


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "problems", lambda cell, _: [selfcheck.Problem("mio", 62, 128)])
    row = json.dumps({"loss": "mio", "rows": 62, "dim": 128} | GOOD)
    child_that(monkeypatch, f"print('''{row}''')")
    selfcheck.main(["--device", "cpu", "--dtype", "float32"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cpu: cpu"
    assert [line.split("cpu")[0].strip() for line in lines[1:3]] == ["float32 D <= 256", "float32 D > 256"]
    assert all("verified, 2 ms, dense reference 8 ms" in line for line in lines[1:3])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["check", "--device", "tpu"], "--device must be"),
        (["check", "--device", "cuda:77"], "--device must be"),
        (["check", "--limit", "0"], "--limit must be positive"),
        (["check", "--dtype", "int8"], "invalid choice"),
        (["chekc"], "the only command is check"),
    ],
)
def test_bad_commands(arguments, message):
    got = run_python("-m", "mio_ext", *arguments)
    assert got.returncode != 0 and message in got.stderr and "Traceback" not in got.stderr


# ---------------------------------------------------------------- train/pretrain.py


class Others:
    """The processes of a run, as a process that is not the first sees them."""

    def __init__(self, said):
        self.said = said

    def from_first(self, make):
        return self.said


def test_pretraining_checks_an_unknown_gpu_and_says_so_in_a_line(gpu, monkeypatch, capsys):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(selfcheck, "problems", lambda cell, _, of=selfcheck.problems: of(cell, CPU))
    child_that(monkeypatch, f"print('''{result({})}''')")
    verify_loss_backend(device, 128)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("checked the kernels on this GPU for float32 D <= 256")
    verify_loss_backend(device, 128)
    assert capsys.readouterr().out == ""


def test_the_other_processes_take_the_first_ones_word(gpu, monkeypatch, capsys):
    device = torch.device("cuda", 0)
    first = {json.dumps(verified.key(device)): {str(CELL): "triton"}}
    monkeypatch.setattr(selfcheck, "check", lambda *_: pytest.fail("only the first process checks"))
    verify_loss_backend(device, 128, Others((None, first)))
    assert backends.auto_on_gpu(0, CELL).backend == "triton"
