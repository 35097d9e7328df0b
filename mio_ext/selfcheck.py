# SPDX-License-Identifier: Apache-2.0
"""``python -m mio_ext check``: is a fused backend right on this machine, and how fast?

For every :class:`~mio_ext.backends.Cell`, each backend runs in a process of its own, which may hang, crash or print
nonsense: that costs the cell's backend and nothing else. The process takes MIO, MIO with labels and SigLIP at a few
sizes, twice for equal bits, holds loss and gradients to the float64 reference and to plain PyTorch in the features'
own type, and times them beside it. What it reports is judged here and kept in the record (verified.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, verified
from .backends import CELLS, WIDE, Cell

LIMIT = 120.0  #: seconds a process may take
#: dtype -> relative errors of loss and gradients that pass whatever plain PyTorch's are; twice its own pass too.
TOLERANCE = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-6, 1e-5),
    torch.bfloat16: (1e-6, 4e-3),
    torch.float16: (1e-6, 2e-3),
}
LOSSES = ("mio", "labels", "siglip")
FIELDS = ("loss_error", "gradient_error", "plain_loss_error", "plain_gradient_error", "ms", "reference_ms")
LOSS_SCALE = 2.0**16  #: small gradients of float16 vanish without one, whoever computes them


class Problem(NamedTuple):
    """One row of the table: a loss, its rows (N of MIO, B of SigLIP) and their width."""

    loss: str
    rows: int
    dim: int


def problems(cell: Cell, device: torch.device) -> list[Problem]:
    """Small and large, no multiple of a tile, every width of the fused kernels; shorter on a CPU."""
    rows = [250, 4098] if device.type == "cuda" else [62, 258]
    shapes = [(n, 770 if cell.wide else 128) for n in rows]
    shapes += [(rows[1] // 4, 300)] if cell.wide else [(rows[1] // 4, 64), (rows[1] // 4, 250)]
    return [Problem(loss, n, d) for loss in LOSSES for n, d in shapes]


# ---------------------------------------------------------------------------------------------- in a child process


def measure(problem: Problem, backend: str, cell: Cell, device: torch.device) -> dict[str, Any]:
    """One row: errors of the backend and of plain PyTorch, equal bits, milliseconds of a forward and backward pass."""

    def step(name: str, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        return lambda: _step(problem, name, cell.dtype, dtype, device)

    exact = step("reference", torch.float64)()
    row: dict[str, Any] = problem._asdict()
    own, plain = step(backend, cell.dtype), step("reference", cell.dtype)
    first, second, by_torch = own(), own(), plain()
    row["same_bits"] = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    row["loss_error"], row["gradient_error"] = _distance(first, exact)
    row["plain_loss_error"], row["plain_gradient_error"] = _distance(by_torch, exact)
    times: dict[str, list[float]] = {"ms": [], "reference_ms": []}
    for _ in range(7):
        for name, run in (("ms", own), ("reference_ms", plain)):
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - begin))
    return row | {name: sorted(seconds)[len(seconds) // 2] for name, seconds in times.items()}


def _step(p: Problem, backend: str, features: torch.dtype, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Loss and gradients of the two sides, of the same features for every ``dtype``."""
    from . import losses

    generator = torch.Generator().manual_seed(p.rows * p.dim)
    half = p.rows if p.loss == "siglip" else p.rows // 2
    base = torch.randn(half, p.dim, generator=generator)
    sides = [base, base + 0.5 * torch.randn(half, p.dim, generator=generator)]
    x, y = (z.to(device, features).to(dtype).requires_grad_() for z in sides)
    if p.loss == "siglip":
        loss = losses.siglip_loss(x, y, 10.0, -8.0, normalize=True, backend=backend)
    else:
        labels = torch.arange(half, device=device) % 9 if p.loss == "labels" else None
        loss = losses.mio_loss(x, y, labels=labels, backend=backend)
    gradients = torch.autograd.grad(loss * LOSS_SCALE, (x, y))
    return [loss.detach(), torch.cat([g.double() for g in gradients])]


def _distance(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - e.double()).norm() / e.double().norm()) for a, e in zip(actual, exact, strict=True)]


def child(arguments: list[str]) -> None:
    """``python -m mio_ext.selfcheck BACKEND DTYPE WIDE DEVICE``: a JSON line for every problem."""
    backend, dtype, wide, name = arguments
    cell, device = Cell(getattr(torch, dtype), wide == "True"), torch.device(name)
    for problem in problems(cell, device):
        print(json.dumps(measure(problem, backend, cell, device)), flush=True)


# ---------------------------------------------------------------------------------------------- around it


def child_command(backend: str, cell: Cell, device: torch.device) -> list[str]:
    dtype = str(cell.dtype).removeprefix("torch.")
    return [sys.executable, "-m", "mio_ext.selfcheck", backend, dtype, str(cell.wide), str(device)]


def run_child(command: list[str], limit: float) -> tuple[str, str | None]:
    """What a process prints, and why it does not count: None, or that it crashed or took longer than ``limit``."""
    home = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([home, os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        # Its own session, so that whatever it starts ends with it; files, since a pipe's other end may outlive it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, start_new_session=True
        )
        try:
            process.wait(limit)
            reason = None
        except subprocess.TimeoutExpired:
            reason = f"took longer than {limit:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for file in (output, errors):
            file.seek(0)
        text, last = output.read(1 << 20).decode(errors="replace"), errors.read().decode(errors="replace").strip()
    if reason is None and process.returncode != 0:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        reason = f"ended with {how}: {last.splitlines()[-1] if last else 'no message'}"
    return text, reason


def judge(text: str, cell: Cell, expected: Iterable[Problem]) -> tuple[list[dict[str, Any]], str | None]:
    """The rows a process printed, and why they do not verify its backend; None if they do."""
    rows = []
    for line in filter(str.strip, text.splitlines()):
        try:
            row = json.loads(line)
            rows.append({**row, "problem": Problem(str(row["loss"]), int(row["rows"]), int(row["dim"]))})
            if not all(math.isfinite(float(row[field])) and float(row[field]) >= 0 for field in FIELDS):
                return [], f"a number is missing or not finite in {line[:200]}"
        except (ValueError, TypeError, KeyError, AttributeError):
            return [], f"printed what is no result: {line[:80]!r}"
    by_problem = {row.pop("problem"): row for row in rows}
    for problem in expected:
        where = f"{problem.loss}, {problem.rows} x {problem.dim}"
        if problem not in by_problem:
            return rows, f"no result for {where}"
        row = by_problem[problem]
        if row["same_bits"] is not True:
            return rows, f"two runs differ for {where}"
        for what, limit in zip(("loss", "gradient"), TOLERANCE[cell.dtype], strict=True):
            error, allowed = row[f"{what}_error"], max(limit, 2 * row[f"plain_{what}_error"])
            if error > allowed:
                return rows, f"{what} is off by {error:.1e} for {where}, allowed {allowed:.1e}"
    return rows, None


class Verdict(NamedTuple):
    """One backend in one cell."""

    backend: str
    reason: str | None  #: why it is not verified; None if it is
    ms: float  #: geometric mean over the problems
    reference_ms: float  #: the dense reference's, in the same process


def try_backend(backend: str, cell: Cell, device: torch.device, limit: float) -> Verdict:
    text, reason = run_child(child_command(backend, cell, device), limit)
    rows, wrong = judge(text, cell, problems(cell, device)) if reason is None else ([], reason)
    ms, reference_ms = (
        math.exp(sum(math.log(max(row[name], 1e-6)) for row in rows) / len(rows)) if rows else math.nan
        for name in ("ms", "reference_ms")
    )
    return Verdict(backend, wrong, ms, reference_ms)


def fused_backends(cell: Cell, device: torch.device) -> list[str]:
    """Those that could run the cell here."""
    if device.type == "cpu" and not backends.interpreted():
        names = ["cpu"]
    else:
        names = ["cuda", "triton"] if device.type == "cuda" else ["cpu", "triton"]
    return [
        name
        for name in names
        if backends.unavailable_reason(name) is None and not (name == "cuda" and cell.dtype == torch.float64)
    ]


def check(
    device: torch.device,
    cells: Iterable[Cell] = CELLS,
    limit: float = LIMIT,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, str | None]:
    """Try every fused backend in ``cells`` and keep what came out in the record; the cells' backends.

    Args:
        say: is told a line for every backend and cell as it ends.
    """
    chosen: dict[str, str | None] = {}
    for cell in cells:
        verdicts = []
        for backend in fused_backends(cell, device):
            verdict = try_backend(backend, cell, device, limit)
            verdicts.append(verdict)
            told = verdict.reason or f"verified, {verdict.ms:.3g} ms, dense reference {verdict.reference_ms:.3g} ms"
            say(f"  {cell!s:<18} {backend:<7} {told}")
        good = [v for v in verdicts if v.reason is None]
        chosen[str(cell)] = min(good, key=lambda v: v.ms).backend if good else None
    verified.remember(device, chosen)
    return chosen


# ---------------------------------------------------------------------------------------------- for scripts


def ensure(device: torch.device, dtype: torch.dtype, dim: int, limit: float = LIMIT) -> str | None:
    """For scripts: see to it that ``auto`` has an answer for such features, by a check if need be.

    Returns:
        A line that says what the check found; None where there was nothing to check.
    """
    cell = Cell(dtype, dim > WIDE)
    if device.type != "cuda" or not fused_backends(cell, device):
        return None
    if backends.auto_on_gpu(device.index, cell).backend != "reference" or str(cell) in verified.record(device):
        return None
    begin, reasons = time.monotonic(), []
    backend = check(device, [cell], limit, lambda line: reasons.append(" ".join(line.split())))[str(cell)]
    took = f"checked the kernels on this GPU for {cell} ({time.monotonic() - begin:.0f} s)"
    if backend is None:
        return f"{took}: none is verified, so the loss runs as dense PyTorch ({'; '.join(reasons)})"
    return f"{took}: {backend}"


# ---------------------------------------------------------------------------------------------- the command


def main(arguments: list[str]) -> None:
    """``python -m mio_ext check [--device DEVICE] [--dtype ...] [--limit SECONDS]``."""
    names = [str(c.dtype).removeprefix("torch.") for c in CELLS[::2]]
    parser = argparse.ArgumentParser("python -m mio_ext check", description=main.__doc__)
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: every GPU, or the CPU where there is none")
    parser.add_argument("--dtype", nargs="+", choices=names, default=names, help="of the features; default: all")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a backend may take for a dtype and width")
    args = parser.parse_args(arguments)
    if not args.limit > 0:
        parser.error(f"--limit must be positive, got {args.limit}")
    for device in _devices(args.device, parser):
        print(f"{device}: {verified.key(device)['device']}")
        cells = [cell for cell in CELLS if str(cell.dtype).removeprefix("torch.") in args.dtype]
        check(device, cells, args.limit, lambda line: print(line, flush=True))
        print(f"  kept in {verified.record_path(device)}")
        if device.type == "cuda":
            for cell in cells:
                choice = backends.auto_on_gpu(device.index, cell)
                print(f"  auto, {cell}: {choice.backend} ({choice.why})")


def _devices(name: str | None, parser: argparse.ArgumentParser) -> list[torch.device]:
    if name is None:
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device must be cpu, cuda or cuda:N, got {name}")
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(torch.cuda.device_count(), 1):
        parser.error(f"--device must be one of this machine's ({torch.cuda.device_count()} GPUs), got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {name}: there is no CUDA GPU")
    return [torch.device("cuda", device.index or 0) if device.type == "cuda" else device]


if __name__ == "__main__":
    child(sys.argv[1:])
