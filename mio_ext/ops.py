# SPDX-License-Identifier: Apache-2.0
"""The op ``mio_ext::pairwise_bce`` as Python sees it: backends, fake implementation, autograd.

The schema is in csrc/ops.cpp, the arithmetic in csrc/cpu/pairwise_bce_pass.h. The implementation of its
Triton twin ``mio_ext::pairwise_bce_triton`` is in triton_backend.py, imported when it is first called.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import Number, loss_dtype
from .reference import PairStats

extension: Any = None
try:
    extension = importlib.import_module("mio_ext._C")  # registers the op's schema and C++ kernels
except ImportError as error:
    _build_error = str(error)

#: Triton is imported only when asked for, and looked for only here: torch.compile of 2.11 cannot trace find_spec.
_has_triton = importlib.util.find_spec("triton") is not None

BACKENDS = ("cpu", "cuda", "triton", "reference")

#: What backend="auto" takes, by the type of the features' device; any other device: "reference".
#: CUDA's row is due once a GPU has passed `make gpu-check`; until then a GPU's backend must be asked for.
AUTO = {"cpu": "cpu"}


def unavailable_reason(backend: str) -> str | None:
    """Why ``backend`` cannot run here, in one sentence; None if it can."""
    if backend in ("cpu", "triton") and extension is None:
        return f"the extension is not built ({_build_error}); run: python setup.py build_ext"
    if backend == "triton":
        if not _has_triton:
            return "Triton is not installed"
        return None if torch.cuda.is_available() or _interpreted() else "there is no CUDA GPU"
    if backend == "cuda":
        if extension is None:
            return f"the extension is not built ({_build_error}); run: python setup.py build_ext"
        if extension.cuda is None:
            return "the extension was built without CUDA; FORCE_CUDA=1 python setup.py build_ext does it or says why"
        return None if torch.cuda.is_available() else "there is no CUDA GPU"
    return None


def _interpreted() -> bool:
    """Triton kernels run on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available_backends() -> list[str]:
    """The backends that can run here; ``python -m mio_ext`` also says why the others cannot."""
    return [backend for backend in BACKENDS if unavailable_reason(backend) is None]


def choose_backend(op: str, backend: str, device: torch.device) -> str:
    """The backend to run: "auto" resolved by the table :data:`AUTO`, anything else checked.

    Raises:
        ValueError: unknown backend, or features on a device that it does not run on.
        RuntimeError: the backend cannot run here.
    """
    if backend == "auto":
        backend = AUTO.get(device.type, "reference")
    elif backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    reason = unavailable_reason(backend)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"{op}: backend 'cpu' needs features on the CPU, got {device}")
    if backend in ("cuda", "triton") and device.type != "cuda" and not (backend == "triton" and _interpreted()):
        raise ValueError(f"{op}: backend {backend!r} needs features on a CUDA GPU, got {device}")
    return backend


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
) -> tuple[Tensor, PairStats]:
    """:func:`reference.pairwise_bce` on a backend; same arguments, same results.

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
        return loss.to(loss_dtype(x.dtype)), stats
    numbers = (*scale, bias, *weights)
    # A compiled graph would be specialised on constants, and weights change with the batch size.
    in_tensor = torch.compiler.is_compiling() or any(isinstance(n, Tensor) for n in numbers)
    params = _as_tensor(numbers, x) if in_tensor else None
    constants = [] if params is not None else [float(n) for n in numbers]  # type: ignore[arg-type]
    # Inside forward() gradients are always off, so what is needed is decided out here.
    grad = torch.is_grad_enabled()
    needs_grad = [grad and t is not None and t.requires_grad for t in (x, y, params)]
    needs_grad[0] |= grad and x2 is not None and x2.requires_grad
    loss, stats = PairwiseBCE.apply(
        x, x2, y, params, backend, x_ids, y_ids, constants, shift, offset, exclude_self, normalize, needs_grad
    )
    return loss, PairStats(*stats.unbind())


def _at_least_float32(t: Tensor) -> Tensor:
    return t.float() if t.dtype.itemsize < 4 else t


def _as_tensor(numbers: tuple[Number, ...], like: Tensor) -> Tensor:
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
        ctx: Any, x: Tensor, x2: Tensor | None, y: Tensor | None, params: Tensor | None, *config: Any
    ) -> tuple[Tensor, Tensor]:
        backend, x_ids, y_ids, *rest = config
        op = torch.ops.mio_ext.pairwise_bce_triton if backend == "triton" else torch.ops.mio_ext.pairwise_bce
        loss, stats, dx, dy, dparams = op(x, y, x_ids, y_ids, params, *rest, x2)
        ctx.save_for_backward(dx, dy, dparams)
        ctx.needs_grad = rest[-1]
        ctx.dtype = x.dtype
        ctx.rows = x.shape[0]
        ctx.halves = x2 is not None
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
            return (None,) * 13
        # Rounded to 16 bits only after grad_output: a loss scale must be able to save small gradients. out=
        # makes that one kernel launch.
        dx, dy, dparams = (
            torch.mul(g, grad_loss, out=torch.empty_like(g, dtype=dtype)) if needed else None
            for g, needed, dtype in zip(
                ctx.saved_tensors, ctx.needs_grad, (ctx.dtype, ctx.dtype, grad_loss.dtype), strict=True
            )
        )
        dx2 = None
        if ctx.halves and dx is not None:
            dx, dx2 = dx[: ctx.rows], dx[ctx.rows :]
        return dx, dx2, dy, dparams, *[None] * 9


def _fake(
    x: Tensor,
    y: Tensor | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    params: Tensor | None,
    constants: list[float],
    shift: int,
    offset: int,
    exclude_self: bool,
    normalize: bool,
    needs_grad: list[bool],
    x2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = loss_dtype(x.dtype)

    def wanted(needs: bool, shape: Any) -> Tensor:
        return x.new_empty(shape if needs else (0,), dtype=dtype)

    return (
        wanted(True, ()),
        x.new_empty(8, dtype=torch.float64),
        wanted(needs_grad[0], x.shape if x2 is None else (x.shape[0] + x2.shape[0], x.shape[1])),
        wanted(needs_grad[1], (0,) if y is None else y.shape),
        wanted(needs_grad[2], 6),
    )


def _run_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import triton_backend

    return triton_backend.pairwise_bce(*args)


if extension is not None:
    _library: Any = torch.library.Library("mio_ext", "IMPL")  # type: ignore[no-untyped-call]
    _library.impl("pairwise_bce_triton", _run_triton, "CPU" if _interpreted() else "CUDA")
    for _op in ("pairwise_bce", "pairwise_bce_triton"):
        torch.library.register_fake(f"mio_ext::{_op}", _fake)
