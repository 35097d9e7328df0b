# SPDX-License-Identifier: Apache-2.0
"""Batch norm over the batches of all processes: torch's own on GPUs, a plain one on CPUs, where torch has none."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.errors import UserError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its batch norms synchronised; parameters, buffers and their names stay as they are.

    Raises:
        UserError: a batch norm that does more than one, as some of timm's: the rest would be lost without a word.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and type(module) not in PLAIN:
            raise UserError(f"several processes cannot share the batch norm of this backbone, {type(module).__name__}")
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SyncBatchNorm
    return model


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose batch is that of all processes of the default group; each holds equally much of it.

    In training mode one all-reduce forward makes mean and variance, and one backward their gradients.
    ``torch.nn.SyncBatchNorm`` is the same on GPUs, and refuses the CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        normalized: tuple[Tensor, Tensor, Tensor] = _Normalize.apply(input, self.weight, self.bias, self.eps)
        output, mean, variance = normalized
        count = dist.get_world_size() * input.numel() // input.shape[1]
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None  # all four are None only where asked for, which ResNets do not
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)  # unbiased, as torch
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        """Channels are the second dimension, of any number."""


class _Normalize(torch.autograd.Function):
    """(y, mean, variance) with y = weight · x̂ + bias and x̂ = (x − mean) / √(variance + eps).

    With m(·) the mean over the whole batch and g = ∂L/∂y:
    ∂L/∂x = weight / √(variance + eps) · (g − m(g) − x̂ · m(g · x̂)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        variance, mean = torch.var_mean(x.to(weight.dtype), _all_but_channels(x), correction=0)
        # E[x²] − E[x]² cancels; in float64 it may.
        moments = torch.stack([mean.double(), variance.double() + mean.double().square()])
        mean, square = _mean_over_processes(moments)
        variance = square - mean.square()
        mean, variance = mean.to(weight.dtype), variance.to(weight.dtype)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, mean, variance = ctx.saved_tensors
        dims, shape = _all_but_channels(x), (-1, *[1] * (x.dim() - 2))
        deviation = torch.rsqrt(variance + ctx.eps)
        normalized = (x.to(mean.dtype) - mean.view(shape)) * deviation.view(shape)
        g = grad.to(weight.dtype)
        sums = torch.stack([g.sum(dims), (g * normalized).sum(dims)])
        mean_g, mean_gx = _mean_over_processes(sums) * (x.shape[1] / x.numel())
        dx = (g - mean_g.view(shape)).addcmul_(normalized, mean_gx.view(shape), value=-1)
        dx *= (weight * deviation).view(shape)
        return dx.to(x.dtype), sums[1], sums[0], None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _mean_over_processes(values: Tensor) -> Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
