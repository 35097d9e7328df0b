# SPDX-License-Identifier: Apache-2.0
"""The losses: each is a choice of rows, columns, scales and weights for one op, ``ops.pairwise_bce``."""

from __future__ import annotations

import numbers
from typing import Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import checks, ops
from .backends import choose_backend
from .checks import Number
from .reference import PairStats


class MIOOptions(TypedDict, total=False):
    """The keywords of :func:`mio_loss`, for its type."""

    temperature: Number
    negative_temperature: Number | None
    negative_weight: Number
    regularizer: Number
    bias: Number | None
    labels: Tensor | None
    backend: str


@overload
def mio_loss(
    z1: Tensor, z2: Tensor, *, return_stats: Literal[False] = ..., **options: Unpack[MIOOptions]
) -> Tensor: ...
@overload
def mio_loss(
    z1: Tensor, z2: Tensor, *, return_stats: Literal[True], **options: Unpack[MIOOptions]
) -> tuple[Tensor, PairStats]: ...
@overload
def mio_loss(
    z1: Tensor, z2: Tensor, *, return_stats: bool, **options: Unpack[MIOOptions]
) -> Tensor | tuple[Tensor, PairStats]: ...
def mio_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Number = 0.5,
    negative_temperature: Number | None = None,
    negative_weight: Number = 1.0,
    regularizer: Number = 1.0,
    bias: Number | None = None,
    labels: Tensor | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PairStats]:
    r"""The MIO loss of two views of a batch, never holding the N × N matrix of its N = 2B rows.

    With ẑ the rows of [z1; z2] divided by their norms, s_ij = ẑ_i · ẑ_j and p(i) the other view of i::

        1/N        Σ_i                 softplus(−(s_ip(i) / temperature + bias))
      + negative_weight · 1/(N(N−2)) Σ_i Σ_{j≠i, j≠p(i)} softplus(s_ij / negative_temperature + bias)
      + regularizer · mean((ẑ1 − ẑ2)²)

    Equal to :func:`mio_ext.reference.mio_loss`, which writes this out in plain PyTorch.

    Args:
        z1, z2: [B, D], B ≥ 2, float32, float64, bfloat16 or float16; row b of both is sample b.
            They need not be normalised. A zero row counts with cosine 0 and gets gradient 0. Where one is of a
            narrower type than the other, it is converted to the type that holds both.
        temperature: for positive pairs, and for negative ones unless ``negative_temperature`` is given.
        negative_weight: ω, of the mean over negative pairs; N − 2 makes it SigCLR's sum. The best logit is then
            log p/q − log ω, so ω and a bias of −log ω go together.
        regularizer: λ; weight of the squared distance between the views.
        bias: added to every logit; None is 0.
            Temperatures, weights and bias: a float, or a tensor of one element ([] or [1]), which gets its
            gradient if it requires one. A float is checked: up to 1e30 in magnitude, a temperature from 1e-30
            (1e300 for float64 features). A tensor's value is never read on the host,
            so a temperature that is not positive and finite shows as NaN in the loss. Under
            ``torch.compile`` a float that changes compiles anew, a tensor does not.
        labels: integers [B]; supervised MIO, eq. (13) of :mod:`mio_ext.reference`: every two rows of
            one label are a positive pair, every other two a negative one, and both terms stay means.
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
    numbers, ids = mio_arguments(
        op, z1, z2, temperature, negative_temperature, negative_weight, regularizer, bias, labels
    )
    z1, z2 = checks.in_one_dtype(z1, z2)
    batch, dim = z1.shape
    loss, stats = ops.pairwise_bce(
        (z1, z2),
        scale=numbers.scale,
        bias=numbers.bias,
        weights=mio_weights(batch, dim, numbers, ids),
        x_ids=ids,
        shift=batch,
        exclude_self=True,
        normalize=True,
        backend=choose_backend(op, backend, z1),
    )
    return (loss, PairStats(*stats.unbind())) if return_stats else loss


class MIONumbers(NamedTuple):
    """The checked numbers of :func:`mio_loss`."""

    scale: tuple[Number, Number]  #: (a_p, a_n)
    bias: Number
    regularizer: Number  #: λ
    negative_weight: Number  #: ω


def mio_arguments(
    op: str,
    z1: Tensor,
    z2: Tensor,
    temperature: Number,
    negative_temperature: Number | None,
    negative_weight: Number,
    regularizer: Number,
    bias: Number | None,
    labels: Tensor | None = None,
    processes: int = 1,
) -> tuple[MIONumbers, Tensor | None]:
    """(numbers, ids of the rows [z1; z2]) from the checked arguments of :func:`mio_loss`.

    Errors name ``op``. ``processes`` share the batch, each with B rows of it.
    """
    checks.check_features(op, z1=z1, z2=z2)
    if z2.shape != z1.shape:
        raise ValueError(f"{op}: z2 must be [B, D] like z1 ({list(z1.shape)}), got {list(z2.shape)}")
    batch = z1.shape[0]
    if batch < (2 if processes == 1 else 1):
        least = "at least 2 rows, else there are no negatives" if processes == 1 else "at least 1 row"
        raise ValueError(f"{op}: z1 must have {least}, got {list(z1.shape)}")
    like = z2 if z2.dtype is torch.float64 else z1  # whose arithmetic is the loss's
    temperature = checks.check_number(op, "temperature", temperature, like, positive=True)
    if negative_temperature is None:
        negative_temperature = temperature
    else:
        negative_temperature = checks.check_number(
            op, "negative_temperature", negative_temperature, like, positive=True
        )
    bias = 0.0 if bias is None else checks.check_number(op, "bias", bias, like)
    negative_weight = checks.check_number(op, "negative_weight", negative_weight, like)
    regularizer = checks.check_number(op, "regularizer", regularizer, like)
    ids = None
    if labels is not None:
        checks.check_ids(op, "labels", labels, batch, z1)
        labels = labels.long()
        ids = torch.cat([labels, labels])
    return MIONumbers((1 / temperature, 1 / negative_temperature), bias, regularizer, negative_weight), ids


def mio_weights(batch: int, dim: int, numbers: MIONumbers, ids: Tensor | None) -> tuple[Number, Number, Number]:
    """(w_p, w_n, w_l) of eq. (12) for a whole batch; with the ids of all its N = 2B rows, of eq. (13)."""
    if ids is None:
        n = 2 * batch
        return 1 / n, numbers.negative_weight / (n * (n - 2)), numbers.regularizer / (batch * dim)
    return supervised_weights(2 * batch, dim, numbers, _positives_per_row(ids, ids).sum())


def supervised_weights(n: int, dim: int, numbers: MIONumbers, equal: Tensor) -> tuple[Number, Number, Number]:
    """(w_p, w_n, w_l) of eq. (13) for n rows, of which ``equal`` pairs, each row with itself too, share a label."""
    positives = equal.double() - n
    negatives = n * (n - 1) - positives
    # A label that all rows share leaves no negatives, and eq. (13) no negative term.
    negative = torch.where(negatives > 0, 1 / negatives, 0)
    return 1 / positives, numbers.negative_weight * negative, 2 * numbers.regularizer / (positives * dim)


class SigLIPOptions(TypedDict, total=False):
    """The keywords of :func:`siglip_loss` that it shares with the one over processes, for their type."""

    image_ids: Tensor | None
    text_ids: Tensor | None
    normalize: bool
    backend: str


class LocalSigLIPOptions(SigLIPOptions, total=False):
    """All keywords of :func:`siglip_loss`, for its type."""

    text_offset: int
    negative_only: bool


@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LocalSigLIPOptions],
) -> Tensor: ...
@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[LocalSigLIPOptions],
) -> tuple[Tensor, PairStats]: ...
@overload
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = ...,
    *,
    return_stats: bool,
    **options: Unpack[LocalSigLIPOptions],
) -> Tensor | tuple[Tensor, PairStats]: ...
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Number,
    logit_bias: Number | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    text_offset: int = 0,
    negative_only: bool = False,
    normalize: bool = False,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PairStats]:
    r"""The SigLIP sigmoid loss of M images against K texts, never holding the M × K matrix.

    With ℓ_ij = logit_scale · x_i·y_j + logit_bias::

        −1/M Σ_i Σ_j log σ(±ℓ_ij),   + on positive pairs, − on all others

    Equal to :func:`mio_ext.reference.siglip_loss`, and with M = K and no other options to open_clip's.

    Args:
        image_features: [M, D], float32, float64, bfloat16 or float16; unit rows, or pass ``normalize``.
        text_features: [K, D], converted with the images to the type that holds both.
            Text ``text_offset + i`` is the positive of image i, so
            M + text_offset ≤ K, unless ids say otherwise or there are no positives at all.
        logit_scale: already exponentiated; a float from 1e-30 to 1e30 or a tensor of one element.
        logit_bias: a float or a tensor of one element; None is 0.
            A tensor gets its gradient if it requires one; its value is never read on the host, so a scale
            that is not positive and finite shows as NaN in the loss.
        image_ids, text_ids: integers [M] and [K]; pairs of one id are positive (several captions of one
            image, the same caption twice). On the CPU an image without any text is an error.
        negative_only: no positive pairs: the texts of another rank, say.
        normalize: divide every row by its norm first, the gradient included.
        backend: "auto", "cpu", "cuda", "triton" or "reference".
        return_stats: also return the :class:`PairStats` of the same pass.

    Returns:
        The loss, 0-dim float32 (float64 for float64 features); with ``return_stats``, (loss, stats).
        Gradients have the features' dtype, and are only computed for what requires one.

    Raises:
        TypeError, ValueError: a bad argument, named with what is expected and what came.
        RuntimeError: the backend cannot run here; or a second derivative was asked of a fused backend.

    Source: arXiv 2303.15343, algorithm 1.
    """
    op = "siglip_loss"
    logit_scale, logit_bias, image_ids, text_ids = siglip_arguments(
        op, image_features, text_features, logit_scale, logit_bias, image_ids, text_ids
    )
    image_features, text_features = checks.in_one_dtype(image_features, text_features)
    m, k = image_features.shape[0], text_features.shape[0]
    if type(text_offset) is not int:
        if isinstance(text_offset, bool) or not isinstance(text_offset, torch.SymInt | numbers.Integral):
            raise TypeError(f"{op}: text_offset must be an int, got {type(text_offset).__name__}")
        text_offset = text_offset if isinstance(text_offset, torch.SymInt) else int(text_offset)
    if image_ids is not None and text_ids is not None:
        if negative_only or text_offset:
            raise ValueError(f"{op}: ids already say what is positive; drop text_offset and negative_only")
        check_every_row_has_a_positive(op, image_ids, text_ids)
    elif not negative_only and not 0 <= text_offset <= k - m:
        raise ValueError(
            f"{op}: image i's text is row text_offset + i of text_features, so text_offset must be in "
            f"[0, {k - m}] for {m} images and {k} texts, got {text_offset}; without positives pass negative_only"
        )
    loss, stats = ops.pairwise_bce(
        image_features,
        text_features,
        scale=(logit_scale, logit_scale),
        bias=logit_bias,
        weights=(1 / m, 1 / m, 0.0),
        x_ids=image_ids,
        y_ids=text_ids,
        offset=k if negative_only else text_offset,  # a positive past the last column is none
        normalize=normalize,
        backend=choose_backend(op, backend, image_features),
    )
    return (loss, PairStats(*stats.unbind())) if return_stats else loss


def siglip_arguments(
    op: str,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Number,
    logit_bias: Number | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
) -> tuple[Number, Number, Tensor | None, Tensor | None]:
    """(scale, bias, int64 ids of both sides) from the checked arguments of :func:`siglip_loss`; errors name ``op``."""
    checks.check_features(op, image_features=image_features, text_features=text_features)
    m, k = image_features.shape[0], text_features.shape[0]
    if m == 0 or k == 0 or text_features.shape[1] != image_features.shape[1]:
        raise ValueError(
            f"{op}: text_features must be [K, D] with the D of image_features and no side empty, "
            f"got {list(image_features.shape)} and {list(text_features.shape)}"
        )
    like = text_features if text_features.dtype is torch.float64 else image_features  # whose arithmetic is the loss's
    logit_scale = checks.check_number(op, "logit_scale", logit_scale, like, positive=True)
    logit_bias = checks.check_number(op, "logit_bias", 0.0 if logit_bias is None else logit_bias, like)
    if (image_ids is None) != (text_ids is None):
        raise ValueError(f"{op}: image_ids and text_ids must be given together")
    if image_ids is not None and text_ids is not None:
        checks.check_ids(op, "image_ids", image_ids, m, image_features)
        checks.check_ids(op, "text_ids", text_ids, k, image_features)
        image_ids, text_ids = image_ids.long(), text_ids.long()
    return logit_scale, logit_bias, image_ids, text_ids


def _positives_per_row(x_ids: Tensor, y_ids: Tensor) -> Tensor:
    """How many columns share each row's id, in O((M + K) log K) and without an M × K mask."""
    columns = y_ids.sort().values
    return torch.searchsorted(columns, x_ids, right=True) - torch.searchsorted(columns, x_ids)


def check_every_row_has_a_positive(op: str, image_ids: Tensor, text_ids: Tensor) -> None:
    if image_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        check_positives(op, image_ids, _positives_per_row(image_ids, text_ids))


def check_positives(op: str, image_ids: Tensor, positives: Tensor) -> None:
    """Refuse an image without a text, where the host can look: on a GPU that would stall it."""
    if not checks.is_readable(positives):
        return
    lonely = (positives == 0).nonzero()
    if lonely.shape[0]:
        row = int(lonely[0])
        raise ValueError(
            f"{op}: every image needs a text of its id, but image {row} (id {int(image_ids[row])}) has none"
        )
