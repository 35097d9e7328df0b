# SPDX-License-Identifier: Apache-2.0
"""How fast and how large is one step of the loss, how near the floor, and beside what a user would pick instead?

    python benchmarks/loss.py                    # CPU or GPU, whatever is there; within --budget seconds
    python benchmarks/loss.py --cases mio:8192:128 siglip:4096:768:bfloat16:forward

Writes benchmarks/results/<device>/loss.json and .csv; benchmarks/report.py makes tables and plots of them. With any
option it writes to build/benchmarks/ instead, unless told by --output. Rows are in a .jsonl beside as they come.

Cases come in order of interest until the budget is spent; those left are listed as over budget. Contenders of a
case are interleaved in one process, after each has agreed with float64. Reported: median and 20/80 % quantiles, and
peak memory of a first step. float16 is taken as GradScaler would, with the loss scaled. On a CPU that first step runs
in a process of its own under a limit of memory and time, so a contender that is too slow or too large is found out and
written down, not waited for.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.contenders import (
    LOSSES,
    NT_XENT,
    SCALE,
    Loss,
    backends,
    contenders,
    exact,
    features,
    mio_chunks,
    own,
    siglip_chunks,
    step,
)
from benchmarks.harness.floor import Rates, floor, measured_rates, work
from benchmarks.harness.machine import PeakMemory, device_type, facts, free_memory, output_path, proc_field, save
from benchmarks.harness.paths import ROOT
from benchmarks.harness.plan import Case, History, Limits, all_cases, parse_case
from benchmarks.harness.report_loss import time_table
from benchmarks.harness.tables import by_case, case_order, is_ours, text_table
from mio_ext.backends import BACKENDS, unavailable_reason

CHECK_ROWS = 512  #: of the comparison with float64; the paper's form takes gigabytes beyond
#: Relative error of loss and gradient that a contender may have. 16-bit logits, as peers have, get 16-bit room.
ROOM = {"float32": 5e-3, "bfloat16": 0.1, "float16": 0.1}
LONG = 2.5  #: seconds; of a longer step the first run counts, and no other is waited for
COLD = 0.5  #: seconds; a longer step needs no warm-up, but for a compiler's
MIN_STEPS, MAX_STEPS = 3, 300
LOSS_SCALE = 2.0**16  #: of float16, where GradScaler starts


def leaves_of(case: Case, device: str, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = features(case.loss, rows or case.rows, case.dim, getattr(torch, case.dtype), device)
    return x.requires_grad_(case.gradient), y.requires_grad_(case.gradient)


def scaled(case: Case, run: Callable[[float], tuple[Any, ...]]) -> tuple[Any, ...]:
    """(loss scale, leaves, ...) of ``run(loss scale) -> (leaves, ...)``.

    As GradScaler finds it: in float16 the largest from LOSS_SCALE down that leaves gradients finite. Else 1.
    """
    loss_scale = LOSS_SCALE if case.dtype == "float16" and case.gradient else 1.0
    while True:
        leaves, *rest = run(loss_scale)
        if loss_scale <= 1 or all(leaf.grad.isfinite().all() for leaf in leaves):
            return loss_scale, leaves, *rest
        loss_scale /= 2


def distance(
    value: torch.Tensor, leaves: Any, true: torch.Tensor, exact_leaves: Any, loss_scale: float
) -> dict[str, float]:
    """Relative errors of the loss and, if there are gradients, of the worse one; ``leaves`` have scaled ones."""
    errors = {"loss_error": abs(value.double() - true).item() / abs(true.item())}
    if leaves[0].grad is not None:
        errors["gradient_error"] = max(
            ((leaf.grad.double() / loss_scale - e.grad).norm() / e.grad.double().norm()).item()
            for leaf, e in zip(leaves, exact_leaves, strict=True)
        )
    return errors


def check(name: str, function: Loss, case: Case, device: str) -> dict[str, float]:
    """Errors against float64, on at most CHECK_ROWS rows."""
    leaves = leaves_of(case, device, min(case.rows, CHECK_ROWS))

    def run(loss_scale: float) -> tuple[Any, torch.Tensor]:
        return leaves, step(function, leaves, SCALE[case.loss], case.gradient, loss_scale)

    loss_scale, _, value = scaled(case, run)
    x, y = leaves
    wide = (x.detach().double().requires_grad_(), y.detach().double().requires_grad_())
    true = step(exact(case.loss, name, device), wide, SCALE[case.loss], True)
    return distance(value, leaves, true, wide, loss_scale)


def check_all_rows(value: torch.Tensor, leaves: Any, case: Case, device: str, loss_scale: float) -> dict[str, float]:
    """Errors on all rows, in float32: on a GPU against plain PyTorch, for nobody is judged by himself.

    On a CPU that takes too long: against our backend there, which has been held to float64 on fewer rows.
    """
    plain = mio_chunks if case.loss == "mio" else siglip_chunks
    wide = tuple(leaf.detach().float().requires_grad_(case.gradient) for leaf in leaves)
    true = step(plain if device == "cuda" else own(case.loss, "cpu"), wide, SCALE[case.loss], case.gradient)
    return distance(value, leaves, true, wide, loss_scale)


def probe(name: str, case: Case, device: str) -> dict[str, Any]:
    """Check, then one step of the real size: its time, its peak of memory, and is it right there too?

    torch.compile is checked at the real size only: another shape would be another half minute of compiler.
    """
    function, scale = contenders(case.loss, device)[0][name], SCALE[case.loss]
    errors = check(name, function, case, device) if name != "torch.compile" else {}
    if not max(errors.values(), default=0) <= ROOM[case.dtype]:
        return {"status": "wrong", "reason": "differs from float64", **errors}
    if name == "torch.compile" or device == "cuda":  # a size may have a kernel of its own to compile
        step(function, leaves_of(case, device), scale, case.gradient)

    def run(loss_scale: float) -> tuple[Any, torch.Tensor, float, int]:
        leaves = leaves_of(case, device)
        with PeakMemory(device) as peak:
            begin = time.perf_counter()
            value = step(function, leaves, scale, case.gradient, loss_scale)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
        return leaves, value, seconds, peak.bytes

    loss_scale, leaves, value, seconds, peak_bytes = scaled(case, run)
    worth_it = case.rows > CHECK_ROWS and (seconds <= LONG or not is_ours(name))  # of a long step of ours it is another
    if name != NT_XENT and (worth_it or not errors):
        errors = check_all_rows(value, leaves, case, device, loss_scale)
        if not max(errors.values()) <= ROOM[case.dtype]:
            return {"status": "wrong", "reason": f"differs from float32 at {case.rows:,} rows", **errors}
    return {"status": "ok", "seconds": seconds, "peak_bytes": peak_bytes, "loss_scale": loss_scale, **errors}


def guarded_probe(name: str, case: Case, device: str) -> dict[str, Any]:
    """:func:`probe`, or what went wrong: compilers and peers fail in many ways, and the others are still measured."""
    try:
        return probe(name, case, device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {"status": "out of memory", "reason": str(error).splitlines()[0] if str(error) else "no memory"}
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        memory = "allocate memory" in str(error) or "not enough memory" in str(error)
        return {"status": "out of memory" if memory else "failed", "reason": f"{type(error).__name__}: {text}"}


@functools.cache
def child_context() -> Any:
    """Children are forked off a process that has imported everything and used no thread pool yet."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    compiler = ["torch._dynamo", "torch._inductor.compile_fx"]
    context.set_forkserver_preload(["benchmarks.loss", *compiler, "open_clip", "lightly.loss"])
    return context  # a module that is not installed is passed over


def in_child(pipe: Connection, name: str, case: Case, memory: float) -> None:
    pipe.send("ready")
    limit = 1024 * proc_field("/proc/self/status", "VmData") + int(memory)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    pipe.send(guarded_probe(name, case, "cpu"))


def isolated_probe(name: str, case: Case, limits: Limits, left: float) -> dict[str, Any]:
    """:func:`probe` in a process of its own, which is ended when it takes too long."""
    seconds = min(left, 600) if is_ours(name) else limits.step
    seconds = 3 * seconds + 30 if name == "torch.compile" else seconds + 5  # the compiler; the check
    context = child_context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=in_child, args=(sender, name, case, limits.memory))
    process.start()
    sender.close()
    try:
        receiver.recv()
        if not receiver.poll(seconds):
            return {"status": "over budget", "reason": f"a step takes more than {seconds:.0f} s"}
        result: dict[str, Any] = receiver.recv()
        process.join(5)
        return result
    except EOFError:
        return {"status": "failed", "reason": "its process died, probably for want of memory"}
    finally:
        process.kill()
        process.join()


def time_step(function: Any, leaves: Any, case: Case, flush: torch.Tensor | None, loss_scale: float) -> float:
    """Seconds of one step; on a GPU between two events, after the cache was flushed."""
    if flush is None:
        begin = time.perf_counter()
        step(function, leaves, SCALE[case.loss], case.gradient, loss_scale)
        return time.perf_counter() - begin
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(function, leaves, SCALE[case.loss], case.gradient, loss_scale)
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * float(start.elapsed_time(end))


def interleaved(
    case: Case,
    names: list[str],
    warm: list[str],
    device: str,
    seconds: float,
    loss_scales: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Times of every contender's steps, in turns; each goes on until it has had ``seconds`` and MIN_STEPS.

    Those in ``warm`` run once or twice before.
    """
    functions = contenders(case.loss, device)[0]
    leaves = leaves_of(case, device)
    flush = torch.empty(2**28, dtype=torch.int8, device=device) if device == "cuda" else None
    times: dict[str, list[float]] = {name: [] for name in names}

    def seconds_of(name: str) -> float:
        return time_step(functions[name], leaves, case, flush, (loss_scales or {}).get(name, 1.0))

    for name in warm:
        if seconds_of(name) < 0.1:
            seconds_of(name)
    running = list(names)
    while running:
        for name in running:
            times[name].append(seconds_of(name))
        running = [
            n for n in running if len(times[n]) < MIN_STEPS or (sum(times[n]) < seconds and len(times[n]) < MAX_STEPS)
        ]
    return times


def measure_case(
    case: Case, names: list[str], device: str, history: History, limits: Limits, left: float
) -> Iterator[dict[str, Any]]:
    """A row for every contender named."""
    torch.compiler.reset()
    deadline = time.monotonic() + left
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        left = deadline - time.monotonic()
        refused = history.refusal(name, case, limits, left)
        if refused is None:
            in_process = device == "cuda"
            result = guarded_probe(name, case, device) if in_process else isolated_probe(name, case, limits, left)
            if "seconds" in result:
                history.add(name, case, result["seconds"], result["peak_bytes"])
        found[name] = refused or result
        if device == "cuda":
            torch.cuda.empty_cache()
    timed = [n for n, row in found.items() if row["status"] == "ok" and row["seconds"] <= LONG]
    loss_scales = {n: found[n]["loss_scale"] for n in timed}
    warm = [n for n in timed if n == "torch.compile" or found[n]["seconds"] < COLD]
    times = interleaved(case, timed, warm, device, limits.seconds, loss_scales) if timed else {}
    rates = measured_rates(device, getattr(torch, case.dtype))
    for name, row in found.items():
        yield report_row(case, name, row, times.get(name), rates, device)


def report_row(
    case: Case, name: str, found: dict[str, Any], times: list[float] | None, rates: Rates, device: str
) -> dict[str, Any]:
    """The line of the data file. Rates in 10⁹ a second."""
    row: dict[str, Any] = case._asdict() | {"contender": name, "status": found["status"]}
    if found["status"] == "ok":
        times = times or [found["seconds"]]
        q = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
        asked = work(case.loss, case.rows, case.dim, getattr(torch, case.dtype).itemsize, case.gradient, device)
        bound = floor(asked, rates)
        median = statistics.median(times)
        row |= {"median_ms": median * 1e3, "p20_ms": q[0] * 1e3, "p80_ms": q[3] * 1e3, "steps": len(times)}
        row |= {"peak_bytes": found["peak_bytes"], "floor_ms": bound.seconds * 1e3, "floor_by": bound.by}
        row |= {"share": bound.seconds / median, "gflops": asked.operations / median * 1e-9}
        row |= {key: value and value * 1e-9 for key, value in rates._asdict().items()}
    row |= {"loss_scale": found["loss_scale"]} if found.get("loss_scale", 1) != 1 else {}
    row |= {key: found[key] for key in ("loss_error", "gradient_error", "reason") if key in found}
    return {k: float(f"{v:.5g}") if isinstance(v, float) and math.isfinite(v) else v for k, v in row.items()}


def show(row: dict[str, Any]) -> None:
    case = ":".join(str(row[f]) for f in Case._fields)
    text = f"{case:<32} {row['contender']:<20} "
    if row["status"] == "ok":
        text += f"{row['median_ms']:11.3f} ms [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}] x{row['steps']:<4}"
        text += f"{row['peak_bytes'] / 1e6:9.1f} MB  {100 * row['share']:5.1f} % of the floor ({row['floor_by']})"
    else:
        text += f"{row['status']}: {row['reason']}"
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=660, help="seconds for everything (default 660)")
    parser.add_argument("--seconds", type=float, help="timed steps of a contender in a case (default 1; GPU 0.3)")
    parser.add_argument("--step-limit", type=float, default=6, help="seconds that a peer's step may take (default 6)")
    parser.add_argument(
        "--memory", type=float, help="GB that a step may take (default half of what is free; GPU 80 %%)"
    )
    parser.add_argument("--cases", nargs="+", type=parse_case, metavar="LOSS:ROWS:DIM[:DTYPE[:DIRECTION]]")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only those whose name starts so")
    parser.add_argument("--output", type=Path, help="data file (default as above)")
    args = parser.parse_args()
    device = device_type()
    if not backends(device):
        reasons = "; ".join(f"{b}: {unavailable_reason(b)}" for b in BACKENDS if unavailable_reason(b))
        print(f"loss.py: no backend to measure on {device}: {reasons}", file=sys.stderr)
        sys.exit(2)
    seconds = args.seconds or (1.0 if device == "cpu" else 0.3)
    memory = args.memory * 1e9 if args.memory else free_memory(device) * (0.5 if device == "cpu" else 0.8)
    limits = Limits(seconds, args.step_limit, memory)
    head = facts(device) | {"limits": limits._asdict(), "budget_seconds": args.budget}
    head["skipped"] = {n: why for loss in LOSSES for n, why in contenders(loss, device)[1].items()}
    deadline = time.monotonic() + args.budget
    history, rows, late = History(), [], []
    path = output_path(parser, args, head, "loss")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.with_suffix(".jsonl").open("w", buffering=1)  # what there is, should a kernel hang
    for case in args.cases or all_cases(device):
        left = deadline - time.monotonic()
        if left < 5 or not_worth_it(case, device, history, left):
            late.append(str(case))
            continue
        names = [n for n in contenders(case.loss, device)[0] if n.startswith(tuple(args.contenders or [""]))]
        for row in measure_case(case, names, device, history, limits, left):
            rows.append(row)
            lines.write(json.dumps(row) + "\n")
            show(row)
    head["over_budget"] = late
    lines.close()
    save(path, head, rows)
    path.with_suffix(".jsonl").unlink()
    cases = dict(sorted(by_case(rows).items(), key=case_order))
    for loss in LOSSES:
        if mine := {case: of_case for case, of_case in cases.items() if case[0] == loss}:
            print(f"\n{text_table(*time_table(loss, mine))}")
    if any(is_ours(row["contender"]) and row["status"] not in ("ok", "over budget") for row in rows):
        sys.exit("loss.py: a backend of ours failed")


def not_worth_it(case: Case, device: str, history: History, left: float) -> bool:
    """Whether the budget does not reach for even one step of ours."""
    expected = [history.expected(n, case) for n in contenders(case.loss, device)[0] if is_ours(n)]
    return bool(expected) and all(e is not None and 1.2 * e[0] > left for e in expected)


if __name__ == "__main__":
    main()
