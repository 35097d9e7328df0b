# SPDX-License-Identifier: Apache-2.0
"""How far one step of gradient descent moves the embeddings, and what docs/theory.md predicts of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mio_ext
from mio_ext import analysis
from train.assemble import Setup
from train.config import Config
from train.data import generator_for
from train.model import PretrainModel


class Displacement(NamedTuple):
    """Predicted and measured Δz of one step of gradient descent, [N, D] float64."""

    rate: float
    predicted: Tensor
    measured: Tensor

    @property
    def r2(self) -> float:
        """Share of the variance of the measured displacement that the prediction explains; negative if none."""
        left = (self.measured - self.predicted).square().sum()
        return float(1 - left / (self.measured - self.measured.mean()).square().sum())

    @property
    def relative_error(self) -> float:
        return float((self.measured - self.predicted).norm() / self.measured.norm())


class Batch:
    """Two views of one batch of training images in float64, and the network on them as in training.

    Batch norm uses the statistics of the batch, of each view alone if the run's --forward was "separate".
    """

    def __init__(self, config: Config, setup: Setup, loss: Mapping[str, Any], size: int) -> None:
        images = setup.data.pretrain
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        chosen = images[order[:size].to(images.device)].to(setup.device)
        generator = generator_for(setup.device, config.seed, 2)
        self.views = setup.preprocess.views(chosen.repeat(2, 1, 1, 1), generator).double()
        self.groups = 1 if config.forward == "fused" else 2
        self.loss = dict(loss)

    def forward(self, network: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        return torch.cat([network(part) for part in rows.chunk(self.groups)])

    def gradient_parts(self, z: Tensor) -> analysis.GradientParts:
        return analysis.gradient_parts(*z.chunk(2), **self.loss)

    def embed(self, model: PretrainModel) -> Tensor:
        """z [N, D]; the model is left as it was."""
        with torch.no_grad():
            return self.forward(copy.deepcopy(model).double().train(), self.views)

    def step(self, model: nn.Module, rows: Tensor, rate: float) -> Tensor:
        """Measured Δz of a step of plain SGD on all parameters of a copy of ``model``."""
        model = copy.deepcopy(model)
        z = self.forward(model, rows)
        loss: Any = mio_ext.mio_loss(*z.chunk(2), **self.loss)
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=rate).step()
        with torch.no_grad():
            return self.forward(model, rows) - z.detach()


def last_layer_displacements(batch: Batch, model: PretrainModel, rates: Sequence[float]) -> list[Displacement]:
    """The projector's last linear layer and its batch norm move, all before them stands still: eq. (34)."""
    model = copy.deepcopy(model).double().train()
    *before, linear, norm = model.projector.children()
    assert isinstance(linear, nn.Linear) and isinstance(norm, nn.BatchNorm1d)
    layer = nn.Sequential(linear, norm)
    with torch.no_grad():
        h = batch.forward(nn.Sequential(model.backbone, *before), batch.views)
        described = analysis.BatchNorm(linear(h), norm.weight, norm.eps, batch.groups)
        dz = batch.gradient_parts(batch.forward(layer, h)).total
    return [
        Displacement(
            rate,
            analysis.layer_displacement(h, dz, rate, bias=linear.bias is not None, norm=described),
            batch.step(layer, h, rate),
        )
        for rate in rates
    ]


def network_displacements(batch: Batch, model: PretrainModel, rates: Sequence[float]) -> list[Displacement]:
    """All parameters move: eq. (32)."""
    model = copy.deepcopy(model).double().train()
    buffers = dict(model.named_buffers())

    def z_of(parameters: Mapping[str, Tensor]) -> Tensor:
        own = {name: buffer.clone() for name, buffer in buffers.items()}  # batch norm writes into them
        return batch.forward(lambda x: torch.func.functional_call(model, {**parameters, **own}, x), batch.views)

    dz = batch.gradient_parts(batch.embed(model)).total
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
        unit = analysis.displacement(z_of, dict(model.named_parameters()), dz, 1.0)
    return [Displacement(rate, rate * unit, batch.step(model, batch.views, rate)) for rate in rates]
