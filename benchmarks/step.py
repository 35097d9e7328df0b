# SPDX-License-Identifier: Apache-2.0
"""What share of a real pre-training step is the loss? So that nobody is promised a faster training than there is.

    python benchmarks/step.py                    # CPU or GPU, whatever is there; within --budget seconds

A step is train/pretrain.py's: two augmented views, ResNet and projector under bfloat16 where the hardware has it,
loss, backward, SGD. Every loss is timed on the embeddings of the same step, forward and backward; all else is
timed once. Images are random. Writes benchmarks/results/<device>/step.json and .csv; with any option it writes to
build/benchmarks/ instead, unless told by --output.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness.contenders import SCALE, Loss, contenders, step
from benchmarks.harness.machine import device_type, facts, free_memory, output_path, save
from benchmarks.harness.report_steps import step_table
from benchmarks.harness.tables import is_ours, text_table
from train.augment import Preprocess, ViewRanges
from train.config import Config
from train.device import is_out_of_memory, use_bfloat16
from train.model import build_model, resolve_stem
from train.optimizer import parameter_groups

BATCHES = [128, 256, 512, 1024, 2048, 4096]
SHOWN = ("mio_ext", "eager", "torch.compile", "paper")  #: contenders of benchmarks/loss.py that take part
PAPER_BYTES = 24  #: per element of its N × N × D tensors: six of them at once, float32
REPEATS = 3


class Case(NamedTuple):
    model: str
    image_size: int  #: pixels
    batch: int  #: images; each gives two views


def cost(case: Case) -> float:
    """How long a step takes, in some unit."""
    return {"resnet18": 1.0, "resnet50": 2.5}[case.model] * case.image_size**2 * case.batch


def all_cases(device: str) -> list[Case]:
    """The cheapest first; on a CPU also the images of the default run, 8 pixels."""
    sizes = [8, 32] if device == "cpu" else [32]
    cases = [Case(m, size, batch) for size, m, batch in itertools.product(sizes, ["resnet18", "resnet50"], BATCHES)]
    return sorted(cases, key=cost)


class Trainer:
    """Everything of a step but the loss."""

    def __init__(self, case: Case, device: str) -> None:
        config = Config()
        torch.manual_seed(0)
        stem = resolve_stem("auto", case.image_size)
        self.model = build_model(case.model, 3, stem, config.projector).to(device)
        mean = std = torch.full((3,), 0.5, device=device)
        self.preprocess = Preprocess(mean, std, case.image_size, ViewRanges())
        self.optimizer = torch.optim.SGD(parameter_groups(self.model, config), lr=0.0, momentum=0.9)
        shape = (case.batch, 3, case.image_size, case.image_size)
        self.images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        self.generator = torch.Generator(device).manual_seed(0)
        self.device, self.bfloat16 = device, use_bfloat16("auto", torch.device(device))

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, losses: dict[str, Loss]) -> tuple[float, dict[str, float]]:
        """(seconds of all else, seconds of every loss); the last loss's gradient goes on to the network."""
        begin = self.now()
        views = self.preprocess.views(self.images.repeat(2, 1, 1, 1), self.generator)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            z = self.model(views)
        z = z.float()
        leaves = tuple(half.detach().clone().requires_grad_() for half in z.chunk(2))
        seconds = self.now() - begin
        times = {}
        for name, loss in losses.items():
            begin = self.now()
            step(loss, leaves, SCALE["mio"], gradient=True)
            times[name] = self.now() - begin
        begin = self.now()
        z.backward(torch.cat([leaf.grad for leaf in leaves]))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return seconds + self.now() - begin, times


def losses_for(case: Case, device: str, memory: float, compile_too: bool) -> tuple[dict[str, Loss], dict[str, str]]:
    """(contenders, those left out with the reason); ours comes last, so that its gradient is used."""
    functions, left_out = contenders("mio", device)[0], {}
    needed = PAPER_BYTES * (2 * case.batch) ** 2 * Config().projector[-1]
    if needed > memory:
        left_out["paper"] = f"out of memory: about {needed / 1e9:.1f} GB of {memory / 1e9:.1f} GB"
    if not compile_too:
        left_out["torch.compile"] = "over budget: compiled for every batch size"
    shown = {n: f for n, f in functions.items() if n.startswith(SHOWN) and n not in left_out}
    return dict(sorted(shown.items(), key=lambda item: is_ours(item[0]))), left_out


def measure(case: Case, device: str, memory: float, compile_too: bool) -> Iterator[dict[str, Any]]:
    losses, left_out = losses_for(case, device, memory, compile_too)
    torch.compiler.reset()
    trainer = Trainer(case, device)
    trainer.step(losses)  # warm-up
    runs = [trainer.step(losses) for _ in range(REPEATS)]
    rest = statistics.median(seconds for seconds, _ in runs)
    for name in losses:
        loss = statistics.median(times[name] for _, times in runs)
        row = case._asdict() | {"contender": name, "status": "ok", "bfloat16": trainer.bfloat16, "steps": REPEATS}
        row |= {"loss_ms": loss * 1e3, "rest_ms": rest * 1e3, "share": loss / (loss + rest)}
        row["images_per_second"] = case.batch / (loss + rest)
        yield {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
    for name, reason in left_out.items():
        status, _, detail = reason.partition(": ")
        yield case._asdict() | {"contender": name, "status": status, "reason": detail}


def expected_seconds(case: Case, seen: dict[Case, float]) -> float:
    """Of the whole case, from the largest one seen; at first a guess."""
    near = max(seen, key=cost, default=None)
    return seen[near] * cost(case) / cost(near) if near else 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=220, help="seconds for everything (default 220)")
    parser.add_argument("--memory", type=float, help="GB that a loss may take (default half of what is free)")
    parser.add_argument("--output", type=Path, help="data file (default as above)")
    args = parser.parse_args()
    device = device_type()
    memory = args.memory * 1e9 if args.memory else free_memory(device) / 2
    head = facts(device) | {"budget_seconds": args.budget, "memory_bytes": memory}
    deadline = time.monotonic() + args.budget
    rows: list[dict[str, Any]] = []
    seen: dict[Case, float] = {}
    late: list[str] = []
    for case in all_cases(device):
        begin = time.monotonic()
        if expected_seconds(case, seen) > deadline - begin:
            late.append(f"{case.model}, {case.image_size} px, batch {case.batch}")
            continue
        try:
            found = list(measure(case, device, memory, compile_too=device == "cuda" or case.batch in (128, 1024)))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            found = [case._asdict() | {"contender": "all", "status": "out of memory", "reason": "the network"}]
        seen[case] = time.monotonic() - begin
        rows += found
        for row in found:
            print({k: v for k, v in row.items() if k != "bfloat16"}, flush=True)
    head["over_budget"] = late
    save(output_path(parser, args, head, "step"), head, rows)
    print(f"\n{text_table(*step_table(rows))}")


if __name__ == "__main__":
    main()
