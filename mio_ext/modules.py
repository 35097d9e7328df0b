# SPDX-License-Identifier: Apache-2.0
"""The losses as modules: :func:`mio_ext.mio_loss` and :func:`mio_ext.siglip_loss` with their numbers kept."""

from __future__ import annotations

from torch import Tensor, nn

from . import distributed
from .checks import Number
from .losses import mio_loss, siglip_loss


class MIOLoss(nn.Module):
    """:func:`mio_loss` as a module. An ``nn.Parameter`` given as a number is learnt with the module.

    Args:
        temperature, negative_temperature, regularizer, bias, backend, negative_weight: as in :func:`mio_loss`.
        gather_distributed: the batches of all processes of the default group are one, as
            :func:`mio_ext.distributed.mio_loss` has it. Otherwise every process is on its own under
            ``DistributedDataParallel`` too: its negatives are those of its own batch.
    """

    def __init__(
        self,
        temperature: Number = 0.5,
        negative_temperature: Number | None = None,
        regularizer: Number = 1.0,
        bias: Number | None = None,
        backend: str = "auto",
        gather_distributed: bool = False,
        negative_weight: Number = 1.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.negative_temperature = negative_temperature
        self.negative_weight = negative_weight
        self.regularizer = regularizer
        self.bias = bias
        self.backend = backend
        self.gather_distributed = gather_distributed

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        loss = distributed.mio_loss if self.gather_distributed else mio_loss
        return loss(
            z1,
            z2,
            temperature=self.temperature,
            negative_temperature=self.negative_temperature,
            negative_weight=self.negative_weight,
            regularizer=self.regularizer,
            bias=self.bias,
            labels=labels,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        numbers = "temperature", "negative_temperature", "negative_weight", "regularizer", "bias"
        names = *numbers, "backend", "gather_distributed"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class SigLIPLoss(nn.Module):
    """Drop-in for open_clip's ``SigLipLoss``: same constructor, call, value and gradients.

    With ``world_size`` > 1 it is :func:`mio_ext.distributed.siglip_loss` over the default process group.
    ``cache_labels`` and ``chunk_size`` are accepted and change nothing: there is no label matrix to cache, and
    memory never grows with the square of the batch. Of open_clip's ways of passing the texts round "bidir" and
    "shift" are ``exchange="ring"`` there, "reduce" and "gather" are "gather", and None is "auto".

    Raises:
        ValueError: a rank that is not in [0, world_size), or a ``dist_impl`` that open_clip does not know.
        RuntimeError: at the call, if the default process group is not of ``world_size`` processes, or if
            this process is not number ``rank`` of it.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"SigLIPLoss: rank must be in [0, world_size), got {rank} of {world_size}")
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"SigLIPLoss: dist_impl must be bidir, shift, reduce or gather, got {dist_impl!r}")
        self.rank, self.world_size = rank, world_size
        self.exchange = "auto" if dist_impl is None else "ring" if dist_impl in ("bidir", "shift") else "gather"
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Number,
        logit_bias: Number | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if self.world_size == 1:  # a process group may be there for other things
            loss = siglip_loss(image_features, text_features, logit_scale, logit_bias, backend=self.backend)
        else:
            if (place := distributed.place("SigLIPLoss", None)) != (self.rank, self.world_size):
                raise RuntimeError(
                    f"SigLIPLoss: this process must be rank {self.rank} of {self.world_size} in the default process "
                    f"group, got rank {place[0]} of {place[1]} (torch.distributed.init_process_group comes first)"
                )
            loss = distributed.siglip_loss(
                image_features, text_features, logit_scale, logit_bias, exchange=self.exchange, backend=self.backend
            )
        return {"contrastive_loss": loss} if output_dict else loss
