# SPDX-License-Identifier: Apache-2.0
"""How long does a loss step take on this GPU, forward and backward, and how much memory?

    python benchmarks/gpu_loss.py [--seconds 180] [--backend triton]

Every contender must first agree with the reference. Contenders of a shape are interleaved, the L2 cache is
flushed before each step, times are CUDA events: median with 20 and 80 % quantiles. One that fails, be it for
memory, is written down with its error; if it is ours, the exit status is 1.
Results: benchmarks/results/<device>/gpu_loss.json, every line with its floor.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mio_ext import mio_loss, siglip_loss  # noqa: E402

MIO_SIZES = [256, 1024, 4096, 16_384, 65_536]  # N = 2 B, D = 128
SIGLIP_SIZES = [1024, 4096, 16_384, 65_536]  # B, D = 768
DENSE_LIMIT = 32_768  # rows beyond which a dense float32 matrix and its gradients pass 20 GB
CHECK_LIMIT = 4096  # rows of the float64 reference that contenders are held to
#: Dense 16-bit TFLOP/s, TB/s, multiprocessors, GHz: the floor on paper, by compute capability.
PEAKS = {(8, 0): (312, 2.0, 108, 1.41), (9, 0): (989, 3.35, 132, 1.755), (10, 0): (2250, 8.0, 148, 1.85)}


def dense_mio(z1: Tensor, z2: Tensor) -> Tensor:
    """The best dense form known to us: one matrix product, masks by diagonal views, no N × N mask."""
    z = F.normalize(torch.cat([z1, z2]).float()).to(z1.dtype)
    batch, n = z1.shape[0], 2 * z1.shape[0]
    s = (z @ z.T).float()
    positive = torch.cat([s.diagonal(batch), s.diagonal(-batch)])
    every = F.softplus(2 * s)
    negative = every.sum() - every.diagonal().sum() - F.softplus(2 * positive).sum()
    regularizer = (z[:batch].float() - z[batch:].float()).square().mean()
    return F.softplus(-2 * positive).mean() + negative / (n * (n - 2)) + regularizer


def dense_siglip(x: Tensor, y: Tensor) -> Tensor:
    """As open_clip writes it: −Σ logsigmoid(labels · logits) / B."""
    logits = 10 * x @ y.T - 10
    labels = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def siglip_peer() -> Callable[[Tensor, Tensor], Tensor] | None:
    """siglip-kernel 0.1.2, if it is installed; it takes the logarithm of the scale."""
    try:
        from siglip_kernel import fused_siglip_loss
    except ImportError:
        return None
    log_scale, bias = (torch.tensor(v, device="cuda") for v in (math.log(10.0), -10.0))
    return lambda x, y: fused_siglip_loss(x, y, log_scale, bias)


def contenders(loss: str, backend: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    if loss == "mio":
        ours = lambda a, b: mio_loss(a, b, backend=backend)  # noqa: E731
        return {
            "mio_ext": ours,
            "dense eager": dense_mio,
            "dense torch.compile": torch.compile(dense_mio, dynamic=False),
        }
    ours = lambda a, b: siglip_loss(a, b, 10.0, -10.0, backend=backend)  # noqa: E731
    all_of_them = {
        "mio_ext": ours,
        "open_clip eager": dense_siglip,
        "open_clip torch.compile": torch.compile(dense_siglip, dynamic=False),
    }
    peer = siglip_peer()
    return all_of_them | ({"siglip-kernel": peer} if peer else {})


def features(loss: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    n, d = (rows // 2, 128) if loss == "mio" else (rows, 768)
    a = torch.randn(n, d, device="cuda", generator=generator)
    b = a + 0.5 * torch.randn(n, d, device="cuda", generator=generator)
    if loss == "siglip":
        a, b = F.normalize(a), F.normalize(b)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def step(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    a.grad = b.grad = None
    loss = function(a, b)
    loss.backward()
    return loss


def agrees(loss: str, function: Callable[[Tensor, Tensor], Tensor], n: int, dtype: torch.dtype) -> None:
    """Raises unless the result is the float64 reference's. 16-bit logits, as peers have, get 16-bit room."""
    a, b = features(loss, min(n, CHECK_LIMIT), dtype)
    exact_a, exact_b = (t.detach().double().requires_grad_() for t in (a, b))
    reference = {
        "mio": lambda x, y: mio_loss(x, y, backend="reference"),
        "siglip": lambda x, y: siglip_loss(x, y, 10.0, -10.0, backend="reference"),
    }[loss]
    value, exact = step(function, a, b), step(reference, exact_a, exact_b)
    room = 0.1 if dtype != torch.float32 else 5e-3
    pairs = [("loss", value, exact), ("gradient", a.grad, exact_a.grad), ("gradient", b.grad, exact_b.grad)]
    for what, actual, expected in pairs:
        error = ((actual.detach().double() - expected).norm() / expected.norm()).item()
        if not error <= room:
            raise ArithmeticError(f"{what} is off by {error:.1e} of the reference's")


def floor_ms(loss: str, rows: int, dtype: torch.dtype) -> float | None:
    """Matrix products, special functions and bytes each alone, whichever is longest; docs/triton.md."""
    peaks = PEAKS.get(torch.cuda.get_device_capability())
    if peaks is None:
        return None
    tflops, tbytes, processors, ghz = peaks
    units, d = (2, 128) if loss == "mio" else (3, 768)
    # float32: three float16 products where the kernel is fused, else no tensor core, a 16th of their rate.
    slower = 1 if dtype != torch.float32 else 3 if loss == "mio" else 16
    matrix = units * 2 * rows**2 * d * slower / (tflops * 1e12)
    special = rows**2 * 2 / (16 * processors * ghz * 1e9)
    traffic = rows * d * dtype.itemsize * 4 / (tbytes * 1e12)
    if loss == "siglip":  # chunked: logits written, read, coefficients written, read
        traffic += rows**2 * (8 + 3 * dtype.itemsize) / (tbytes * 1e12)
    return max(matrix, special, traffic) * 1e3


def warm_up(loss: str, n: int, function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> dict[str, Any]:
    """Checks and compiles one contender: its peak memory, or its error."""
    try:
        agrees(loss, function, n, a.dtype)
        for _ in range(3):
            step(function, a, b)
        torch.cuda.synchronize()
        a.grad = b.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(function, a, b)
        torch.cuda.synchronize()
        return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # compilers and peers fail in many ways; the others are measured all the same
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        a.grad = b.grad = None
        torch.cuda.empty_cache()


def measure(
    loss: str, n: int, functions: dict[str, Callable[[Tensor, Tensor], Tensor]], dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """Of every contender, median and quantiles of up to 200 steps; within ``seconds``, but for five at least."""
    deadline = time.monotonic() + seconds
    a, b = features(loss, n, dtype)
    results = {name: warm_up(loss, n, function, a, b) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name, result in results.items() if "error" not in result}
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    rounds = 0
    while times and (rounds < 5 or (rounds < 200 and time.monotonic() < deadline)):
        events = []
        for name in times:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step(functions[name], a, b)
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events:
            times[name].append(start.elapsed_time(end))
        rounds += 1
    for name, values in times.items():
        q = statistics.quantiles(values, n=10)
        results[name] |= {"median_ms": statistics.median(values), "p20_ms": q[1], "p80_ms": q[7], "n": len(values)}
    return results


def measure_job(loss: str, n: int, dtype: torch.dtype, backend: str, seconds: float) -> list[dict[str, Any]]:
    """One shape: a line for every contender."""
    torch.compiler.reset()
    functions = contenders(loss, backend)
    if n > DENSE_LIMIT and (dtype == torch.float32 or loss == "mio"):
        functions = {name: f for name, f in functions.items() if "eager" not in name and "compile" not in name}
    units, d = (2, 128) if loss == "mio" else (3, 768)
    rows = []
    for name, result in measure(loss, n, functions, dtype, seconds).items():
        row = {"loss": loss, "rows": n, "dtype": str(dtype).removeprefix("torch."), "what": name}
        row |= {"floor_ms": floor_ms(loss, n, dtype)} | result
        if "median_ms" in result:
            row["tflops"] = units * 2 * n**2 * d / result["median_ms"] / 1e9
        rows.append(row)
        print({k: round(v, 4) if isinstance(v, float) and math.isfinite(v) else v for k, v in row.items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180, help="for all shapes together, compilation included")
    parser.add_argument("--backend", default="triton")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "gpu_loss: no CUDA GPU here; benchmarks/triton_resources.py is what can be known without one",
            file=sys.stderr,
        )
        sys.exit(2)
    shapes = [("mio", n) for n in MIO_SIZES] + [("siglip", n) for n in SIGLIP_SIZES]
    jobs = [(loss, n, dtype) for loss, n in shapes for dtype in (torch.bfloat16, torch.float32)]
    deadline = time.monotonic() + args.seconds
    rows = []
    for i, (loss, n, dtype) in enumerate(jobs):
        share = (deadline - time.monotonic()) / (len(jobs) - i)
        rows += measure_job(loss, n, dtype, args.backend, share)
    device = torch.cuda.get_device_name().replace(" ", "-")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    out = ROOT / "benchmarks" / "results" / device / "gpu_loss.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip(),
        "command": " ".join(sys.argv),
    }
    out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    print(f"wrote {out.relative_to(ROOT)}")
    sys.exit(any("error" in row for row in rows if row["what"] == "mio_ext"))


if __name__ == "__main__":
    main()
