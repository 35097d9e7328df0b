# SPDX-License-Identifier: Apache-2.0
"""Is this right and fast on the GPU that is here? Build, tests, benchmarks, a profile and a short training.

    python benchmarks/gpu_check.py                         # or make gpu-check PYTHON=python3; about ten minutes
    python benchmarks/gpu_check.py --part card tests-cuda  # some of it
    python benchmarks/gpu_check.py --list                  # what there is, and how long each may take

Every part is a process group of its own, killed whole at its limit, so that a kernel that hangs or a process that dies
costs nothing but itself; the cheapest and most telling come first. Nothing is installed, and a part whose tools are
not here is left out. As a part ends, a JSON line (part, rc, seconds, limit, what) is printed and added to parts.jsonl
in the output folder, which has the part's whole output beside it, and its figures: a line a test, a row a case.

benchmarks/collect.py makes the committed data of that folder.

Exit status: 0 if every part that ran succeeded, 1 if one did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.harness.paths import ROOT

NEEDED = ("torch", "setuptools", "pytest")
LEFT_OUT = "left out"
GRACE = 3.0  #: seconds between SIGTERM and SIGKILL
SHOWN = 8  #: last lines of a part's output that are repeated on the terminal
#: Of SigLIP, where rows are too wide for one kernel; the telling ones first.
WIDE_ROWS, WIDE_DIMS = (65_536, 16_384, 4096, 1024, 131_072), (768, 512, 1152)
TOOLKIT = "/usr/local/cuda/bin"  #: where nvcc, ncu and compute-sanitizer are, if not on PATH

#: Prints a JSON object about the GPU, or nothing. In a process of its own: a broken driver may hang.
PROBE = """
import json, torch
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(json.dumps({"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}))
"""
CARD = """
import json
from benchmarks.harness.machine import facts
print(json.dumps(facts("cuda"), indent=1))
"""


def nothing_missing() -> str | None:
    return None


class Part(NamedTuple):
    name: str
    what: str  #: for --list
    limit: float  #: seconds
    command: tuple[str, ...]
    environment: Mapping[str, str] = MappingProxyType({})
    missing: Callable[[], str | None] = nothing_missing  #: asked before it runs: why it has to be left out
    instead_of: str | None = None  #: runs only if the part of this name failed


def without(*programs: str) -> Callable[[], str | None]:
    """What of ``programs`` (a name, a path in the repository, or module:NAME) is not here."""

    def find(program: str) -> bool:
        if program.startswith("module:"):
            return importlib.util.find_spec(program.removeprefix("module:")) is not None
        return (ROOT / program).exists() if "/" in program else shutil.which(program) is not None

    def reason() -> str | None:
        gone = [program.removeprefix("module:") for program in programs if not find(program)]
        return f"no {', no '.join(gone)}" if gone else None

    return reason


def parts(capability: str, output: Path) -> list[Part]:
    """All of them, in order, for a GPU of this compute capability."""
    return [*correctness(capability, output), *speed(capability, output), *variants(capability), *sanitizers(output)]


def correctness(capability: str, output: Path) -> list[Part]:
    python = sys.executable
    architecture = "9.0a" if capability == "9.0" else capability
    cmake_architecture = architecture.replace(".", "") + "-real"
    build = (python, "setup.py", "--quiet", "build_ext")
    test, bench = "build/cmake/pairwise_bce_cuda_test", "build/cmake/pairwise_bce_cuda_bench"
    configure = f"cmake -S . -B build/cmake -DCMAKE_CUDA_ARCHITECTURES={cmake_architecture} -DMIO_CUDA=ON"
    compile_both = f"cmake --build build/cmake -j --target {Path(test).name} {Path(bench).name}"
    found = [
        Part("card", "the GPU, its driver, the versions", 60, (python, "-c", CARD)),
        Part("build", "the extension, for this GPU alone", 240, build,
             {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}),
        Part("build-without-cuda", "the extension, where the CUDA kernels cannot be built", 120, build,
             {"FORCE_CUDA": "0"}, instead_of="build"),
        Part("extension", "what is built and can run", 60, (python, "-m", "mio_ext")),
        Part("check", "every backend against float64; which one auto takes", 90, (python, "-m", "mio_ext", "check")),
        Part("kernels-build", "the C++ test and microbenchmark", 180, ("sh", "-c", f"{configure} && {compile_both}"),
             missing=without("cmake", "nvcc")),
    ]  # fmt: skip
    families = {"hopper": ["--hopper", "1"]} if capability == "9.0" else {}
    families |= {kind: ["--hopper", "0", "--kind", kind] for kind in ("bf16", "fp16", "tf32", "fp16x3")}
    for family, options in families.items():  # one that traps costs its own cases only
        what = f"the C++ test of the kernels, {family}"
        found.append(Part(f"kernels-{family}", what, 30, (test, *options), missing=without(test)))
    for d, n in ((128, 65_536), (64, 65_536), (256, 65_536), (128, 8192)):
        command = (bench, "--n", str(n), "--d", str(d))
        name = f"bench-{n // 1024}k-{d}"
        found.append(Part(name, f"microbenchmark at N = {n:,}, D = {d}", 20, command, missing=without(bench)))
    for backend in ("cuda", "triton"):
        files = ("tests/package/test_backends_gpu.py", f"tests/package/test_{backend}_gpu.py")
        select = "triton" if backend == "triton" else "not triton and not sanitizer"
        found.append(pytest_part(f"tests-{backend}", f"GPU tests of the {backend} backend", 120, files, select, output))
    return found


def pytest_part(name: str, what: str, limit: float, files: tuple[str, ...], select: str, output: Path) -> Part:
    """A JSON line a test in NAME.jsonl; where the plugins are here, one hanging test is not the end of the others."""
    options = ["-p", "no:cacheprovider", "-m", "gpu", "-q", "--tb=short", "-k", select]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "60", "--timeout-method", "thread"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", "3", "--max-worker-restart", "6"]
    lines = {"MIO_TEST_LINES": str(output / f"{name}.jsonl")}
    return Part(name, what, limit, (sys.executable, "-m", "pytest", *options, *files), lines)


def speed(capability: str, output: Path) -> list[Part]:
    """Five minutes at most."""
    found = []
    losses = {  # one backend's hanging kernel must not cost the other's figures; peers run in turns with ours
        "loss-cuda": ("our CUDA backend", 35, ["mio_ext cuda"]),
        "loss-triton": ("our Triton backend", 35, ["mio_ext triton"]),
        "loss-peers": ("ours, in turns with siglip-kernel and eager", 45, ["mio_ext cuda", "siglip-kernel", "eager"]),
        "loss-wide": ("wide rows, in turns with siglip-kernel", 40, ["mio_ext cuda", "siglip-kernel"]),
        "loss-compile": ("ours, in turns with torch.compile", 40, ["mio_ext cuda", "torch.compile"]),
    }
    for name, (who, limit, contenders) in losses.items():
        command = [sys.executable, "benchmarks/loss.py", "--contenders", *contenders, "--budget", str(limit - 8)]
        command += ["--output", str(output / f"{name}.json")]
        if name == "loss-wide":
            command += ["--cases", *(f"siglip:{b}:{d}:bfloat16" for b in WIDE_ROWS for d in WIDE_DIMS)]
        found.append(Part(name, f"benchmarks/loss.py: {who}", limit, tuple(command)))
    bench = "build/cmake/pairwise_bce_cuda_bench"
    for name, kernel in (("profile", "sweep_hopper"), ("profile-portable", "sweep_kernel")):
        if kernel == "sweep_hopper" and capability != "9.0":
            continue
        command = ["ncu", "--set", "full", "-k", f"regex:{kernel}", "-c", "1", bench]
        command += ["--n", "32768", "--d", "128", "--repeat", "1"]
        found.append(Part(name, f"ncu on {kernel}", 25, tuple(command), missing=without("ncu", bench)))
    train = [sys.executable, "train/pretrain.py", "--epochs", "3", "--knn-every", "1", "--no-evaluate"]
    train += ["--output", str(output / "run"), "--overwrite"]
    needs = without("module:torchvision", "module:sklearn", "module:safetensors")
    found.append(Part("training", "three epochs on digits, with k-NN", 55, tuple(train), missing=needs))
    return found


def variants(capability: str) -> list[Part]:
    """Three builds of the Hopper kernel."""
    command = (sys.executable, "benchmarks/cuda_variants.py")
    what = "variants of the Hopper kernel, predicted and measured"
    return [Part("variants", what, 300, command, missing=without("cmake", "nvcc"))] if capability == "9.0" else []


def sanitizers(output: Path) -> list[Part]:
    """Last: they are slow, and racecheck may hang."""
    found = []
    for tool in ("memcheck", "racecheck"):
        tests = ("tests/package/test_cuda_gpu.py",)
        part = pytest_part(tool, f"compute-sanitizer --tool {tool}", 130, tests, tool, output)
        found.append(part._replace(missing=without("compute-sanitizer")))
    return found


# --- running them


def run_parts(chosen: Iterable[Part], output: Path, limit: float) -> list[dict[str, Any]]:
    """Each in turn, while ``limit`` seconds for all of them last; their lines."""
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + limit
    done: list[dict[str, Any]] = []
    with (output / "parts.jsonl").open("w", buffering=1) as lines:
        for part in chosen:
            replaced = next((line for line in done if line["part"] == part.instead_of), None)
            if part.instead_of is not None and (replaced is None or replaced["rc"] == 0):
                continue
            for stale in output.glob(f"{part.name}.*"):
                stale.unlink()
            line = run_part(part, output / f"{part.name}.txt", min(part.limit, deadline - time.monotonic()))
            done.append(line)
            lines.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    return done


def run_part(part: Part, log: Path, limit: float) -> dict[str, Any]:
    """Its line. ``rc`` is None where there is no exit status: killed at the limit, or not begun at all."""
    line: dict[str, Any] = {"part": part.name, "rc": None, "seconds": 0.0, "limit": round(max(limit, 0), 1)}
    if limit < 1:
        return line | {"what": "no time is left"}
    if (reason := part.missing()) is not None:
        return line | {"what": f"{LEFT_OUT}: {reason}"}
    print(f"{part.name}: {part.what}, up to {limit:.0f} s", flush=True)
    begin = time.monotonic()
    rc, what = run_group(part, log, limit)
    last = shown(log, SHOWN)
    print("".join(f"    {text}\n" for text in last), end="", flush=True)
    what += f": {last[-1]}" if last else ""
    return line | {"rc": rc, "seconds": round(time.monotonic() - begin, 1), "what": what}


def run_group(part: Part, log: Path, limit: float) -> tuple[int | None, str]:
    """(exit status, what became of it). Whatever the command has started is gone afterwards."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(part.environment)
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return 127, f"did not start: {error.strerror}"
        try:
            rc = process.wait(limit)
        except subprocess.TimeoutExpired:
            return None, "killed at its limit"
        finally:
            end_group(process)
    if rc < 0:
        return rc, f"died of {signal.Signals(-rc).name}"
    return rc, "ok" if rc == 0 else f"exit status {rc}"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to a command that still runs, then SIGKILL to all of its group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:  # stuck in the driver: it cannot be helped, and the next part may yet run
        print("    it cannot be killed", flush=True)


def shown(log: Path, count: int) -> list[str]:
    """The last lines of an output, whatever bytes they are made of."""
    text = log.read_bytes()[-20_000:].decode(errors="replace").replace("\r", "\n")
    lines = ["".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line) for line in text.split("\n")]
    return [line.rstrip()[:200] for line in lines if line.strip()][-count:]


def visible_gpu() -> dict[str, str] | None:
    """Name and compute capability; None without a GPU."""
    try:
        probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(probe.stdout.splitlines()[-1]) if probe.returncode == 0 and probe.stdout.strip() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", metavar="NAME", help="these only, in the order of --list")
    parser.add_argument("--list", action="store_true", help="say what there is and run nothing")
    parser.add_argument("--limit", type=float, default=900, help="seconds for everything (default 900)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check", help="default build/gpu-check")
    args = parser.parse_args()
    output = args.output.resolve()
    names = [part.name for part in parts("9.0", output)]
    if unknown := [name for name in args.part or [] if name not in names]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(names)}")
    if args.list:
        for part in parts("9.0", output):
            print(f"{part.name:<20} {part.limit:4.0f} s  {part.what}")
        return 0
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"gpu-check: {sys.executable} lacks {', '.join(lacking)}", file=sys.stderr)
        return 2
    gpu = visible_gpu()
    if gpu is None:
        print("gpu-check: PyTorch sees no CUDA GPU here, so there is nothing to check", file=sys.stderr)
        return 2
    os.environ["PATH"] += os.pathsep + TOOLKIT
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the part that runs is ended too
    chosen = [part for part in parts(gpu["capability"], output) if not args.part or part.name in args.part]
    done = run_parts(chosen, output, args.limit)
    failed = [line["part"] for line in done if line["rc"] != 0 and not line["what"].startswith(LEFT_OUT)]
    ended = f"not well: {', '.join(failed)}" if failed else "all that ran is well"
    print(f"gpu-check: {gpu['device']}, {len(done)} parts, {ended}; outputs are in {output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
