# SPDX-License-Identifier: Apache-2.0
"""How many exp2 a second does the GPU do? A Triton loop on registers; imported where there is a GPU only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK, ROUNDS, PROGRAMS_PER_PROCESSOR = 1024, 4096, 16


@triton.jit
def exp2_kernel(out_ptr, rounds, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = index.to(tl.float32) / BLOCK
    for _ in range(rounds):
        x = tl.exp2(-x)  # settles near 0.64; every thread has BLOCK / 128 of them, independent of each other
    tl.store(out_ptr + index, x)


def exponentials() -> tuple[int, Callable[[], None]]:
    """(number of exponentials, the function that does them)."""
    programs = PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties().multi_processor_count
    out = torch.empty(programs * BLOCK, device="cuda")

    def run() -> None:
        exp2_kernel[(programs,)](out, ROUNDS, BLOCK)

    return programs * BLOCK * ROUNDS, run
