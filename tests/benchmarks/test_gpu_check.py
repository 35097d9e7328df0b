# SPDX-License-Identifier: Apache-2.0
"""gpu-check's own logic, with parts that hang, die and babble; no GPU is needed."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_python

from benchmarks import cuda_variants, gpu_check
from benchmarks.gpu_check import Part, run_parts

FINE = "print('all is well')"
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
BABBLES = r"import sys; sys.stdout.buffer.write(bytes(range(256)) * 40 + b'\n\x1b[2J end of it')"
# A child that ignores SIGTERM and outlives its parent, unless the whole group is killed; its id is left in a file.
HANGS = """
import pathlib, subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
child.stdout.readline()
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("now it hangs", flush=True)
time.sleep(600)
"""


def python(name, code, *arguments, limit=60.0, **more):
    return Part(name, f"what {name} does", limit, (sys.executable, "-c", code, *map(str, arguments)), **more)


def alive(pid):
    """Whether the process runs: one that is dead, but not yet reaped by its new parent, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_gone(pid):
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_what_happens_to_one_part_costs_the_others_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.3)
    pid = tmp_path / "pid"
    done = run_parts(
        [
            python("dies", DIES),
            python("hangs", HANGS, pid, limit=4),
            python("babbles", BABBLES),
            python("fails", "print('no'); raise SystemExit(3)"),
            Part("absent", "is not there", 60, ("no-such-program",)),
            python("fine", FINE),
        ],
        tmp_path / "out",
        limit=300,
    )
    assert [(line["part"], line["rc"]) for line in done] == [
        ("dies", -signal.SIGSEGV), ("hangs", None), ("babbles", 0), ("fails", 3), ("absent", 127), ("fine", 0),
    ]  # fmt: skip
    what = {line["part"]: line["what"] for line in done}
    assert what["dies"] == "died of SIGSEGV"
    assert what["hangs"] == "killed at its limit: now it hangs"
    assert what["fails"] == "exit status 3: no" and what["fine"] == "ok: all is well"
    assert what["absent"].startswith("did not start") and what["babbles"].endswith(" end of it")
    seconds = {line["part"]: line["seconds"] for line in done}
    assert 4 <= seconds["hangs"] < 8
    assert wait_until_gone(int(pid.read_text()))  # the child of the part that hung
    # The same lines are on disk and on the terminal, which no control character of a part reaches.
    assert [json.loads(line) for line in (tmp_path / "out" / "parts.jsonl").read_text().splitlines()] == done
    out = capsys.readouterr().out
    assert [json.loads(line) for line in out.splitlines() if line.startswith("{")] == done
    assert out.replace("\n", "").isprintable()
    assert (tmp_path / "out" / "babbles.txt").read_bytes().startswith(bytes(range(256)))


def test_a_line_is_there_when_its_part_ends(tmp_path):
    """Should the machine be taken away, what has ended is known."""
    lines = tmp_path / "parts.jsonl"
    done = run_parts([python("one", FINE), python("two", f"print(open({str(lines)!r}).read())")], tmp_path, limit=300)
    assert json.loads((tmp_path / "two.txt").read_text())["part"] == "one"
    assert [set(line) for line in done] == [{"part", "rc", "seconds", "limit", "what"}] * 2


def test_children_of_a_part_that_ended_well_are_gone_too(tmp_path):
    pid = tmp_path / "pid"
    code = HANGS.replace("time.sleep(600)\n", "raise SystemExit(0)\n")
    (line,) = run_parts([python("leaves", code, pid)], tmp_path, limit=300)
    assert line["rc"] == 0
    assert wait_until_gone(int(pid.read_text()))


def test_total_limit_shortens_a_part_and_leaves_out_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.1)
    sleeper = python("sleeps", "import time; time.sleep(600)", limit=100)
    done = run_parts([python("fine", FINE), sleeper, python("late", FINE)], tmp_path, limit=4)
    fine, sleeps, late = done
    assert fine["rc"] == 0
    assert sleeps["what"] == "killed at its limit" and sleeps["limit"] <= 4
    assert late == {"part": "late", "rc": None, "seconds": 0.0, "limit": 0, "what": "no time is left"}


def test_a_part_may_stand_in_for_a_failed_one_or_be_left_out(tmp_path):
    fallback = python("fallback", FINE, instead_of="build")
    names = [line["part"] for line in run_parts([python("build", FINE), fallback], tmp_path, limit=300)]
    assert names == ["build"]
    done = run_parts([python("build", "raise SystemExit(1)"), fallback], tmp_path, limit=300)
    assert [(line["part"], line["rc"]) for line in done] == [("build", 1), ("fallback", 0)]
    tools = gpu_check.without("no-such-program", "module:no_such_module", "build/no/such/file", "sh")
    (line,) = run_parts([python("profile", FINE, missing=tools)], tmp_path, limit=300)
    assert line["what"] == "left out: no no-such-program, no no_such_module, no build/no/such/file"
    assert line["rc"] is None and not (tmp_path / "profile.txt").exists()


def test_what_an_earlier_run_left_is_not_taken_for_this_ones(tmp_path):
    for name in ("tests.jsonl", "tests.txt", "tests.json"):
        (tmp_path / name).write_text("old")
    run_parts([python("tests", FINE)], tmp_path, limit=300)
    assert {path.name for path in tmp_path.iterdir()} == {"parts.jsonl", "tests.txt"}


def with_fake_parts(monkeypatch, tmp_path, *argv):
    """main() on a machine with a GPU and the parts fine, fails and absent."""
    fakes = [python("fine", FINE), python("fails", "raise SystemExit(1)"), python("left", FINE, missing=lambda: "no x")]
    monkeypatch.setattr(gpu_check, "parts", lambda *_: fakes)
    monkeypatch.setattr(gpu_check, "visible_gpu", lambda: {"device": "Test GPU", "capability": "9.0"})
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # put back afterwards
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(tmp_path / "out"), *argv])
    return gpu_check.main()


def test_exit_status_says_whether_all_that_ran_is_well(monkeypatch, tmp_path, capsys):
    assert with_fake_parts(monkeypatch, tmp_path) == 1
    assert "3 parts, not well: fails" in capsys.readouterr().out
    assert with_fake_parts(monkeypatch, tmp_path, "--part", "left", "fine") == 0
    assert [json.loads(line)["part"] for line in (tmp_path / "out" / "parts.jsonl").open()] == ["fine", "left"]
    assert with_fake_parts(monkeypatch, tmp_path, "--part", "fine", "--limit", "0") == 1  # nobody knows


def test_unknown_part_and_list(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        with_fake_parts(monkeypatch, tmp_path, "--part", "tests")
    assert stop.value.code == 2 and "no part tests; there are fine, fails, left" in capsys.readouterr().err
    assert with_fake_parts(monkeypatch, tmp_path, "--list") == 0
    assert "what fine does" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path):
    found = run_python("benchmarks/gpu_check.py", "--output", str(tmp_path / "x"), env={"CUDA_VISIBLE_DEVICES": ""})
    assert found.returncode == 2 and found.stdout == "" and not (tmp_path / "x").exists()
    assert found.stderr == "gpu-check: PyTorch sees no CUDA GPU here, so there is nothing to check\n"


def test_killed_from_outside_it_takes_its_part_along(tmp_path, monkeypatch):
    """As `timeout` does it: SIGTERM to gpu-check alone."""
    pid = tmp_path / "pid"
    script = tmp_path / "outside.py"
    script.write_text(
        f"""
import sys, pathlib
sys.path.insert(0, {str(ROOT)!r})
from benchmarks import cuda_variants, gpu_check
from benchmarks.gpu_check import Part
hangs = Part("hangs", "", 600, (sys.executable, "-c", {HANGS!r}, {str(pid)!r}))
gpu_check.GRACE = 0.2
gpu_check.parts = lambda *_: [hangs]
gpu_check.visible_gpu = lambda: {{"device": "Test GPU", "capability": "9.0"}}
sys.argv = ["gpu_check.py", "--output", {str(tmp_path / "out")!r}]
sys.exit(gpu_check.main())
"""
    )
    check = gpu_check.subprocess.Popen([sys.executable, str(script)], stdout=gpu_check.subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    check.send_signal(signal.SIGTERM)
    assert check.wait(30) == 128 + signal.SIGTERM
    assert wait_until_gone(int(pid.read_text()))


def test_parts_of_a_gpu_are_whole_and_the_second_half_short(tmp_path):
    for capability, architecture in (("9.0", "9.0a"), ("8.6", "8.6")):
        found = gpu_check.parts(capability, tmp_path)
        names = [part.name for part in found]
        assert len(names) == len(set(names))
        assert names[0] == "card" and names[-1] == "racecheck"
        assert found[1].environment["TORCH_CUDA_ARCH_LIST"] == architecture
        assert ("profile" in names) == (capability == "9.0")
        assert sum(part.limit for part in gpu_check.speed(capability, tmp_path)) <= 300
    for part in found:
        for argument in part.command:  # no file has moved away
            if argument.endswith(".py") and argument != "-c":
                assert (ROOT / argument).is_file(), argument


def test_every_test_leaves_a_line(tmp_path):
    """conftest.py's part of it: an outcome a line, with the reason of what did not pass."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_lines.py").write_text(
        "import os, pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2, 'not equal'\n"
        "@pytest.mark.skip(reason='no wish')\ndef test_is_skipped(): pass\n"
        "def test_kills_all(): os._exit(9)\n"
    )
    lines = tmp_path / "lines.jsonl"
    argv = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    assert run_python(*argv, env={"MIO_TEST_LINES": str(lines)}).returncode == 9
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["outcome"] for line in found] == ["passed", "failed", "skipped"]
    assert found[0]["test"].endswith("::test_passes") and "why" not in found[0]
    assert "not equal" in found[1]["why"] and "no wish" in found[2]["why"]


def test_variants_are_of_the_kernel_as_it_is():
    """What they change is there, once."""
    sources = {cuda_variants.source(variant) for variant in cuda_variants.VARIANTS}
    assert len(sources) == len(cuda_variants.VARIANTS)
