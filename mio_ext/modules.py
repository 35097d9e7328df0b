# SPDX-License-Identifier: Apache-2.0
"""The losses as modules: :func:`mio_ext.mio_loss` and :func:`mio_ext.siglip_loss` with their numbers kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NoReturn, overload

import torch
from torch import Tensor, nn

from . import distributed
from .backends import BACKENDS
from .checks import Number, check_number, is_readable
from .losses import mio_loss, siglip_loss


class _Loss(nn.Module):
    """What both modules do alike."""

    backend: str

    def _check_backend(self) -> None:
        if self.backend not in ("auto", *BACKENDS):
            names = ", ".join(BACKENDS)
            raise ValueError(f"{type(self).__name__}: backend must be one of auto, {names}, got {self.backend!r}")

    def __prepare_scriptable__(self) -> NoReturn:  # torch.jit.script asks for it, of modules inside others too
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile it; use torch.compile or torch.export"
        )


class MIOLoss(_Loss):
    """:func:`mio_loss` as a module: ``MIOLoss(temperature=0.5)(z1, z2)`` for two views z1, z2 [B, D].

    Numbers may be floats or tensors of one element. An ``nn.Parameter`` is learnt with the module and is in its
    ``state_dict``; any other tensor moves with the module and is not.

    Args:
        temperature, negative_temperature, regularizer, bias, backend, negative_weight: as in :func:`mio_loss`.
        gather_distributed: the batches of all processes of the default group are one, as
            :func:`mio_ext.distributed.mio_loss` has it. Otherwise every process is on its own under
            ``DistributedDataParallel`` too: its negatives are those of its own batch.

    Raises:
        TypeError, ValueError: a number or a backend that :func:`mio_loss` would refuse.
    """

    temperature: Number
    negative_temperature: Number | None
    negative_weight: Number
    regularizer: Number
    bias: Number | None

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
        """As the class says."""
        super().__init__()
        self._keep("temperature", temperature, positive=True)
        self._keep("negative_temperature", negative_temperature, positive=True, optional=True)
        self._keep("negative_weight", negative_weight)
        self._keep("regularizer", regularizer)
        self._keep("bias", bias, optional=True)
        self.backend = backend
        self._check_backend()
        self.gather_distributed = gather_distributed

    def _keep(self, name: str, value: Number | None, positive: bool = False, optional: bool = False) -> None:
        """A float as it is, a parameter as such, another tensor as a buffer: so it moves, and old state loads."""
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value, persistent=False)
            return
        if not isinstance(value, Tensor) and not (optional and value is None):
            like = torch.empty(0, dtype=torch.float64)  # what float32 cannot hold is refused when features come
            check_number("MIOLoss", name, value, like, positive=positive)  # type: ignore[arg-type]  # None is refused
        setattr(self, name, value)

    def forward(self, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss, 0-dim, of z1 and z2 [B, D]; ``labels`` [B], integers, make it supervised. See :func:`mio_loss`."""
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
        """The constructor's arguments, a learnt one with its value now."""
        numbers = "temperature", "negative_temperature", "negative_weight", "regularizer", "bias"
        names = *numbers, "backend", "gather_distributed"
        return ", ".join(f"{name}={_shown(getattr(self, name))}" for name in names)

    if TYPE_CHECKING:  # nn.Module's own would take and return anything
        __call__ = forward


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    now = f"{value.item():g}" if is_readable(value.data) else f"tensor on {value.device}"  # a GPU is not waited for
    return f"{now} (learnt)" if isinstance(value, nn.Parameter) else now


class SigLIPLoss(_Loss):
    """Drop-in for open_clip's ``SigLipLoss``: same constructor, call, value and gradients.

    It has no parameters: scale and bias, which the model learns, come with every call.

    With ``world_size`` > 1 it is :func:`mio_ext.distributed.siglip_loss` over the default process group.
    ``cache_labels`` and ``chunk_size`` are accepted and change nothing: there is no label matrix to cache, and
    memory never grows with the square of the batch. Of open_clip's ways of passing the texts round "bidir" and
    "shift" are ``exchange="ring"`` there, "reduce" and "gather" are "gather", and None is "auto".

    Raises:
        ValueError: a rank that is not in [0, world_size), a ``dist_impl`` that open_clip does not know, or an
            unknown backend.
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
        """As the class says."""
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"SigLIPLoss: rank must be in [0, world_size), got {rank} of {world_size}")
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"SigLIPLoss: dist_impl must be bidir, shift, reduce or gather, got {dist_impl!r}")
        self.rank, self.world_size = rank, world_size
        self.exchange = "auto" if dist_impl is None else "ring" if dist_impl in ("bidir", "shift") else "gather"
        self.backend = backend
        self._check_backend()

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Number,
        logit_bias: Number | None = ...,
        output_dict: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Number,
        logit_bias: Number | None = ...,
        *,
        output_dict: Literal[True],
    ) -> dict[str, Tensor]: ...
    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Number,
        logit_bias: Number | None = ...,
        output_dict: bool = ...,
    ) -> Tensor | dict[str, Tensor]: ...
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Number,
        logit_bias: Number | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, 0-dim, of image_features [M, D] and text_features [K, D], K ≥ M, all rows of length 1.

        ``logit_scale``, already exponentiated, and ``logit_bias`` are floats or tensors of one element; with
        ``output_dict`` {"contrastive_loss": loss}. See :func:`siglip_loss`.
        """
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

    def extra_repr(self) -> str:
        """Where the texts of other processes come from, if there are any, and the backend."""
        place = f"rank={self.rank}, world_size={self.world_size}, exchange={self.exchange!r}, "
        return f"{place if self.world_size > 1 else ''}backend={self.backend!r}"

    if TYPE_CHECKING:
        __call__ = forward
