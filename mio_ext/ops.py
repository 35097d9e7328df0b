# SPDX-License-Identifier: Apache-2.0
"""The op ``mio_ext::pairwise_bce`` as Python sees it: its call, fake implementation, autograd.

The schema is in csrc/ops.cpp, the arithmetic in csrc/cpu/sweep.h; backends.py says which implementation
runs. That of its Triton twin ``mio_ext::pairwise_bce_triton`` is in triton/pairwise_bce.py, imported when first called.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, reference
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
        with torch.autocast(x.device.type, enabled=False):
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
    needs_grad = [False, False, False]
    if torch.is_grad_enabled():  # asked out here, for inside forward() gradients are always off
        needs_grad[0] = x.requires_grad or (x2 is not None and x2.requires_grad)
        needs_grad[1] = y is not None and y.requires_grad
        needs_grad[2] = params is not None and params.requires_grad
    call = Call(x, y, x_ids, y_ids, params, constants, shift, offset, exclude_self, normalize, needs_grad, x2)
    return PairwiseBCE.apply(x, x2, y, params, call, backend)  # type: ignore[no-any-return]


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


class PairwiseBCE(torch.autograd.Function):
    """The differentiable face of the op. The gradient is made along with the loss; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x2: Tensor | None, y: Tensor | None, params: Tensor | None, call: Call, backend: str
    ) -> tuple[Tensor, Tensor]:
        op = torch.ops.mio_ext.pairwise_bce_triton if backend == "triton" else torch.ops.mio_ext.pairwise_bce
        loss, stats, dx, dy, dparams = op.default(*call)
        ctx.save_for_backward(dx, dy, dparams)
        ctx.needs_grad, ctx.dtype = call.needs_grad, x.dtype
        ctx.halves = None if x2 is None else (x.shape[0], x2.shape[0])
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # zeros for stats would be a kernel launch
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "pairwise_bce: a fused backend has no second derivative; pass backend='reference' for create_graph=True"
            )
        if grad_loss is None:
            return None, None, None, None, None, None
        saved, needed = ctx.saved_tensors, ctx.needs_grad
        dx = _scaled(saved[0], grad_loss, ctx.dtype) if needed[0] else None
        dy = _scaled(saved[1], grad_loss, ctx.dtype) if needed[1] else None
        dparams = saved[2] * grad_loss if needed[2] else None
        dx2 = None
        if ctx.halves is not None and dx is not None:
            dx, dx2 = dx.split_with_sizes(ctx.halves)
        return dx, dx2, dy, dparams, None, None


def _scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``, rounded to 16 bits only after the product: a loss scale must be able to save small gradients."""
    if gradient.dtype == dtype:
        return gradient * by
    return torch.mul(gradient, by, out=torch.empty_like(gradient, dtype=dtype))  # one kernel launch


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    x, y, x2 = call.x, call.y, call.x2
    dtype = loss_dtype(x.dtype)
    rows = x.shape[0] if x2 is None else x.shape[0] + x2.shape[0]
    shapes: tuple[Any, ...] = ((rows, x.shape[1]), (0,) if y is None else y.shape, (6,))
    gradients = (x.new_empty(s if n else (0,), dtype=dtype) for s, n in zip(shapes, call.needs_grad, strict=True))
    return x.new_empty((), dtype=dtype), x.new_empty(8, dtype=torch.float64), *gradients


def _run_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .triton.pairwise_bce import pairwise_bce

    return pairwise_bce(*arguments)


if backends.extension is not None:
    _library: Any = torch.library.Library("mio_ext", "IMPL")  # type: ignore[no-untyped-call]
    _library.impl("pairwise_bce_triton", _run_triton, "CPU" if backends.interpreted() else "CUDA")
    for _op in ("pairwise_bce", "pairwise_bce_triton"):
        torch.library.register_fake(f"mio_ext::{_op}", _fake)
