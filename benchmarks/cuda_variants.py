# SPDX-License-Identifier: Apache-2.0
"""Variants of the Hopper kernel's main loop, timed one after the other on one GPU: which order of waits is best?

    python benchmarks/cuda_variants.py [--n 65536] [--d 128]

Each is the sources with one place changed, in a folder of its own under build/variants/, and says beside what
pairwise_bce_cuda_bench measures what benchmarks/cuda_replay.py had predicted. The first is the kernel as it is, the
last too, so that a card that slows down as it gets warm does not decide. All of them are built before any is timed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.paths import ROOT

LOOP = "csrc/cuda/sweep_hopper.cuh"
BENCH = "pairwise_bce_cuda_bench"
COPIED = ("csrc", "tests/native", "benchmarks", "CMakeLists.txt")
GIVE = "    if (consumer == 0 || left > 1) barrier_arrive(other_barrier, T::kThreads);\n"
TAKE = "    barrier_wait(my_barrier, T::kThreads);\n"
FIRST = "  if (consumer == 1) barrier_arrive(other_barrier, T::kThreads);  // the first turn is the other's\n"
BARRIERS = "  const int my_barrier = 1 + consumer, other_barrier = 2 - consumer;\n"
DONE = "      wgmma_wait<1>();\n      hold_all(s[0]);\n"


class Variant(NamedTuple):
    name: str
    why: str
    changes: tuple[tuple[str, str], ...]  #: text of LOOP, and what takes its place
    predicted: str  #: at N = 65,536, D = 128, for bfloat16; docs/journal/cuda.md says how


VARIANTS = (
    Variant("as-it-is", "the consumers take turns at starting their products", (),
            "2,081 clocks a tile if pipes work beside the tensor cores, 3,514 if behind: 2.3 to 3.95 ms"),
    Variant("turn-after-logits", "a turn ends when the logits are there, so that the terms are never in step",
            ((GIVE, ""), (DONE, DONE + "  " + GIVE)),
            "the same within 2 %, and less if the consumers were in step"),
    Variant("no-turns", "nothing orders the consumers", ((GIVE, ""), (TAKE, ""), (FIRST, ""), (BARRIERS, "")),
            "1 to 10 % more"),
    Variant("both-products", "the terms start when the gradient before is done too, beside the other's products",
            ((DONE, DONE.replace("1", "0")),), "1 to 2 % more"),
)  # fmt: skip


def source(variant: Variant) -> str:
    text = (ROOT / LOOP).read_text()
    for old, new in variant.changes:
        if text.count(old) != 1:
            raise ValueError(f"{variant.name}: {LOOP} no longer has this text once:\n{old}")
        text = text.replace(old, new)
    return text


def build(variant: Variant) -> Path:
    folder = ROOT / "build" / "variants" / variant.name
    shutil.rmtree(folder, ignore_errors=True)
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, folder / name)
    (folder / LOOP).write_text(source(variant))
    options = ["-DCMAKE_CUDA_ARCHITECTURES=90a-real", "-DMIO_CUDA=ON"]
    for command in (["-S", ".", "-B", "build", *options], ["--build", "build", "-j", "--target", BENCH]):
        subprocess.run(["cmake", *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "build" / BENCH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=65_536)
    parser.add_argument("--d", type=int, default=128)
    args = parser.parse_args()
    built = [(variant, build(variant)) for variant in VARIANTS]
    bad = 0
    for variant, program in (*built, built[0]):
        print(f"{variant.name}: {variant.why}\n  predicted: {variant.predicted}", flush=True)
        done = subprocess.run(
            [str(program), "--n", str(args.n), "--d", str(args.d)], capture_output=True, text=True, check=False
        )
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "hopper" in line or "differs" in line]
        print("".join(f"  measured: {line}\n" for line in lines), end="", flush=True)
        bad += done.returncode != 0
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
