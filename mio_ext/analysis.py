# SPDX-License-Identifier: Apache-2.0
"""The closed forms behind the MIO loss: forces on the rows, the projector's gradient, displacement, information.

docs/theory.md derives them; equation numbers continue those of :mod:`mio_ext.reference`. N = 2B rows z = [z1; z2],
p(i) the other view of row i, P_i = I − ẑ_i ẑ_iᵀ, ℓ = s/τ + b, g = ∂L/∂z:

    (18) log 2 − (L_pos + L_neg)/2  =  JSD(positive ‖ negative pairs) − what the critic misses
    (22) its largest value for a cosine critic
    (23) attraction_i  = −2 σ(−ℓ_ip(i)) / (N τ_p ‖z_i‖) · P_i ẑ_p(i)
    (24) repulsion_i   =  2ω / (N(N−2) τ_n ‖z_i‖) · Σ_{j≠i, j≠p(i)} σ(ℓ_ij) P_i ẑ_j
    (25) regularizer_i = −2λ / (B·D ‖z_i‖) · P_i ẑ_p(i)
    (27) z_i = W h_i + c:   ∂L/∂W = Σ_i g_i h_iᵀ,   ∂L/∂c = Σ_i g_i
    (29) batch norm:        ∂L/∂u = J g, for each feature J = γ/σ (I − 11ᵀ/n − ûûᵀ/n)
    (32) Δz = −η K g + O(η²),   K = (∂z/∂θ)(∂z/∂θ)ᵀ
    (33) for z_i = W h_i + c:   Δz_i = −η Σ_j (h_iᵀh_j + 1) g_j
    (34) the same through batch norm

No N × N matrix is ever formed: the pairs go through the loss's own kernels, and K g is H(Hᵀg). Nothing here is
part of an autograd graph: results are plain numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, losses, ops
from .backends import choose_backend
from .checks import Number
from .reference import PairStats

__all__ = [
    "BatchNorm",
    "GradientParts",
    "LayerGradient",
    "batch_norm_jacobian",
    "displacement",
    "gradient_parts",
    "js_ceiling",
    "js_estimate",
    "layer_displacement",
    "layer_gradient",
]


class GradientParts(NamedTuple):
    """∂L/∂z of the loss (6) in its three parts, each [2B, D]; a step of descent moves along their negatives."""

    attraction: Tensor  #: from L_pos, eq. (23): pulls the two views of a sample together
    repulsion: Tensor  #: from L_neg, eq. (24): pushes all other pairs apart
    regularizer: Tensor  #: from L_reg, eq. (25): along the attraction

    @property
    def total(self) -> Tensor:
        """∂L/∂z [2B, D], eq. (10)."""
        return self.attraction + self.repulsion + self.regularizer


@torch.no_grad()
def gradient_parts(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Number = 0.5,
    negative_temperature: Number | None = None,
    negative_weight: Number = 1.0,
    regularizer: Number = 1.0,
    bias: Number | None = None,
    backend: str = "auto",
) -> GradientParts:
    """Attraction, repulsion and regulariser in ∂L/∂z, eq. (23)–(25): three passes of the loss's kernel.

    Args:
        z1, z2: [B, D], B ≥ 2, float32, float64, bfloat16 or float16, as for :func:`mio_ext.mio_loss`; not
            normalised. Also the other arguments are those of the loss.

    Returns:
        The parts, [2B, D] each, rows in the order [z1; z2]; float32, float64 for float64 features (also for
        16-bit features, since one pair's share of the gradient underflows in float16). A row of norm ≤ 1e-12
        has 0. Their sum is the gradient of :func:`mio_ext.mio_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`mio_ext.mio_loss`.
    """
    op = "gradient_parts"
    numbers, _ = losses.mio_arguments(op, z1, z2, temperature, negative_temperature, negative_weight, regularizer, bias)
    z1, z2 = checks.in_one_dtype(z1, z2)
    batch, dim = z1.shape
    positive, negative, linear = losses.mio_weights(batch, dim, numbers, None)
    backend = choose_backend(op, backend, z1)
    z = torch.cat([z1.detach(), z2.detach()]).to(checks.loss_dtype(z1.dtype)).requires_grad_()

    def part(weights: tuple[Number, Number, Number]) -> Tensor:
        with torch.enable_grad():
            loss, _ = ops.pairwise_bce(
                z,
                scale=numbers.scale,
                bias=numbers.bias,
                weights=weights,
                shift=batch,
                exclude_self=True,
                normalize=True,
                backend=backend,
            )
            return torch.autograd.grad(loss, z)[0]

    return GradientParts(part((positive, 0.0, 0.0)), part((0.0, negative, 0.0)), part((0.0, 0.0, linear)))


def js_estimate(stats: PairStats) -> Tensor:
    """log 2 − (L_pos + L_neg)/2 in nats, eq. (18): a lower bound of the Jensen-Shannon divergence of the pairs.

    The bound is on JSD(law of positive pairs ‖ law of negative pairs) ∈ [0, log 2], it is of expectations, and
    it holds for every critic that both kinds of pairs share (one temperature, one bias). The statistics are those
    of :func:`mio_ext.mio_loss` or :func:`mio_ext.siglip_loss` with ``return_stats=True``; they hold neither the
    regulariser nor SigLIP's weight of the negatives.

    Args:
        stats: means over pairs the critic was not fitted to, else it may exceed the divergence.

    Returns:
        0-dim float64; negative for a critic worse than none. NaN if one kind of pairs is missing.

    Source: arXiv 2111.12664, section 3; the variational form is that of f-GAN, arXiv 1606.00709.
    """
    return math.log(2) - (stats.positive_loss + stats.negative_loss) / 2


def js_ceiling(temperature: float, bias: float = 0.0, batch: int | None = None) -> float:
    """The largest :func:`js_estimate` in nats that any embedding can reach with the critic s/τ + b, eq. (22).

    All positive cosines 1, all negative ones equal and as low as they can be: −2/(N − 2) in a batch of N = 2B
    rows, 0 in the limit of many.

    Args:
        temperature, bias: floats; temperature > 0.
        batch: B ≥ 2, or None for the limit.

    Raises:
        ValueError: temperature not positive, or batch below 2.
    """
    if not temperature > 0:
        raise ValueError(f"js_ceiling: temperature must be positive, got {temperature}")
    if batch is not None and batch < 2:
        raise ValueError(f"js_ceiling: batch must be at least 2, got {batch}")
    lowest = 0.0 if batch is None else -1 / (batch - 1)

    def softplus(t: float) -> float:
        return max(t, 0) + math.log1p(math.exp(-abs(t)))

    return math.log(2) - (softplus(-1 / temperature - bias) + softplus(lowest / temperature + bias)) / 2


class BatchNorm(NamedTuple):
    """Batch norm in train mode after the last linear layer: biased variance over the rows, eq. (28)."""

    input: Tensor  #: u [N, D], what it normalises
    weight: Tensor | None = None  #: γ [D]; None: no affine part, γ = 1 and neither γ nor β is learnt
    eps: float = 1e-5  #: added to the variance
    groups: int = 1  #: equal runs of rows with statistics of their own: 2 where each view had its own forward

    def grouped(self, t: Tensor) -> Tensor:
        """[groups, N / groups, D]."""
        return t.reshape(self.groups, -1, t.shape[1])

    def normalized(self) -> tuple[Tensor, Tensor]:
        """û [N, D] and σ = sqrt(variance + eps), broadcast to [N, D]."""
        u = self.grouped(self.input)
        variance, mean = torch.var_mean(u, 1, correction=0, keepdim=True)
        sigma = (variance + self.eps).sqrt()
        return ((u - mean) / sigma).flatten(0, 1), sigma.expand_as(u).flatten(0, 1)


@torch.no_grad()
def batch_norm_jacobian(norm: BatchNorm, v: Tensor) -> Tensor:
    """J v for the Jacobian J = ∂z/∂u of batch norm and v [N, D], eq. (29); in O(N·D).

    J acts on each feature alone and is symmetric, so this is both the change of z for a change v of u and the
    gradient of u for a gradient v of z. What it returns sums to 0 over the rows of a group.
    """
    unit, sigma = norm.normalized()
    unit, v = norm.grouped(unit), norm.grouped(v)
    projected = v - v.mean(1, keepdim=True) - unit * (unit * v).mean(1, keepdim=True)
    scale = 1 / sigma if norm.weight is None else norm.weight / sigma
    return scale * projected.flatten(0, 1)


class LayerGradient(NamedTuple):
    """Gradients of the loss by the parameters of the last layer z = BN(W h + c)."""

    weight: Tensor  #: ∂L/∂W [D, F]
    bias: Tensor  #: ∂L/∂c [D]; 0 up to rounding where batch norm follows
    norm_weight: Tensor | None  #: ∂L/∂γ [D]; None without an affine batch norm
    norm_bias: Tensor | None  #: ∂L/∂β [D]


@torch.no_grad()
def layer_gradient(h: Tensor, dz: Tensor, norm: BatchNorm | None = None) -> LayerGradient:
    """The gradient that reaches the projector's last linear layer, eq. (27), (29) and (30).

    Args:
        h: [N, F], the layer's input.
        dz: ∂L/∂z [N, D], of :func:`gradient_parts` for instance: one part of it gives that part's gradient.
        norm: the batch norm between layer and loss, if there is one.
    """
    du = dz if norm is None else batch_norm_jacobian(norm, dz)
    affine = norm is not None and norm.weight is not None
    norm_weight = (norm.normalized()[0] * dz).sum(0) if norm is not None and affine else None
    return LayerGradient(du.T @ h, du.sum(0), norm_weight, dz.sum(0) if affine else None)


@torch.no_grad()
def layer_displacement(
    h: Tensor, dz: Tensor, learning_rate: float, *, bias: bool = True, norm: BatchNorm | None = None
) -> Tensor:
    """Δz [N, D] after one step of gradient descent on the last layer alone, eq. (33) and (34).

    Exact without batch norm, since z is linear in W; with it up to O(η²). K is applied as H(Hᵀg): O((N + D)·F).

    Args:
        h, dz, norm: as for :func:`layer_gradient`.
        learning_rate: η of ``torch.optim.SGD`` without momentum and weight decay.
        bias: whether the linear layer has one. An affine batch norm's γ and β are moved as well.
    """
    gradient = layer_gradient(h, dz, norm)
    du = h @ gradient.weight.T
    if bias:
        du += gradient.bias
    if norm is None:
        return -learning_rate * du
    change = batch_norm_jacobian(norm, du)
    if gradient.norm_weight is not None and gradient.norm_bias is not None:
        change += norm.normalized()[0] * gradient.norm_weight + gradient.norm_bias
    return -learning_rate * change


def displacement(
    function: Callable[[Mapping[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    dz: Tensor,
    learning_rate: float,
) -> Tensor:
    """Δz = −η K ∂L/∂z after one step of gradient descent on any parameters, up to O(η²), eq. (32).

    K = J Jᵀ with J = ∂z/∂θ is never formed: Jᵀ is a backward pass, J a forward-mode one.

    Args:
        function: parameters to z [N, D], differentiable in both modes, without side effects.
        parameters: θ by name; only these move.
        dz: ∂L/∂z [N, D].
        learning_rate: η.
    """
    theta = {name: p.detach() for name, p in parameters.items()}
    backward: Any = torch.func.vjp(function, theta)[1]
    (gradient,) = backward(dz)
    with warnings.catch_warnings():  # torch's own forward-mode rules still go through torch.jit.script
        warnings.filterwarnings("ignore", r".*torch\.jit\.script.* is deprecated")
        moved: Tensor = torch.func.jvp(function, (theta,), (gradient,))[1]
    return -learning_rate * moved.detach()
