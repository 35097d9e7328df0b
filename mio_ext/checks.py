# SPDX-License-Identifier: Apache-2.0
"""The checks every loss makes before it runs, the same for all backends.

A message names the op, the argument, what is expected and what came. Nothing here reads a value
from a tensor: that would stall a GPU. A bad temperature or scale in a tensor makes the loss NaN.
"""

from __future__ import annotations

import numbers
import sys

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

IDS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)

#: Floats may be this large in magnitude, and positive ones as small as its reciprocal: then no product with them leaves
#: the arithmetic.
LARGEST = {torch.float32: 1e30, torch.float64: 1e300}

#: A float, or a tensor of one element on the features' device.
Number = float | Tensor


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic, of the loss and of the op's gradients, for features of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_features(op: str, **features: Tensor) -> None:
    """Two feature matrices of one device and width, by name. Raises TypeError or ValueError."""
    (name, first), (other_name, other) = features.items()
    if (
        isinstance(first, Tensor)
        and isinstance(other, Tensor)
        and (first.dim(), other.dim()) == (2, 2)
        and first.dtype is other.dtype
        and first.dtype in DTYPES
        and first.device == other.device
        and first.layout is torch.strided is other.layout
        and first.size(1) > 0
    ):
        return
    for argument, t in features.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {argument} must be a tensor, got {type(t).__name__}")
        if t.dim() != 2:
            raise ValueError(f"{op}: {argument} must be two-dimensional, [B, D], got {list(t.shape)}")
        if t.layout != torch.strided:
            raise TypeError(f"{op}: {argument} must be a dense tensor, got {t.layout}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{op}: {argument} must be float32, float64, bfloat16 or float16, got {t.dtype}")
    if first.shape[1] == 0:
        raise ValueError(f"{op}: {name} must have at least one feature, got {list(first.shape)}")
    if other.device != first.device:
        raise ValueError(f"{op}: {other_name} must be on {first.device} like {name}, got {other.device}")


def in_one_dtype(first: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type that holds both: under autocast one side may come out in 16 bits and the other not."""
    if first.dtype is other.dtype:
        return first, other
    dtype = torch.promote_types(first.dtype, other.dtype)
    return first.to(dtype), other.to(dtype)


def check_number(op: str, name: str, value: Number, like: Tensor, *, positive: bool = False) -> Number:
    """A finite float (> 0 where ``positive``), or a floating tensor of one element on ``like``'s device.

    Returns it ready for arithmetic: a float, or a 0-dim tensor of the loss's dtype.
    """
    if type(value) is float and (1e-30 if positive else -1e30) <= value <= 1e30:  # of every dtype
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{op}: {name} must be a float or a tensor of one element, got {list(value.shape)}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {value.dtype}")
        if value.device != like.device:
            raise ValueError(f"{op}: {name} must be on {like.device} like the features, got {value.device}")
        return value.to(loss_dtype(like.dtype)).reshape(())
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a float or a tensor of one element, got {type(value).__name__}")
    number = value if torch.compiler.is_compiling() else float(value)
    # Comparisons, for the compiler traces them where it cannot trace math.isfinite.
    if not -sys.float_info.max <= number <= sys.float_info.max or (positive and number <= 0):
        kind = "positive and finite" if positive else "finite"
        raise ValueError(f"{op}: {name} must be {kind}, got {value}")
    dtype = loss_dtype(like.dtype)
    largest = LARGEST[dtype]
    if not (1 / largest if positive else -largest) <= number <= largest:
        least = f"{1 / largest:g}" if positive else f"-{largest:g}"
        raise ValueError(f"{op}: {name} must be from {least} to {largest:g} in {dtype}, got {value}")
    return number


def check_ids(op: str, name: str, ids: Tensor, rows: int, like: Tensor) -> None:
    """Integer ids, one a row."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of integers, got {type(ids).__name__}")
    if ids.dtype not in IDS:
        raise TypeError(f"{op}: {name} must be integers, got {ids.dtype}")
    if ids.shape != (rows,):
        raise ValueError(f"{op}: {name} must be [{rows}], an id for each row, got {list(ids.shape)}")
    if ids.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like the features, got {ids.device}")


def is_readable(t: Tensor) -> bool:
    """Whether the host has the values of ``t`` at hand: not on a GPU, and nobody has them where a graph is recorded."""
    return (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(t) is Tensor  # not FakeTensor
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )
