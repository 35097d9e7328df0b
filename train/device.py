# SPDX-License-Identifier: Apache-2.0
"""Where a run computes: device, precision, loss backend and processes."""

from __future__ import annotations

import os
import platform
from typing import Any

import sklearn
import torch
import torchvision

import mio_ext
from train.run_folder import UserError


def choose_device(name: str) -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= count:
            raise UserError(f"--device {name}: torch sees {count} CUDA device(s); pass --device cpu")
    return device


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """auto: where the hardware multiplies bfloat16; emulation is slower than float32."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, hence the getattr
    return supported is not None and supported()


def check_loss_backend(backend: str, device: torch.device) -> None:
    """Find out on four numbers, before anything is set up or written."""
    z = torch.eye(2, device=device)
    try:
        mio_ext.mio_loss(z, z, backend=backend)
    except (RuntimeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--loss-backend {backend}: {reason} (--loss-backend reference runs everywhere)") from error


def versions(device: torch.device) -> dict[str, Any]:
    """What a number in the log depends on beside the configuration."""
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (mio_ext, torch, torchvision, sklearn)},
        "device": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; the CPU allocator only a message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "allocate memory" in str(error) or "not enough memory" in str(error)
