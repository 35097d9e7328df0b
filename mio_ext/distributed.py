# SPDX-License-Identifier: Apache-2.0
"""The same losses over the batches of all processes of a group (``torch.distributed``; Gloo or NCCL).

Every process calls with its own rows, as many as it has, and gets gradients for them. The rows of the others are
gathered in their own 16 bits for one sweep of the op, or go round in a ring and are swept block by block, so that
memory does not grow with the number of processes: ``exchange="gather"`` or ``"ring"``; ``"auto"`` is the ring where
gathered rows, and their gradient, would take more than a sixteenth of a device's memory. No process ever sweeps more
than its share of the pairs, and the N × N matrix does not exist.

Gradients follow open_clip's convention: **the mean over the processes**, which is what
``DistributedDataParallel`` makes of the parameters' gradients, is exactly the gradient of the loss of the whole
batch. A temperature, scale or bias that is learnt must be averaged in the same way, so let it be a parameter
of the wrapped module.

Without a process group there is one process, and these are the functions of :mod:`mio_ext.losses`: the same
line trains alone and under ``torchrun``.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks, losses, ops, ring
from .backends import choose_backend
from .checks import Number
from .exchange import Group, agree, gather, place, scatter_sum
from .losses import MIOOptions, SigLIPOptions
from .reference import PairStats

__all__ = [
    "gather_rows",
    "global_sum",
    "mio_loss",
    "place",
    "siglip_loss",
]


@overload
def mio_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    group: Group = ...,
    exchange: str = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[MIOOptions],
) -> Tensor: ...
@overload
def mio_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    group: Group = ...,
    exchange: str = ...,
    return_stats: Literal[True],
    **options: Unpack[MIOOptions],
) -> tuple[Tensor, PairStats]: ...
@overload
def mio_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    group: Group = ...,
    exchange: str = ...,
    return_stats: bool,
    **options: Unpack[MIOOptions],
) -> Tensor | tuple[Tensor, PairStats]: ...
def mio_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    group: Group = None,
    exchange: str = "auto",
    temperature: Number = 0.5,
    negative_temperature: Number | None = None,
    negative_weight: Number = 1.0,
    regularizer: Number = 1.0,
    bias: Number | None = None,
    labels: Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PairStats]:
    r""":func:`mio_ext.mio_loss` of the batch of all W processes: B·W samples, N = 2BW rows, all N² pairs.

    The value (and the statistics) are those of the whole batch, the same on every process. The gradient that
    a process gets is W times that of this value with respect to its own z1 and z2, so that the mean over
    processes is right; see :mod:`mio_ext.distributed`.

    Its G_ij = ∂L/∂s_ij is symmetric (eq. (7)–(8)), so a row's gradient as a row and as a column are the same
    and eq. (9) needs own rows of G only: one all-gather of [2B, D], or one trip of them round the ring, and one
    all-reduce of nine numbers in the forward pass, **no communication in the backward pass**.

    Args:
        z1, z2: [B, D], B ≥ 1; the same D on every process. B may differ: a sample counts as much on any process.
        group: the process group; None: the default one.
        exchange: "auto", "gather" or "ring", how own rows meet those of the others; the same on every process.
        labels: integers [B] of the own samples.
            Everything else as in :func:`mio_ext.mio_loss`, and the same on every process.

    Raises:
        TypeError, ValueError: a bad argument; the processes do not agree on D, dtype, labels or exchange. They ask
            each other from host to host before anything else is sent; no GPU is waited for. ``torch.compile`` skips
            that, so there every B must be the same.
        RuntimeError: the backend cannot run here; a second derivative was asked for; a process is gone.

    Source: arXiv 2111.12664, version 1.
    """
    op = "mio_loss"
    _, world = place(op, group)
    if world == 1:
        return losses.mio_loss(
            z1,
            z2,
            temperature=temperature,
            negative_temperature=negative_temperature,
            negative_weight=negative_weight,
            regularizer=regularizer,
            bias=bias,
            labels=labels,
            backend=backend,
            return_stats=return_stats,
        )
    numbers, ids = losses.mio_arguments(
        op, z1, z2, temperature, negative_temperature, negative_weight, regularizer, bias, labels, processes=world
    )
    z1, z2 = checks.in_one_dtype(z1, z2)
    backend = choose_backend(op, backend, z1)
    x = torch.cat([z1, z2])
    plan = agree(op, group, x, len(x), ids=ids is not None, form=exchange)
    batch, dim = sum(plan.rows) // 2, z1.shape[1]
    if plan.ring:
        if ids is None:
            weights = losses.mio_weights(batch, dim, numbers, None)
        else:
            equal = ring.count_positives(op, group, plan, ids, ids).sum()
            dist.all_reduce(equal, group=group)
            weights = losses.supervised_weights(2 * batch, dim, numbers, equal)
        loss, stats = ring.pairwise_bce(
            op, group, plan, x, scale=numbers.scale, bias=numbers.bias, weights=weights, x_ids=ids, y_ids=ids,
            normalize=True, backend=backend,
        )  # fmt: skip
        return (loss, PairStats(*stats.unbind())) if return_stats else loss
    all_ids = None if ids is None else gather(ids, plan.rows, group)
    loss, stats = ops.pairwise_bce(
        _Twice.apply(x),  # as a row and as a column
        gather(x.detach(), plan.rows, group),  # rank by rank [z1; z2]
        scale=numbers.scale,
        bias=numbers.bias,
        weights=losses.mio_weights(batch, dim, numbers, all_ids),
        x_ids=ids,
        y_ids=all_ids,
        shift=len(z1),
        offset=plan.start,
        exclude_self=True,
        normalize=True,
        backend=backend,
    )
    total = ring.totals(loss, stats)
    dist.all_reduce(total, group=group)
    loss = _Value.apply(loss, total[0].to(loss.dtype), world)
    return (loss, PairStats(*ring.statistics(total).unbind())) if return_stats else loss


@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = ...,
    *,
    group: Group = ...,
    exchange: str = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[SigLIPOptions],
) -> Tensor: ...
@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = ...,
    *,
    group: Group = ...,
    exchange: str = ...,
    return_stats: Literal[True],
    **options: Unpack[SigLIPOptions],
) -> tuple[Tensor, PairStats]: ...
@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = ...,
    *,
    group: Group = ...,
    exchange: str = ...,
    return_stats: bool,
    **options: Unpack[SigLIPOptions],
) -> Tensor | tuple[Tensor, PairStats]: ...
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = None,
    *,
    group: Group = None,
    exchange: str = "auto",
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    normalize: bool = False,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PairStats]:
    r""":func:`mio_ext.siglip_loss` of the own M images against the texts of all processes, as in open_clip.

    With ℓ_ij = logit_scale · x_i·y_j + logit_bias, i over the own images and j over **all** texts::

        −1/M Σ_i Σ_j log σ(±ℓ_ij),   + on positive pairs, − on all others

    As in open_clip the value is that of the own images, divided by their number, and is not averaged over
    processes; its mean over them is the loss of the whole batch, and the mean of the gradients its gradient.

    "gather": one all-gather of the texts forward, one reduce-scatter of their gradient backward (in float32, none
    for frozen texts): 3 units of 2·M·(K·W)·D operations. "ring": a block of texts travels with its gradient, to which
    every process adds, and nothing is sent backward; so **all processes must weigh their losses alike** (a scaler's
    common scale is fine). Where they do not, pass "gather", which is right for any weights.

    Args:
        image_features: [M, D].
        text_features: [K, D], the same D on every process; text i is the positive of image i, so M ≤ K, unless ids
            say otherwise. M and K may differ from process to process: the value is then W/ΣM instead of 1/M times
            the sum, so that its mean over processes is the loss of the whole batch.
        group: the process group; None: the default one.
        exchange: "auto", "gather" or "ring"; the same on every process.
        image_ids, text_ids: integers [M] and [K]; pairs of one id are positive on whatever processes they are.
            Everything else as in :func:`mio_ext.siglip_loss`; scale and bias the same on every process.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mio_loss` of this module.

    Source: arXiv 2303.15343, algorithm 1.
    """
    op = "siglip_loss"
    _, world = place(op, group)
    if world == 1:
        return losses.siglip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            image_ids=image_ids,
            text_ids=text_ids,
            normalize=normalize,
            backend=backend,
            return_stats=return_stats,
        )
    # What only one process would complain about must be found before the others wait for it.
    logit_scale, logit_bias, image_ids, text_ids = losses.siglip_arguments(
        op, image_features, text_features, logit_scale, logit_bias, image_ids, text_ids
    )
    image_features, text_features = checks.in_one_dtype(image_features, text_features)
    m, k = len(image_features), len(text_features)
    if image_ids is None and m > k:
        raise ValueError(f"{op}: text_features must have a text for each of {m} images, got {k}")
    backend = choose_backend(op, backend, image_features)
    plan = agree(
        op,
        group,
        text_features,
        m,
        ids=text_ids is not None,
        gradient=torch.is_grad_enabled() and text_features.requires_grad,
        form=exchange,
    )
    weight = world / sum(plan.own)  # of equal batches 1/M; else so that the mean over processes is that of all images
    numbers: Any = {
        "scale": (logit_scale, logit_scale), "bias": logit_bias, "weights": (weight, weight, 0.0),
        "normalize": normalize, "backend": backend,
    }  # fmt: skip
    if plan.ring:
        if image_ids is not None and text_ids is not None:
            losses.check_positives(op, image_ids, ring.count_positives(op, group, plan, image_ids, text_ids))
        loss, stats = ring.pairwise_bce(
            op, group, plan, image_features, text_features, x_ids=image_ids, y_ids=text_ids, **numbers
        )
    else:
        texts = _GatherRows.apply(text_features, plan.rows, group)
        if image_ids is not None and text_ids is not None:
            text_ids = gather(text_ids, plan.rows, group)
            losses.check_every_row_has_a_positive(op, image_ids, text_ids)
        offset = plan.start if text_ids is None else 0
        loss, stats = ops.pairwise_bce(image_features, texts, x_ids=image_ids, y_ids=text_ids, offset=offset, **numbers)
    return (loss, PairStats(*stats.unbind())) if return_stats else loss


def gather_rows(rows: Tensor, group: Group = None) -> Tensor:
    """The rows [M, ...] of all W processes, [W·M, ...], rank by rank.

    Backward: the own rows' gradient, summed over the losses of all processes, in float32 or better.
    """
    _, world = place("gather_rows", group)
    return rows if world == 1 else _GatherRows.apply(rows, [len(rows)] * world, group)  # type: ignore[no-any-return]


def global_sum(loss: Tensor, group: Group = None) -> Tensor:
    """The sum of a scalar loss over all W processes, the same value everywhere.

    Backward: W times the gradient to the own loss, so that the mean over processes is the sum's gradient.
    """
    _, world = place("global_sum", group)
    if world == 1:
        return loss
    value = loss.detach().clone()
    dist.all_reduce(value, group=group)
    return _Value.apply(loss, value, world)  # type: ignore[no-any-return]


class _Twice(torch.autograd.Function):
    """The identity, whose gradient counts double."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


class _Value(torch.autograd.Function):
    """``value``, whose gradient goes to ``loss``, ``factor``-fold."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ring.refuse_second_derivative()
        return ctx.factor * grad, None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return gather(rows, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ring.refuse_second_derivative()
        # Summed in 16 bits the error would grow with the number of processes.
        partial = grad.to(checks.loss_dtype(grad.dtype))
        return scatter_sum(partial, ctx.sizes, ctx.group).to(grad.dtype), None, None
