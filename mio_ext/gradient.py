# SPDX-License-Identifier: Apache-2.0
"""The gradient of the op, on the op itself: whatever calls it meets this, whether through ops.py, a compiler, an
exported graph or torch.func. The gradient is made along with the loss; the backward pass only scales it.

torch's stable ABI has no autograd, so this is Python: :func:`register` puts it before the implementations, where the
dispatcher calls it, and :func:`call` is the short way there, for a plain call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

if TYPE_CHECKING:
    from .ops import Call

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # loss, stats, dx, dy, dparams


class _Gradient(_SingleLevelFunction):
    """The loss of what ``run`` returns, and its gradient. The statistics have none and go to ``stats``.

    With a history dx, dy and dparams are returned too, and to differentiate them is refused: no second derivative is
    silently zero, however the first was taken.

    autograd.Function takes a call inside torch.func for one that every level is still to see. Here the dispatcher
    calls, once for each level and with its tensors.
    """

    apply: Any
    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x2: Tensor | None,
        y: Tensor | None,
        params: Tensor | None,
        run: Callable[[], Outputs],
        stats: list[Tensor],
        history: bool,
    ) -> Any:
        loss, statistics, *gradients = run()
        stats.append(statistics)
        ctx.save_for_backward(*gradients)
        ctx.dtype, ctx.rows = x.dtype, None if x2 is None else x.shape[0]
        # In torch.func.grad and its like gradients are always on; there the history has to say what is differentiated.
        ctx.transform = history and _C._are_functorch_transforms_active()
        if not history:
            return loss
        ctx.set_materialize_grads(False)
        return loss, *gradients

    @staticmethod
    def backward(ctx: Any, by: Tensor | None, *others: Tensor | None) -> Any:
        if any(o is not None for o in others) or (torch.is_grad_enabled() and not ctx.transform):
            raise RuntimeError(
                "pairwise_bce: a fused backend has no second derivative; pass backend='reference' for create_graph=True"
            )
        if by is None:
            return (None,) * 7
        dx, dy, dparams = ctx.saved_tensors
        of_x, of_x2, of_y, of_params, *_ = ctx.needs_input_grad
        rows, dtype = ctx.rows, ctx.dtype
        return (
            # A storage of its own for each: whoever keeps or saves one must not keep both.
            _scaled(dx if rows is None else dx[:rows], by, dtype) if of_x else None,
            _scaled(dx[rows:], by, dtype) if of_x2 else None,
            _scaled(dy, by, dtype) if of_y else None,
            dparams * by if of_params else None,
            None,
            None,
            None,
        )


def _scaled(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to 16 bits only after the product: a loss scale must be able to save small gradients."""
    if gradient.dtype == dtype:
        return gradient * by
    # One kernel launch, where nobody differentiates, batches or traces it.
    if not (torch.is_grad_enabled() or is_transformed() or _C._functorch.is_legacy_batchedtensor(by)) and (
        type(gradient) is type(by) is Tensor
    ):
        return torch.mul(gradient, by, out=torch.empty_like(gradient, dtype=dtype))
    return (gradient * by).to(dtype)


def is_transformed() -> bool:
    """Whether a compiler or torch.func is at work, to which the op itself must be shown."""
    return torch.compiler.is_compiling() or _C._are_functorch_transforms_active()


def _raised(error: RuntimeError) -> Exception:
    """The stable ABI knows one kind of exception; csrc/tensor.h says what they begin with."""
    message = str(error)
    if type(error) is not RuntimeError:
        return error
    if message.startswith("pairwise_bce: "):
        return ValueError(message)
    if message.startswith("out of memory: "):
        return torch.OutOfMemoryError(message)
    return error


def _needs(x: Tensor, x2: Tensor | None, y: Tensor | None, params: Tensor | None) -> list[bool]:
    return [
        x.requires_grad or (x2 is not None and x2.requires_grad),
        y is not None and y.requires_grad,
        params is not None and params.requires_grad,
    ]


def call(op: Any, arguments: Call) -> tuple[Tensor, Tensor]:
    """Loss and statistics of a plain call: what :func:`register` would have the dispatcher do, by a shorter way.

    Sets ``arguments.needs_grad``.
    """
    x, y, _, _, params, _, _, _, _, _, needs, x2, _ = arguments
    if forward_ad._current_level >= 0:  # somebody may want a tangent
        loss, stats, *_ = op(*arguments)
        return loss, stats

    def run() -> Outputs:
        with _C._AutoDispatchBelowAutograd():
            outputs: Outputs = op(*arguments)
            return outputs

    try:
        if torch.is_grad_enabled():
            needs[:] = _needs(x, x2, y, params)
            if True in needs:
                made: list[Tensor] = []
                return _Gradient.apply(x, x2, y, params, run, made, False), made[0]
        loss, stats, *_ = run()
        return loss, stats
    except RuntimeError as error:
        raise _raised(error) from None


@contextmanager
def _differentiating() -> Iterator[None]:
    """What autograd.Function has turned off in its forward pass."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def _has_tangent(t: Tensor | None) -> bool:
    return t is not None and forward_ad.unpack_dual(t).tangent is not None


def register(library: torch.library.Library, name: str) -> None:
    """Give op ``name`` of the library's namespace its gradient.

    It sees what requires a gradient at its own level of torch.func, so it is what asks the implementation for one;
    callers need not.
    """
    op = getattr(getattr(torch.ops, library.ns), name).default

    def differentiable(keys: Any, *arguments: Any) -> Any:
        from .ops import Call

        call = Call(*arguments)
        inputs = (call.x, call.x2, call.y, call.params)
        if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
            raise NotImplementedError(
                "pairwise_bce: a fused backend has no forward-mode derivative; pass backend='reference' for "
                "torch.func.jvp, jacfwd or hessian"
            )
        due = _needs(*inputs) if torch.is_grad_enabled() else [False] * 3
        call = call._replace(needs_grad=[a or b for a, b in zip(call.needs_grad, due, strict=True)])

        def run() -> Any:
            # The next level of torch.func differentiates what this one calls.
            next_level = _C._are_functorch_transforms_active()
            with _C._AutoDispatchBelowAutograd(), _differentiating() if next_level else nullcontext():
                return op.redispatch(keys & _C._after_autograd_keyset, *call)

        try:
            if True not in due:
                return run()
            stats: list[Tensor] = []
            with enable_single_level_autograd_function():
                loss, *gradients = _Gradient.apply(*inputs, run, stats, True)
            return loss, stats[0], *gradients
        except RuntimeError as error:
            raise _raised(error) from None

    library.impl(name, differentiable, "Autograd", with_keyset=True)
