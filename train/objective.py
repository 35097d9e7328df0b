# SPDX-License-Identifier: Apache-2.0
"""What is minimised: MIO (SigCLR is a setting of it), NT-Xent (SimCLR) as the baseline, or SigLIP between two views."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mio_ext import analysis, distributed
from train.config import Config


def nt_xent_loss(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent of two views [B, D]: softmax cross-entropy of each row against its other view, self excluded.

    Over the batches of all W processes, as :mod:`mio_ext.distributed` does it. Plain PyTorch with the
    2B x 2BW matrix, as everywhere. Source: arXiv 2002.05709, eq. (1).
    """
    rank, world = distributed.place("nt_xent_loss", None)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = z @ distributed.gather_rows(z).T / temperature
    row = torch.arange(len(z), device=z.device)
    own = rank * len(z) + row
    logits[row, own] = -math.inf
    return distributed.global_sum(F.cross_entropy(logits, own.roll(len(z1))) / world)


class Objective(nn.Module):
    """Embeddings of two views [B, D] to (loss, statistics of the pairs).

    Of more views, B rows each, z1 has the first half and z2 the other: ids make all rows of an image positive.

    The statistics are those of MIO with this temperature's critic, whatever is minimised, so that runs
    compare; see :class:`mio_ext.reference.PairStats`. Both are of the whole batch where processes share it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.name, self.backend, self.regularizer = config.objective, config.loss_backend, config.regularizer
        self.temperature, self.bias = config.temperature, config.bias
        self.negative_temperature, self.negative_weight = config.negative_temperature, config.negative_weight
        self.views = config.views
        self.log_temperature = self.learnt_bias = None
        if config.learn_scale:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))
        if config.learn_scale or config.learn_bias:
            self.learnt_bias = nn.Parameter(torch.tensor(float(config.bias)))

    @property
    def pairwise(self) -> bool:
        """MIO with its knobs, and SigCLR, which is one setting of them."""
        return self.name in ("mio", "sigclr")

    def numbers(self, rows: int) -> dict[str, Any]:
        """The numbers of :func:`mio_ext.mio_loss` for so many rows of all processes, as they are now."""
        temperature, bias = self.critic()
        negatives = rows - self.views if self.name == "sigclr" else 1  # of a row: their sum in the place of their mean
        return {
            "temperature": temperature,
            "negative_temperature": self.negative_temperature,
            "negative_weight": self.negative_weight * negatives,
            "regularizer": self.regularizer,
            "bias": bias,
        }

    def critic(self) -> tuple[float | Tensor, float | Tensor]:
        """Temperature and bias as they are now."""
        temperature = self.temperature if self.log_temperature is None else self.log_temperature.exp()
        return temperature, self.bias if self.learnt_bias is None else self.learnt_bias

    def ids(self, z1: Tensor) -> Tensor | None:
        """The image of each row of z1, over all processes, where there are more than two views."""
        if self.views == 2:
            return None
        rank, _ = distributed.place("mio_loss", None)
        images = len(z1) // (self.views // 2)
        return (rank * images + torch.arange(images, device=z1.device)).repeat(self.views // 2)

    def gradient_norms(self, z: Tensor) -> dict[str, float]:
        """Norms of MIO's dL/dz [2B, D] and of its parts, docs/theory.md eq. (23)-(25), of two views."""
        if not self.pairwise or self.views > 2:
            return {}
        parts = analysis.gradient_parts(*z.chunk(2), **self.numbers(len(z)), backend=self.backend)
        return {
            f"{name}_norm": float(part.norm()) for name, part in (*parts._asdict().items(), ("gradient", parts.total))
        }

    def forward(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, Any]:
        temperature, bias = self.critic()
        result: Any  # with statistics a pair, else a tensor
        if self.pairwise:
            _, world = distributed.place("mio_loss", None)
            numbers = self.numbers(2 * len(z1) * world)
            result = distributed.mio_loss(
                z1, z2, **numbers, labels=self.ids(z1), backend=self.backend, return_stats=True
            )
            loss, stats = result
            return loss, stats
        if self.name == "simclr":
            loss = nt_xent_loss(z1, z2, self.temperature)
        else:
            _, world = distributed.place("siglip_loss", None)
            x, y = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
            result = distributed.siglip_loss(x, y, 1 / temperature, bias, backend=self.backend)
            loss = distributed.global_sum(result / world)  # the mean of the processes' own losses
        with torch.no_grad():
            result = distributed.mio_loss(z1, z2, backend=self.backend, return_stats=True)
        return loss, result[1]
