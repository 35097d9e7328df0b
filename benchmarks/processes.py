# SPDX-License-Identifier: Apache-2.0
"""What a process group costs: the losses gathered, round a ring, and open_clip's, in time and in tensors held.

    python benchmarks/processes.py               # two minutes on a quiet machine, Gloo, a thread a process

The contenders take turns, forward and backward; a step takes as long as its slowest process. Writes a JSON file and
a CSV beside it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.machine import facts, output_path, save
from mio_ext import SigLIPLoss, distributed

CASES = [("mio", 256, 128), ("mio", 1024, 128), ("siglip", 256, 512), ("siglip", 1024, 512)]  # rows of a process
Step = Callable[[], None]


def contenders(loss: str, x: Tensor, y: Tensor) -> dict[str, Step]:
    """Name -> a forward and backward pass."""
    place: Any = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    if loss == "mio":
        return {
            f"mio_ext {form}": lambda form=form: distributed.mio_loss(x, y, exchange=form).backward()  # type: ignore[misc]
            for form in ("gather", "ring")
        }
    modules: dict[str, Any] = {f"mio_ext {way}": SigLIPLoss(**place, dist_impl=way) for way in ("gather", "bidir")}
    modules = {name.replace("bidir", "ring"): module for name, module in modules.items()}
    try:
        from open_clip.loss import SigLipLoss

        modules |= {f"open_clip {way}": SigLipLoss(**place, dist_impl=way) for way in ("bidir", "gather")}
    except ImportError:
        pass
    return {name: lambda m=m: m(x, y, scale, bias).backward() for name, m in modules.items()}  # type: ignore[misc]


def held(step: Step) -> int:
    """Bytes of tensors beyond those before the step, at the peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))))


def work(rank: int, world: int, rendezvous: str, seconds: float, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    for loss, rows, dim in CASES:
        generator = torch.Generator().manual_seed(rank)
        x, y = (
            torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator)).requires_grad_() for _ in "xy"
        )
        steps = contenders(loss, x, y)
        memory = {}
        for name, step in steps.items():
            step()
            memory[name] = held(step)
        times: dict[str, list[float]] = {name: [] for name in steps}
        begin, going = time.perf_counter(), torch.ones(1)
        while bool(going):
            for name, step in steps.items():
                dist.barrier()
                start = time.perf_counter()
                step()
                took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
                dist.all_reduce(took, dist.ReduceOp.MAX)
                times[name].append(float(took))
            going[0] = float(time.perf_counter() - begin < seconds)
            dist.broadcast(going, 0)
        if rank == 0:
            for name, t in times.items():
                case = {"loss": loss, "processes": world, "rows": rows, "dim": dim, "contender": name}
                queue.put(case | {"steps": len(t), "median_ms": 1e3 * statistics.median(t), "held_bytes": memory[name]})
    if rank == 0:
        queue.put(None)
    dist.barrier()
    dist.destroy_process_group()


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["loss    processes  rows   D    contender          ms      MB held"]
    for r in rows:
        lines.append(
            f"{r['loss']:<7} {r['processes']:>9}  {r['rows']:>4}  {r['dim']:>4}  {r['contender']:<17}"
            f"{r['median_ms']:>7.3g}  {r['held_bytes'] / 1e6:>8.3g}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="numbers of processes (default 2 4)")
    parser.add_argument("--seconds", type=float, default=8, help="for each case, all contenders together (default 8)")
    parser.add_argument("--output", type=Path, help="default: among the committed figures; with options: build/")
    args = parser.parse_args()
    head, results = facts("cpu"), list[dict[str, Any]]()
    path = output_path(parser, args, head, "processes")
    for world in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            queue = mp.get_context("spawn").SimpleQueue()
            arguments = (world, f"{folder}/rendezvous", args.seconds, queue)
            group: Any = mp.spawn(work, arguments, world, join=False)  # type: ignore[attr-defined, no-untyped-call]
            results += iter(queue.get, None)
            while not group.join():
                pass
    save(path, head, results)
    print(table(results))


if __name__ == "__main__":
    main()
