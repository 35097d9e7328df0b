# SPDX-License-Identifier: Apache-2.0
"""The op ``mio_ext::pairwise_bce`` as Python sees it: its call, its fake implementation, its rule for vmap.

The schema is in csrc/ops.cpp, the gradient in gradient.py, the arithmetic in csrc/cpu/sweep.h; backends.py says
which implementation runs. That of its Triton twin ``mio_ext::pairwise_bce_triton`` is in triton/pairwise_bce.py,
imported when first called.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, gradient, library, reference
from .checks import Number, loss_dtype


class Call(NamedTuple):
    """The op's arguments; csrc/ops.cpp says what they mean."""

    x: Tensor
    y: Tensor | None
    x_ids: Tensor | None
    y_ids: Tensor | None
    params: Tensor | None
    constants: list[float]
    shift: int
    offset: int
    exclude_self: bool
    normalize: bool
    needs_grad: list[bool]
    x2: Tensor | None = None
    tf32: bool = False


def pairwise_bce(
    x: Tensor | tuple[Tensor, Tensor],
    y: Tensor | None = None,
    *,
    scale: tuple[Number, Number] = (1.0, 1.0),
    bias: Number = 0.0,
    weights: tuple[Number, Number, Number] = (1.0, 1.0, 0.0),
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    shift: int = 0,
    offset: int = 0,
    exclude_self: bool = False,
    normalize: bool = False,
    backend: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """:func:`reference.pairwise_bce` on a backend; same arguments, same results, the statistics as float64 [8].

    ``x`` may be two tensors, the first rows and the others.
    16-bit features get exact float32 logits and 16-bit gradients, for which a backend may round σ to bfloat16 or
    float16; autocast changes nothing.
    What csrc/ops.cpp asks of offset and shift holds for fused backends only.

    Raises:
        ValueError: a linear weight without ``normalize``: the fused gradient has no term for the norms.
    """
    if not normalize and (isinstance(weights[2], Tensor) or weights[2] != 0):
        raise ValueError("pairwise_bce: the linear weight needs normalize=True")
    x, x2 = x if isinstance(x, tuple) else (x, None)
    if backend == "reference":
        x = x if x2 is None else torch.cat([x, x2])
        with _without_autocast(x.device.type):
            loss, stats = reference.pairwise_bce(
                _at_least_float32(x),
                None if y is None else _at_least_float32(y),
                scale=scale,
                bias=bias,
                weights=weights,
                x_ids=x_ids,
                y_ids=y_ids,
                shift=shift,
                offset=offset,
                exclude_self=exclude_self,
                normalize=normalize,
            )
        return loss.to(loss_dtype(x.dtype)), torch.stack(stats)
    constants: Any = [*scale, bias, *weights]
    params = None
    # A compiled graph would be specialised on constants, and weights change with the batch size.
    if torch.compiler.is_compiling() or not all(type(n) is float for n in constants):
        params, constants = _as_tensor(constants, x), []
    op = (library.ops().pairwise_bce_triton if backend == "triton" else library.ops().pairwise_bce).default
    needs = [False, False, False]  # gradient.py asks for the gradients that are due
    tf32 = x.dtype == torch.float32 and _takes_tf32(backend)
    call = Call(x, y, x_ids, y_ids, params, constants, shift, offset, exclude_self, normalize, needs, x2, tf32)
    if gradient.is_transformed():
        loss, stats, *_ = op(*call)
        return loss, stats
    return gradient.call(op, call)


@backends.constant_in_graphs
def _takes_tf32(backend: str) -> bool:
    """What torch.set_float32_matmul_precision() sets too; its getter fails once someone has set this one."""
    return backend == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    # The meta device has none.
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _at_least_float32(t: Tensor) -> Tensor:
    return t.float() if t.dtype.itemsize < 4 else t


def _as_tensor(numbers: list[Number], like: Tensor) -> Tensor:
    """The op's ``params``; stack() hands each learnable number its gradient in its own shape."""
    dtype = loss_dtype(like.dtype)
    return torch.stack(
        [
            n.to(dtype).reshape(()) if isinstance(n, Tensor) else torch.full((), n, dtype=dtype, device=like.device)
            for n in numbers
        ]
    )


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    x, y, x2 = call.x, call.y, call.x2
    dtype = loss_dtype(x.dtype)
    rows = x.shape[0] if x2 is None else x.shape[0] + x2.shape[0]
    shapes: tuple[Any, ...] = ((rows, x.shape[1]), (0,) if y is None else y.shape, (6,))
    gradients = (x.new_empty(s if n else (0,), dtype=dtype) for s, n in zip(shapes, call.needs_grad, strict=True))
    return x.new_empty((), dtype=dtype), x.new_empty(8, dtype=torch.float64), *gradients


def _batched(name: str) -> Callable[..., tuple[tuple[Tensor, ...], tuple[int, ...]]]:
    """For torch.func.vmap: a call for each member of the batch, for the op has no such dimension."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        op = getattr(library.ops(), name).default
        calls = []
        for i in range(info.batch_size):
            members = (a.select(d, i) if isinstance(d, int) else a for a, d in zip(arguments, in_dims, strict=True))
            calls.append(op(*members))
        return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])

    return rule


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, in out's type, which for 16-bit operands is float32."""
    with torch.no_grad():
        if a.dtype == out.dtype:
            torch.addmm(out, a, b, out=out)
        elif a.is_cuda:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:  # the CPU has no such product
            torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)


def _run_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .triton.pairwise_bce import pairwise_bce

    return pairwise_bce(*arguments)


if library.failure is None:
    _library: Any = torch.library.Library(library.NAMESPACE, "IMPL")  # type: ignore[no-untyped-call]
    _library.impl("pairwise_bce_triton", _run_triton, "CPU" if backends.interpreted() else "CUDA")
    _library.impl("add_product", add_product, "CompositeExplicitAutograd")
    for _op in ("pairwise_bce", "pairwise_bce_triton"):
        gradient.register(_library, _op)
        torch.library.register_fake(f"{library.NAMESPACE}::{_op}", _fake)
        torch.library.register_vmap(f"{library.NAMESPACE}::{_op}", _batched(_op))
