# SPDX-License-Identifier: Apache-2.0
"""The floor of a step: what this machine could do, measured on the spot, and what the loss asks of it.

    floor = max(products / matrix rate, logits · special functions / their rate, bytes / bandwidth)

The unit of work is 2·N²·D operations, one full N × N × D product (docs/performance.md, cost model).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness.paths import ROOT

CPU_LIBRARY_SIZE, GPU_LIBRARY_SIZE = 2048, 8192  #: rows of the library's product
CPU_COPY_BYTES, GPU_COPY_BYTES = 2**27, 2**30


class Rates(NamedTuple):
    """Per second, all threads; None: not found here."""

    matrix: float  #: operations of the fastest product of this type, of those below
    library: float  #: operations of the library's product in this type
    multiply_add: float | None  #: operations of the type's multiply-adds on registers (CPU; float16: float32's)
    special: float  #: exponentials
    bandwidth: float  #: bytes of a copy, read and written


class Work(NamedTuple):
    """What a step asks for."""

    operations: float
    special: float
    bytes: float


class Floor(NamedTuple):
    seconds: float
    by: str  #: what is scarce


def units(loss: str, gradient: bool, device: str) -> float:
    """Full products of a step. MIO's gradient: the upper triangle on a CPU, the square on a GPU."""
    if loss == "mio":
        return 0.5 if not gradient else 1.5 if device == "cpu" else 2.0
    return 3.0 if gradient else 1.0


def work(loss: str, rows: int, dim: int, itemsize: int, gradient: bool, device: str) -> Work:
    """Operations, special functions and bytes of features and gradients.

    A logit costs one exponential, and on a GPU with a gradient also half a reciprocal, which is the same unit's: two
    logits can share one. Logits are those made once: MIO's triangle, but for the square of a GPU's gradient; SigLIP's
    square.
    """
    square = rows**2
    n = units(loss, gradient, device)
    logits = square if loss == "siglip" or n == 2.0 else square / 2
    special = logits * (1.5 if device != "cpu" and gradient else 1)
    tensors = 1 if loss == "mio" else 2
    traffic = tensors * rows * dim * itemsize * (2 if gradient else 1)
    return Work(n * 2 * square * dim, special, traffic)


def floor(of: Work, rates: Rates) -> Floor:
    parts = {
        "matrix": of.operations / rates.matrix,
        "special functions": of.special / rates.special,
        "bandwidth": of.bytes / rates.bandwidth,
    }
    by = max(parts, key=parts.__getitem__)
    return Floor(parts[by], by)


def measured_rates(device: str, dtype: torch.dtype) -> Rates:
    """Half a second's worth of measurement: the best of a few tries each, since a floor is what cannot be beaten."""
    return cpu_rates(dtype) if device == "cpu" else gpu_rates(dtype)


def cpu_rates(dtype: torch.dtype) -> Rates:
    library = library_rate("cpu", CPU_LIBRARY_SIZE, dtype)
    loops = native_loops()
    multiply_add = special = None
    threads = torch.get_num_threads()
    if loops is not None:
        multiply_add = max(loops.multiply_add_rate(threads, 5_000_000) for _ in range(3))
        if dtype == torch.bfloat16:
            multiply_add = max(multiply_add, *(loops.bfloat16_rate(threads, 5_000_000) for _ in range(3)))
        special = max(loops.exponential_rate(threads, 1_000_000) for _ in range(3))
    else:
        x = torch.rand(threads * 2**15)  # stays in the cache
        special = x.numel() / best_of(5, lambda: torch.exp(x))
    bandwidth = copy_rate("cpu", CPU_COPY_BYTES)
    return Rates(max(library, multiply_add or 0), library, multiply_add, special, bandwidth)


def gpu_rates(dtype: torch.dtype) -> Rates:
    library = library_rate("cuda", GPU_LIBRARY_SIZE, dtype)
    matrix = library
    if dtype == torch.float32:  # three products of float16 halves are as exact: docs/triton.md
        matrix = max(library, library_rate("cuda", GPU_LIBRARY_SIZE, torch.float16) / 3)
    bandwidth = copy_rate("cuda", GPU_COPY_BYTES)
    torch.cuda.empty_cache()
    from benchmarks.harness.gpu_rates import exponentials

    count, run = exponentials()
    return Rates(matrix, library, None, count / best_of(5, run, cuda=True), bandwidth)


def library_rate(device: str, size: int, dtype: torch.dtype) -> float:
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best_of(3, lambda: a @ b, cuda=device == "cuda")


def copy_rate(device: str, size: int) -> float:
    source = torch.zeros(size // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * size / best_of(3, lambda: target.copy_(source), cuda=device == "cuda")


def best_of(times: int, function: Callable[[], Any], cuda: bool = False) -> float:
    """Seconds of the fastest run, after one to warm up."""
    best = float("inf")
    for i in range(times + 1):
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            seconds = start.elapsed_time(end) * 1e-3
        else:
            begin = time.perf_counter()
            function()
            seconds = time.perf_counter() - begin
        best = min(best, seconds) if i else best
    return best


@functools.cache
def native_loops() -> ctypes.CDLL | None:
    """rates.cpp, compiled for this machine into build/; None without a compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    source = Path(__file__).with_name("rates.cpp")
    command = [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-pthread", "-shared", "-fPIC"]
    key = hashlib.sha256(source.read_bytes() + str(command).encode()).hexdigest()[:12]
    target = ROOT / "build" / f"rates-{key}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        subprocess.run([*command, str(source), "-o", str(target)], check=True)
    loops = ctypes.CDLL(str(target))
    for function in (loops.multiply_add_rate, loops.bfloat16_rate, loops.exponential_rate):
        function.argtypes, function.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_double
    return loops
