# SPDX-License-Identifier: Apache-2.0
"""Who is compared: our backends, what a user would write, and what a user could install instead.

A contender is a function of two feature tensors [B, D] and a scale (MIO: 1 / temperature), differentiable in the
features. 16-bit features stay 16 bits in its matrix products; what a package does beyond that is its own affair.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mio_ext import available_backends, mio_loss, siglip_loss

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1" if (os.cpu_count() or 1) < 8 else "8")
# What the compiler says about itself and about a toolkit it does not need.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

Loss = Callable[[Tensor, Tensor, float], Tensor]

LOSSES = ("mio", "siglip")
BIAS = -10.0  #: SigLIP's, as initialised in its paper
SCALE = {"mio": 2.0, "siglip": 10.0}  #: the defaults of both papers
CHUNK = 1024  #: rows of a checkpointed block
NT_XENT = "lightly NT-Xent"  #: another loss, shown for scale


def float32_or_wider(t: Tensor) -> Tensor:
    return t.float() if t.dtype.itemsize < 4 else t


def mio_eager(z1: Tensor, z2: Tensor, scale: float | Tensor) -> Tensor:
    """The best dense form known to us: one product, softplus over all of it, the diagonals taken back out.

    Scaling the rows before the product and subtracting sums was the fastest of the forms tried.
    """
    batch, n = len(z1), 2 * len(z1)
    z = F.normalize(float32_or_wider(torch.cat([z1, z2])))
    logits = float32_or_wider((scale * z).to(z1.dtype) @ z.to(z1.dtype).T)
    terms = F.softplus(logits)
    diagonals = terms.diagonal().sum() + terms.diagonal(batch).sum() + terms.diagonal(-batch).sum()
    positive = F.softplus(-logits.diagonal(batch)).mean()
    return positive + (terms.sum() - diagonals) / (n * (n - 2)) + (z[:batch] - z[batch:]).square().mean()


def mio_paper(z1: Tensor, z2: Tensor, scale: float) -> Tensor:
    """As the paper's code makes its logits: cosine similarity broadcast to N × N × D."""
    batch, n = len(z1), 2 * len(z1)
    z = torch.cat([z1, z2])
    logits = scale * F.cosine_similarity(z[:, None], z[None], dim=2)
    index = torch.arange(n, device=z.device)
    positive = index[:, None] == (index + batch) % n
    negative = ~positive & (index[:, None] != index)
    regularizer = F.mse_loss(F.normalize(z1), F.normalize(z2))
    return F.softplus(-logits[positive]).mean() + F.softplus(logits[negative]).mean() + regularizer


def mio_chunks(z1: Tensor, z2: Tensor, scale: float) -> Tensor:
    """Blocks of rows under torch.utils.checkpoint: O(CHUNK · N) memory, every block's logits made twice."""
    batch, n = len(z1), 2 * len(z1)
    z = F.normalize(float32_or_wider(torch.cat([z1, z2])))
    columns = z.to(z1.dtype)
    index = torch.arange(n, device=z.device)

    def block(rows: Tensor, own: Tensor, partner: Tensor) -> Tensor:
        logits = float32_or_wider((scale * rows).to(z1.dtype) @ columns.T)
        terms = F.softplus(logits)
        positive = logits.gather(1, partner[:, None])
        excluded = terms.gather(1, torch.stack([own, partner], 1))
        return torch.stack([F.softplus(-positive).sum() / n, (terms.sum() - excluded.sum()) / (n * (n - 2))])

    parts = zip(z.split(CHUNK), index.split(CHUNK), index.roll(batch).split(CHUNK), strict=True)
    loss = sum(checkpoint(block, *part, use_reentrant=False).sum() for part in parts)
    return loss + (z[:batch] - z[batch:]).square().mean()


def siglip_eager(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """The best dense form known to us: softplus(−ℓ) = softplus(ℓ) − ℓ spares the matrix of labels."""
    logits = float32_or_wider((scale * x).to(x.dtype) @ y.T) + BIAS
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(x)


def siglip_paper(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """The published algorithm: −Σ log σ(labels · logits) / B with a matrix of labels."""
    logits = scale * x @ y.T + BIAS
    labels = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - torch.ones_like(logits)
    return -F.logsigmoid(labels * logits).sum() / len(x)


def siglip_chunks(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """As :func:`mio_chunks`."""

    def block(rows: Tensor, partners: Tensor) -> Tensor:
        logits = float32_or_wider((scale * rows).to(x.dtype) @ y.T) + BIAS
        positive = float32_or_wider((scale * rows).to(x.dtype) * partners).sum(1) + BIAS
        return F.softplus(logits).sum() - positive.sum()

    parts = zip(x.split(CHUNK), y.split(CHUNK), strict=True)
    return torch.stack([checkpoint(block, *part, use_reentrant=False) for part in parts]).sum() / len(x)


def compiled(function: Callable[..., Tensor]) -> Loss:
    """torch.compile for one shape; the scale goes in as a tensor, or every value would be compiled anew."""
    compiled_function = torch.compile(function, dynamic=False)
    return lambda x, y, scale: compiled_function(x, y, torch.full((), scale, device=x.device))


def own(loss: str, backend: str) -> Loss:
    def loss_of(x: Tensor, y: Tensor, scale: float) -> Tensor:
        if loss == "mio":
            return mio_loss(x, y, temperature=1 / scale, backend=backend)  # type: ignore[return-value]
        return siglip_loss(x, y, scale, BIAS, backend=backend)  # type: ignore[return-value]

    return loss_of


def exact(loss: str, name: str, device: str) -> Loss:
    """What contender ``name`` must agree with on float64 features."""
    return contenders(loss, device)[0][name] if name == NT_XENT else own(loss, "reference")


def open_clip_loss(**options: int) -> Loss:
    from open_clip.loss import SigLipLoss

    for option in set(options) - set(inspect.signature(SigLipLoss).parameters):
        raise TypeError(
            f"SigLipLoss of open_clip_torch {importlib.metadata.version('open_clip_torch')} has no {option}"
        )
    module = SigLipLoss(**options)
    return lambda x, y, scale: module(x, y, *torch.tensor([scale, BIAS], device=x.device).unbind())


def siglip_kernel() -> Loss:
    """siglip-kernel's router; it takes the logarithm of the scale."""
    from siglip_kernel import fused_siglip_loss

    def loss(x: Tensor, y: Tensor, scale: float) -> Tensor:
        log_scale, bias = torch.tensor([math.log(scale), BIAS], device=x.device).unbind()
        value: Tensor = fused_siglip_loss(x, y, log_scale, bias)
        return value

    return loss


def nt_xent() -> Loss:
    from lightly.loss import NTXentLoss

    return lambda x, y, scale: NTXentLoss(temperature=1 / scale)(x, y)


def backends(device: str) -> list[str]:
    """Our fused backends for tensors of this device type; the first one takes every width."""
    return [b for b in (("cpu",) if device == "cpu" else ("triton", "cuda")) if b in available_backends()]


def contenders(loss: str, device: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """(name -> function, name -> why it cannot take part here)."""
    functions: dict[str, Loss] = {f"mio_ext {backend}": own(loss, backend) for backend in backends(device)}
    skipped: dict[str, str] = {}

    def add(name: str, module: str, make: Callable[[], Loss]) -> None:
        if importlib.util.find_spec(module) is None:
            skipped[name] = f"{module} is not installed (extra [bench])"
            return
        try:
            functions[name] = make()
        except Exception as error:  # a peer that does not load must not keep the others from being measured
            skipped[name] = " ".join(str(error).split())[:200]

    if loss == "mio":
        functions |= {"eager": mio_eager, "torch.compile": compiled(mio_eager)}
        functions |= {"checkpointed chunks": mio_chunks, "paper": mio_paper}
        add(NT_XENT, "lightly", nt_xent)
        return functions, skipped
    functions |= {"eager": siglip_eager, "torch.compile": compiled(siglip_eager)}
    functions |= {"checkpointed chunks": siglip_chunks, "paper": siglip_paper}
    add("open_clip", "open_clip", open_clip_loss)
    add("open_clip chunk_size", "open_clip", lambda: open_clip_loss(chunk_size=CHUNK))
    if device == "cpu":
        skipped["siglip-kernel"] = "it needs a CUDA GPU"
    else:
        add("siglip-kernel", "siglip_kernel", siglip_kernel)
    return functions, skipped


def features(loss: str, rows: int, dim: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two correlated views of rows / 2 samples (MIO), or rows images and texts (SigLIP, unit rows)."""
    generator = torch.Generator(device).manual_seed(seed)
    count = rows // 2 if loss == "mio" else rows
    x = torch.randn(count, dim, device=device, generator=generator)
    y = x + 0.5 * torch.randn(count, dim, device=device, generator=generator)
    if loss == "siglip":
        x, y = F.normalize(x), F.normalize(y)
    return x.to(dtype), y.to(dtype)


def step(
    function: Loss, leaves: tuple[Tensor, Tensor], scale: float, gradient: bool, loss_scale: float = 1.0
) -> Tensor:
    """One training step's worth of loss: the value, and the gradients in ``leaves``; or the value alone.

    Gradients are ``loss_scale`` times as large: float16's flush to zero without it, as any training knows.
    """
    if not gradient:
        with torch.no_grad():
            return function(*leaves, scale)
    for leaf in leaves:
        leaf.grad = None
    loss = function(*leaves, scale)
    (loss if loss_scale == 1 else loss.float() * loss_scale).backward()
    return loss.detach()
