# SPDX-License-Identifier: Apache-2.0
"""Where a run computes: device, precision, loss backend and processes."""

from __future__ import annotations

import errno
import platform
from typing import Any

import sklearn
import torch
import torchvision

import mio_ext
from mio_ext import selfcheck, verified
from train.errors import UserError
from train.processes import ALONE, Processes


def choose_device(name: str, processes: Processes = ALONE) -> torch.device:
    """The device of this process; every process of a machine gets a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return device
    if device.index is not None and processes.count > 1:
        raise UserError(f"--device {name}: {processes.count} processes need a GPU each; pass --device cuda")
    device = torch.device("cuda", processes.local_rank if device.index is None else device.index)
    if device.index >= (count := torch.cuda.device_count()):
        reason = f", and process {processes.rank} needs one of its own" if processes.count > 1 else ""
        raise UserError(f"--device {name}: torch sees {count} CUDA device(s){reason}; pass --device cpu")
    if processes.count > 1:
        torch.cuda.set_device(device)  # where NCCL works
    return device


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """auto: where the hardware multiplies bfloat16; emulation is slower than float32."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, hence the getattr
    return supported is not None and bool(supported())


def verify_loss_backend(device: torch.device, width: int, processes: Processes = ALONE) -> None:
    """On a GPU of a kind that was never measured, check the fused kernels before "auto" has to choose.

    The first process does, in child processes, and says in a line what came out; the others take its word.
    """
    line, records = processes.from_first(lambda: (selfcheck.ensure(device, torch.float32, width), verified.known()))
    verified.adopt(records)
    if line is not None:
        print(line, flush=True)


def check_loss_backend(backend: str, device: torch.device) -> None:
    """Find out on four numbers, before anything is set up or written."""
    z = torch.eye(2, device=device)
    try:
        mio_ext.mio_loss(z, z, backend=backend)
    except (RuntimeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--loss-backend {backend}: {reason} (--loss-backend reference runs everywhere)") from error


def versions(device: torch.device, processes: Processes = ALONE) -> dict[str, Any]:
    """What a number in the log depends on beside the configuration."""
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (mio_ext, torch, torchvision, sklearn)},
        "device": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": processes.count,
    }


def is_out_of_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; the CPU allocator only a message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "allocate memory" in str(error) or "not enough memory" in str(error)
