# SPDX-License-Identifier: Apache-2.0
"""The op over all processes with blocks of rows that go round a ring: memory does not grow with their number.

Own rows stay. What the others have passes by, a block at a time, the next one on its way while this one is swept;
the whole gradient is made in the forward pass, and the backward pass sends nothing.

- MIO: G_ij = ∂L/∂s_ij is symmetric, so own rows of G are all of their gradient, and the blocks are rows in their own
  16 bits.
- SigLIP: a block of texts travels with its gradient in float32, to which every process adds; a trip takes it home.
  That counts every process's loss once, so they must all hand the same number to ``backward()``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .checks import Number, loss_dtype
from .exchange import Group, Plan, Ring


class Problem(NamedTuple):
    """What a process sweeps: own rows against the blocks of all."""

    op: str
    group: Group
    plan: Plan
    backend: str
    normalize: bool
    symmetric: bool  #: MIO: the blocks are the rows, each with two views, and no pair of a row with itself
    x_ids: Tensor | None
    y_ids: Tensor | None
    needs_grad: tuple[bool, bool, bool]  #: of rows, of the blocks, of the six numbers


def pairwise_bce(
    op: str,
    group: Group,
    plan: Plan,
    x: Tensor,
    y: Tensor | None = None,
    *,
    scale: tuple[Number, Number],
    bias: Number,
    weights: tuple[Number, Number, Number],
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    normalize: bool = False,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`ops.pairwise_bce` of the own rows ``x`` against all processes' ``y``, or ``x`` if that is None.

    Row i of ``y`` is the positive of row i of ``x`` on the same process; without ``y`` the halves of ``x`` are two
    views of each sample. Or ids say what is positive.

    Returns:
        (loss, statistics [8]): of all processes' rows without ``y``, where the gradient is W times that of the own
        rows; of the own rows against all columns with ``y``.
    """
    params = ops._as_tensor([*scale, bias, *weights], x)
    on = torch.is_grad_enabled()
    needs_grad = (on and x.requires_grad, on and y is not None and y.requires_grad, on and params.requires_grad)
    problem = Problem(op, group, plan, backend, normalize, y is None, x_ids, y_ids, needs_grad)
    return _PairwiseRing.apply(x, y, params, problem)  # type: ignore[no-any-return]


class _PairwiseRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, params: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
        total, *gradients = _go_round(x, y, params, problem)
        ctx.save_for_backward(*gradients)
        ctx.needs_grad, ctx.dtype = problem.needs_grad, x.dtype
        ctx.factor = problem.plan.world if problem.symmetric else 1
        stats = statistics(total)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return total[0].to(loss_dtype(x.dtype)), stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative()
        if grad is None:
            return None, None, None, None
        grad = ctx.factor * grad
        dx, dy, dparams = (g * grad if n else None for g, n in zip(ctx.saved_tensors, ctx.needs_grad, strict=True))
        # Rounded to 16 bits only now, for a loss scale must be able to save small gradients.
        return *(None if g is None else g.to(ctx.dtype) for g in (dx, dy)), dparams, None


def _go_round(x: Tensor, y: Tensor | None, params: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(totals [9], dx, dy, dparams) of the own rows and of the own block; empty where no gradient is wanted."""
    plan, ring = problem.plan, Ring(problem.op, problem.group, problem.plan)
    travels = [x if y is None else y] + ([] if problem.y_ids is None else [problem.y_ids])
    total = torch.zeros(9, dtype=torch.float64, device=x.device)
    dx = dparams = x.new_empty(0)
    home, failure = None, None  # the gradient of a block on its way, and the first error of a sweep
    for process, (block, *ids) in ring.blocks(travels):
        call = _call(x, block, ids, params, problem, own=process == plan.rank)
        try:
            loss, stats, *gradients = _sweep(call, problem.backend)
        except Exception as error:  # the others count on our passing blocks on; none may take a half result for whole
            failure = failure or error
            loss, stats, *gradients = _poison(call)
        total += totals(loss, stats)
        if process == plan.rank:  # the first
            dx, dparams = gradients[0], gradients[2]
        else:
            # Without y: a row of another's block sees this row as its column too, with the same gradient.
            dx.add_(gradients[0], alpha=2 if problem.symmetric else 1)
            dparams.add_(gradients[2])
        if problem.needs_grad[1]:
            if home is not None:
                gradients[1] += home.wait()[0]
            home = ring.pass_on([gradients[1]], plan.rows[(process - 1) % plan.world], tag=1)
        del block, ids, call, gradients  # let go before more comes
    dy = x.new_empty(0) if home is None else home.wait()[0]
    if problem.symmetric:
        dist.all_reduce(total, group=problem.group)  # here, for nobody may wait for one who failed
    if failure is not None:
        raise failure
    return total, dx, dy, dparams


def _call(x: Tensor, block: Tensor, ids: list[Tensor], params: Tensor, problem: Problem, own: bool) -> ops.Call:
    """Own rows against one block. A positive past the last column is none."""
    dx, dy, dparams = problem.needs_grad
    alone = own and problem.symmetric
    return ops.Call(
        x=x,
        y=None if alone else block,
        x_ids=problem.x_ids,
        y_ids=None if alone or not ids else ids[0],
        params=params,
        constants=[],
        shift=len(x) // 2 if alone else 0,
        offset=0 if own or ids else len(block),
        exclude_self=alone,
        normalize=problem.normalize,
        needs_grad=[dx, dy, dparams],
    )


def _sweep(call: ops.Call, backend: str) -> tuple[Tensor, ...]:
    """(loss, stats, dx, dy, dparams) of one call, on the backend."""
    if backend != "reference":
        op = torch.ops.mio_ext.pairwise_bce_triton if backend == "triton" else torch.ops.mio_ext.pairwise_bce
        return op.default(*call)  # type: ignore[no-any-return]
    dtype = loss_dtype(call.x.dtype)
    sides = [None if t is None else t.detach().to(dtype) for t in (call.x, call.y, call.params)]
    leaves = [t.requires_grad_() for t, n in zip(sides, call.needs_grad, strict=True) if t is not None and n]
    with torch.enable_grad():
        assert sides[0] is not None and sides[2] is not None
        a_p, a_n, b, w_p, w_n, w_l = sides[2].unbind()
        loss, stats = ops.pairwise_bce(
            sides[0],
            sides[1],
            scale=(a_p, a_n),
            bias=b,
            # The linear weight is refused without unit rows, even a zero that is a tensor.
            weights=(w_p, w_n, w_l if call.normalize else 0.0),
            x_ids=call.x_ids,
            y_ids=call.y_ids,
            shift=call.shift,
            offset=call.offset,
            exclude_self=call.exclude_self,
            normalize=call.normalize,
            backend="reference",
        )
        found = iter(torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ())
    gradients = []
    for t, n in zip(sides, call.needs_grad, strict=True):
        gradient = next(found) if t is not None and n else call.x.new_empty(0)
        gradients.append(torch.zeros_like(t) if gradient is None and t is not None else gradient)
    return loss.detach(), stats, *gradients


def _poison(call: ops.Call) -> tuple[Tensor, ...]:
    """What :func:`_sweep` would return, of NaN."""
    nan = call.x.new_full((), math.nan, dtype=loss_dtype(call.x.dtype))
    sides = (call.x, call.x if call.y is None else call.y, call.params)
    gradients = (
        nan.expand_as(t).clone() if n and t is not None else nan.new_empty(0)
        for t, n in zip(sides, call.needs_grad, strict=True)
    )
    return nan, nan.double().expand(8), *gradients


def count_positives(op: str, group: Group, plan: Plan, x_ids: Tensor, y_ids: Tensor) -> Tensor:
    """[M], how many rows of all processes' blocks have each own row's id. The ids make a trip of their own."""
    count = torch.zeros_like(x_ids)
    for _, (ids,) in Ring(op, group, plan).blocks([y_ids]):
        columns = ids.sort().values
        count += torch.searchsorted(columns, x_ids, right=True) - torch.searchsorted(columns, x_ids)
    return count


def totals(loss: Tensor, stats: Tensor) -> Tensor:
    """[9] float64 that may be added up: the loss, the two numbers of pairs, six sums over them."""
    counts, means = stats[:2], stats[2:]
    pairs = counts.repeat(3)  # means alternate between positives and negatives
    return torch.cat([loss.detach().double()[None], counts, torch.where(pairs != 0, means * pairs, 0)])


def statistics(total: Tensor) -> Tensor:
    """[8], the fields of :class:`~mio_ext.reference.PairStats`, from :func:`totals`; a mean over no pairs is NaN."""
    counts = total[1:3]
    return torch.cat([counts, total[3:] / counts.repeat(3)])


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("a loss over a process group has no second derivative; drop create_graph=True")
