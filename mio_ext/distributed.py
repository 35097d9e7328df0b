# SPDX-License-Identifier: Apache-2.0
"""The same losses over the batches of all processes of a group (``torch.distributed``; Gloo or NCCL).

Every process calls with its own rows and gets gradients for them; the rows of the others are gathered, in
their own 16 bits, and one sweep of the op takes own rows × all rows. No process ever holds more than its
share of the pairs, and the N × N matrix does not exist.

Gradients follow open_clip's convention: **the mean over the processes**, which is what
``DistributedDataParallel`` makes of the parameters' gradients, is exactly the gradient of the loss of the whole
batch. A temperature, scale or bias that is learnt must be averaged in the same way, so let it be a parameter
of the wrapped module.

Without a process group there is one process, and these are the functions of :mod:`mio_ext.losses`: the same
line trains alone and under ``torchrun``.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks, losses, ops
from .backends import choose_backend
from .checks import Number
from .losses import MIOOptions, SigLIPOptions
from .reference import PairStats

__all__ = [
    "gather_rows",
    "global_sum",
    "mio_loss",
    "place",
    "siglip_loss",
]

Group = Any  #: a torch.distributed process group, None: the default one

# torch 2.14 gave these their names and deprecated the old ones; a torch built without distribution has none.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


@overload
def mio_loss(
    z1: Tensor, z2: Tensor, *, group: Group = ..., return_stats: Literal[False] = ..., **options: Unpack[MIOOptions]
) -> Tensor: ...
@overload
def mio_loss(
    z1: Tensor, z2: Tensor, *, group: Group = ..., return_stats: Literal[True], **options: Unpack[MIOOptions]
) -> tuple[Tensor, PairStats]: ...
@overload
def mio_loss(
    z1: Tensor, z2: Tensor, *, group: Group = ..., return_stats: bool, **options: Unpack[MIOOptions]
) -> Tensor | tuple[Tensor, PairStats]: ...
def mio_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    group: Group = None,
    temperature: Number = 0.5,
    negative_temperature: Number | None = None,
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
    and eq. (9) needs own rows of G only: one all-gather of [2B, D] and one all-reduce of nine numbers in the
    forward pass, **no communication in the backward pass**.

    Args:
        z1, z2: [B, D], B ≥ 1; the same B and D on every process.
        group: the process group; None: the default one.
        labels: integers [B] of the own samples.
            Everything else as in :func:`mio_ext.mio_loss`, and the same on every process.

    Raises:
        TypeError, ValueError: a bad argument; B is not the same on all processes. On a GPU that is looked
            at only the first time a process sees a B, for the answer makes the host wait.
        RuntimeError: the backend cannot run here; a second derivative was asked for.

    Source: arXiv 2111.12664, version 1.
    """
    op = "mio_loss"
    rank, world = place(op, group)
    if world == 1:
        return losses.mio_loss(
            z1,
            z2,
            temperature=temperature,
            negative_temperature=negative_temperature,
            regularizer=regularizer,
            bias=bias,
            labels=labels,
            backend=backend,
            return_stats=return_stats,
        )
    scale, bias, regularizer, ids = losses.mio_arguments(
        op, z1, z2, temperature, negative_temperature, regularizer, bias, labels, processes=world
    )
    backend = choose_backend(op, backend, z1)
    batch, dim = z1.shape
    _check_same_rows(op, "z1", batch, z1.device, group)
    x = torch.cat([z1, z2])
    all_ids = None if ids is None else _gather(ids, group)
    loss, stats = ops.pairwise_bce(
        _Twice.apply(x),  # as a row and as a column
        _gather(x.detach(), group),  # rank by rank [z1; z2]
        scale=scale,
        bias=bias,
        weights=losses.mio_weights(world * batch, dim, regularizer, all_ids),
        x_ids=ids,
        y_ids=all_ids,
        shift=batch,
        offset=rank * 2 * batch,
        exclude_self=True,
        normalize=True,
        backend=backend,
    )
    value, stats = _sum_over_processes(loss.detach(), stats, group)
    loss = _Value.apply(loss, value, world)
    return (loss, PairStats(*stats.unbind())) if return_stats else loss


@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = ...,
    *,
    group: Group = ...,
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

    One all-gather of the texts forward, one reduce-scatter of their gradient backward (in float32, none for
    frozen texts): 3 units of 2·M·(K·W)·D operations. A second sweep over own texts × gathered images would
    spare the reduce-scatter for a second all-gather of the same size, but takes 4 units, and would be wrong
    where processes weigh their losses differently.

    Args:
        image_features: [M, D].
        text_features: [K, D], the same K and D on every process; text i is the positive of image i, so M ≤ K,
            unless ids say otherwise.
        group: the process group; None: the default one.
        image_ids, text_ids: integers [M] and [K]; pairs of one id are positive on whatever processes they are.
            Everything else as in :func:`mio_ext.siglip_loss`; scale and bias the same on every process.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mio_loss` of this module.

    Source: arXiv 2303.15343, algorithm 1.
    """
    op = "siglip_loss"
    rank, world = place(op, group)
    offset = 0
    if world > 1:
        # What only one process would complain about must be found before the others wait for it.
        checks.check_features(op, image_features=image_features, text_features=text_features)
        m, k = len(image_features), len(text_features)
        if image_ids is not None and text_ids is not None:
            checks.check_ids(op, "text_ids", text_ids, k, image_features)
        elif m > k:
            raise ValueError(f"{op}: text_features must have a text for each of {m} images, got {k}")
        _check_same_rows(op, "text_features", k, text_features.device, group)
        text_features = gather_rows(text_features, group)
        if text_ids is not None:
            text_ids = _gather(text_ids, group)
        else:
            offset = rank * k
    return losses.siglip_loss(
        image_features,
        text_features,
        logit_scale,
        logit_bias,
        image_ids=image_ids,
        text_ids=text_ids,
        text_offset=offset,
        normalize=normalize,
        backend=backend,
        return_stats=return_stats,
    )


def gather_rows(rows: Tensor, group: Group = None) -> Tensor:
    """The rows [M, ...] of all W processes, [W·M, ...], rank by rank.

    Backward: the own rows' gradient, summed over the losses of all processes, in float32 or better.
    """
    _, world = place("gather_rows", group)
    return rows if world == 1 else _GatherRows.apply(rows, group)  # type: ignore[no-any-return]


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


def place(op: str, group: Group) -> tuple[int, int]:
    """(rank, number of processes) in the group; (0, 1) where there is no default process group."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{op}: group must be one that this process belongs to")
    return rank, dist.get_world_size(group)


#: Numbers of rows that a group has agreed on.
_agreed: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()


def _check_same_rows(op: str, argument: str, rows: int, device: torch.device, group: Group) -> None:
    """Gloo aborts the process and NCCL hangs where sizes differ, so nobody gathers before they agree.

    Always on the CPU; on a GPU, where reading the answer stalls it, once for each number of rows.
    """
    if torch.compiler.is_compiling():
        return
    agreed = _agreed.setdefault(group or dist.group.WORLD, set())
    if device.type != "cpu" and rows in agreed:
        return
    bounds = torch.tensor([rows, -rows], device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    most, least = int(bounds[0]), -int(bounds[1])
    if most != least:
        raise ValueError(
            f"{op}: {argument} must have the same number of rows on every process, got {rows} here and "
            f"{least} to {most} over all (drop or fill the last batch of an epoch)"
        )
    agreed.add(rows)


def _gather(rows: Tensor, group: Group) -> Tensor:
    """[W·M, ...] of every process's [M, ...], without gradient."""
    gathered = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    _all_gather(gathered, rows.contiguous(), group=group)
    return gathered


def _sum_over_processes(loss: Tensor, stats: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The loss and the statistics of all rows from those of each process's rows, in one all-reduce."""
    counts, means = stats[:2], stats[2:]
    pairs = counts.repeat(3)  # means alternate between positives and negatives
    sums = torch.where(pairs > 0, means * pairs, 0)  # a mean over no pairs is NaN
    total = torch.cat([loss.double()[None], counts, sums])
    dist.all_reduce(total, group=group)
    counts = total[1:3]
    return total[0].to(loss.dtype), torch.cat([counts, total[3:] / counts.repeat(3)])


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("a loss over a process group has no second derivative; drop create_graph=True")


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
        _refuse_second_derivative()
        return ctx.factor * grad, None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        _refuse_second_derivative()
        # Summed in 16 bits the error would grow with the number of processes.
        partial = grad.to(checks.loss_dtype(grad.dtype)).contiguous()
        world = dist.get_world_size(ctx.group)
        own = partial.new_empty(partial.shape[0] // world, *partial.shape[1:])
        _reduce_scatter(own, partial, group=ctx.group)
        return own.to(grad.dtype), None
