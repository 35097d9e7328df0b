# SPDX-License-Identifier: Apache-2.0
"""The maths of mio_ext in plain PyTorch: the definition that every fused backend is tested against.

Everything here is dense (O(N^2) memory), runs in any floating dtype on any device, and is
differentiable as often as one likes. Equation numbers are the ones the kernels cite.

Two views z1, z2 [B, D] of the same B samples; N = 2B, Z = [z1; z2], p(i) = (i + B) mod N:

    (1)  ẑ_i  = z_i / max(‖z_i‖₂, 1e-12)
    (2)  s_ij = ẑ_i · ẑ_j
    (3)  L_pos = 1/N          Σ_i                 softplus(−(s_{i,p(i)}/τ_p + b))
    (4)  L_neg = 1/(N(N−2))   Σ_i Σ_{j≠i, j≠p(i)} softplus( s_ij/τ_n + b)
    (5)  L_reg = λ · mean over the B·D elements of (ẑ1 − ẑ2)²
    (6)  L     = L_pos + ω L_neg + L_reg

The gradient, with G_ij = ∂L/∂s_ij over ordered pairs (symmetric, zero on the diagonal):

    (7)  G_{i,p(i)} = −σ(−s/τ_p − b) / (N τ_p)
    (8)  G_ij       =  ω σ( s/τ_n + b) / (N(N−2) τ_n)    otherwise
    (9)  ∂L/∂ẑ_i    = 2 Σ_j G_ij ẑ_j + 2λ/(B·D) (ẑ_i − ẑ_{p(i)})
    (10) ∂L/∂z_i    = (I − ẑ_i ẑ_iᵀ) ∂L/∂ẑ_i / ‖z_i‖     for ‖z_i‖ > 1e-12, else 0

where G is that of (3) and (4). The second term of (9) is (5)'s own and stays a difference: (10) would take its ẑ_i
out again, but where the views agree, −ẑ_{p(i)} alone leaves only rounding of what it cancels to.

The form all losses share, for rows x [M, D] and columns y [K, D]:

    (11) ℓ_ij = a·(x_i·y_j) + b,   a = a_p on positive pairs, a_n on negative pairs
    (12) L    = w_p Σ_pos softplus(−ℓ) + w_n Σ_neg softplus(ℓ) + w_l/2 Σ_pos ‖x_i − y_j‖²

The weight ω of the negatives is 1 in MIO, N − 2 in SigCLR (arXiv 2410.17427), which sums them.
MIO is (12) with x = y = Ẑ, a_p = 1/τ_p, a_n = 1/τ_n, w_p = 1/N, w_n = ω/(N(N−2)) and
w_l = λ/(B·D): summed over the N ordered positive pairs, the last term is exactly (5). Its gradient is
w_l (x_i − y_j) for x_i and w_l (y_j − x_i) for y_j, summed over positive pairs: the second term of (9), where x = y.

With labels (supervised MIO) the positives of a row are all other rows of its label, P ordered pairs,
and the negatives all rows of another label, Q ordered pairs; both terms stay means, and so does the
regulariser, over the positive pairs' squared distances per element:

    (13) L = 1/P Σ_pos softplus(−ℓ) + ω/Q Σ_neg softplus(ℓ) + λ/(P·D) Σ_pos ‖ẑ_i − ẑ_j‖²

Without labels P = N and Q = N(N−2), and (13) is (6). A term over no pairs is 0.

SigLIP, for image features x [M, D] and text features y [K, D], is (12) with a_p = a_n = logit scale,
w_p = w_n = 1/M and w_l = 0. Image i's text is row offset + i of y or, with ids, every text of its id:

    (14) L = −1/M Σ_i Σ_j log σ(±ℓ_ij),   + on positive pairs, − on all others

Sources: MIO, arXiv 2111.12664 (version 1); SigLIP, arXiv 2303.15343.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "PairStats",
    "mio_loss",
    "normalized",
    "pairwise_bce",
    "siglip_loss",
    "softplus",
]

#: Norms are clamped to this from below, as in ``torch.nn.functional.normalize``.
EPS = 1e-12


class PairStats(NamedTuple):
    """What the pass over all pairs saw; 0-dim float64 tensors without gradient, over ordered pairs.

    A mean over no pairs at all is NaN.
    """

    positives: Tensor  #: number of positive pairs
    negatives: Tensor  #: number of negative pairs
    positive_loss: Tensor  #: mean softplus(−ℓ) over positive pairs
    negative_loss: Tensor  #: mean softplus(ℓ) over negative pairs
    positive_cosine: Tensor  #: mean x_i·y_j over positive pairs (the cosine where rows are unit vectors)
    negative_cosine: Tensor  #: mean x_i·y_j over negative pairs
    positive_probability: Tensor  #: mean σ(ℓ) over positive pairs
    negative_probability: Tensor  #: mean σ(ℓ) over negative pairs


def normalized(z: Tensor) -> Tensor:
    """Eq. (1); a row of norm ≤ 1e-12 gets no gradient."""
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    # where() keeps the square root's infinite slope at 0 out of the graph; NaN rows stay NaN.
    degenerate = norm <= EPS
    safe = torch.linalg.vector_norm(torch.where(degenerate, torch.ones_like(z), z), dim=1, keepdim=True)
    return torch.where(degenerate, z.detach() / EPS, z / safe)


def softplus(t: Tensor) -> Tensor:
    """log(1 + exp(t)). ``torch.nn.functional.softplus`` is not: beyond 20 it returns t, 2e-9 off."""
    return -F.logsigmoid(-t)


def mio_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    negative_temperature: float | Tensor | None = None,
    negative_weight: float | Tensor = 1.0,
    regularizer: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Eq. (1)–(6), as written; (13) with labels. Arguments as in :func:`mio_ext.mio_loss`."""
    batch, dim = z1.shape
    n = 2 * batch
    tau_p = temperature
    tau_n = temperature if negative_temperature is None else negative_temperature
    b = 0.0 if bias is None else bias
    z = normalized(torch.cat([z1, z2]))  # (1)
    s = z @ z.T  # (2)
    if labels is not None:  # (13)
        label = torch.cat([labels.long()] * 2)
        other = ~torch.eye(n, dtype=torch.bool, device=z.device)
        same = label[:, None] == label
        positive, negative = same & other, ~same
        pairs = positive.sum()
        loss_pos = torch.where(positive, softplus(-(s / tau_p + b)), 0).sum() / pairs
        loss_neg = torch.where(negative, softplus(s / tau_n + b), 0).sum() / negative.sum().clamp(min=1)
        squared_distance = torch.where(positive, (z[:, None] - z).square().sum(-1), 0).sum() / pairs
        return loss_pos + negative_weight * loss_neg + regularizer * squared_distance / dim
    index = torch.arange(n, device=z.device)
    partner = (index + batch) % n
    negative = (index[:, None] != index) & (partner[:, None] != index)
    loss_pos = softplus(-(s[index, partner] / tau_p + b)).sum() / n  # (3)
    loss_neg = torch.where(negative, softplus(s / tau_n + b), 0).sum() / (n * (n - 2))  # (4)
    loss_reg = regularizer * (z[:batch] - z[batch:]).square().mean()  # (5)
    return loss_pos + negative_weight * loss_neg + loss_reg  # (6)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    text_offset: int = 0,
    negative_only: bool = False,
    normalize: bool = False,
) -> Tensor:
    """Eq. (14), as written. Arguments as in :func:`mio_ext.siglip_loss`."""
    if normalize:
        image_features, text_features = normalized(image_features), normalized(text_features)
    m, k = image_features.shape[0], text_features.shape[0]
    logits = logit_scale * image_features @ text_features.T
    if logit_bias is not None:
        logits = logits + logit_bias
    if negative_only:
        positive = torch.zeros(m, k, dtype=torch.bool, device=logits.device)
    elif image_ids is not None and text_ids is not None:
        positive = image_ids[:, None] == text_ids
    else:
        positive = torch.arange(m, device=logits.device)[:, None] + text_offset == torch.arange(k, device=logits.device)
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / m


def pairwise_bce(
    x: Tensor,
    y: Tensor | None = None,
    *,
    scale: tuple[float | Tensor, float | Tensor] = (1.0, 1.0),
    bias: float | Tensor = 0.0,
    weights: tuple[float | Tensor, float | Tensor, float | Tensor] = (1.0, 1.0, 0.0),
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    shift: int = 0,
    offset: int = 0,
    exclude_self: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, PairStats]:
    """Eq. (11)–(12) over all pairs of the rows ``x`` [M, D] and the columns ``y`` [K, D] (None: y = x).

    Row i's own column is ``offset + i``; with ``exclude_self`` that pair does not count.
    Its positive column is ``offset + (i + shift) mod M``, if there is such a column, unless
    ``x_ids`` [M] and ``y_ids`` [K] are given: then every pair of equal ids is positive.

    Args:
        scale: (a_p, a_n), positive and finite, else the loss is NaN.
        weights: (w_p, w_n, w_l).
        normalize: apply eq. (1) to x and y first.

    Returns:
        The loss (0-dim) and the statistics of the pass.
    """
    if normalize:
        x = normalized(x)
        y = None if y is None else normalized(y)
    if y is None:
        y, y_ids = x, x_ids
    m, k = x.shape[0], y.shape[0]
    row = torch.arange(m, device=x.device)[:, None]
    col = torch.arange(k, device=x.device)
    keep = (col != offset + row) if exclude_self else torch.ones(m, k, dtype=torch.bool, device=x.device)
    if x_ids is None:
        alike, y_alike = col == offset + (row + shift) % m, col[:, None] == col
    else:
        assert y_ids is not None
        alike, y_alike = x_ids[:, None] == y_ids, y_ids[:, None] == y_ids
    positive = keep & alike
    negative = keep & ~positive

    def over(pairs: Tensor, values: Tensor) -> Tensor:
        return torch.where(pairs, values, 0).sum()

    s = x @ y.T
    logit_p, logit_n = (_positive_or_nan(a) * s + bias for a in scale)  # (11)
    loss_p, loss_n = softplus(-logit_p), softplus(logit_n)
    distances = _half_squared_distances(x, y, positive, alike.int().argmax(1), y_alike.int().argmax(1))
    w_p, w_n, w_l = weights
    loss = w_p * over(positive, loss_p) + w_n * over(negative, loss_n) + w_l * distances  # (12)

    def mean(pairs: Tensor, values: Tensor) -> Tensor:
        return over(pairs, values.detach().double()) / pairs.sum()

    stats = PairStats(
        positive.sum().double(),
        negative.sum().double(),
        mean(positive, loss_p),
        mean(negative, loss_n),
        mean(positive, s),
        mean(negative, s),
        mean(positive, logit_p.sigmoid()),
        mean(negative, logit_n.sigmoid()),
    )
    return loss, stats


def _half_squared_distances(x: Tensor, y: Tensor, pairs: Tensor, x_like: Tensor, y_like: Tensor) -> Tensor:
    """Σ over pairs of ‖x_i − y_j‖²/2 without a square of x_i alone, exact where the two agree.

    ``x_like`` [M] and ``y_like`` [K] name one column r for every two rows that are a pair, and the distance is taken
    between x_i − r and y_j − r. What r is does not matter, so no gradient is due for it.
    """
    point = y.detach()
    x, y, pairs = x - point[x_like], y - point[y_like], pairs.to(x.dtype)
    squares = pairs.sum(1) @ x.square().sum(1) + pairs.sum(0) @ y.square().sum(1)
    return squares / 2 - (x * (pairs @ y)).sum()


def _positive_or_nan(scale: float | Tensor) -> float | Tensor:
    """A scale that means nothing must not look as if it did."""
    if isinstance(scale, Tensor):
        return torch.where((scale > 0) & scale.isfinite(), scale, torch.nan)
    return scale if 0 < scale < float("inf") else float("nan")
