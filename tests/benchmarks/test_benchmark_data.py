# SPDX-License-Identifier: Apache-2.0
"""From a run to a page: where data go, and that README and docs say what they say."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks import accuracy, check_ratios, collect, loss, report
from benchmarks.harness import contenders, machine, plan, report_loss, tables

CASE = plan.Case("mio", 4096, 128)
LIMITS = plan.Limits(seconds=1, step=8, memory=8e9)


# --- report


def row(case, contender, ms, status="ok", **more):
    fields = {"median_ms": ms, "peak_bytes": 2e6, "floor_ms": 0.5, "share": 0.5 / (ms or 1), "floor_by": "matrix"}
    fields |= {"library": 100.0, "multiply_add": 200.0, "special": 5.0, "bandwidth": 20.0}
    return case._asdict() | {"contender": contender, "status": status} | (fields if status == "ok" else {}) | more


def data(*rows):
    head = {"device": "Test CPU", "device_type": "cpu", "threads": 2, "instruction_set": "avx2", "driver": "Linux 6"}
    head |= {"versions": {"torch": "2.10"}, "commit": "abc", "date": "2026-01-01", "command": "python x", "skipped": {}}
    head |= {"limits": LIMITS._asdict(), "budget_seconds": 9, "over_budget": ["mio:4:4:float32:both"]}
    return head | {"results": list(rows)}


EXAMPLE = data(
    row(CASE, "mio_ext cpu", 2.0),
    row(CASE, "eager", 30.0),
    row(CASE, "open_clip", 1.5),
    row(CASE, "paper", None, "out of memory", reason="large"),
    row(CASE._replace(rows=8192), "mio_ext cpu", 2000.0),
    row(CASE._replace(rows=8192), "eager", None, "over budget", reason="slow"),
)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A repository with EXAMPLE as its only data, and a page for it."""
    path = tmp_path / "benchmarks" / "results" / "test-cpu" / "loss.json"
    machine.save(path, {k: v for k, v in EXAMPLE.items() if k != "results"}, EXAMPLE["results"])
    for module in (tables, report):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(report, "PAGES", ("page.md",))
    (tmp_path / "page.md").write_text("a\n<!-- loss-report: benchmarks/report.py -->\nold\n<!-- end -->\nb\n")
    return tmp_path


def test_data_file_comes_back_as_it_was(results):
    path = results / "benchmarks" / "results" / "test-cpu" / "loss.json"
    assert json.loads(path.read_text()) == EXAMPLE
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 1 + len(EXAMPLE["results"])


def test_report_shows_wins_losses_and_gaps(results):
    text = report_loss.performance_loss()
    for line in (
        "| 4,096 | 128 | float32 | 2 ms | 25 % of 0.50 ms | 30 ms (15.0×) | 1.5 ms (**0.75×**) | out of memory |",
        "| 8,192 | 128 | float32 | 2 s | 0.03 % of 0.50 ms | over budget | – | – |",
        "in 1 of the 1 cases where anything else was timed: MIO N = 4,096, D = 128, float32 (open_clip 0.75×).",
        "| MIO | paper | – | – | – | 0 of 0 | 1 out of memory |",
    ):
        assert line in text
    assert "2 of 3 cases found a place" in text


def test_report_of_a_gpu_has_both_backends_and_what_went_wrong(results):
    """GPUs come first; our slower backend is a column with its ratio; of a peer timed twice the faster run counts."""
    small, half = CASE._replace(dtype="bfloat16"), CASE._replace(dtype="float16")
    head = {k: v for k, v in EXAMPLE.items() if k != "results"}
    head |= {"device_type": "cuda", "device": "Test GPU", "host": "8 cores", "notes": ["A note."]}
    head |= {"budget_seconds": None, "limits": LIMITS._asdict() | {"memory": None}, "over_budget": []}
    rows = [row(small, "mio_ext cuda", 1.0), row(small, "mio_ext triton", 3.0)]
    rows += [row(small, "siglip-kernel", ms) for ms in (0.8, 0.5, 0.7)]
    rows += [row(half, name, None, "wrong", reason="unscaled") for name in ("mio_ext cuda", "mio_ext triton")]
    machine.save(results / "benchmarks" / "results" / "test-gpu" / "loss.json", head, rows)
    text = report_loss.performance_loss()
    assert text.index("### Test GPU") < text.index("### Test CPU")
    for line in (
        "| MIO: N | D | type | mio_ext | floor reached | mio_ext triton | siglip-kernel |",
        "| 4,096 | 128 | bf16 | 1 ms | 50 % of 0.50 ms | 3 ms (3.0×) | 0.50 ms (**0.50×**) |",
        "| 4,096 | 128 | fp16 | wrong | – | wrong | – |",
        "in 1 of the 1 cases where anything else was timed: MIO N = 4,096, D = 128, bf16 (siglip-kernel 0.50×).",
        "2 cases.\n\n- A note.",
    ):
        assert line in text, line
    assert "| MIO | N = 4,096, D = 128 | 1 ms, 2 MB | 3 ms (3.0×), 2 MB | 0.50 ms (**0.50×**), 2 MB |" in (
        report_loss.readme_loss()
    )


@pytest.mark.parametrize("path", [p for p in tables.data_files("loss") if "nvidia" in p.parent.name], ids=str)
def test_committed_gpu_figures_are_reported_where_they_are_weak(path):
    """Every peer that is faster, the slower of our backends, all notes, and what the kernels alone take."""
    gpu, short = json.loads(path.read_text()), report_loss.readme_loss()
    full = report_loss.loss_report(path)
    assert gpu["notes"] and all(note in short and note in full for note in gpu["notes"])
    faster = 0
    for case, of_case in tables.by_case(gpu["results"]).items():
        ours = tables.our_best(of_case)
        for name, found in of_case.items():
            if ours and found["status"] == "ok" and found["median_ms"] < ours["median_ms"]:
                faster += 1
                ratio = f"{found['median_ms'] / ours['median_ms']:.2f}×"
                assert f"{tables.case_name(case)} ({name} {ratio})" in short and f"**{ratio}**" in full
    assert faster == full.count("(**")
    for kind, part in (("tests", "| triton | "), ("kernels", "| hopper | "), ("profile", "| registers a thread | ")):
        assert (part in full) == path.with_name(f"{kind}.json").exists()


def test_report_writes_page_and_plots_and_sees_what_went_stale(results, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py"])
    report.main()
    assert report.stale() == []
    page = results / "page.md"
    assert "old" not in page.read_text() and page.read_text().endswith("<!-- end -->\nb\n")
    page.write_text(page.read_text().replace("30 ms", "31 ms"))
    assert report.stale() == ["page.md"]
    path = results / "benchmarks" / "results" / "test-cpu" / "loss.json"
    path.write_text(path.read_text().replace("30.0", "31.0"))
    assert report.stale() == ["page.md", *(f"docs/plots/test-cpu-{plot}.png" for plot in tables.PLOT_NAMES)]


def test_an_empty_place_is_filled_and_its_neighbour_kept(monkeypatch):
    monkeypatch.setattr(report, "SECTIONS", {"one": lambda: "1", "two": lambda: "2"})
    place = "<!-- {}: benchmarks/report.py -->\n{}<!-- end -->\n"
    page = "".join(place.format(name, "{}") for name in ("one", "two"))
    assert report.rendered(page.format("", "")) == page.format("1\n", "2\n")
    assert report.rendered(page.format("a\nb\n", "c\n")) == page.format("1\n", "2\n")


def test_help_and_check_write_nothing(results, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    for argument, status in (("--help", 0), ("--check", "page.md"), ("--chekc", 2)):
        monkeypatch.setattr(sys, "argv", ["report.py", argument])
        with pytest.raises(SystemExit) as stop:
            report.main()
        assert str(stop.value.code).startswith(str(status))
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


def test_unknown_section_is_an_error():
    with pytest.raises(SystemExit, match="no section 'nothing'"):
        report.rendered("<!-- nothing: benchmarks/report.py -->\n\n<!-- end -->")


def test_pages_are_the_data_and_have_every_section():
    assert report.stale() == []
    text = "".join((ROOT / page).read_text() for page in report.PAGES)
    for section in report.SECTIONS:
        assert text.count(f"<!-- {section}: benchmarks/report.py -->") == 1


# --- where the data go


def run_benchmark(module, argv, monkeypatch, tmp_path):
    """The files that are there afterwards."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(machine, "SCRATCH", tmp_path / "build")
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *argv])
    module.main()
    return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}


def test_a_part_of_the_cases_leaves_the_committed_data_alone(monkeypatch, tmp_path, capsys):
    argv = ["--cases", "mio:64:8", "--contenders", "mio_ext", "eager", "--seconds", "0.01"]
    files = run_benchmark(loss, argv, monkeypatch, tmp_path)
    assert {path.split("/")[0] for path in files} == {"build"}
    assert {path.split("/")[-1] for path in files} == {"loss.json", "loss.csv"}  # the lines have become these
    last = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert last[0].split()[:5] == ["MIO:", "N", "D", "type", "mio_ext"] and last[0].split()[-1] == "eager"
    assert re.fullmatch(r"64 +8 +float32 .* % of .* \(\**[\d.]+×\**\)", last[1])  # either may be the faster
    files = run_benchmark(loss, [*argv, "--output", str(tmp_path / "mine" / "x.json")], monkeypatch, tmp_path)
    assert {"mine/x.json", "mine/x.csv"} <= files


SCRIPTS = ["loss", "step", "accuracy", "report", "check_ratios", "gpu_check", "collect"]
SCRIPTS += ["cuda_resources", "triton_resources", "triton_tiles"]


@pytest.mark.parametrize("how, name", [*(("file", name) for name in SCRIPTS), ("module", "loss")])
def test_scripts_run_as_files_and_as_modules_and_help_does_nothing(how, name, tmp_path):
    """From any folder as files: benchmarks/benchmarks.py makes the package and mio_ext importable."""
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks").rglob("*") if path.suffix != ".pyc"}
    command = [str(ROOT / "benchmarks" / f"{name}.py")] if how == "file" else ["-m", f"benchmarks.{name}"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=tmp_path if how == "file" else ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0 and run.stdout.startswith("usage: "), run.stderr
    after = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks").rglob("*") if path.suffix != ".pyc"}
    assert not any(tmp_path.iterdir()) and {p: after.get(p) for p in before} == before


def test_rows_are_on_disk_as_they_come(monkeypatch, tmp_path):
    """Should a kernel hang, what was measured before is there."""
    seen = []

    def hang(case, *_):
        for ms in (1.0, 2.0):
            seen.append((tmp_path / "x.jsonl").read_text().splitlines())
            yield row(case, "mio_ext cpu", ms, p20_ms=ms, p80_ms=ms, steps=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(loss, "measure_case", hang)
    monkeypatch.setattr(sys, "argv", ["loss.py", "--cases", "mio:64:8", "--output", str(tmp_path / "x.json")])
    with pytest.raises(KeyboardInterrupt):
        loss.main()
    assert [len(lines) for lines in seen] == [0, 1]
    assert [json.loads(line)["median_ms"] for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [1.0, 2.0]


def test_accuracy_ends_with_its_table(monkeypatch, tmp_path, capsys):
    functions = {"eager": contenders.mio_eager}
    monkeypatch.setattr(accuracy, "contenders", lambda *_: (functions, {}))
    monkeypatch.setattr(accuracy, "LOSSES", ("mio",))
    files = run_benchmark(accuracy, ["--rows", "32", "--dim", "8"], monkeypatch, tmp_path)
    assert {path.split("/")[0] for path in files} == {"build"}
    assert "MIO, N = 32, D = 8" in capsys.readouterr().out.split("\n\n")[-1]


def test_only_the_whole_benchmark_writes_committed_data():
    parser = loss.argparse.ArgumentParser()
    parser.add_argument("--output")
    parser.add_argument("--budget", type=float, default=660)
    head = {"device": "A CPU", "threads": 2}
    for argv, base in (
        ([], machine.RESULTS),
        (["--budget", "9"], machine.SCRATCH),
        (["--budget", "660"], machine.RESULTS),
    ):
        path = machine.output_path(parser, parser.parse_args(argv), head, "loss")
        assert path == base / "a-cpu-2-threads" / "loss.json"
    assert machine.output_path(parser, parser.parse_args(["--output", "x.json"]), head, "loss").name == "x.json"


CARD = """warning: load average 9
{
 "device": "Test GPU", "device_type": "cuda", "driver": "1", "versions": {"torch": "2"}, "commit": "abc", "date": "1"
}
"""
KERNELS = """Test GPU, N = 65536, D = 128, MIO
bf16        loss and gradient     7.1383 ms (7.0982 to 7.2522)    308.1 TFLOP/s  floor 2.0541 ms, 29 % of it
bf16 hopper loss and gradient     4.5566 ms (4.5326 to 4.6005)    482.6 TFLOP/s
bf16        loss only             5.2212 ms (5.2
"""
NCU = """Test GPU, N = 32768, D = 128, MIO
  void sweep_hopper_kernel<Bf16, 128, 0>(Sweep) (256, 1, 1)x(384, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    SM Frequency                    Ghz         1.45
    Duration                         us         1,440.5
    Registers Per Thread             register/thread             168
    Local Memory Spilling Requests                                0
    INF   Shared is the highest-utilized pipeline (48.5%) based on elapsed cycles in the workload
"""


def test_what_gpu_check_left_becomes_data_and_pages(results, monkeypatch, tmp_path, capsys):
    """Whole parts and cut ones; no path of the machine gets into the data."""
    folder = tmp_path / "gpu-check"
    folder.mkdir()
    case = CASE._replace(dtype="bfloat16")
    ours, peer = row(case, "mio_ext cuda", 1.0), row(case, "siglip-kernel", 0.5)
    whole, cut = json.dumps({"results": [ours]}), json.dumps(peer) + '\n{"loss": "mio", "ro'
    tests = [
        {"test": "tests/a.py::b[cuda]", "outcome": "failed", "seconds": 1.0, "why": "a.py:9: in b\nE   assert 5 <= 4"},
        {
            "test": "tests/a.py::c",
            "outcome": "skipped",
            "seconds": 0.0,
            "why": "('/home/me/a.py', 1, 'Skipped: one GPU')",
        },
    ]
    files = {"card.txt": CARD, "loss-cuda.json": whole, "loss-peers.jsonl": cut, "bench-64k-128.txt": KERNELS}
    files |= {"profile.txt": NCU, "tests-cuda.jsonl": "".join(json.dumps(t) + "\n" for t in tests)}
    files |= {"kernels-tf32.txt": "tf32 nan: is lost FAILED\n1 failures in 40 cases\n", "kernels-build.txt": "x"}
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(sys, "argv", ["collect.py", str(folder)])
    assert collect.main() == 0
    target = tmp_path / "benchmarks" / "results" / "test-gpu"
    found = {path.stem: json.loads(path.read_text()) for path in target.glob("*.json")}
    assert set(found) == {"loss", "kernels", "profile", "tests"}
    assert [r["run"] for r in found["loss"]["results"]] == ["loss-cuda", "loss-peers"]
    assert [(r["kernel"], r["median_ms"], r["floor_ms"]) for r in found["kernels"]["results"]] == [
        ("portable", 7.1383, 2.0541), ("hopper", 4.5566, None)
    ]  # fmt: skip
    (profile,) = found["profile"]["results"]
    assert profile["duration_ms"] == pytest.approx(1.4405) and profile["registers_per_thread"] == 168
    assert profile["local_memory_spilling_requests"] == 0 and profile["busiest_pipe_percent"] == 48.5
    assert [r["why"] for r in found["tests"]["results"]] == ["assert 5 <= 4", "Skipped: one GPU"]
    assert all(data["commit"] == "abc" and data["n"] == 1 for data in found.values())
    text = report_loss.performance_loss()
    for part in (
        "| cuda | 0 | 1 | 1 |",
        "| bf16 | hopper | 4.56 ms | 483 | – |",
        "siglip-kernel 0.50×",
        "tf32: 1 failures in 40 cases; tf32 nan: is lost FAILED",
    ):
        assert part in text
    (folder / "card.txt").unlink()
    assert collect.main() == 2


# --- bench-check


def test_ratios_are_compared_with_a_wide_tolerance():
    assert check_ratios.verdict(10, 7) == "as committed" == check_ratios.verdict(10, 14)
    assert check_ratios.verdict(10, 6.6) == "FELL"
    assert check_ratios.verdict(10, 15.1) == "rose"
    slower = data(row(CASE, "mio_ext cpu", 4.0), row(CASE, "eager", 30.0), row(CASE, "open_clip", 3.0))
    lines = check_ratios.compare(EXAMPLE, slower)
    assert [line.split()[-1] for line in lines[1:3]] == ["FELL", "committed"]
    assert lines[-1].startswith("1 ratios fell by more than 1.5x")
    assert check_ratios.compare(EXAMPLE, EXAMPLE)[-1] == "no ratio fell by more than 1.5x"
