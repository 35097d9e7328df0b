# SPDX-License-Identifier: Apache-2.0
"""One loss over a large batch, encoders in the memory of a small one: gradient caching (arXiv 2101.06983).

A pairwise loss needs the embeddings of all samples at once, but not the activations behind them. So the encoder runs
twice: without gradient for the embeddings, and again, a micro-batch at a time, for the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

Encoder = Callable[[Tensor], Tensor]


def backward_in_micro_batches(
    encoders: Encoder | Sequence[Encoder],
    inputs: Sequence[Tensor],
    loss: Callable[..., Tensor],
    micro_batch_size: int,
    backward: Callable[[Tensor], None] = Tensor.backward,
    modules: Sequence[nn.Module] = (),
) -> Tensor:
    """``loss(*(encoder(input) for ...)).backward()`` with the activations of ``micro_batch_size`` samples at a time.

    Gradients are added to the parameters' ``.grad`` as ``backward()`` does, those of ``loss``'s own parameters too.
    They are those of one pass up to rounding, if the encoder treats samples independently. What does not:

    - Random numbers (dropout, augmentation): the second run of a micro-batch draws what the first drew.
    - Batch norm in training mode sees a micro-batch, both times the same. That is another network than one whose batch
      norm sees the whole batch; its running statistics move once for every micro-batch, not twice.

    Under ``DistributedDataParallel`` gradients are averaged once, at an encoder's last micro-batch; so the number of
    micro-batches must be the same on every process.

    Args:
        encoders: one callable for all inputs, or one for each.
        inputs: tensors [B, ...] (two views, or images and texts), all of one B; each is cut into pieces of
            ``micro_batch_size`` rows, the last one may be smaller.
        loss: embeddings [B, D], one for each input, to a scalar; :func:`mio_ext.distributed.mio_loss`, say.
        backward: of the loss; with a gradient scaler ``lambda loss: scaler.scale(loss).backward()``.
        modules: what encoders run that are not ``nn.Module``s themselves, for batch norm's running statistics and
            ``DistributedDataParallel``.

    Returns:
        The loss, detached.

    Raises:
        ValueError: a micro-batch size below 1, no inputs, inputs of different length, encoders of another number.

    Source: arXiv 2101.06983, section 3.
    """
    op = "backward_in_micro_batches"
    if micro_batch_size < 1:
        raise ValueError(f"{op}: micro_batch_size must be at least 1, got {micro_batch_size}")
    if not inputs or len({len(t) for t in inputs}) > 1:
        raise ValueError(f"{op}: inputs must be tensors of one length, got {[len(t) for t in inputs]}")
    each = [encoders] * len(inputs) if callable(encoders) else list(encoders)
    if len(each) != len(inputs):
        raise ValueError(f"{op}: encoders must be one, or one for each of {len(inputs)} inputs, got {len(each)}")
    pieces = [(e, piece) for e, t in zip(each, inputs, strict=True) for piece in t.split(micro_batch_size)]
    run = [[e] if isinstance(e, nn.Module) else list(modules) for e, _ in pieces]
    device = inputs[0].device

    states, embedded = [], []
    with torch.no_grad(), _buffers_kept({module for several in run for module in several}):
        for encoder, piece in pieces:
            states.append(_random_state(device))
            embedded.append(encoder(piece))
    count = len(pieces) // len(inputs)
    embeddings = [torch.cat(embedded[i : i + count]).requires_grad_() for i in range(0, len(pieces), count)]
    del embedded
    value = loss(*embeddings)
    backward(value)
    after = _random_state(device)
    gradients = [
        g for z in embeddings for g in (torch.zeros_like(z) if z.grad is None else z.grad).split(micro_batch_size)
    ]
    last = {module: number for number, several in enumerate(run) for module in several}
    for number, ((encoder, piece), gradient, state) in enumerate(zip(pieces, gradients, states, strict=True)):
        with ExitStack() as stack:
            for module in run[number]:
                if number < last[module]:  # of DistributedDataParallel, gradients stay with their process
                    stack.enter_context(getattr(module, "no_sync", nullcontext)())
            _set_random_state(state, device)
            torch.autograd.backward(encoder(piece), gradient)
    _set_random_state(after, device)
    return value.detach()


@contextmanager
def _buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Batch norm's running statistics and the like are afterwards what they were before."""
    buffers = [b for module in modules for b in module.buffers()]
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _random_state(device: torch.device) -> tuple[Any, ...]:
    """Of the CPU's generator and the device's."""
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), own


def _set_random_state(state: tuple[Any, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
