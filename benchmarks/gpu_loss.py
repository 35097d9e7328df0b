# SPDX-License-Identifier: Apache-2.0
"""How long does a loss step take on this GPU, forward and backward, and how much memory?

    python benchmarks/gpu_loss.py [--seconds 240] [--backend triton]

Every contender must first agree with the reference. Contenders of a shape are interleaved, the L2 cache is
flushed before each step, times are CUDA events: median with 20 and 80 % quantiles. One that runs out of
memory is written down as such. Results: benchmarks/results/<device>/gpu_loss.json, every line with its floor.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
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
    """siglip-kernel, if it is installed."""
    if importlib.util.find_spec("siglip_kernel") is None:
        return None
    import siglip_kernel

    function = getattr(siglip_kernel, "siglip_loss", None) or getattr(siglip_kernel, "fused_siglip_loss", None)
    if function is None:
        return None

    def call(x: Tensor, y: Tensor) -> Tensor:
        scale, bias = (torch.tensor(v, device=x.device) for v in (10.0, -10.0))
        return function(x, y, scale, bias)

    return call


def contenders(loss: str, backend: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    if loss == "mio":
        ours = lambda a, b: mio_loss(a, b, backend=backend)  # noqa: E731
        return {"mio_ext": ours, "dense eager": dense_mio, "dense torch.compile": torch.compile(dense_mio)}
    ours = lambda a, b: siglip_loss(a, b, 10.0, -10.0, backend=backend)  # noqa: E731
    all_of_them = {
        "mio_ext": ours,
        "open_clip eager": dense_siglip,
        "open_clip torch.compile": torch.compile(dense_siglip),
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


def agrees(loss: str, function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    """On 512 rows, against the float64 reference. 16-bit logits, which peers have, get 16-bit room."""
    a, b = features(loss, 512, dtype)
    exact_a, exact_b = (t.detach().double().requires_grad_() for t in (a, b))
    reference = {
        "mio": lambda x, y: mio_loss(x, y, backend="reference"),
        "siglip": lambda x, y: siglip_loss(x, y, 10.0, -10.0, backend="reference"),
    }[loss]
    value, exact = step(function, a, b), step(reference, exact_a, exact_b)
    room = 0.1 if dtype != torch.float32 else 5e-3
    assert abs(value.item() - exact.item()) <= room * abs(exact.item()), (value.item(), exact.item())
    for t, e in ((a, exact_a), (b, exact_b)):
        assert (t.grad.double() - e.grad).norm() <= room * e.grad.norm()


def floor_ms(loss: str, rows: int, dtype: torch.dtype) -> float | None:
    """Matrix products, special functions and bytes each alone, whichever is longest; docs/triton.md."""
    peaks = PEAKS.get(torch.cuda.get_device_capability())
    if peaks is None:
        return None
    tflops, tbytes, processors, ghz = peaks
    units, d = (2, 128) if loss == "mio" else (3, 768)
    matrix = units * 2 * rows**2 * d / (tflops * (1 if dtype != torch.float32 else 1 / 16) * 1e12)
    special = rows**2 * 2 / (16 * processors * ghz * 1e9)
    traffic = rows * d * dtype.itemsize * 4 / (tbytes * 1e12)
    if loss == "siglip" or dtype == torch.float32:  # chunked: logits written, read, coefficients written, read
        traffic += rows**2 * (8 + 3 * dtype.itemsize) / (tbytes * 1e12)
    return max(matrix, special, traffic) * 1e3


def measure(
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]], a: Tensor, b: Tensor, seconds: float
) -> dict[str, Any]:
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {}
    results: dict[str, Any] = {}
    for name, function in functions.items():
        try:
            for _ in range(3):
                step(function, a, b)
            torch.cuda.synchronize()
            a.grad = b.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(function, a, b)
            torch.cuda.synchronize()
            results[name] = {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
            times[name] = []
        except torch.OutOfMemoryError:
            results[name] = {"error": "out of memory"}
            torch.cuda.empty_cache()
    deadline, rounds = time.monotonic() + seconds, 0
    while rounds < 5 or (rounds < 200 and time.monotonic() < deadline):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=150, help="of timing, over all shapes (compilation comes on top)"
    )
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
    rows = []
    for loss, n, dtype in jobs:
        torch.compiler.reset()
        functions = contenders(loss, args.backend)
        if n > DENSE_LIMIT and (dtype == torch.float32 or loss == "mio"):
            functions = {name: f for name, f in functions.items() if "eager" not in name and "compile" not in name}
        for function in functions.values():
            agrees(loss, function, dtype)
        a, b = features(loss, n, dtype)
        floor = floor_ms(loss, n, dtype)
        for name, result in measure(functions, a, b, args.seconds / len(jobs)).items():
            row = {"loss": loss, "rows": n, "dtype": str(dtype).removeprefix("torch."), "what": name, "floor_ms": floor}
            row |= result
            if "median_ms" in result:
                units, d = (2, 128) if loss == "mio" else (3, 768)
                row["tflops"] = units * 2 * n**2 * d / result["median_ms"] / 1e9
            rows.append(row)
            print(
                {k: round(v, 4) if isinstance(v, float) and math.isfinite(v) else v for k, v in row.items()}, flush=True
            )
        del a, b
        torch.cuda.empty_cache()
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


if __name__ == "__main__":
    main()
