# SPDX-License-Identifier: Apache-2.0
"""What can run the op here, and which of it ``backend="auto"`` takes.

On the CPU that is the CPU kernel. On a GPU of a kind we have measured, :data:`AUTO` says; on any other, the record
that ``python -m mio_ext check`` has made on this machine (:mod:`mio_ext.selfcheck`); else the dense reference, with
one warning. Nothing here reads a tensor's value, and nothing is tried out inside a call.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import library

#: Triton is imported only when asked for, and looked for only here: torch.compile of 2.11 cannot trace find_spec.
_has_triton = importlib.util.find_spec("triton") is not None

F = TypeVar("F", bound=Callable[..., Any])
BACKENDS = ("cpu", "cuda", "triton", "reference")
#: Rows wider than this take another path than the fused kernels of a GPU.
WIDE = 256


class Cell(NamedTuple):
    """What ``auto`` tells apart on a GPU."""

    dtype: torch.dtype  #: of the features
    wide: bool  #: D > 256

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {'D > 256' if self.wide else 'D <= 256'}"


CELLS = [Cell(d, w) for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64) for w in (False, True)]

#: What ``auto`` takes on GPUs that we have measured, by compute capability; benchmarks/results/ holds the figures, and
#: says of which commit.
AUTO: dict[tuple[int, int], dict[Cell, str]] = {
    (9, 0): {cell: "cuda" for cell in CELLS if cell.dtype != torch.float64},
}


class Choice(NamedTuple):
    """What ``auto`` takes, and why in a few words."""

    backend: str
    why: str


def unavailable_reason(backend: str) -> str | None:
    """Why ``backend`` cannot run here, in one sentence; None if it can."""
    if backend != "reference" and library.failure is not None:
        return library.failure
    if backend == "triton":
        if not _has_triton:
            return "Triton is not installed"
        return None if torch.cuda.is_available() or interpreted() else "there is no CUDA GPU"
    if backend == "cuda":
        if library.cuda_failure is not None:
            return library.cuda_failure
        return library.cuda_mismatch() if torch.cuda.is_available() else "there is no CUDA GPU"
    return None


def interpreted() -> bool:
    """Triton kernels run on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available_backends() -> list[str]:
    """The backends that can run here; ``python -m mio_ext`` also says why the others cannot."""
    return [backend for backend in BACKENDS if unavailable_reason(backend) is None]


def choose_backend(op: str, backend: str, features: Tensor) -> str:
    """The backend to run on ``features`` [B, D]: "auto" resolved, anything else checked.

    Raises:
        ValueError: unknown backend, or features on a device that it does not run on.
        RuntimeError: the backend cannot run here.
    """
    device = features.device
    if backend == "auto":
        backend = "cpu" if device.type == "cpu" else _auto(device, features.dtype, _is_wide(features))
    elif backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return backend
    reason = unavailable_reason(backend)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"{op}: backend 'cpu' needs features on the CPU, got {device}")
    if backend in ("cuda", "triton") and device.type != "cuda" and not (backend == "triton" and interpreted()):
        raise ValueError(f"{op}: backend {backend!r} needs features on a CUDA GPU, got {device}")
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            f"{op}: torch.jit.trace, and so TensorBoard's add_graph, cannot record backend {backend!r}; "
            "pass backend='reference', or use torch.export"
        )
    return backend


def constant_in_graphs(function: F) -> F:
    """torch.compiler.assume_constant_result, without the compiler: it takes a second and a half to import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _is_wide(features: Tensor) -> bool:
    # A branch, so that it is a constant where the compiler does not know the width.
    if features.shape[1] > WIDE:  # noqa: SIM103
        return True
    return False


@constant_in_graphs
def _auto(device: torch.device, dtype: torch.dtype, wide: bool) -> str:
    if device.type != "cuda":
        return "reference"
    return _auto_on_gpu(device.index, Cell(dtype, wide)).backend


@functools.cache
def _auto_on_gpu(index: int | None, cell: Cell) -> Choice:
    """:func:`auto_on_gpu`, once a process, with a warning where it is the reference for want of anything better."""
    choice = auto_on_gpu(index, cell)
    if choice.backend == "reference":
        warnings.warn(f"mio_ext: backend='auto' takes the dense reference for {cell}: {choice.why}", stacklevel=2)
    return choice


def auto_on_gpu(index: int | None, cell: Cell) -> Choice:
    """What ``auto`` takes on GPU number ``index`` (None: the current one)."""
    from . import verified

    if not torch.cuda.is_available():
        return Choice("reference", "there is no CUDA GPU")
    major, minor = torch.cuda.get_device_capability(index)
    measured = AUTO.get((major, minor), {}).get(cell)
    if measured is not None and unavailable_reason(measured) is None:
        return Choice(measured, f"measured on compute capability {major}.{minor}")
    backend = verified.backend_for(index, cell)
    if backend is not None and unavailable_reason(backend) is None:
        return Choice(backend, "verified on this GPU")
    why = f"no fused backend is verified on this GPU, compute capability {major}.{minor}"
    if measured is not None:
        why = f"{measured!r} would be faster, but {unavailable_reason(measured)}"
    return Choice("reference", f"{why}; to verify one, run: python -m mio_ext check")


def forget_choices() -> None:
    """Look at the record of ``python -m mio_ext check`` again at the next call."""
    _auto_on_gpu.cache_clear()
