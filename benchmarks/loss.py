# SPDX-License-Identifier: Apache-2.0
"""How fast and how large is one step of the loss, forward + backward, beside what a user would write?

    python benchmarks/loss.py                     # all cases, writes benchmarks/results/<device>/loss.json
    python benchmarks/loss.py --cases mio:8192:128 --output /dev/null

All contenders of a case run in one process, interleaved, after a warm-up and after each one's loss and
gradient were compared with float64. Reported are the median and the 20/80 % quantiles of a step, and
the peak of memory beyond the inputs, measured in a process of its own for each contender.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mio_ext import mio_loss, ops, siglip_loss  # noqa: E402

CASES = ["mio:256:128", "mio:1024:128", "mio:8192:128", "mio:32768:128"]
CASES += ["siglip:256:512", "siglip:2048:512", "siglip:8192:512"]
TEMPERATURE = 0.5
LOGIT_SCALE, LOGIT_BIAS = 10.0, -10.0
#: A dense contender of more rows would need tens of gigabytes for its logits and their gradients.
MAX_DENSE_ROWS = 8192


def mio_eager(z1: Tensor, z2: Tensor) -> Tensor:
    """The dense loss: one matrix product, softplus over all of it, the diagonals taken back out.

    Scaling the rows before the product and subtracting sums was the fastest of the forms tried.
    """
    batch, n = len(z1), 2 * len(z1)
    z = F.normalize(torch.cat([z1, z2]))
    logits = (z / TEMPERATURE) @ z.T
    terms = F.softplus(logits)
    negative = terms.sum() - terms.diagonal().sum() - 2 * terms.diagonal(batch).sum()
    positive = F.softplus(-logits.diagonal(batch)).mean()
    return positive + negative / (n * (n - 2)) + (z[:batch] - z[batch:]).square().mean()


def siglip_eager(x: Tensor, y: Tensor) -> Tensor:
    """The published algorithm, dense, as in open_clip."""
    logits = LOGIT_SCALE * x @ y.T + LOGIT_BIAS
    labels = 2 * torch.eye(len(x), dtype=x.dtype) - torch.ones(len(x), len(x), dtype=x.dtype)
    return -F.logsigmoid(labels * logits).sum() / len(x)


def siglip_open_clip(x: Tensor, y: Tensor) -> Tensor:
    from open_clip.loss import SigLipLoss

    return SigLipLoss()(x, y, torch.tensor(LOGIT_SCALE), torch.tensor(LOGIT_BIAS))


def siglip_ours(x: Tensor, y: Tensor) -> Tensor:
    loss = siglip_loss(x, y, LOGIT_SCALE, LOGIT_BIAS)
    assert isinstance(loss, Tensor)
    return loss


def contenders(loss: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    if loss == "mio":
        return {"mio_ext": mio_loss, "eager": mio_eager, "torch.compile": torch.compile(mio_eager)}
    return {
        "mio_ext": siglip_ours,
        "eager": siglip_eager,
        "open_clip": siglip_open_clip,
        "torch.compile": torch.compile(siglip_eager),
    }


def units(loss: str) -> float:
    """Matrix products of a step, in units of 2 N² D operations (docs: cost model)."""
    return 1.5 if loss == "mio" else 3.0


def inputs(loss: str, rows: int, dim: int) -> list[Tensor]:
    """Leaf tensors: two views of rows / 2 samples, or rows images and texts."""
    generator = torch.Generator().manual_seed(0)
    count = rows // 2 if loss == "mio" else rows
    x, y = (torch.randn(count, dim, generator=generator) for _ in range(2))
    if loss == "siglip":
        x, y = F.normalize(x), F.normalize(y)
    return [x.requires_grad_(), y.requires_grad_()]


def step(contender: Callable[[Tensor, Tensor], Tensor], leaves: list[Tensor]) -> Tensor:
    for leaf in leaves:
        leaf.grad = None
    loss = contender(*leaves)
    loss.backward()
    return loss.detach()


def check(name: str, contender: Callable[[Tensor, Tensor], Tensor], leaves: list[Tensor], exact: list[Tensor]) -> dict:
    """Relative errors of loss and gradient against float64; raises where they are not rounding."""
    loss = step(contender, leaves)
    errors = [
        ((a.double() - b).norm() / b.norm()).item()
        for a, b in zip([loss, *[leaf.grad for leaf in leaves]], exact, strict=True)
    ]
    if not (errors[0] < 1e-4 and max(errors[1:]) < 1e-2):
        raise RuntimeError(f"{name} is wrong: relative errors {errors}")
    return {"loss_error": errors[0], "gradient_error": max(errors[1:])}


def time_interleaved(functions: dict[str, Callable], leaves: list[Tensor], budget: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    rounds = 0
    while rounds < 5 or (time.perf_counter() - start < budget and rounds < 1000):
        for name, function in functions.items():
            begin = time.perf_counter()
            step(function, leaves)
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    return times


def peak_memory(loss: str, rows: int, dim: int, name: str) -> int:
    """Bytes beyond the inputs at the peak of one step, in a process of its own."""
    command = [sys.executable, __file__, "--peak-memory-of", f"{loss}:{rows}:{dim}:{name}"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(spec: str) -> None:
    loss, rows, dim, name = spec.split(":")
    function = contenders(loss)[name]
    step(function, inputs(loss, 64, int(dim)))  # libraries, thread pools, the compiler
    if name == "torch.compile":
        step(function, inputs(loss, int(rows), int(dim)))  # compiled again for the size
    leaves = inputs(loss, int(rows), int(dim))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_peak()
    step(function, leaves)
    print(resident_peak() - before)


def resident_peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def multiply_add_rate() -> float:
    """The machine's float32 matrix rate as PyTorch's library reaches it, in operations a second."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return 2 * 2048**3 / statistics.median(times)


def run_case(spec: str, budget: float) -> list[dict]:
    loss, rows, dim = spec.split(":")
    leaves = inputs(loss, int(rows), int(dim))
    functions = contenders(loss)
    if int(rows) > MAX_DENSE_ROWS:
        functions = {"mio_ext": functions["mio_ext"]}
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = [step(functions["mio_ext"], wide).double(), *[leaf.grad for leaf in wide]]
    errors = {name: check(name, f, leaves, exact) for name, f in functions.items()}
    times = time_interleaved(functions, leaves, budget)
    rows_out = []
    for name, values in times.items():
        quantiles = statistics.quantiles(values, n=5)
        median = statistics.median(values)
        flops = units(loss) * 2 * int(rows) ** 2 * int(dim)
        rows_out.append(
            {
                "loss": loss,
                "rows": int(rows),
                "dim": int(dim),
                "dtype": "float32",
                "contender": name,
                "median_ms": median * 1e3,
                "p20_ms": quantiles[0] * 1e3,
                "p80_ms": quantiles[3] * 1e3,
                "steps": len(values),
                "peak_memory_bytes": peak_memory(loss, int(rows), int(dim), name),
                "gflops": flops / median * 1e-9 if name == "mio_ext" else None,
                **errors[name],
            }
        )
        report = rows_out[-1]
        print(
            f"{spec:<16} {name:<14} {report['median_ms']:10.3f} ms  "
            f"[{report['p20_ms']:.3f}, {report['p80_ms']:.3f}]  {report['peak_memory_bytes'] / 1e6:8.1f} MB",
            flush=True,
        )
    return rows_out


def device_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="LOSS:ROWS:DIM")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timed steps for a case (default 20)")
    parser.add_argument("--output", type=Path, help="data file (default benchmarks/results/<device>/loss.json)")
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_memory_of:
        print_peak_memory(args.peak_memory_of)
        return
    results = {
        "command": shlex.join(["python", "benchmarks/loss.py", *sys.argv[1:]]),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": ops.extension.cpu_instruction_set(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "date": datetime.date.today().isoformat(),
        "matmul_gflops": multiply_add_rate() * 1e-9,
        "results": [row for spec in args.cases for row in run_case(spec, args.budget)],
    }
    folder = "".join(c if c.isalnum() else "-" for c in f"{results['device']} {results['threads']} threads".lower())
    output = args.output or ROOT / "benchmarks" / "results" / folder / "loss.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
