# SPDX-License-Identifier: Apache-2.0
"""The losses: each is a choice of rows, columns, scales and weights for one op, ``ops.pairwise_bce``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import checks, ops
from .reference import PairStats


def mio_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    negative_temperature: float | Tensor | None = None,
    regularizer: float = 1.0,
    bias: float | Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PairStats]:
    r"""The MIO loss of two views of a batch, never holding the N × N matrix of its N = 2B rows.

    With ẑ the rows of [z1; z2] divided by their norms, s_ij = ẑ_i · ẑ_j and p(i) the other view of i::

        1/N        Σ_i                 softplus(−(s_ip(i) / temperature + bias))
      + 1/(N(N−2)) Σ_i Σ_{j≠i, j≠p(i)} softplus(s_ij / negative_temperature + bias)
      + regularizer · mean((ẑ1 − ẑ2)²)

    Equal to :func:`mio_ext.reference.mio_loss`, which writes this out in plain PyTorch.

    Args:
        z1, z2: [B, D], B ≥ 2, float32, float64, bfloat16 or float16; row b of both is sample b.
            They need not be normalised. A zero row counts with cosine 0 and gets gradient 0.
        temperature: for positive pairs, and for negative ones unless ``negative_temperature`` is given.
        regularizer: λ; weight of the squared distance between the views.
        bias: added to every logit; None is 0.
            Temperatures and bias: a float, or a tensor of one element ([] or [1]), which gets its
            gradient if it requires one. A float is checked; a tensor's value is never read on the host,
            so a bad one shows as NaN in the loss.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
        return_stats: also return the :class:`PairStats` of the same pass.

    Returns:
        The loss, 0-dim float32 (float64 for float64 features); with ``return_stats``, (loss, stats).
        Gradients have the features' dtype.

    Raises:
        TypeError, ValueError: a bad argument, named with what is expected and what came.
        RuntimeError: the backend cannot run here; or a second derivative was asked of a fused backend.

    Source: arXiv 2111.12664, version 1.
    """
    op = "mio_loss"
    checks.check_features(op, z1=z1, z2=z2)
    if z2.shape != z1.shape:
        raise ValueError(f"{op}: z2 must be [B, D] like z1 ({list(z1.shape)}), got {list(z2.shape)}")
    batch, dim = z1.shape
    if batch < 2:
        raise ValueError(f"{op}: z1 must have at least 2 rows, else there are no negatives, got {list(z1.shape)}")
    negative_temperature = temperature if negative_temperature is None else negative_temperature
    bias = 0.0 if bias is None else bias
    checks.check_number(op, "temperature", temperature, z1, positive=True)
    checks.check_number(op, "negative_temperature", negative_temperature, z1, positive=True)
    checks.check_number(op, "bias", bias, z1)
    checks.check_number(op, "regularizer", regularizer, z1)
    n = 2 * batch
    loss, stats = ops.pairwise_bce(
        torch.cat([z1, z2]),
        scale=(1 / temperature, 1 / negative_temperature),
        bias=bias,
        weights=(1 / n, 1 / (n * (n - 2)), regularizer / (batch * dim)),
        shift=batch,
        exclude_self=True,
        normalize=True,
        backend=ops.choose_backend(op, backend, z1.device),
    )
    return (loss, stats) if return_stats else loss


class MIOLoss(nn.Module):
    """:func:`mio_loss` as a module; the arguments are those of the function."""

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        negative_temperature: float | Tensor | None = None,
        regularizer: float = 1.0,
        bias: float | Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        # Plain assignment registers an nn.Parameter, so a learnable temperature is the module's own.
        self.temperature = temperature
        self.negative_temperature = negative_temperature
        self.regularizer = regularizer
        self.bias = bias
        self.backend = backend

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        loss = mio_loss(
            z1,
            z2,
            temperature=self.temperature,
            negative_temperature=self.negative_temperature,
            regularizer=self.regularizer,
            bias=self.bias,
            backend=self.backend,
        )
        assert isinstance(loss, Tensor)
        return loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, regularizer={self.regularizer}, backend={self.backend!r}"
